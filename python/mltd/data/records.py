"""Records: text before any tokenizer has seen it. Every reader gives them as groups, task name -> records."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

Thing = TypeVar("Thing")


class Record(NamedTuple):
    """What is read, and what is to be predicted from it.

    source      what is read; "" for text that is only continued, as in language modelling
    references  what may be said: the first is learnt, all of them judge what a model generates. A class name, or a
                number as text, for classification and regression
    id          where it stands in its file; distinct within its task
    unit        what must not be torn apart into support and query, as the turns of a dialogue; "": the record alone
    """

    source: str
    references: tuple[str, ...]
    id: str
    unit: str = ""

    @property
    def target(self) -> str:
        return self.references[0]

    @property
    def piece(self) -> str:
        """What stays together with it: its unit, or the record alone."""
        return self.unit or self.id

    @property
    def text(self) -> str:
        """The source and, on a line of its own, the target."""
        return f"{self.source}\n{self.target}" if self.source else self.target


Groups = Mapping[str, tuple[Record, ...]]
"""Task name -> its records: a persona, a topic, a domain."""


def normalised(text: str) -> str:
    """Lower case, words only: the form in which two texts count as the same. Text without a word keeps its signs."""
    return re.sub(r"\W+", " ", text.lower()).strip() or " ".join(text.split())


def stable_order(*parts: str) -> str:
    """A sort key that shuffles the same way on every machine and every Python."""
    return hashlib.sha256("\x1f".join(parts).encode()).hexdigest()


def by_unit(things: Sequence[Thing], record: Callable[[Thing], Record]) -> list[tuple[Thing, ...]]:
    """Records, or what belongs to them, by unit, in order of appearance."""
    found: dict[str, list[Thing]] = {}
    for thing in things:
        found.setdefault(record(thing).piece, []).append(thing)
    return [tuple(unit) for unit in found.values()]


def at_least(groups: Groups, count: int) -> dict[str, tuple[Record, ...]]:
    """The groups of `count` units or more."""
    return {name: records for name, records in groups.items() if len({record.piece for record in records}) >= count}


def numbered(groups: Groups, name: str) -> dict[str, tuple[Record, ...]]:
    """The same as `name 1`, `name 2`, …: names that quote nothing of the records, as those of personas do."""
    return {f"{name} {number}": records for number, records in enumerate(groups.values(), 1)}


def pooled(groups: Groups, name: str) -> dict[str, tuple[Record, ...]]:
    """All records as one group: the articles of an encyclopaedia as one domain, say. Ids and units say where from."""
    return {
        name: tuple(
            record._replace(id=f"{group}/{record.id}", unit=record.unit and f"{group}/{record.unit}")
            for group, records in groups.items()
            for record in records
        )
    }


def merged(groups: Groups) -> dict[str, tuple[Record, ...]]:
    """Records of one group that have the same source as one record with all their references, each once."""
    made = {}
    for name, records in groups.items():
        by_source: dict[str, Record] = {}
        for record in records:
            first = by_source.setdefault(record.source, record)
            references = dict.fromkeys((*first.references, *record.references))
            by_source[record.source] = first._replace(references=tuple(references))
        made[name] = tuple(by_source.values())
    return made


def label_groups(groups: Groups, ways: int, seed: int = 0) -> dict[str, tuple[Record, ...]]:
    """Each group cut by label into groups of `ways` labels: few-shot tasks of a corpus with one long list of labels.

    The labels are drawn by `seed`, no two groups share one, and those left over are in none. Raises ValueError where a
    group has fewer labels than `ways`.
    """
    made: dict[str, tuple[Record, ...]] = {}
    for name, records in groups.items():
        labels = sorted({record.target for record in records}, key=lambda label: stable_order(str(seed), name, label))
        if not 2 <= ways <= len(labels):
            raise ValueError(f"ways: got {ways}, expected 2 ≤ ways ≤ {len(labels)}, the labels of {name!r}")
        for start in range(0, len(labels) - ways + 1, ways):
            chosen = set(labels[start : start + ways])
            part = tuple(record for record in records if record.target in chosen)
            made[f"{name}/{start // ways + 1}"] = part
    return made
