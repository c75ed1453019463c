"""The csrc kernels of `lowrank_linear`, called by pointer: tensors in, tensors out, no autograd here."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tarp_kernels.ops.lowrank_linear.contract import Form, Operands
from tarp_kernels.ops.lowrank_linear.layout import (
    Saved,
    Selection,
    arranged,
    dense_gradients,
    empty_floats,
    rows,
)
from tarp_kernels.ops.philox import drop_threshold


def forward(
    operands: Operands,
    segments: Tensor | None,
    form: Form,
    saved: Saved | None = None,
    selection: Selection | None = None,
    y: Tensor | None = None,
) -> Tensor:
    """y [T, N]; h, s, u go into `saved`. A selection of rows to write goes into `y`, contiguous."""
    from tarp_kernels import _C

    operands, segments = arranged(operands, _plain), _offsets(segments)
    x = operands.x
    count = x.shape[0] if selection is None else selection.count(x)
    y = x.new_empty(count, operands.weight.shape[0]) if y is None else y
    z = empty_floats(x, count, operands.V.shape[-2])
    kept = (0, 0, 0) if saved is None else tuple(map(_pointer, saved))
    _C.lowrank_linear_forward(
        *_arguments(operands, segments, form, count, selection),
        *(_pointer(operands.bias), y.data_ptr(), *kept, z.data_ptr()),
    )
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
    from tarp_kernels import _C

    dy, segments, floats = rows(dy), _offsets(segments), arranged(operands, _plain)
    wanted = [name for name, needed in zip(Operands._fields, needs, strict=True) if needed]
    out = {
        name: torch.empty(tensor.shape, dtype=tensor.dtype)
        for name, tensor in floats._asdict().items()
        if name in wanted and tensor is not None and name not in ("weight", "bias")
    }
    if "weight" in wanted and floats.P is not None:  # the kernel adds to it task by task
        out["weight"] = torch.zeros(floats.weight.shape, dtype=torch.float32)
    if out:
        count = floats.x.shape[0]
        if selection is not None:
            count = selection.count(floats.x)
            if "x" in out and selection.read is not None:
                out["x"].zero_()
        arguments = _arguments(floats, segments, form, count, selection)
        workspace = torch.empty(_C.lowrank_linear_backward_workspace(*arguments), dtype=torch.float32)
        gradients = (_pointer(out.get(name)) for name in ("x", "V", "U", "w1", "b1", "w2", "b2", "P", "Q", "weight"))
        _C.lowrank_linear_backward(
            *arguments, dy.data_ptr(), dy.stride(0), *map(_pointer, saved), *gradients, workspace.data_ptr()
        )
    out |= dense_gradients(dy, operands, wanted, selection)
    given = operands._asdict()
    return [out[name].to(given[name].dtype) for name in wanted]


def _arguments(
    operands: Operands, segments: Tensor | None, form: Form, count: int, selection: Selection | None
) -> tuple:
    """What forward and backward both pass: sizes, strides and pointers of the operands, then the form of the call."""
    x, weight, _, V, U, w1, b1, w2, b2, P, Q = operands
    blocks = 1 if P is None or P.dim() == (2 if segments is None else 3) else P.shape[-3]
    return (
        (count, x.shape[1], weight.shape[0], V.shape[-2]),
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
        (_pointer(P), _pointer(Q), 0 if P is None else P.shape[-1], blocks, form.multiplicative),
        *((0, 0) if selection is None else map(_pointer, selection)),
    )


def _plain(tensor: Tensor) -> Tensor:
    """Contiguous float32."""
    if tensor.dtype == torch.float32 and tensor.is_contiguous() and not tensor.is_neg():
        return tensor
    return tensor.detach().to(torch.float32).contiguous().resolve_neg()


def _offsets(segments: Tensor | None) -> Tensor | None:
    return None if segments is None else segments.to(torch.int64).contiguous()


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
