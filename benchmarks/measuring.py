"""What every part of gpu_check.py measures with."""

from collections.abc import Callable

import torch
from torch import Tensor

from mltd.bench.cases import interleaved


def relative(found: Tensor, wanted: Tensor) -> float:
    """The error over the size of what was wanted, both as Frobenius norms."""
    return ((found.double() - wanted).norm() / wanted.norm().clamp(min=1e-30)).item()


def timed(calls: dict[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
    """Median milliseconds of each call."""
    if device.type == "cuda":
        from triton.testing import do_bench

        return {name: do_bench(call, warmup=5, rep=20, return_mode="median") for name, call in calls.items()}
    return {name: 1e3 * sorted(times)[len(times) // 2] for name, times in interleaved(calls, 5).items()}
