"""The CUDA backend of `lowrank_linear`, called by pointer: few rows in one launch, many in one for z and one for y.

Backward is that of the Triton backend but for the sums over rows, which CUDA launches make: what its launches read, h,
s and u, is what this forward saves.
`cuda_plans.refusal` says which calls have a kernel here.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tarp_kernels.ops.lowrank_linear import cuda_gradients, cuda_plans, cuda_skinny
from tarp_kernels.ops.lowrank_linear.contract import Form, Operands
from tarp_kernels.ops.lowrank_linear.cuda_arguments import activations, counts, full, of_one_dtype, plain
from tarp_kernels.ops.lowrank_linear.cuda_plans import FewRows, ManyRows, aligned
from tarp_kernels.ops.lowrank_linear.layout import Saved, Selection, arranged, empty_floats


class Tensors(NamedTuple):
    """What the kernel points to, in its order; x, W, b and y of one half precision."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    V: Tensor
    U: Tensor
    w1: Tensor | None
    b1: Tensor | None
    w2: Tensor | None
    b2: Tensor | None
    segments: Tensor | None  # int64, like the next two
    read: Tensor | None
    write: Tensor | None
    scaling: Tensor | None  # float64, in place of the number
    y: Tensor
    h: Tensor | None
    s: Tensor | None
    u: Tensor | None
    partials: Tensor | None
    middle: Tensor
    counts: Tensor


def forward(
    operands: Operands,
    segments: Tensor | None,
    form: Form,
    saved: Saved | None = None,
    selection: Selection | None = None,
    y: Tensor | None = None,
) -> Tensor:
    """y [T, N]; h, s, u go into `saved`. A selection of rows to write goes into `y`, contiguous."""
    operands = arranged(operands, plain)
    x, weight, bias, V, U, w1, b1, w2, b2, *_ = operands
    if not aligned(x) or x.stride(0) % 8:
        x = x.clone(memory_format=torch.contiguous_format)
    if not aligned(weight):  # only what is compiled comes here with one: a compiler does not see where tensors lie
        weight = weight.clone(memory_format=torch.contiguous_format)
    read, write = (None, None) if selection is None else selection
    rows = x.shape[0] if selection is None else selection.count(x)
    if rows > cuda_plans.MOST_ROWS:
        return _forward_many(operands._replace(x=x, weight=weight), segments, form, saved, selection, y)
    in_features, out_features, rank = x.shape[1], weight.shape[0], V.shape[-2]
    if y is None:
        y = x.new_empty(rows, out_features)
    if rows == 0:
        return y
    first, tasks = 0 if w1 is None else w1.shape[-2], 1 if segments is None else segments.shape[0] - 1
    low, wide = of_one_dtype((V, U, w1, b1, w2, b2))
    plan = cuda_plans.few_rows(
        rows, in_features, out_features, rank, first, w2 is not None, tasks, cuda_plans.multiprocessors(x.device)
    )
    offsets = None if segments is None else segments.to(x.device, torch.int64).contiguous()
    in_memory = form.scaling if isinstance(form.scaling, Tensor) else None
    h, s, u = (t if t.numel() else None for t in saved) if saved is not None else (None, None, None)
    partials = None
    if plan.splits > 1:
        partials = x.new_empty(plan.tiles * plan.splits * rows * cuda_plans.TILE, dtype=torch.float32)
    middle, zeros = empty_floats(x, rows, rank + first), counts(x.device, 3 + plan.tiles)
    every: Any = (x, weight, bias, *low, offsets, read, write, in_memory, y, h, s, u, partials, middle, zeros)
    numbers = (
        *(rows, in_features, out_features, rank, first, form.outputs(operands)),
        *(tasks, plan.splits, plan.stage, x.stride(0), weight.stride(0)),
        *(*activations(form), full(form, operands), x.shape[0], y.shape[0], int(wide)),
    )
    launch(plan, Tensors(*every), numbers, 0.0 if in_memory is not None else float(form.scaling))
    return y


def _forward_many(
    operands: Operands,
    segments: Tensor | None,
    form: Form,
    saved: Saved | None,
    selection: Selection | None,
    y: Tensor | None,
) -> Tensor:
    """`forward` for many rows; z is Triton's where `cuda_plans.makes_z` says so."""
    from tarp_kernels.ops.lowrank_linear import triton_kernels  # imports triton

    if not cuda_plans.makes_z(operands, form):
        return triton_kernels.forward(operands, segments, form, saved, selection, y, many_rows)
    x, weight, bias, _, U, *_ = operands
    rows = triton_kernels.Rows(x, segments, selection=selection)
    if y is None:
        y = x.new_empty(rows.count, weight.shape[0])
    z = cuda_skinny.middle(rows, operands, form, saved)
    many_rows(rows, x, weight, bias, z, U, y)
    return y


def backward(
    dy: Tensor,
    operands: Operands,
    segments: Tensor | None,
    saved: Saved,
    needs: Sequence[bool],
    form: Form,
    selection: Selection | None = None,
) -> list[Tensor]:
    """Gradients of the needed operands, in their order, each in its tensor's dtype; dx is 0 where x is not read."""
    from tarp_kernels.ops.lowrank_linear import triton_kernels

    return triton_kernels.backward(dy, operands, segments, saved, needs, form, selection, cuda_gradients.tall)


def launch(plan: FewRows, tensors: Tensors, numbers: tuple[int, ...], scaling: float) -> None:
    """Start the kernel on the current stream. One name for it, so that tests can run the same launch elsewhere."""
    from tarp_kernels import _C

    device = tensors.x.device
    _C.lowrank_linear_few_rows(
        device.index,
        torch.cuda.current_stream(device).cuda_stream,
        tensors.x.dtype == torch.bfloat16,
        plan.token_tiles,
        plan.tiles * plan.splits,
        plan.shared_bytes,
        [0 if tensor is None else tensor.data_ptr() for tensor in tensors],
        numbers,
        scaling,
    )


def many_rows(rows: Any, x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor, U: Tensor, y: Tensor) -> None:
    """y = x Wᵀ + bias + z Uᵀ, z [T, r] in x's dtype; `rows`: Triton's `Rows` of the call."""
    from tarp_kernels.ops.lowrank_linear.triton_products import capability

    plan = cuda_plans.many_rows(
        rows.tiles(cuda_plans.MANY_TILE),
        x,
        weight,
        rows.read,
        capability(x.device),
        cuda_plans.multiprocessors(x.device),
    )
    segments = None if rows.segments is None else rows.segments.to(torch.int64)
    numbers = (rows.count, *weight.shape[::-1], z.shape[1], max(1, rows.tasks), x.stride(0), weight.stride(0))
    tensors = (x, weight, bias, z, U.to(x.dtype), segments, rows.read, rows.write, y)
    launch_many(plan, tensors, (*numbers, x.shape[0], y.shape[0]))


def launch_many(plan: ManyRows, tensors: tuple[Tensor | None, ...], numbers: tuple[int, ...]) -> None:
    """Start a kernel of many rows on the current stream; a name of its own for the same reason."""
    from tarp_kernels import _C

    x: Any = tensors[0]
    stream, half = torch.cuda.current_stream(x.device).cuda_stream, x.dtype == torch.bfloat16
    pointers = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    common = (x.device.index, stream, half, plan.tiles, pointers, numbers)
    if plan.sm90:
        maps = x.new_empty(cuda_plans.MAP_BYTES, dtype=torch.uint8)
        _C.lowrank_linear_many_rows_sm90(*common, plan.columns == cuda_plans.WIDE_TILE, maps.data_ptr())
    else:
        _C.lowrank_linear_many_rows(*common)
