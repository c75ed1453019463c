"""What every part of gpu_check.py measures and counts with."""

import contextlib
import functools
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from mltd.bench.cases import interleaved
from tarp_kernels import available_backends
from tarp_kernels import backend as on_backend
from tarp_kernels.backends import DEVICES, DTYPES, NotServed

Row = dict[str, Any]


def relative(found: Tensor, wanted: Tensor) -> float:
    """The error over the size of what was wanted, both as Frobenius norms."""
    return ((found.double() - wanted).norm() / wanted.norm().clamp(min=1e-30)).item()


def timed(calls: dict[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
    """Median milliseconds of each call."""
    if device.type == "cuda":
        from triton.testing import do_bench

        return {name: do_bench(call, warmup=5, rep=20, return_mode="median") for name, call in calls.items()}
    return {name: 1e3 * sorted(times)[len(times) // 2] for name, times in interleaved(calls, 5).items()}


def timed_on_each_backend(
    call: Callable[[], object], device: torch.device
) -> tuple[dict[str, float], dict[str, NotServed]]:
    """Median milliseconds of a call on every compiled backend, and why the others do not serve it."""
    times, refused = {}, {}
    for name in backends_of(device):
        try:
            with on_backend(name):
                times |= timed({name: call}, device)
        except NotServed as reason:
            refused[name] = reason
    return times, refused


# --- which backend did what ------------------------------------------------------------------------------------------


def backends_of(device: torch.device) -> list[str]:
    """The compiled backends that run on this device."""
    return [name for name in available_backends() if name in DEVICES and DEVICES[name][0] == device.type]


def dtypes_of(backend: str, dtypes: Any) -> list[torch.dtype]:
    """Those that the backend takes."""
    return [dtype for dtype in dtypes if dtype in DTYPES[backend]]


def row_of(facts: Row, measure: Callable[[], Row]) -> Row:
    """What is known of a call and what was measured of it, or why the backend does not serve it."""
    try:
        return facts | measure()
    except NotServed as reason:
        return facts | {"not served": str(reason)}


def wrong(rows: list[Row]) -> list[Row]:
    return [row for row in rows if "not served" not in row and not row["ok"]]


def served(rows: list[Row]) -> dict[str, dict[str, dict[str, int]]]:
    """How many calls of each operator each backend served, and how many it did not."""
    counts: dict = defaultdict(lambda: defaultdict(lambda: {"served": 0, "not served": 0}))
    for row in rows:
        counts[row["operator"]][row["backend"]]["not served" if "not served" in row else "served"] += 1
    return {operator: dict(of_operator) for operator, of_operator in counts.items()}


def unserved(counts: dict[str, dict[str, dict[str, int]]], operators: tuple[str, ...], names: list[str]) -> list[Row]:
    """A row that is wrong for each backend that serves no call of one of these operators: nothing was shown of it."""
    pairs = [(o, name) for o in operators for name in names if not counts.get(o, {}).get(name, {}).get("served")]
    return [{"operator": o, "call": "none is served", "backend": name, "ok": False} for o, name in pairs]


def cuda_entries() -> list[str]:
    """The functions of the extension that start CUDA kernels; none where it was built without."""
    try:
        from tarp_kernels import _C
    except ImportError:
        return []
    return [name for name in dir(_C) if "on a gpu" in (getattr(_C, name).__doc__ or "").casefold()]


@contextlib.contextmanager
def counted_launches() -> Iterator[dict[str, int]]:
    """Within the block every start of CUDA kernels is counted, by the name of the function that starts them."""
    counts = dict.fromkeys(cuda_entries(), 0)
    if not counts:
        yield counts
        return
    from tarp_kernels import _C

    def counted(name: str, start: Callable) -> Callable:
        @functools.wraps(start)
        def call(*arguments):
            counts[name] += 1
            return start(*arguments)

        return call

    with contextlib.ExitStack() as stack:
        for name in counts:
            stack.enter_context(mock.patch.object(_C, name, counted(name, getattr(_C, name))))
        yield counts


def unreached(launches: dict[str, int], capability: tuple[int, int]) -> list[Row]:
    """A row that is wrong for each CUDA kernel of this GPU that no call started: nothing was shown of it."""
    missing = [name for name, count in launches.items() if not count and (capability == (9, 0) or "sm90" not in name)]
    return [{"operator": name, "call": "none starts it", "backend": "cuda", "ok": False} for name in missing]
