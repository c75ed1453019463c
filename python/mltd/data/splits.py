"""Groups in three parts that share none: to meta-train on, to choose rates and stopping on, and to report on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import NamedTuple

from mltd.data.duplicates import By, Duplicate, deduplicated, duplicates
from mltd.data.records import Groups, Record, stable_order


class GroupSplit(NamedTuple):
    """Task name -> records for each part. Also for corpora that come with parts of their own."""

    train: Groups
    validation: Groups
    test: Groups

    def check(self, by: By = "record") -> list[Duplicate]:
        """Every name of a group and every text that two parts share; see `duplicates`."""
        found = [
            Duplicate(f"{first}/{name}", f"{second}/{name}", "")
            for first, second in combinations(self._fields, 2)
            for name in getattr(self, first)
            if name in getattr(self, second)
        ]
        for first, second in combinations(self._fields, 2):
            found += duplicates(self._placed(first), self._placed(second), by)
        return found

    def without_duplicates(self, by: By = "record") -> GroupSplit:
        """Each text in one place only: test keeps it before validation, and validation before train.

        Groups of which nothing is left are left out. Raises ValueError where two parts share the name of a group.
        """
        everything: dict[str, tuple[Record, ...]] = {}
        for part in reversed(self._fields):
            for name, records in getattr(self, part).items():
                if name in everything:
                    raise ValueError(f"{part}: got the group {name!r} of another part too, expected distinct names")
                everything[name] = records
        kept = {name: records for name, records in deduplicated(everything, by=by).items() if records}
        return GroupSplit(*({name: kept[name] for name in part if name in kept} for part in self))

    def _placed(self, part: str) -> Iterator[tuple[str, Record]]:
        for name, records in getattr(self, part).items():
            for record in records:
                yield f"{part}/{name} ({record.id})", record


def split_groups(
    groups: Groups, *, validation: int | Sequence[str], test: int | Sequence[str], seed: int = 0
) -> GroupSplit:
    """Whole groups into train, validation and test: so many, drawn by `seed`, or those with these names.

    Raises ValueError for names that are not there or in both, and where no group is left to train on.
    """
    draw = sorted(groups, key=lambda name: stable_order(str(seed), name))
    tested = _chosen("test", test, draw, groups)
    validated = _chosen("validation", validation, [name for name in draw if name not in tested], groups)
    both = [name for name in validated if name in tested]
    if both:
        raise ValueError(f"validation: got {both} which are in test too, expected other groups")
    train = [name for name in groups if name not in tested and name not in validated]
    if not train:
        raise ValueError(
            f"validation, test: got {len(validated)} and {len(tested)} of {len(groups)} groups, expected at least one "
            "left to train on; ask for fewer"
        )
    return GroupSplit(*({name: groups[name] for name in names} for names in (train, validated, tested)))


def _chosen(argument: str, wanted: int | Sequence[str], draw: Sequence[str], groups: Groups) -> list[str]:
    if isinstance(wanted, int):
        if not 0 <= wanted <= len(draw):
            raise ValueError(
                f"{argument}: got {wanted} of {len(draw)} groups to choose from, expected 0 to {len(draw)}"
            )
        return list(draw[:wanted])
    unknown = wanted if isinstance(wanted, str) else [name for name in wanted if name not in groups]
    if unknown:
        raise ValueError(f"{argument}: got {unknown!r}, expected names out of {list(groups)}")
    return list(wanted)
