"""What every benchmark shares: a case is built, and its gate checked, once for all of its contenders."""

import os

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from mltd.bench.cases import Case, GateError, Timing, measure


@dataclass
class Checked:
    """A case whose gate is green, and its contenders timed side by side."""

    case: Case
    timings: dict[str, Timing]


@pytest.fixture(scope="module")
def checked() -> Callable[[Callable[[], Case], int], Checked]:
    """Give the checked case of a builder; only the last one is kept, for the memory of whole models."""
    last: dict[object, Checked | GateError] = {}

    def get(key: object, build: Callable[[], Case], rounds: int) -> Checked:
        if key not in last:
            last.clear()
            case = build()
            try:
                last[key] = Checked(case, {timing.contender: timing for timing in measure(case, rounds)})
            except GateError as error:
                last[key] = error
        found = last[key]
        if isinstance(found, GateError):
            pytest.fail(f"not reported, the gate is red: {found}", pytrace=False)
        return found

    return get


@pytest.fixture
def run(benchmark, checked):
    """Time one contender of a case with pytest-benchmark, and note its ratio from the rounds side by side.

    Prefer that ratio (extra_info) to comparing rows: rows are timed one after the other, and the machine drifts.
    """

    def time_it(key: tuple, contender: str, build: Callable[[], Case], rounds: int) -> None:
        found = checked(key, build, rounds)
        if contender not in found.case.calls:
            pytest.skip(f"{contender} is not installed")
        timing = found.timings[contender]
        benchmark.group = found.case.name
        benchmark.extra_info.update(
            ratio=round(timing.ratio, 4), baseline=timing.baseline, gate_deviation=timing.deviation
        )
        benchmark.pedantic(found.case.calls[contender], rounds=rounds, warmup_rounds=1)

    return time_it
