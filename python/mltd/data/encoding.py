"""Records as examples for a tokenizer: what is read, what is scored, and what happens to text that is too long."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

from mltd.data.records import Groups, Record
from mltd.kinds import IGNORED, Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KindName = Literal["causal", "seq2seq", "classification", "regression"]
TooLong = Literal["error", "drop", "cut_start", "cut_end"]

END = "\n"
"""What ends a turn, the prompt's as well as the reply's."""

PROMPT = "{source}" + END
"""Plain lines, without a chat template: 0.4 to 0.7 of the tokens that one needs for terse chat."""


class Item(NamedTuple):
    """A record as the model gets it."""

    record: Record
    example: Example


class Encoded(NamedTuple):
    """Task name -> items, all for one kind of model; `labels`: task name -> its class names, by class index."""

    kind: KindName
    items: Mapping[str, tuple[Item, ...]]
    labels: Mapping[str, tuple[str, ...]]

    def at_least(self, count: int) -> Encoded:
        """Without the groups of fewer than `count` units, which may be small because long records were dropped."""
        kept = {
            name: items for name, items in self.items.items() if len({item.record.piece for item in items}) >= count
        }
        return self._replace(items=kept)


def encode(
    groups: Groups,
    tokenizer: PreTrainedTokenizerBase,
    kind: KindName = "causal",
    *,
    max_length: int | None = None,
    max_target_length: int | None = None,
    too_long: TooLong = "error",
    prompt: str = PROMPT,
    end: str = END,
    every_reference: bool = False,
    labels: Sequence[str] | None = None,
) -> Encoded:
    """Every record as an example of this kind.

    kind    "causal"          the prompt is read; the target and what ends it are scored
            "seq2seq"         input_ids is the source; labels is the target, a sequence of its own with its end token
            "classification"  input_ids is the source; labels is the index of the class that the target names
            "regression"      input_ids is the source; labels is the target as a number
    max_length         most tokens of input_ids; default: as many as the tokenizer's model takes
    max_target_length  most tokens of labels, for seq2seq; default: as max_length
    too_long           "error", "drop" to leave such records out, "cut_start" or "cut_end" of the source. A target is
                       never cut: a model would learn to stop in mid-sentence
    prompt, end        for causal models: how the source is put, with {source} in it, and what ends the target
    every_reference    an example for every reference, not for the first only: what models of data-to-text train on
    labels             class names in the order of their indices; default: each task's own names in alphabetical order

    Raises ValueError that names the task and the record: too long, no token, a target that is no class or no number;
    and where tasks differ in the number of their classes, as one classifier must serve them all.
    """
    if "{source}" not in prompt:
        raise ValueError(f"prompt: got {prompt!r}, expected {{source}} in it, where the record's source goes")
    if too_long not in ("error", "drop", "cut_start", "cut_end"):
        raise ValueError(f"too_long: got {too_long!r}, expected 'error', 'drop', 'cut_start' or 'cut_end'")
    limit = _limit(max_length, tokenizer)
    target_limit = limit if max_target_length is None else max_target_length
    names = _class_names(groups, labels) if kind == "classification" else {}
    items: dict[str, tuple[Item, ...]] = {}
    for name, records in groups.items():
        _check(name, records)
        made = []
        for record in records:
            where = f"task {name!r}: record {record.id!r}"
            for one in _single(record) if every_reference else [record]:
                build = _builder(one, tokenizer, kind, prompt, end, names.get(name, ()), where)
                example = _fitted(one, build, kind, limit, target_limit, too_long, where)
                if example is not None:
                    made.append(Item(record, example))
        items[name] = tuple(made)
    return Encoded(kind, items, names)


def windows(groups: Groups, tokenizer: PreTrainedTokenizerBase, length: int, *, rest: bool = False) -> Encoded:
    """Texts cut into examples of `length` tokens, all of them scored but the first: language modelling.

    No token is in two windows and no window in two texts; each window is a unit of its own.

    rest  keep the shorter window that ends a text too

    A task of short texts may be left without a window. Raises ValueError for a record with a source, which windows
    would not read.
    """
    if length < 2:
        raise ValueError(f"length: got {length}, expected at least 2, one token to read and one to predict")
    items: dict[str, tuple[Item, ...]] = {}
    for name, records in groups.items():
        _check(name, records)
        made = []
        for record in records:
            if record.source:
                raise ValueError(
                    f"task {name!r}: record {record.id!r} has a source, expected text only; use encode for pairs"
                )
            ids = _ids(tokenizer, record.target)
            for number, start in enumerate(range(0, len(ids), length)):
                window = tuple(ids[start : start + length])
                if len(window) == length or (rest and len(window) > 1):
                    text = str(tokenizer.decode(list(window)))
                    made.append(Item(Record("", (text,), f"{record.id}[{number}]"), Example(window, window)))
        items[name] = tuple(made)
    return Encoded("causal", items, {})


def causal_example(tokenizer: PreTrainedTokenizerBase, record: Record, prompt: str = PROMPT, end: str = END) -> Example:
    """Token ids and labels: -100 over the prompt; the target and what ends it are scored.

    The beginning-of-text token comes first where the tokenizer puts one before a text itself, as Llama's does.
    """
    bos = tokenizer.bos_token_id
    opening = [bos] if bos is not None and _ids(tokenizer, "x", special=True)[:1] == [bos] else []
    # replace, not format: a prompt or a source may hold braces of its own
    read = opening + (_ids(tokenizer, prompt.replace("{source}", record.source)) if record.source else [])
    said = _ids(tokenizer, record.target) + _ids(tokenizer, end)
    return Example(tuple(read + said), tuple([IGNORED] * len(read) + said))


def _builder(
    record: Record,
    tokenizer: PreTrainedTokenizerBase,
    kind: KindName,
    prompt: str,
    end: str,
    names: Sequence[str],
    where: str,
) -> Callable[[str], Example]:
    """source -> the record's example with that source; what the target gives is made once."""
    if kind == "causal":
        return lambda source: causal_example(tokenizer, record._replace(source=source), prompt, end)
    if not record.source:
        raise ValueError(f"{where}: got no source, expected text for a model of the kind {kind!r} to read")
    labels: tuple[int | float, ...]
    if kind == "seq2seq":
        labels = _target_ids(tokenizer, record.target)
    elif kind == "classification":
        if record.target not in names:
            raise ValueError(f"{where}: got the label {record.target!r}, expected one of {list(names)}")
        labels = (names.index(record.target),)
    elif kind == "regression":
        labels = (_number(record.target, where),)
    else:
        raise ValueError(f"kind: got {kind!r}, expected 'causal', 'seq2seq', 'classification' or 'regression'")
    return lambda source: Example(tuple(_ids(tokenizer, source, special=True)), labels)


def _fitted(
    record: Record,
    build: Callable[[str], Example],
    kind: KindName,
    limit: int,
    target_limit: int,
    too_long: TooLong,
    where: str,
) -> Example | None:
    """The record's example within the limits, None where it is to be left out."""
    example = build(record.source)
    if not example.input_ids:
        raise ValueError(f"{where}: got no token out of {record.source[:40]!r}, expected at least one")
    if kind == "seq2seq" and len(example.labels) > target_limit:
        if too_long == "drop":
            return None
        raise ValueError(
            f"{where}: its target has {len(example.labels):,} tokens, expected at most {target_limit:,}; raise "
            "max_target_length, or leave such records out with too_long='drop'"
        )
    if len(example.input_ids) <= limit:
        return example
    if too_long == "drop":
        return None
    if too_long == "error":
        raise ValueError(
            f"{where}: got {len(example.input_ids):,} tokens, expected at most {limit:,}; raise max_length, or choose "
            "too_long='drop', 'cut_start' or 'cut_end'"
        )

    def cut(signs: int) -> Example:
        kept = record.source[:signs] if too_long == "cut_end" else record.source[len(record.source) - signs :]
        return build(kept)

    fits, breaks = 0, len(record.source)  # characters: tokens may depend on what stands beside them
    while breaks - fits > 1:
        middle = (fits + breaks) // 2
        fits, breaks = (middle, breaks) if len(cut(middle).input_ids) <= limit else (fits, middle)
    if fits == 0:
        raise ValueError(
            f"{where}: nothing of the source is left beside a target that is never cut, within {limit:,} tokens; raise "
            "max_length or leave the record out"
        )
    return cut(fits)


def _check(name: str, records: Sequence[Record]) -> None:
    """Records of one id would be taken for one piece and always land on the same side of a split."""
    ids: set[str] = set()
    for record in records:
        if record.id in ids:
            raise ValueError(f"task {name!r}: got two records with the id {record.id!r}, expected distinct ids")
        if not record.references or not all(text.strip() for text in record.references):
            raise ValueError(
                f"task {name!r}: record {record.id!r}: got the references {record.references}, expected at least one "
                "and none of them empty; leave the record out"
            )
        ids.add(record.id)


def _class_names(groups: Groups, labels: Sequence[str] | None) -> dict[str, tuple[str, ...]]:
    if labels is not None:
        return dict.fromkeys(groups, tuple(labels))
    names = {name: tuple(sorted({record.target for record in records})) for name, records in groups.items()}
    first = next(iter(names), "")
    for name, own in names.items():
        if len(own) != len(names[first]):
            raise ValueError(
                f"task {name!r}: got {len(own)} classes, expected {len(names[first])} as in {first!r}, because one "
                "classifier serves all tasks; give the class names as labels, or leave the task out"
            )
    return names


def _limit(max_length: int | None, tokenizer: PreTrainedTokenizerBase) -> int:
    if max_length is not None and max_length < 1:
        raise ValueError(f"max_length: got {max_length}, expected at least 1, or None for the tokenizer's own")
    return int(tokenizer.model_max_length) if max_length is None else max_length  # 1e30 where it has none


def _single(record: Record) -> list[Record]:
    return [record._replace(references=(reference,)) for reference in record.references]


def _target_ids(tokenizer: PreTrainedTokenizerBase, target: str) -> tuple[int, ...]:
    """The target as an encoder-decoder's labels, ended by the end-of-text token."""
    ids = list(tokenizer(text_target=target, verbose=False).input_ids)
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"tokenizer: {type(tokenizer).__name__} has no eos_token, expected one to end a target with; set eos_token"
        )
    return tuple(ids if ids[-1:] == [tokenizer.eos_token_id] else [*ids, tokenizer.eos_token_id])


def _number(text: str, where: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{where}: got {text!r}, expected a finite number to regress on")
    return number


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, special: bool = False) -> list[int]:
    return list(tokenizer(text, add_special_tokens=special, verbose=False).input_ids)
