"""Some rows of a matrix gathered, and put back: by CUDA kernels where they serve, else by PyTorch.

PyTorch's index_copy writes the whole result and then its selected rows once more; the kernel writes each row once.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tarp_kernels import backends
from tarp_kernels.ops.dispatch import needs_dispatcher
from tarp_kernels.ops.lowrank_linear.layout import rows as adjacent


class Picked(NamedTuple):
    """Some rows of a matrix [T, d], named twice."""

    numbers: Tensor  # of these rows, int64 [T'], rising; on a GPU what is none leads to some row
    mask: Tensor  # bool [T]


def gather_rows(x: Tensor, picked: Picked) -> Tensor:
    """x [T, d] at these rows, [T', d]; differentiable any number of times."""
    return _Gather.apply(x, *picked) if _served(x) else x.index_select(0, picked.numbers)


def scatter_rows(base: Tensor, picked: Picked, values: Tensor) -> Tensor:
    """base [T, d] with values [T', d], of its dtype, in the place of these rows; differentiable any number of times."""
    return _Scatter.apply(base, values, *picked) if _served(base) else base.index_copy(0, picked.numbers, values)


def _served(x: Tensor) -> bool:
    """Whether the kernels copy rows of this matrix."""
    return (
        x.device.type == "cuda"
        and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and x.shape[1] > 0
        and backends.why_unavailable("cuda") is None
        and not needs_dispatcher(x)
    )


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, index, mask):
        ctx.save_for_backward(index, mask)
        index, x = index.contiguous(), adjacent(x.detach())
        out = x.new_empty(len(index), x.shape[1])
        size = _piece(x, out)
        launch("gather_rows", size, (x, index, out), (len(index), len(x), *_pieces(size, out, x)))
        return out

    @staticmethod
    def backward(ctx, dout):
        index, mask = ctx.saved_tensors
        return _Scatter.apply(None, dout, index, mask), None, None


class _Scatter(torch.autograd.Function):
    """Without base or without values: zeros there."""

    @staticmethod
    def forward(ctx, base, values, index, mask):
        ctx.save_for_backward(index, mask)
        index, mask = index.contiguous(), mask.contiguous()
        base, values = (None if tensor is None else adjacent(tensor.detach()) for tensor in (base, values))
        given: Any = values if base is None else base
        out = given.new_empty(len(mask), given.shape[1])
        size = _piece(base, values, out)
        numbers = (len(index), len(mask), *_pieces(size, out, base, values))
        launch("scatter_rows", size, (base, values, index, mask, out), numbers)
        return out

    @staticmethod
    def backward(ctx, dout):
        index, mask = ctx.saved_tensors
        dbase = _Scatter.apply(dout, None, index, mask) if ctx.needs_input_grad[0] else None
        dvalues = _Gather.apply(dout, index, mask) if ctx.needs_input_grad[1] else None
        return dbase, dvalues, None, None


def _piece(*matrices: Tensor | None) -> int:
    """Bytes by which all these matrices can be copied: 16 where all rows are whole pieces of it, else an element's."""
    there = [tensor for tensor in matrices if tensor is not None]
    size = there[0].element_size()
    whole = all(
        number % 16 == 0
        for tensor in there
        for number in (tensor.data_ptr(), tensor.stride(0) * size, tensor.shape[1] * size)
    )
    return 16 if whole else size


def _pieces(size: int, out: Tensor, *matrices: Tensor | None) -> tuple[int, ...]:
    """Pieces of a row, and from each matrix's row to its next."""
    in_pieces = size // out.element_size()
    strides = (0 if tensor is None else tensor.stride(0) // in_pieces for tensor in matrices)
    return out.shape[1] // in_pieces, *strides


def launch(kernel: str, piece_bytes: int, tensors: tuple[Tensor | None, ...], numbers: tuple[int, ...]) -> None:
    """Start a kernel on the current stream. One name for it, so that tests can run the same launch elsewhere."""
    from tarp_kernels import _C

    out: Any = tensors[-1]
    if len(out):
        stream = torch.cuda.current_stream(out.device).cuda_stream
        pointers = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        getattr(_C, kernel)(out.device.index, stream, piece_bytes, pointers, numbers)
