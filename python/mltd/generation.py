"""Texts for the query sets of many tasks, each by its own adapted model, from one `generate` of Hugging Face at a time.

Beam search gives a row to each beam and keeps those of a prompt together, so rows stay in task order and the offsets of
`task_parallel`, which know only proportions, still hold.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from mltd.query_batches import Tokens, adapted, batches, check_prompts, padded_and_mask

Decode = Callable[[list[int]], str]


@dataclass(frozen=True)
class Decoding:
    """How to generate; without sampling, so the same prompts give the same texts.

    max_new_tokens   most tokens of one text
    beams            1: the likeliest token at every step; more: beam search
    length_penalty   of beam search: scores are divided by length ** length_penalty, so more prefers longer texts
    no_repeat_ngram  n-grams of so many tokens never come twice; 0: they may
    stop             texts at which to stop, such as "\\n"; they are not part of what is returned
    max_tokens       most tokens of one batch: rows · beams · (longest prompt + max_new_tokens)

    Everything else, such as the end token and a smallest length, is what `model.generation_config` says.
    """

    max_new_tokens: int
    beams: int = 1
    length_penalty: float = 1.0
    no_repeat_ngram: int = 0
    stop: tuple[str, ...] = ()
    max_tokens: int = 16384

    def __post_init__(self) -> None:
        for name, least in (("max_new_tokens", 1), ("beams", 1), ("no_repeat_ngram", 0), ("max_tokens", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least {least}")
        if isinstance(self.stop, str) or not all(self.stop):
            raise ValueError(f"stop: got {self.stop!r}, expected a tuple of texts that are not empty")


def generate(
    model: Any,
    prompts: Sequence[Tokens],
    decode: Decode,
    decoding: Decoding,
    parameters: Mapping[str, Tensor] | None = None,
    alpha: Tensor | None = None,
) -> dict[str, str]:
    """Texts by id, in the order of the prompts: only what is new, up to the end token or a stop text.

    model       a decoder-only or an encoder-decoder language model
    prompts     for each task, id -> tokens to go on from, or, for an encoder-decoder, of the source
    decode      new tokens without the end token -> text, such as a tokenizer's `decode` with skip_special_tokens
    parameters  name -> [B, *shape], as `mltd.adapt` returns them: the adapter of task i at index i; None: all tasks by
                the model as it stands
    alpha       as `tarp_kernels.architecture` takes it: the search cells' architecture, of each task or of all

    Raises ValueError that names the id of a prompt that is empty, twice there, not of the model's vocabulary, or too
    long to be continued.
    """
    check_prompts(prompts, model)
    _check_lengths(prompts, model, decoding)
    texts: dict[str, str] = {key: "" for own in prompts for key in own}
    rows = [list(own.items()) for own in prompts]

    def tokens(row: tuple[str, Sequence[int]]) -> int:
        return decoding.beams * (len(row[1]) + decoding.max_new_tokens)

    for batch, offsets in batches(rows, tokens, decoding.max_tokens):
        with adapted(model, parameters, alpha, offsets):
            found = _generate([own for _, own in batch], model, decode, decoding)
        texts.update(zip((key for key, _ in batch), found, strict=True))
    return texts


def _generate(batch: Sequence[Sequence[int]], model: Any, decode: Decode, decoding: Decoding) -> list[str]:
    encodes = model.config.is_encoder_decoder
    defaults = model.generation_config
    ends = _ends(defaults.eos_token_id)
    pad = defaults.pad_token_id if defaults.pad_token_id is not None else next(iter(ends), 0)
    ids, mask = padded_and_mask(batch, pad, model.device, left=not encodes)
    start = 1 if encodes else ids.shape[1]  # a decoder beside an encoder begins with its start token

    def text(row: Tensor) -> str:
        return decode(_before(row[start:].tolist(), ends))

    stops = StoppingCriteriaList([_Stop(text, decoding.stop)] if decoding.stop else [])
    beam_search = {"length_penalty": decoding.length_penalty} if decoding.beams > 1 else {}
    found = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=decoding.max_new_tokens,
        num_beams=decoding.beams,
        no_repeat_ngram_size=decoding.no_repeat_ngram,
        do_sample=False,
        num_return_sequences=1,
        return_dict_in_generate=False,
        pad_token_id=pad,
        stopping_criteria=stops,
        **beam_search,
    )
    return [_cut(text(row), decoding.stop) for row in found]


class _Stop(StoppingCriteria):
    """A row is done when its text has one of the stop texts. Texts, not tokens: a stop text may lie across tokens."""

    def __init__(self, text: Callable[[Tensor], str], stop: tuple[str, ...]) -> None:
        self.text, self.stop = text, stop

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        rows = input_ids.cpu()  # once, not row by row
        done = [any(stop in self.text(row) for stop in self.stop) for row in rows]
        return torch.tensor(done, device=input_ids.device)


def _before(tokens: list[int], ends: Sequence[int]) -> list[int]:
    return tokens[: next((i for i, token in enumerate(tokens) if token in ends), len(tokens))]


def _cut(text: str, stops: Sequence[str]) -> str:
    return text[: min((text.index(stop) for stop in stops if stop in text), default=len(text))]


def _ends(tokens: int | list[int] | None) -> list[int]:
    return [] if tokens is None else [tokens] if isinstance(tokens, int) else list(tokens)


def _check_lengths(prompts: Sequence[Tokens], model: Any, decoding: Decoding) -> None:
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is None:
        return
    encodes = model.config.is_encoder_decoder
    if encodes and decoding.max_new_tokens >= longest:
        raise ValueError(
            f"max_new_tokens: got {decoding.max_new_tokens}, expected fewer than {longest}, the longest output of "
            f"{type(model).__name__} and its start token"
        )
    room = longest if encodes else longest - decoding.max_new_tokens
    for own in prompts:
        for key, tokens in own.items():
            if len(tokens) > room:
                beside = "" if encodes else f" beside {decoding.max_new_tokens} new ones"
                raise ValueError(
                    f"prompts[{key!r}]: got {len(tokens)} tokens, expected at most {room}{beside}, for "
                    f"{type(model).__name__} reads {longest}; cut the prompt"
                )
