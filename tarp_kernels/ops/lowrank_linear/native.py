"""The csrc kernels of `lowrank_linear`, called by pointer: tensors in, tensors out, no autograd here.

h, s, u are what the kernels keep for backward, all float32:
h = x Vᵀ [T, r];  s = g(x) [T, S], S = 0 without generator;  u = x w1ᵀ + b1 [T, m] of an MLP generator, else [T, 0].
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tarp_kernels.ops.philox import drop_threshold

_SAVED_DTYPE = torch.float32


def empty_saved(
    x: Tensor, V: Tensor, w1: Tensor | None, w2: Tensor | None, sigma: str
) -> tuple[Tensor, Tensor, Tensor]:
    rank = V.shape[-2]
    outputs = 0 if w1 is None else rank if sigma == "diag" else rank * rank
    hidden = 0 if w2 is None else w1.shape[-2]
    return tuple(x.new_empty((x.shape[0], size), dtype=_SAVED_DTYPE) for size in (rank, outputs, hidden))


def forward(tensors: Sequence[Tensor | None], segments: Tensor | None, form, save: bool = True):
    """(y, h, s, u) for x [T, K] and the rest of autograd.NAMES; h, s, u are None unless they are to be saved."""
    from tarp_kernels import _C

    x, weight, bias, *adapter = tensors
    x, adapter, segments = _rows(x), [_float(tensor) for tensor in adapter], _offsets(segments)
    y = x.new_empty(x.shape[0], weight.shape[0])
    saved = empty_saved(x, adapter[0], adapter[2], adapter[4], form.sigma) if save else (None, None, None)
    bias = None if bias is None else bias.contiguous()
    arguments = _arguments(x, weight, adapter, segments, form)
    z = x.new_empty((x.shape[0], adapter[0].shape[-2]), dtype=_SAVED_DTYPE)
    _C.lowrank_linear_forward(*arguments, _pointer(bias), y.data_ptr(), *map(_pointer, saved), z.data_ptr())
    return y, *saved


def backward(dy: Tensor, tensors, segments, saved, needs: Sequence[bool], form) -> list[Tensor]:
    """Gradients of the needed tensors, in the order of autograd.NAMES, each in its tensor's dtype."""
    from tarp_kernels import _C

    x, weight, bias, *adapter = tensors
    x, dy, segments = _rows(x), _rows(dy), _offsets(segments)
    floats = [_float(tensor) for tensor in adapter]
    out: list[Tensor | None] = [None] * len(tensors)
    if needs[0]:
        out[0] = torch.empty(x.shape, dtype=x.dtype)
    for i, tensor in enumerate(floats, start=3):
        if needs[i]:
            out[i] = torch.empty(tensor.shape, dtype=torch.float32)
    if needs[0] or any(needs[3:]):
        arguments = _arguments(x, weight, floats, segments, form)
        gradients = [_pointer(out[i]) for i in (0, *range(3, len(tensors)))]
        workspace = torch.empty(_C.lowrank_linear_backward_workspace(*arguments), dtype=torch.float32)
        _C.lowrank_linear_backward(
            *arguments, dy.data_ptr(), dy.stride(0), *map(_pointer, saved), *gradients, workspace.data_ptr()
        )
    if needs[1]:
        out[1] = dy.t() @ x
    if needs[2]:
        out[2] = dy.sum(0)
    for i, tensor in enumerate(adapter, start=3):
        if needs[i]:
            out[i] = out[i].to(tensor.dtype)
    return [gradient for gradient, needed in zip(out, needs, strict=True) if needed]


def _arguments(x, weight, adapter, segments, form) -> tuple:
    """What forward and backward both pass: sizes, strides, pointers, then the form of the call."""
    V, U, w1, b1, w2, b2 = adapter
    return (
        (x.shape[0], x.shape[1], weight.shape[0], V.shape[-2]),
        0 if w1 is None else w1.shape[-2],
        0 if segments is None else segments.shape[0] - 1,
        _pointer(segments),
        x.dtype == torch.bfloat16,
        x.data_ptr(),
        x.stride(0),
        weight.data_ptr(),
        weight.stride(0),
        weight.stride(1),
        (_pointer(V), _pointer(U), _pointer(w1), _pointer(b1), _pointer(w2), _pointer(b2)),
        form.sigma == "full",
        form.hidden_activation,
        form.activation,
        form.scaling,
        drop_threshold(form.dropout_p),
        form.dropout_seed,
        torch.get_num_threads(),
    )


def _rows(x: Tensor) -> Tensor:
    """The kernels walk rows of adjacent elements; anything else is copied once."""
    return x if x.shape[1] <= 1 or x.stride(1) == 1 else x.contiguous()


def _float(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().to(torch.float32).contiguous()


def _offsets(segments: Tensor | None) -> Tensor | None:
    return None if segments is None else segments.to(torch.int64).contiguous()


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
