"""An adapter's gradients as sums over rows, by two CUDA launches: parts by chunks of rows, and their sums in order."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tarp_kernels.ops.lowrank_linear import cuda_plans

OUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""In the order of `PartsOut` in csrc/lowrank_linear/gradients_cuda.h."""


class Tensors(NamedTuple):
    """What the kernel of the first stage points to, in its order; both operands of one half precision."""

    wide: Tensor
    narrow: Tensor | None
    wide_index: Tensor | None  # int64, like the next two
    narrow_index: Tensor | None
    segments: Tensor | None
    parts: Tensor


def tall(
    rows: Any,
    a: Tensor,
    b: Tensor | None,
    names: dict[str, int],
    out: dict[str, Tensor],
    drops: bool = False,
    a_rows: Tensor | None = None,
    b_rows: Tensor | None = None,
) -> None:
    """`triton_products.tall`, which is called where `cuda_plans.sums` says so; `rows`: Triton's `Rows` of the call."""
    p, q = sum(names.values()), 1 if b is None else b.shape[1]
    left, right = (a, a_rows, q), (b, b_rows, 1)  # an operand, its rows, floats of a part from column to column
    (wide, wide_index, wide_step), (narrow, narrow_index, narrow_step) = (left, right) if p >= q else (right, left)
    assert wide is not None
    if not cuda_plans.sums(wide, drops):
        from tarp_kernels.ops.lowrank_linear import triton_products  # imports triton

        return triton_products.tall(rows, a, b, names, out, drops, a_rows, b_rows)
    chunk = cuda_plans.CHUNK
    chunks, tasks = rows.tiles(chunk), max(1, rows.tasks)
    parts = a.new_empty((chunks, p * q), dtype=torch.float32)
    segments = None if rows.segments is None else rows.segments.to(torch.int64)
    numbers = (
        *(wide.shape[1], wide.stride(0), wide.shape[0], wide_step, int(cuda_plans.whole(wide))),
        *((1, 0, 0, narrow_step, 0) if narrow is None else (narrow.shape[1], narrow.stride(0), narrow.shape[0])),
        *(() if narrow is None else (narrow_step, int(cuda_plans.whole(narrow)))),
        *(rows.count, tasks, chunk),
    )
    launch_tall(
        chunks, cuda_plans.columns(min(p, q)), Tensors(wide, narrow, wide_index, narrow_index, segments, parts), numbers
    )
    first = 0
    for name, count in names.items():
        if name in out:
            numbers = (rows.count, tasks, chunk, p * q, first * q, count * q)
            launch_add_parts(parts, segments, out[name], numbers)
        first += count


def launch_tall(chunks: int, narrow_columns: int, tensors: Tensors, numbers: tuple[int, ...]) -> None:
    """Start the first stage on the current stream. One name for it, so that tests can run the same launch elsewhere."""
    from tarp_kernels import _C

    device = tensors.wide.device
    stream, half = torch.cuda.current_stream(device).cuda_stream, tensors.wide.dtype == torch.bfloat16
    pointers = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    _C.lowrank_linear_tall(device.index, stream, half, chunks, narrow_columns, pointers, numbers)


def launch_add_parts(parts: Tensor, segments: Tensor | None, out: Tensor, numbers: tuple[int, ...]) -> None:
    """Start the second stage on the current stream; a name of its own for the same reason."""
    from tarp_kernels import _C

    device = parts.device
    stream, kind = torch.cuda.current_stream(device).cuda_stream, OUT_DTYPES.index(out.dtype)
    pointers = [0 if tensor is None else tensor.data_ptr() for tensor in (parts, segments, out)]
    _C.lowrank_linear_add_parts(device.index, stream, kind, pointers, numbers)
