"""z = scaling · Σ(x) x Vᵀ for many rows of x by one CUDA launch, and h, s, u for backward."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tarp_kernels.ops.lowrank_linear import cuda_plans
from tarp_kernels.ops.lowrank_linear.contract import Form, Operands
from tarp_kernels.ops.lowrank_linear.cuda_arguments import activations, counts, full, of_one_dtype
from tarp_kernels.ops.lowrank_linear.cuda_plans import Skinny
from tarp_kernels.ops.lowrank_linear.layout import Saved, empty_floats


class Tensors(NamedTuple):
    """What the kernel points to, in its order; x and z of one half precision."""

    x: Tensor
    V: Tensor
    w1: Tensor | None
    b1: Tensor | None
    w2: Tensor | None
    b2: Tensor | None
    segments: Tensor | None  # int64, like the next
    read: Tensor | None
    scaling: Tensor | None  # float64, in place of the number
    z: Tensor
    h: Tensor | None
    s: Tensor | None
    u: Tensor | None
    partials: Tensor | None
    counts: Tensor | None


def middle(rows: Any, operands: Operands, form: Form, saved: Saved | None) -> Tensor:
    """z [T, r] in x's dtype, for plain operands; `rows`: Triton's `Rows` of the call. h, s, u go into `saved`."""
    x, _, _, V, _, w1, b1, w2, b2, *_ = operands
    in_features, rank, first = x.shape[1], V.shape[-2], 0 if w1 is None else w1.shape[-2]
    tiles = rows.tiles(cuda_plans.SKINNY_ROWS)
    plan = cuda_plans.skinny(tiles, in_features, rank + first, cuda_plans.multiprocessors(x.device))
    low, wide = of_one_dtype((V, w1, b1, w2, b2))
    z, partials, zeros = x.new_empty(rows.count, rank), None, None
    if plan.splits > 1:
        partials = empty_floats(x, tiles * plan.splits * cuda_plans.SKINNY_ROWS, rank + first)
        zeros = counts(x.device, tiles)
    in_memory = form.scaling if isinstance(form.scaling, Tensor) else None
    kept = (None,) * 3 if saved is None else tuple(t if t.numel() else None for t in saved)
    segments = None if rows.segments is None else rows.segments.to(torch.int64)
    every: Any = (x, *low, segments, rows.read, in_memory, z, *kept, partials, zeros)
    numbers = (
        *(rows.count, in_features, rank, first, form.outputs(operands), max(1, rows.tasks), plan.splits),
        *(x.stride(0), x.shape[0], *activations(form), full(form, operands), int(wide)),
    )
    launch(plan, tiles, Tensors(*every), numbers, 0.0 if in_memory is not None else float(form.scaling))
    return z


def launch(plan: Skinny, tiles: int, tensors: Tensors, numbers: tuple[int, ...], scaling: float) -> None:
    """Start the kernel on the current stream. One name for it, so that tests can run the same launch elsewhere."""
    from tarp_kernels import _C

    device = tensors.x.device
    stream, half = torch.cuda.current_stream(device).cuda_stream, tensors.x.dtype == torch.bfloat16
    pointers = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    _C.lowrank_linear_skinny(device.index, stream, half, tiles, plan.columns, pointers, numbers, scaling)
