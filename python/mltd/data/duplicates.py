"""The same text in two places: found and named, or left in the first place only."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from mltd.data.records import Groups, Record, normalised

By = Literal["record", "target"]
"""What makes two records the same: source and a reference, or a reference alone (a reply would be known by heart)."""


class Duplicate(NamedTuple):
    """One text, or the name of a task, in two places that should not share it; `str(duplicate)` says it in words."""

    first: str
    second: str
    text: str
    """"" for a name."""

    def __str__(self) -> str:
        where = f"in {self.first} and in {self.second}"
        return f"the same text {where}: {self.text!r}" if self.text else f"the same task name {where}"


def duplicates(
    first: Iterable[tuple[str, Record]], second: Iterable[tuple[str, Record]], by: By = "record"
) -> list[Duplicate]:
    """Records, each with its place, that both sides have. Case, white space and punctuation do not count."""
    places: dict[tuple[str, ...], list[str]] = {}
    for place, record in first:
        for key in _keys(record, by):
            places.setdefault(key, []).append(place)
    found: list[Duplicate] = []
    for place, record in second:
        others = dict.fromkeys(other for key in _keys(record, by) for other in places.get(key, ()))
        found += [Duplicate(other, place, record.text) for other in others]
    return found


def deduplicated(
    groups: Groups, order: Sequence[str] | None = None, by: By = "record"
) -> dict[str, tuple[Record, ...]]:
    """Groups in `order`, each record kept only where none of the records before it, in any group, is the same.

    A record that is the same as another of its own unit stays: the unit is one piece.

    order  names of groups; the first that has a text keeps it. Default: as they come
    """
    seen: dict[tuple[str, ...], tuple[str, str]] = {}
    kept: dict[str, tuple[Record, ...]] = {}
    for name in groups if order is None else order:
        new: list[Record] = []
        for place, record in enumerate(groups[name]):
            here = (name, record.unit or str(place))
            keys = _keys(record, by)
            if all(seen.get(key, here) == here for key in keys):
                seen.update(dict.fromkeys(keys, here))
                new.append(record)
        kept[name] = tuple(new)
    return kept


def _keys(record: Record, by: By) -> list[tuple[str, ...]]:
    read = (normalised(record.source),) if by == "record" else ()
    return list(dict.fromkeys((*read, normalised(reference)) for reference in record.references))
