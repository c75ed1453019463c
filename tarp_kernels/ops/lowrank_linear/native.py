"""The csrc kernels of `lowrank_linear`, called by pointer: tensors in, tensors out, no autograd here.

h, s, u are what the kernels keep for backward, all float32:
h = x Vᵀ [T, r];  s = g(x) [T, S], S = 0 without generator;  u = x w1ᵀ + b1 [T, m] of an MLP generator, else [T, 0].
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tarp_kernels.ops.lowrank_linear.contract import Form, Operands
from tarp_kernels.ops.philox import drop_threshold

Saved = tuple[Tensor, Tensor, Tensor]


def empty_saved(operands: Operands, form: Form) -> Saved:
    """Room for h, s, u."""
    rank = operands.V.shape[-2]
    outputs = 0 if operands.w1 is None else rank if form.sigma == "diag" else rank * rank
    hidden = 0 if operands.w1 is None or operands.w2 is None else operands.w1.shape[-2]
    return _floats(operands.x, rank), _floats(operands.x, outputs), _floats(operands.x, hidden)


def forward(operands: Operands, segments: Tensor | None, form: Form) -> Tensor:
    """y [T, N], nothing kept."""
    return _forward(operands, segments, form, None)


def forward_and_save(operands: Operands, segments: Tensor | None, form: Form) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y [T, N] and h, s, u."""
    saved = empty_saved(operands, form)
    return _forward(operands, segments, form, saved), *saved


def _forward(operands: Operands, segments: Tensor | None, form: Form, saved: Saved | None) -> Tensor:
    from tarp_kernels import _C

    operands, segments = _kernel_layout(operands), _offsets(segments)
    x = operands.x
    y, z = x.new_empty(x.shape[0], operands.weight.shape[0]), _floats(x, operands.V.shape[-2])
    bias = None if operands.bias is None else operands.bias.contiguous()
    kept = (0, 0, 0) if saved is None else tuple(map(_pointer, saved))
    _C.lowrank_linear_forward(*_arguments(operands, segments, form), _pointer(bias), y.data_ptr(), *kept, z.data_ptr())
    return y


def backward(
    dy: Tensor, operands: Operands, segments: Tensor | None, saved: Saved, needs: Sequence[bool], form: Form
) -> list[Tensor]:
    """Gradients of the needed operands, in their order, each in its tensor's dtype."""
    from tarp_kernels import _C

    dy, segments, floats = _rows(dy), _offsets(segments), _kernel_layout(operands)
    wanted = dict(zip(Operands._fields, needs, strict=True))
    out = {
        name: torch.empty(tensor.shape, dtype=tensor.dtype)
        for name, tensor in zip(Operands._fields, floats, strict=True)
        if wanted[name] and tensor is not None and name not in ("weight", "bias")
    }
    if out:
        arguments = _arguments(floats, segments, form)
        workspace = torch.empty(_C.lowrank_linear_backward_workspace(*arguments), dtype=torch.float32)
        gradients = (_pointer(out.get(name)) for name in ("x", "V", "U", "w1", "b1", "w2", "b2"))
        _C.lowrank_linear_backward(
            *arguments, dy.data_ptr(), dy.stride(0), *map(_pointer, saved), *gradients, workspace.data_ptr()
        )
    if wanted["weight"]:
        out["weight"] = dy.t() @ operands.x
    if wanted["bias"]:
        out["bias"] = dy.sum(0)
    given = operands._asdict()
    return [out[name].to(given[name].dtype) for name, needed in wanted.items() if needed]


def _arguments(operands: Operands, segments: Tensor | None, form: Form) -> tuple:
    """What forward and backward both pass: sizes, strides and pointers of the operands, then the form of the call."""
    x, weight, _, V, U, w1, b1, w2, b2 = operands
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


def _kernel_layout(operands: Operands) -> Operands:
    """Rows of adjacent elements for x, contiguous float32 for the adapter; weight and bias as they are."""

    def floats(tensor: Tensor) -> Tensor:
        if tensor.dtype == torch.float32 and tensor.is_contiguous() and not tensor.is_neg():
            return tensor
        return tensor.detach().to(torch.float32).contiguous().resolve_neg()

    x, weight, bias, V, U, *generator = operands
    tensors = (None if tensor is None else floats(tensor) for tensor in generator)
    bias = None if bias is None else bias.resolve_neg()
    return Operands(_rows(x), weight.resolve_neg(), bias, floats(V), floats(U), *tensors)


def _rows(x: Tensor) -> Tensor:
    return x.resolve_neg() if x.shape[1] <= 1 or x.stride(1) == 1 else x.contiguous()


def _floats(x: Tensor, columns: int) -> Tensor:
    return x.new_empty((x.shape[0], columns), dtype=torch.float32)


def _offsets(segments: Tensor | None) -> Tensor | None:
    return None if segments is None else segments.to(torch.int64).contiguous()


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
