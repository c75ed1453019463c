"""Tasks drawn from encoded records: support and query of so many units, or each unit in turn held out."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import NamedTuple

from mltd.data.duplicates import By, Duplicate, duplicates
from mltd.data.encoding import Encoded, Item, KindName
from mltd.data.records import Record, by_unit, normalised, stable_order
from mltd.tasks import Task, TaskSet

NAMED = 3  # groups in a message

Drawn = tuple[str, Sequence[Sequence[Item]], Sequence[Sequence[Item]]]
"""A task's name, and the pieces of its support and of its query."""


class Episodes(NamedTuple):
    """Tasks and, by task name, the records of their examples: query[name][i].references judge what is generated."""

    tasks: TaskSet
    support: Mapping[str, tuple[Record, ...]]
    query: Mapping[str, tuple[Record, ...]]

    def check_duplicates(self, other: Episodes | None = None, by: By = "record") -> list[Duplicate]:
        """Texts on both sides of a split that must keep them apart, however they are spelt; see `TaskSet.check_leaks`.

        Without `other`: between support and query of each task. With `other` (train against test): of all records.
        """
        if other is not None:
            return duplicates(self._placed(), other._placed(), by)
        return [
            found
            for name in self.tasks.names
            for found in duplicates(self._part("support", name), self._part("query", name), by)
        ]

    def _placed(self) -> Iterator[tuple[str, Record]]:
        for name in self.tasks.names:
            for part in ("support", "query"):
                yield from self._part(part, name)

    def _part(self, part: str, name: str) -> Iterator[tuple[str, Record]]:
        for i, record in enumerate(getattr(self, part)[name]):
            yield f"{self.tasks.name}/{name}/{part}[{i}] ({record.id})", record


def draw(
    encoded: Encoded,
    name: str,
    *,
    support: int,
    query: int | None = None,
    episodes: int = 1,
    by_class: bool = False,
    seed: int = 0,
) -> Episodes:
    """Tasks of `support` and `query` units of each group, drawn by `seed`, the same on every machine.

    name      of the task set: "train", "validation", "test"
    support   units to adapt on: the k of k-shot. A unit is a record, or a dialogue with all its turns
    query     units to judge by; None: all others
    episodes  most tasks of one group (`group`, `group#2`, …), of distinct units; a small group gives fewer
    by_class  targets are names of classes, which take turns as long as each has units left: support = n·k has k units
              of each of n classes. Always so for classification

    What has been read comes again only after everything else has, so support and query share sources only where a group
    has too few. Raises ValueError that names the groups with too few units.
    """
    if support < 1 or (query is not None and query < 1) or episodes < 1:
        raise ValueError(f"support, query, episodes: got {support}, {query}, {episodes}, expected at least 1")
    if query is None and episodes > 1:
        raise ValueError("query: got None with several episodes, expected a number of units, as one takes all others")
    pieces = _pieces(encoded)
    size = support + (1 if query is None else query)
    small = {group: len(found) for group, found in pieces.items() if len(found) < size}
    if small:
        raise ValueError(
            f"support, query: got {support} and {query}, but {len(small)} groups of {len(pieces)} have fewer units, as "
            f"{dict(islice(small.items(), NAMED))}; ask for fewer, or leave such groups out with "
            f"encoded.at_least({size})"
        )
    drawn: list[Drawn] = []
    for group, found in pieces.items():
        order = stable_shuffle(group, [[item.record for item in piece] for piece in found], seed)
        shuffled = [found[i] for i in order]
        if by_class or encoded.kind == "classification":
            shuffled = _in_turns(shuffled)
        step = len(shuffled) if query is None else size
        for episode in range(min(episodes, len(shuffled) // step)):
            chunk = shuffled[episode * step : (episode + 1) * step]
            label = group if episode == 0 else f"{group}#{episode + 1}"
            drawn.append((label, chunk[:support], chunk[support:]))
    return _episodes(drawn, encoded.kind, name)


def leave_one_out(encoded: Encoded, name: str) -> Episodes:
    """For every unit of every group a task `group#n`: the n-th unit is the query, the others are the support.

    The tasks of a group share most of their support, so average over them before you do over groups; `left_out_of` says
    which group a task is of. Raises ValueError that names the groups of a single unit.
    """
    pieces = _pieces(encoded)
    small = [group for group, found in pieces.items() if len(found) < 2]
    if small:
        raise ValueError(
            f"encoded: got fewer than two units in {len(small)} groups of {len(pieces)}, as {small[:NAMED]}, expected "
            "at least two, one of them to hold out; leave such groups out with encoded.at_least(2)"
        )
    drawn = [
        (f"{group}#{i + 1}", [*found[:i], *found[i + 1 :]], [found[i]])
        for group, found in pieces.items()
        for i in range(len(found))
    ]
    return _episodes(drawn, encoded.kind, name)


def left_out_of(task: str) -> str:
    """The group of a task's name that `leave_one_out` gave."""
    return task.rpartition("#")[0]


def stable_shuffle(name: str, pieces: Sequence[Sequence[Record]], seed: int) -> list[int]:
    """The places of `pieces` in a random order that depends on their texts, `name` and `seed` and on nothing else.

    Pieces of the same source are spread out: a second comes after every first.
    """

    def key(place: int) -> str:
        return stable_order(str(seed), name, *(text for record in pieces[place] for text in _texts(record)))

    times: Counter[str] = Counter()
    ranked = []
    for position, place in enumerate(sorted(range(len(pieces)), key=key)):
        read = {normalised(record.source) for record in pieces[place]}
        source = read.pop() if len(read) == 1 else ""  # a dialogue is read as a whole, and plain text not at all
        ranked.append((times[source] if source else 0, position, place))
        times[source] += 1
    return [place for _, _, place in sorted(ranked)]


def _in_turns(pieces: Sequence[tuple[Item, ...]]) -> list[tuple[Item, ...]]:
    """The classes in turn, as long as they last, each with its pieces in the order that they have."""
    waiting: dict[str, deque[tuple[Item, ...]]] = {}
    for piece in pieces:
        waiting.setdefault(piece[0].record.target, deque()).append(piece)
    order = []
    while waiting:
        order += [queue.popleft() for queue in waiting.values()]
        waiting = {label: queue for label, queue in waiting.items() if queue}
    return order


def _texts(record: Record) -> tuple[str, ...]:
    return (record.source, *record.references)


def _pieces(encoded: Encoded) -> dict[str, list[tuple[Item, ...]]]:
    """Group -> its items by unit, in order of appearance. ValueError where there is no group."""
    if not encoded.items:
        raise ValueError("encoded: got no group, expected at least one")
    return {group: by_unit(items, lambda item: item.record) for group, items in encoded.items.items()}


def _episodes(drawn: Sequence[Drawn], kind: KindName, name: str) -> Episodes:
    tasks, support, query = [], {}, {}
    for label, adapt, judge in drawn:
        read, asked = ([item for piece in pieces for item in piece] for pieces in (adapt, judge))
        tasks.append(Task(label, [item.example for item in read], [item.example for item in asked], kind))
        support[label] = tuple(item.record for item in read)
        query[label] = tuple(item.record for item in asked)
    return Episodes(TaskSet(tasks, name), support, query)
