"""``tarp bench --tune``: measure the launch configurations of the GPU kernels on this GPU and keep the fastest."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from rich.console import Console
from torch import Tensor

from mltd.bench.layers import SHAPES, parse_shape
from tarp_kernels import backends, tuning
from tarp_kernels.ops.lowrank_linear.contract import Form, Operands

FORM = Form("diag", "silu", "one_plus", "one_plus", 1.0, 0.0, 0, "triton")
"""Of the calls that are timed: the default TarpConfig's."""

Timer = Callable[[Callable[[], object]], float]


def run_tune(shapes: Sequence[str] | None, console: Console) -> int:
    """Tune for `shapes` (the standard ones if None), every bucket of rows up to theirs; returns the exit status.

    Raises ValueError where no GPU can run the Triton kernels, OSError where the table cannot be written.
    """
    reason = backends.why_unavailable("triton")
    if reason is not None:
        raise ValueError(f"tuning measures the Triton kernels on a GPU: {reason}")
    device = torch.device("cuda", torch.cuda.current_device())
    gpu = torch.cuda.get_device_name(device)
    plans: dict[str, tuning.Plan] = {}
    for shape in shapes or SHAPES:
        plans |= tune(shape, device, gpu_seconds, console)
    console.print(f"{len(plans)} plans for {gpu} are in {tuning.write(gpu, plans)}")
    return 0


def gpu_seconds(call: Callable[[], object]) -> float:
    """Median time of a call on the GPU, its launches enqueued ahead."""
    from triton.testing import do_bench

    return do_bench(call, return_mode="median") / 1e3


def tune(shape: str, device: torch.device, seconds: Timer, console: Console) -> dict[str, tuning.Plan]:
    """The fastest plan for each bucket of rows up to the shape's, for the forward pass and for dx, by table entry."""
    from tarp_kernels.ops.lowrank_linear import cuda_kernels, cuda_plans, triton_kernels, triton_plans  # import triton

    most, inner, outer, rank = parse_shape(shape)
    found = {}
    for direction in ("forward", "dx"):  # dx multiplies by W, forward by Wᵀ
        weight = torch.randn(outer, inner, device=device, dtype=torch.bfloat16)
        weight = weight if direction == "forward" else weight.t()
        for rows in (rows for rows in tuning.ROWS if rows <= max(most, tuning.ROWS[0])):
            operands = _operands(rows, weight, rank)
            key = triton_plans.key_of(operands, triton_plans.Middle(operands, FORM), None, FORM)
            call = functools.partial(triton_kernels.forward, operands, None, FORM)
            plan, best = tuning.fastest(triton_plans.candidates(key, rows), functools.partial(seconds, call))
            if backends.why_unavailable("cuda") is None and cuda_plans.refusal(operands, None, FORM, True) is None:
                if seconds(functools.partial(cuda_kernels.forward, operands, None, FORM)) < best:
                    plan = plan._replace(backend="cuda")
            found[key.entry(rows)] = plan
            console.print(f"{direction} {rows}x{weight.shape[1]}x{weight.shape[0]}x{rank}: {best * 1e6:.1f} µs, {plan}")
    return found


def _operands(rows: int, weight: Tensor, rank: int) -> Operands:
    outer, inner = weight.shape
    shapes = {"x": (rows, inner), "V": (rank, inner), "U": (outer, rank), "w1": (rank, inner)}
    return Operands(weight=weight, bias=None, **{name: weight.new_empty(s).normal_() for name, s in shapes.items()})
