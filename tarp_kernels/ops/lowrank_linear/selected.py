"""`lowrank_linear` on some rows only: read by number and written by number, without a gathered or a scattered copy.

    y = f(x[rows])                            rows alone
    out = base, but out[index] = f(…)         into = (base, index)

What PyTorch's index_select and index_copy make of that defines it: `composed`, which also runs on the reference
backend, under compilers and transforms, and under autocast where x must be cast.
"""

from typing import Any

import torch
from torch import Tensor

from tarp_kernels import backends
from tarp_kernels.ops.dispatch import needs_dispatcher
from tarp_kernels.ops.lowrank_linear import autograd
from tarp_kernels.ops.lowrank_linear.contract import Form, Operands, check_index
from tarp_kernels.ops.lowrank_linear.layout import Selection, empty_saved


def on_rows(run, x, weight, bias, V, U, generator, *options, backend, rows, into) -> Tensor:
    """`run`, the operator, with its rows chosen; `options` and all before are its arguments."""
    tensors = isinstance(x, Tensor) and isinstance(weight, Tensor) and x.layout is torch.strided
    if not tensors or x.dim() < 1 or weight.dim() != 2:
        return run(x, weight, bias, V, U, generator, *options, backend)  # which says what is wrong
    flat = x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])
    base = index = None
    if rows is not None:
        check_index("rows", rows, flat, "x")
    if into is not None:
        base, index = check_into(into, flat if rows is None else rows, x, weight)
    arguments = (weight, bias, V, U, generator, *options, backend)
    if needs_dispatcher(x) or _is_cast(x) or _takes_reference(backend, x):
        return composed(run, flat, arguments, rows, base, index, None if into is None else into[0].shape)

    rows, index = (None if numbers is None else numbers.contiguous() for numbers in (rows, index))

    def kernels(operands: Operands, segments: Tensor | None, form: Form) -> Tensor:
        return apply(base, operands._replace(x=flat), segments, Selection(rows, index), form)

    counted = flat if rows is None else flat[: rows.shape[0]]  # as many rows as there will be, for the checks
    y = run(counted, *arguments, apply=kernels)
    return y if into is None else y.reshape(into[0].shape)


def _takes_reference(backend: str | None, x: Tensor) -> bool:
    """Whether that is what `run` will choose; which kernels otherwise is for it to say."""
    return backends.choose(backend, x.dtype, x.device, lambda named: None) == "reference"


def _is_cast(x: Tensor) -> bool:
    """Whether autocast will convert x, which is better done to some rows than to all."""
    device = x.device.type
    return torch.is_autocast_enabled(device) and x.dtype != torch.get_autocast_dtype(device)


def check_into(into, source: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """base [T, N] and its index, for as many rows as `source` has."""
    if not isinstance(into, tuple | list) or len(into) != 2 or not isinstance(into[0], Tensor):
        names = [type(part).__name__ for part in into] if isinstance(into, tuple | list) else None
        came = type(into).__name__ if names is None else f"({', '.join(names)})"
        raise TypeError(f"into: got {came}, expected (base [..., N], index int64 [T']), two tensors")
    base, index = into
    if base.dtype != x.dtype:
        raise TypeError(f"into[0]: got dtype {base.dtype}, expected {x.dtype} like x; convert it with .to(x.dtype)")
    if base.device != x.device:
        raise ValueError(f"into[0]: lies on {base.device}, expected {x.device} like x; move it with .to(x.device)")
    if base.layout is not torch.strided or base.dim() < 1 or base.shape[-1] != weight.shape[0]:
        raise ValueError(f"into[0]: got shape {list(base.shape)}, expected [..., N] with N = weight.shape[0]")
    base = base.reshape(base.shape[:-1].numel(), base.shape[-1])
    check_index("into[1]", index, base, "into[0]")
    if index.shape[0] != source.shape[0]:
        raise ValueError(
            f"into[1]: got {index.shape[0]} row numbers, expected {source.shape[0]}, one for each row that is computed"
        )
    return base, index


def composed(run, flat: Tensor, arguments: tuple, rows, base, index, shape) -> Tensor:
    """The definition."""
    y = run(flat if rows is None else flat.index_select(0, rows), *arguments)
    if base is None:
        return y
    kind = torch.promote_types(base.dtype, y.dtype)  # under autocast they differ
    return base.to(kind).index_copy(0, index, y.to(kind)).reshape(shape)


def apply(base: Tensor | None, operands: Operands, segments: Tensor | None, selection: Selection, form: Form) -> Tensor:
    """y [T', N], or base [T, N] with these rows, by the kernels."""
    tensors = (base, *operands)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        return _SelectedRows.apply(*tensors, segments, *selection, form)
    return autograd.kernels(form.backend).forward(operands, segments, form, None, selection, _target(base))


def _target(base: Tensor | None) -> Tensor | None:
    """Where the kernels write: what they leave must already be there."""
    return None if base is None else base.detach().clone(memory_format=torch.contiguous_format)


class _SelectedRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        base, *tensors, segments, read, write, form = arguments
        operands, selection = Operands(*tensors), Selection(read, write)
        saved = empty_saved(operands, form, selection)
        y = autograd.kernels(form.backend).forward(operands, segments, form, saved, selection, _target(base))
        ctx.form = form
        ctx.save_for_backward(*tensors, segments, read, write, *saved)
        return y

    @staticmethod
    def backward(ctx, dy):
        *tensors, segments, read, write, h, s, u = ctx.saved_tensors
        wants_base, *needs = ctx.needs_input_grad[: 1 + len(Operands._fields)]
        dbase = dy.index_fill(0, write, 0) if wants_base else None
        if torch.is_grad_enabled():  # create_graph=True
            gradients = _differentiable(dy, Operands(*tensors), segments, Selection(read, write), (h, s, u), needs, ctx)
        elif any(needs):
            gradients = autograd.kernels(ctx.form.backend).backward(
                dy, Operands(*tensors), segments, (h, s, u), needs, ctx.form, Selection(read, write)
            )
        else:
            gradients = []
        return dbase, *autograd.spread(gradients, needs), None, None, None, None


def _differentiable(dy, operands: Operands, segments, selection: Selection, saved, needs, ctx) -> list[Any]:
    """The gradients as functions of dy and the operands, gathered and scattered by PyTorch."""
    picked, x = selection.picked(dy, operands.x)
    found = autograd.differentiable_gradients(picked, operands._replace(x=x), segments, saved, needs, ctx.form)
    if needs[0] and selection.read is not None:
        found[0] = torch.zeros_like(operands.x).index_copy(0, selection.read, found[0])
    return found
