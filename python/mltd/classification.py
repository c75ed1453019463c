"""Classification by a language model: the label whose text is likeliest after the source."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mltd.kinds import IGNORED, padded
from mltd.query_batches import Tokens, adapted, batches, check_prompts, check_tokens, padded_and_mask


class _Row(NamedTuple):
    key: str
    label: str
    source: tuple[int, ...]
    candidate: tuple[int, ...]


@torch.no_grad()
def label_scores(
    model: Any,
    prompts: Sequence[Tokens],
    candidates: Sequence[Tokens],
    parameters: Mapping[str, Tensor] | None = None,
    alpha: Tensor | None = None,
    *,
    max_tokens: int = 1024,
) -> dict[str, dict[str, float]]:
    """{id: {label: log p(the label's text | source)}}, summed over the text's tokens, in nats.

    model       a decoder-only model, or an encoder-decoder whose encoder reads the source
    prompts     for each task, id -> tokens of the source
    candidates  for each task, label -> tokens of its text, with the end token if a label may begin another one
    parameters  name -> [B, *shape], as `mltd.adapt` returns them; None: all tasks by the model as it stands
    alpha       as `tarp_kernels.architecture` takes it
    max_tokens  most tokens, padding included, of one forward pass

    Raises ValueError for fewer than two candidates, two with the same tokens, or tokens that the model cannot read.
    """
    check_prompts(prompts, model)
    if len(candidates) != len(prompts):
        raise ValueError(f"candidates: got {len(candidates)} for {len(prompts)} tasks, expected one mapping for each")
    encodes = model.config.is_encoder_decoder
    longest = getattr(model.config, "max_position_embeddings", None)
    rows: list[list[_Row]] = []
    for i, (own, labels) in enumerate(zip(prompts, candidates, strict=True)):
        _check_candidates(f"candidates[{i}]", labels, model)
        pairs = [
            _Row(key, label, tuple(source), tuple(candidate))
            for key, source in own.items()
            for label, candidate in labels.items()
        ]
        for row in pairs:
            _check_length(row, encodes, longest, type(model).__name__)
        rows.append(pairs)
    scores: dict[str, dict[str, float]] = {
        key: dict.fromkeys(labels, 0.0) for own, labels in zip(prompts, candidates, strict=True) for key in own
    }
    run = _after_encoder if encodes else _after_source
    for batch, offsets in batches(rows, lambda row: len(row.source) + len(row.candidate), max_tokens):
        with adapted(model, parameters, alpha, offsets):
            found = run(model, batch)
        for row, score in zip(batch, found.tolist(), strict=True):
            scores[row.key][row.label] = score
    return scores


def classify(scores: Mapping[str, Mapping[str, float]]) -> dict[str, str]:
    """{id: the label of the highest score}, the first of equal ones. ValueError names an id with a score of NaN."""
    for key, own in scores.items():
        wrong = [label for label, score in own.items() if score != score]
        if wrong:
            raise ValueError(f"scores[{key!r}]: {wrong[0]!r} has NaN, expected a number; the model's logits are NaN")
    return {key: max(own, key=own.__getitem__) for key, own in scores.items()}


def _after_source(model: Any, batch: Sequence[_Row]) -> Tensor:
    """Log-likelihoods [rows] of candidates that go on from their sources."""
    ids, mask = padded_and_mask([row.source + row.candidate for row in batch], 0, model.device)
    targets = [(IGNORED,) * (len(row.source) - 1) + row.candidate for row in batch]  # position t predicts token t + 1
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    return _log_likelihoods(logits, padded(targets, IGNORED).to(model.device))


def _after_encoder(model: Any, batch: Sequence[_Row]) -> Tensor:
    """Log-likelihoods [rows] of candidates that a decoder writes, beside an encoder that has read the sources."""
    ids, mask = padded_and_mask([row.source for row in batch], 0, model.device)
    labels = padded([row.candidate for row in batch], IGNORED).to(model.device)
    logits = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).logits
    return _log_likelihoods(logits, labels)


def _log_likelihoods(logits: Tensor, targets: Tensor) -> Tensor:
    """logits [rows, tokens, V], targets [rows, tokens] with IGNORED where nothing is asked -> [rows]."""
    asked = targets != IGNORED
    chosen = logits[asked]  # [S, V]: a log-softmax of the prompt's logits would be thrown away
    if chosen.dtype != torch.float64:
        chosen = chosen.float()
    losses = nn.functional.cross_entropy(chosen, targets[asked], reduction="none")
    # split and sum, not index_add: the same bits every time on a GPU
    return -torch.stack([own.sum() for own in losses.split(asked.sum(1).tolist())])


def _check_candidates(where: str, labels: Tokens, model: Any) -> None:
    if len(labels) < 2:
        raise ValueError(f"{where}: got {len(labels)} label, expected at least two to choose from")
    vocabulary = model.get_input_embeddings().weight.shape[0]
    seen: dict[tuple[int, ...], str] = {}
    for label, tokens in labels.items():
        check_tokens(f"{where}[{label!r}]", tokens, vocabulary)
        twin = seen.setdefault(tuple(tokens), label)
        if twin != label:
            raise ValueError(f"{where}: {twin!r} and {label!r} have the same tokens, expected labels that differ")


def _check_length(row: _Row, encodes: bool, longest: int | None, model: str) -> None:
    length = max(len(row.source), len(row.candidate)) if encodes else len(row.source) + len(row.candidate)
    if longest is not None and length > longest:
        raise ValueError(
            f"prompts[{row.key!r}] with label {row.label!r}: got {length} tokens, expected at most {longest}, the "
            f"longest input of {model}; cut the prompt"
        )
