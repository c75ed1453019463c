"""A case: contenders that do the same job, a gate that must be green, and how its timings become rows."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

Call = Callable[[], object]


class GateError(AssertionError):
    """The contenders of a case do not compute the same thing, so no time of theirs is worth reporting."""


@dataclass(frozen=True)
class Case:
    """Contenders that do the same job, by name.

    kind        group for goals and pictures, for example "forward"
    shape       what it ran on, for example "512x768x768x8": rows x in_features x out_features x rank
    calls       name -> the call that is timed
    gate        raises GateError unless the contenders agree; returns the largest relative deviation it saw
    baseline    name of the contender that ratios are taken to
    rounds      how often every contender runs
    """

    kind: str
    shape: str
    calls: Mapping[str, Call]
    gate: Callable[[], float]
    baseline: str
    rounds: int = 25

    @property
    def name(self) -> str:
        return f"{self.kind} {self.shape}"


@dataclass(frozen=True)
class Timing:
    """One contender of one case. Times in milliseconds; ``ratio`` of medians to the case's baseline."""

    kind: str
    shape: str
    contender: str
    baseline: str
    ratio: float
    p20_ms: float
    p50_ms: float
    p80_ms: float
    rounds: int
    deviation: float = field(metadata={"help": "largest relative deviation that the gate saw"})


def measure(case: Case, rounds: int | None = None) -> list[Timing]:
    """Run the gate, then time every contender in turn in each round, so that a drift of the machine hits all of them.

    Every round starts with another contender. Raises GateError instead of timing anything when the gate is red.
    """
    deviation = case.gate()
    times = interleaved(case.calls, rounds or case.rounds)
    median = float(np.median(times[case.baseline]))
    found = []
    for name, values in times.items():
        p20, p50, p80 = (float(value) for value in np.percentile(values, (20, 50, 80)))
        found.append(
            Timing(
                case.kind,
                case.shape,
                name,
                case.baseline,
                p50 / median,
                p20 * 1e3,
                p50 * 1e3,
                p80 * 1e3,
                len(values),
                deviation,
            )
        )
    return found


def interleaved(calls: Mapping[str, Call], rounds: int) -> dict[str, list[float]]:
    """Seconds of every call in every round; two warm-up runs of each come first and are not counted."""
    for call in calls.values():
        call()
        call()
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()  # a collection would hit one contender only
    try:
        for i in range(rounds):
            for name in names[i % len(names) :] + names[: i % len(names)]:
                start = time.perf_counter()
                calls[name]()
                times[name].append(time.perf_counter() - start)
    finally:
        if collecting:
            gc.enable()
    return times
