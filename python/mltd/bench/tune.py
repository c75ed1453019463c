"""``tarp bench --tune``: measure the launch configurations of the GPU kernels on this GPU and keep the fastest.

And which backend of a search cell is the faster one.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from mltd.bench.cells import architecture
from mltd.bench.layers import SHAPES, parse_shape
from tarp_kernels import CellWeights, SearchCellConfig, backends, tuning
from tarp_kernels.ops.lowrank_linear.contract import Form, Operands
from tarp_kernels.ops.search_cell.layout import layout

FORM = Form("diag", "silu", "one_plus", "one_plus", 1.0, 0.0, 0, "triton")
"""Of the calls that are timed: the default TarpConfig's."""

TASKS = 8
"""That the rows of a search cell are cut into where each task has its own: a meta-batch."""

Timer = Callable[[Callable[[], object]], float]


def run_tune(shapes: Sequence[str] | None, console: Console) -> int:
    """Tune for `shapes` (the standard ones if None), every bucket of rows up to theirs; returns the exit status.

    And for search cells of the default width beside layers of their in_features.

    Raises ValueError where no GPU can run the Triton kernels, OSError where the table cannot be written.
    """
    reason = backends.why_unavailable("triton")
    if reason is not None:
        raise ValueError(f"tuning measures the Triton kernels on a GPU: {reason}")
    device = torch.device("cuda", torch.cuda.current_device())
    gpu = torch.cuda.get_device_name(device)
    found = tuning.Table({}, {})
    for shape in shapes or SHAPES:
        found.plans.update(tune(shape, device, gpu_seconds, console))
        found.cells.update(tune_cell(shape, device, gpu_seconds, console))
    path = tuning.write(gpu, found)
    console.print(f"{len(found.plans)} plans and {len(found.cells)} choices for search cells on {gpu} are in {path}")
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


def tune_cell(shape: str, device: torch.device, seconds: Timer, console: Console) -> dict[str, str]:
    """The faster backend of a search cell beside a layer, for each bucket of rows up to the shape's, by table entry.

    Of forward and backward together: what backward runs on is decided before forward, and by nothing that would let a
    value depend on whether gradients are asked for. Nothing where Triton alone can run.
    """
    from tarp_kernels.ops.search_cell import cuda_kernels, cuda_plans, triton_kernels  # imports triton

    most, d, _, _ = parse_shape(shape)
    found: dict[str, str] = {}
    if backends.why_unavailable("cuda") is not None:
        return found
    width = SearchCellConfig().width
    for rows, per_task in itertools.product(tuning.ROWS, (False, True)):
        if rows > max(most, tuning.ROWS[0]):
            break
        h = torch.randn(rows, d, device=device, dtype=torch.bfloat16)
        weights = _cell_weights(d, width, (min(TASKS, rows),) if per_task else (), h)
        if cuda_plans.refusal(h, weights, named=True) is not None:
            break
        times = {
            name: seconds(functools.partial(_train, kernels, h, weights))
            for name, kernels in (("triton", triton_kernels), ("cuda", cuda_kernels))
        }
        faster = min(times, key=lambda name: times[name])
        found[tuning.CellKey("bfloat16", d, width, per_task).entry(rows)] = faster
        shown = ", ".join(f"{name} {time * 1e6:.1f} µs" for name, time in times.items())
        console.print(f"search cell {rows}x{d}x{width}{', one for each task' if per_task else ''}: {shown}")
    return found


def _train(kernels: ModuleType, h: Tensor, weights: CellWeights) -> None:
    """Forward and backward of the published dominant cell, with gradients of h and of every weight."""
    tasks = weights.output.shape[0] if weights.per_task else 1
    ends = torch.arange(tasks + 1) * h.shape[0] // tasks if weights.per_task else None
    found, alpha = layout(h, None, None, ends), architecture()
    out, saved = kernels.forward(h, weights, alpha, found, True, keep=True)
    kernels.backward(out, h, weights, alpha, found, True, saved, ("h", *weights.tensors))


def _cell_weights(d: int, width: int, tasks: tuple[int, ...], like: Tensor) -> CellWeights:
    shapes = CellWeights.shapes(d, width)
    tensors: dict[str, Any] = {name: like.new_empty(*tasks, *s).normal_() * 0.1 for name, s in shapes.items()}
    return CellWeights(**tensors)


def _operands(rows: int, weight: Tensor, rank: int) -> Operands:
    outer, inner = weight.shape
    shapes = {"x": (rows, inner), "V": (rank, inner), "U": (outer, rank), "w1": (rank, inner)}
    return Operands(weight=weight, bias=None, **{name: weight.new_empty(s).normal_() for name, s in shapes.items()})
