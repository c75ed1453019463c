"""JSON-lines as tasks: lines {"task": ..., "source": ..., "target": ...}, all lines of a name one task.

target is text, or with a classification head the name or the number of a class, or for a regression a number.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mltd.data.dialogue import Pair, encode_pair
from mltd.kinds import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TARGETS: dict[str, tuple[type, ...]] = {
    "causal": (str,),
    "seq2seq": (str,),
    "classification": (str, int),
    "regression": (int, float),
}


class Line(NamedTuple):
    """One example as it was read, and where: "file:line"."""

    task: str
    source: str
    target: Any
    place: str


def read_lines(path: Path, kind: str, task: str | None = None) -> list[Line]:
    """The lines of a file in their order; with `task` all are of that one, and none needs to name it.

    Raises ValueError that names file and line for what is not JSON, a missing column or a value of a wrong type.
    """
    found = []
    for number, text in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not text.strip():
            continue
        place = f"{path}:{number}"
        try:
            values = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{place}: is not JSON ({error})") from None
        columns = ("source", "target") if task is not None else ("task", "source", "target")
        if not isinstance(values, dict):
            raise ValueError(f"{place}: is a {type(values).__name__}, expected an object with {', '.join(columns)}")
        missing = [column for column in columns if column not in values]
        if missing:
            raise ValueError(
                f"{place}: has no column {missing[0]!r} but {', '.join(values)}; expected {', '.join(columns)}"
            )
        _check(place, "source", values["source"], (str,))
        _check(place, "target", values["target"], TARGETS[kind])
        if task is None:
            _check(place, "task", values["task"], (str, int))
        found.append(Line(str(values["task"]) if task is None else task, values["source"], values["target"], place))
    if not found:
        raise ValueError(f"{path}: has no line, expected at least one example")
    return found


def _check(place: str, column: str, value: Any, kinds: tuple[type, ...]) -> None:
    if not isinstance(value, kinds) or isinstance(value, bool) or value == "":
        wanted = " or ".join({str: "text", int: "a whole number", float: "a number"}[kind] for kind in kinds)
        raise ValueError(f"{place}: {column} is {value!r}, expected {wanted}")


def class_names(lines: Sequence[Line]) -> tuple[str, ...]:
    """The classes that the lines name, sorted; empty where they give numbers."""
    return tuple(sorted({line.target for line in lines if isinstance(line.target, str)}))


def encode(line: Line, kind: str, tokenizer: PreTrainedTokenizerBase, classes: Sequence[str] | None = None) -> Example:
    """A line as an example of that kind. ValueError, with file and line, for a class that is not among `classes`."""
    if kind == "causal":
        return encode_pair(tokenizer, Pair(line.source, line.target))
    source = tuple(tokenizer(line.source).input_ids)
    if kind == "seq2seq":
        return Example(source, tuple(tokenizer(text_target=line.target).input_ids))
    if kind == "classification" and isinstance(line.target, str):
        if line.target not in (classes or ()):
            raise ValueError(f"{line.place}: target is {line.target!r}, expected one of {', '.join(classes or ())}")
        return Example(source, (list(classes or ()).index(line.target),))
    return Example(source, (float(line.target) if kind == "regression" else line.target,))
