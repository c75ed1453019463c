"""Kinds of task: what an example of each holds, how examples become a batch, and how the model's answer is scored.

    causal          a language model continues a text; labels lie on the input
    seq2seq         an encoder-decoder model writes one text from another
    classification  a model with a classification head names one class of `config.num_labels`
    regression      such a model with one output gives a number

Everything else in this package treats all kinds alike. A kind of one's own is a subclass that a Task is given.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mltd.head import token_losses

IGNORED = -100
"""The label of a token that is not scored."""


class Example(NamedTuple):
    """One sequence and what is to be predicted.

    causal: labels[t] is input_ids[t] where that token is scored and -100 where it is not (prompt, padding); both have
    the same length. The model shifts, so labels[0] is never scored: nothing comes before it.
    seq2seq: labels are the tokens of the target, the one that ends it included.
    classification: labels hold the class alone; regression: the number alone.
    """

    input_ids: tuple[int, ...]
    labels: tuple[Any, ...]

    @property
    def scored(self) -> int:
        """How many tokens of this example are scored, as a causal one."""
        return sum(label != IGNORED for label in self.labels[1:])


class Batch(NamedTuple):
    """Examples as a model takes them. S numbers are scored."""

    inputs: dict[str, Tensor]  # [n, ...] each
    positions: Tensor  # [S] rows of the flattened logits that predict a target, example after example
    targets: Tensor  # [S]


class Kind:
    """A kind of task; the methods that differ are overridden."""

    name: str

    def length(self, example: Any) -> int:
        """What this example adds to a forward pass, in tokens."""
        return len(example.input_ids)

    def scored(self, example: Any) -> int:
        """How many numbers of this example are scored."""
        return 1

    def check(self, where: str, example: Any) -> None:
        """Raise ValueError, which begins with `where`, for an example that is not one of this kind."""
        raise NotImplementedError

    def check_fits(self, where: str, example: Any, model: Any) -> None:
        """Raise ValueError for an example that is too long for the model, or that has a token which it lacks."""
        raise NotImplementedError

    def check_model(self, model: Any) -> None:
        """Raise ValueError for a model that does not do this kind of task."""
        raise NotImplementedError

    def inputs(self, examples: Sequence[Any]) -> dict[str, Tensor]:
        """What is read of the examples, right-padded: input_ids [n, L], attention_mask [n, L]."""
        return _inputs(examples)

    def collate(self, examples: Sequence[Any]) -> Batch:
        """The examples as far as their losses depend on them."""
        raise NotImplementedError

    def losses(self, model: Any, inputs: Mapping[str, Any], positions: Tensor, targets: Tensor) -> Tensor:
        """The loss of every scored number: [S], float32 (float64 stays)."""
        return token_losses(model, inputs, positions, targets)


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


# --- language models --------------------------------------------------------------------------------------------------


class Causal(Kind):
    """Models whose tokens see only what is before them."""

    name = "causal"

    def length(self, example: Any) -> int:
        """The tokens before the last one that is scored: nothing that comes later is read by what predicts it."""
        return next((t for t in range(len(example.labels) - 1, 0, -1) if example.labels[t] != IGNORED), 0)

    def scored(self, example: Any) -> int:
        return example.scored

    def check(self, where: str, example: Any) -> None:
        _require_tokens(where, example, least="two")
        if len(example.input_ids) != len(example.labels):
            raise ValueError(
                f"{where}: got {len(example.labels)} labels for {len(example.input_ids)} tokens, expected one for "
                f"each; label a token that is not to be scored {IGNORED}"
            )

    def check_model(self, model: Any) -> None:
        if getattr(model.config, "is_encoder_decoder", False):
            raise ValueError(
                f"model: {type(model).__name__} is an encoder-decoder, expected a decoder-only language model such as "
                "GPT-2 or Llama for causal tasks; make tasks of kind 'seq2seq' for it"
            )

    def check_fits(self, where: str, example: Any, model: Any) -> None:
        _require_short(where, example.input_ids, model)
        _require_vocabulary(where, (*example.input_ids, *_known(example.labels)), model)

    def collate(self, examples: Sequence[Any]) -> Batch:
        lengths = [self.length(example) for example in examples]
        read = [Example(example.input_ids[:n], ()) for example, n in zip(examples, lengths, strict=True)]
        # position t predicts token t + 1
        ahead = padded([example.labels[1 : n + 1] for example, n in zip(examples, lengths, strict=True)], IGNORED)
        sequence, position = (ahead != IGNORED).nonzero(as_tuple=True)
        return Batch(self.inputs(read), sequence * ahead.shape[1] + position, ahead[sequence, position])

    def losses(self, model: Any, inputs: Mapping[str, Any], positions: Tensor, targets: Tensor) -> Tensor:
        return super().losses(model, {**inputs, "use_cache": False}, positions, targets)


class SeqToSeq(Kind):
    name = "seq2seq"

    def length(self, example: Any) -> int:
        return len(example.input_ids) + len(example.labels)

    def scored(self, example: Any) -> int:
        return len(_known(example.labels))

    def check(self, where: str, example: Any) -> None:
        _require_tokens(where, example, least="one")

    def check_model(self, model: Any) -> None:
        if not hasattr(model, "prepare_decoder_input_ids_from_labels"):
            raise ValueError(
                f"model: {type(model).__name__} has no decoder of its own, expected an encoder-decoder such as BART or "
                "T5 for tasks of kind 'seq2seq'; make causal tasks for it"
            )

    def check_fits(self, where: str, example: Any, model: Any) -> None:
        _require_short(where, example.input_ids, model)
        _require_short(f"{where}: labels", example.labels, model)
        _require_vocabulary(where, (*example.input_ids, *_known(example.labels)), model)

    def collate(self, examples: Sequence[Any]) -> Batch:
        labels = padded([example.labels for example in examples], IGNORED)
        sequence, position = (labels != IGNORED).nonzero(as_tuple=True)
        positions = sequence * labels.shape[1] + position
        return Batch({**_inputs(examples), "labels": labels}, positions, labels[sequence, position])

    def losses(self, model: Any, inputs: Mapping[str, Any], positions: Tensor, targets: Tensor) -> Tensor:
        # The decoder reads its targets one place later. What pads them comes after all that is scored.
        read = model.prepare_decoder_input_ids_from_labels(inputs["labels"])
        rest = {name: tensor for name, tensor in inputs.items() if name != "labels"}
        return super().losses(model, {**rest, "decoder_input_ids": read, "use_cache": False}, positions, targets)


# --- models with a classification head --------------------------------------------------------------------------------


class Classification(Kind):
    name = "classification"
    target_type: type = int

    def check(self, where: str, example: Any) -> None:
        _require_tokens(where, example, least="one")
        if len(example.labels) != 1 or not isinstance(example.labels[0], self.target_type | int):
            raise ValueError(f"{where}: got labels {example.labels!r}, expected one {self.target_type.__name__}")

    def check_model(self, model: Any) -> None:
        if "ForSequenceClassification" not in type(model).__name__:
            raise ValueError(
                f"model: {type(model).__name__} has no classification head, expected one from "
                f"AutoModelForSequenceClassification for tasks of kind {self.name!r}; or write the labels as text"
            )

    def check_fits(self, where: str, example: Any, model: Any) -> None:
        _require_short(where, example.input_ids, model)
        _require_vocabulary(where, example.input_ids, model)
        self.check_label(where, example.labels[0], model.config.num_labels)

    def check_label(self, where: str, label: Any, outputs: int) -> None:
        if not 0 <= label < outputs:
            raise ValueError(f"{where}: got class {label}, expected 0 ≤ class < {outputs}, the model's num_labels")

    def collate(self, examples: Sequence[Any]) -> Batch:
        targets = torch.tensor([example.labels[0] for example in examples])
        return Batch(_inputs(examples), torch.arange(len(examples)), targets)

    def losses(self, model: Any, inputs: Mapping[str, Any], positions: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(model, inputs), targets, reduction="none")

    def logits(self, model: Any, inputs: Mapping[str, Any]) -> Tensor:
        """[n, num_labels], float32 (float64 stays)."""
        pad = model.config.pad_token_id
        if pad is not None:  # decoder-only models find a text's last token by the padding behind it
            ids = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, pad)
            inputs = {**inputs, "input_ids": ids}
        return _wide(model(**inputs).logits)


class Regression(Classification):
    name = "regression"
    target_type = float

    def check_label(self, where: str, label: Any, outputs: int) -> None:
        if outputs != 1:
            raise ValueError(f"{where}: the model has num_labels = {outputs}, expected 1 for a regression")

    def collate(self, examples: Sequence[Any]) -> Batch:
        batch = super().collate(examples)
        return batch._replace(targets=batch.targets.float())

    def losses(self, model: Any, inputs: Mapping[str, Any], positions: Tensor, targets: Tensor) -> Tensor:
        outputs = self.logits(model, inputs).squeeze(-1)
        return (outputs - targets.to(outputs.dtype)).square()


KINDS: dict[str, Kind] = {kind.name: kind for kind in (Causal(), SeqToSeq(), Classification(), Regression())}


# --- parts ------------------------------------------------------------------------------------------------------------


def collate(examples: Sequence[Any], pad_id: int) -> dict[str, Tensor]:
    """One right-padded batch of causal examples [n, L], int64: input_ids, attention_mask (1 at real tokens), labels
    (-100 at padding)."""
    return _inputs(examples, pad_id) | {"labels": padded([example.labels for example in examples], IGNORED)}


def _inputs(examples: Sequence[Any], pad_id: int = 0) -> dict[str, Tensor]:
    rows = [example.input_ids for example in examples]
    return {"input_ids": padded(rows, pad_id), "attention_mask": padded([(1,) * len(row) for row in rows], 0)}


def padded(rows: Sequence[Sequence[int]], fill: int, left: bool = False) -> Tensor:
    """Rows of differing lengths as one matrix, int64 [rows, longest], `fill` behind each or, if `left`, before it."""
    length = max((len(row) for row in rows), default=0)
    out = torch.full((len(rows), length), fill, dtype=torch.int64)
    for i, row in enumerate(rows):
        out[i, slice(length - len(row), length) if left else slice(len(row))] = torch.tensor(row, dtype=torch.int64)
    return out


def _known(labels: Sequence[int]) -> list[int]:
    return [label for label in labels if label != IGNORED]


def _require_tokens(where: str, example: Any, least: str) -> None:
    if not example.input_ids:
        raise ValueError(f"{where}: got no token, expected at least {least}; leave the example out")


def _require_short(where: str, tokens: Sequence[int], model: Any) -> None:
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and len(tokens) > longest:
        raise ValueError(
            f"{where}: got {len(tokens)} tokens, expected at most {longest}, the longest input of "
            f"{type(model).__name__}; cut the example"
        )


def _require_vocabulary(where: str, tokens: Sequence[int], model: Any) -> None:
    vocabulary = model.get_input_embeddings().weight.shape[0]
    worst, least = max(tokens), min(tokens)
    if worst >= vocabulary or least < 0:
        raise ValueError(
            f"{where}: got token {worst if worst >= vocabulary else least}, expected 0 ≤ token < {vocabulary}; use the "
            "tokenizer of this model"
        )
