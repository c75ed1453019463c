"""Forward, backward and double backward of `lowrank_linear`, eager and through torch.library.

Eager calls go straight to an autograd.Function; compiled, faked and transformed ones go through the registered
operators `tarp_kernels::lowrank_linear` and `tarp_kernels::lowrank_linear_backward`, which run the same code.
"""

import functools
import importlib
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from tarp_kernels.ops.dispatch import needs_dispatcher
from tarp_kernels.ops.lowrank_linear import native, reference
from tarp_kernels.ops.lowrank_linear.contract import Form, Operands, check_offsets
from tarp_kernels.ops.lowrank_linear.layout import Saved, empty_saved
from tarp_kernels.ops.lowrank_linear.second_order import double_backward

_OPERANDS = len(Operands._fields)


@functools.cache
def kernels(backend: str) -> ModuleType:
    """The module of a backend's kernels: forward, backward. Triton is imported when it is needed."""
    return native if backend == "cpu" else importlib.import_module(f"tarp_kernels.ops.lowrank_linear.{backend}_kernels")


def apply(operands: Operands, segments: Tensor | None, form: Form) -> Tensor:
    """y [T, N] for checked arguments."""
    if needs_dispatcher(operands.x):
        # A number would be a constant of the graph, and each value of it another graph; times a tensor it is not.
        scaling = torch.ones((), dtype=torch.float64, device=operands.x.device) * form.scaling
        operator = _forward_triton_op if form.backend == "triton" else _forward_op
        return operator(*operands, segments, *form._replace(scaling=scaling))[0]
    if form.backend == "reference":
        return _reference_forward(operands, segments, form)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in operands):
        return _LowrankLinear.apply(*operands, segments, form)
    return kernels(form.backend).forward(operands, segments, form)


def _forward_and_save(operands: Operands, segments: Tensor | None, form: Form) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y [T, N] and h, s, u."""
    saved = empty_saved(operands, form)
    return kernels(form.backend).forward(operands, segments, form, saved), *saved


def _reference_forward(operands: Operands, segments: Tensor | None, form: Form) -> Tensor:
    return reference.lowrank_linear(
        *operands[:5], form.generator(operands), **form.reference_options(operands, segments)
    )


class _LowrankLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        *tensors, segments, form = arguments
        y, *saved = _forward_and_save(Operands(*tensors), segments, form)
        ctx.form = form
        ctx.save_for_backward(*tensors, segments, *saved)
        return y

    @staticmethod
    def backward(ctx, dy):
        *tensors, segments, h, s, u = ctx.saved_tensors
        needs = ctx.needs_input_grad[:_OPERANDS]
        if torch.is_grad_enabled():  # create_graph=True
            gradients = differentiable_gradients(dy, Operands(*tensors), segments, (h, s, u), needs, ctx.form)
        else:
            gradients = kernels(ctx.form.backend).backward(dy, Operands(*tensors), segments, (h, s, u), needs, ctx.form)
        return *spread(gradients, needs), None, None


def differentiable_gradients(
    dy: Tensor, operands: Operands, segments: Tensor | None, saved: Saved, needs: Sequence[bool], form: Form
) -> list[Tensor]:
    """The first-order gradients that `needs` names, to be differentiated again."""
    return list(_LowrankLinearBackward.apply(dy, *operands, segments, *saved, needs, form))


class _LowrankLinearBackward(torch.autograd.Function):
    """The first-order gradients as a differentiable function of dy and the operands; h, s, u are functions of those."""

    @staticmethod
    def forward(ctx, dy, *arguments):
        *tensors, segments, h, s, u, needs, form = arguments
        ctx.needs, ctx.form = needs, form
        ctx.save_for_backward(dy, *tensors, segments)
        return tuple(kernels(form.backend).backward(dy, Operands(*tensors), segments, (h, s, u), needs, form))

    @staticmethod
    def backward(ctx, *cotangents):
        dy, *tensors, segments = ctx.saved_tensors
        asked = ctx.needs_input_grad[: 1 + _OPERANDS]
        return *double_backward(cotangents, dy, Operands(*tensors), segments, ctx.needs, ctx.form, asked), *(None,) * 6


def spread(values: Iterable, mask: Sequence[bool]) -> list:
    """Values in order at the places where the mask is true, None elsewhere."""
    iterator = iter(values)
    return [next(iterator) if wanted else None for wanted in mask]


# --- torch.library ---------------------------------------------------------------------------------------------------
# Each operator comes twice: opaque to a compiler, and in Triton, where a compiler sees the launches themselves.


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    V: Tensor,
    U: Tensor,
    w1: Tensor | None,
    b1: Tensor | None,
    w2: Tensor | None,
    b2: Tensor | None,
    P: Tensor | None,
    Q: Tensor | None,
    segments: Tensor | None,
    sigma: str,
    hidden_activation: str,
    activation: str,
    multiplicative: str,
    scaling: Tensor,
    dropout_p: float,
    dropout_seed: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    form = Form(sigma, hidden_activation, activation, multiplicative, scaling, dropout_p, dropout_seed, backend)
    operands = Operands(x, weight, bias, V, U, w1, b1, w2, b2, P, Q)
    if backend == "triton":
        with kernels(backend).products.traceable():
            return _forward_and_save(operands, segments, form)
    if backend != "cuda":  # its kernels read a number on the GPU, which the host would have to wait for
        form = form._replace(scaling=scaling.item())
    if segments is not None and segments.device.type == "cpu":
        check_offsets(segments.tolist(), x.shape[0])
    if backend == "reference":
        return _reference_forward(operands, segments, form), x.new_empty(0), x.new_empty(0), x.new_empty(0)
    return _forward_and_save(operands, segments, form)


def _forward_fake(x, weight, bias, V, U, w1, b1, w2, b2, P, Q, segments, *values):
    form, y = Form(*values), x.new_empty(x.shape[0], weight.shape[0])
    if form.backend == "reference":
        return y, x.new_empty(0), x.new_empty(0), x.new_empty(0)
    return y, *empty_saved(Operands(x, weight, bias, V, U, w1, b1, w2, b2, P, Q), form)


def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    V: Tensor,
    U: Tensor,
    w1: Tensor | None,
    b1: Tensor | None,
    w2: Tensor | None,
    b2: Tensor | None,
    P: Tensor | None,
    Q: Tensor | None,
    segments: Tensor | None,
    h: Tensor,
    s: Tensor,
    u: Tensor,
    needs: Sequence[bool],
    sigma: str,
    hidden_activation: str,
    activation: str,
    multiplicative: str,
    scaling: Tensor,
    dropout_p: float,
    dropout_seed: int,
    backend: str,
) -> list[Tensor]:
    form = Form(sigma, hidden_activation, activation, multiplicative, scaling, dropout_p, dropout_seed, backend)
    operands = Operands(x, weight, bias, V, U, w1, b1, w2, b2, P, Q)
    if backend == "triton":
        with kernels(backend).products.traceable():
            return kernels(backend).backward(dy, operands, segments, (h, s, u), needs, form)
    if backend != "cuda":
        form = form._replace(scaling=scaling.item())
    if backend != "reference":
        return kernels(backend).backward(dy, operands, segments, (h, s, u), needs, form)
    options = form.reference_options(operands, segments)
    gradients = reference.lowrank_linear_backward(dy, *operands[:5], form.generator(operands), **options)
    return [gradient for gradient, needed in zip(gradients, needs, strict=True) if needed]


def _backward_fake(dy, x, weight, bias, V, U, w1, b1, w2, b2, P, Q, segments, h, s, u, needs, *values):
    operands = Operands(x, weight, bias, V, U, w1, b1, w2, b2, P, Q)
    return [t.new_empty(t.shape) for t, needed in zip(operands, needs, strict=True) if needed]


def _save_forward(ctx, inputs, output):
    ctx.form = Form(*inputs[_OPERANDS + 1 :])._replace(scaling=None)
    scaling = inputs[_OPERANDS + 1 + Form._fields.index("scaling")]
    ctx.save_for_backward(*inputs[: _OPERANDS + 1], *output[1:], scaling)


def _differentiate_forward(ctx, dy, *_):
    *tensors, segments, h, s, u, scaling = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:_OPERANDS])
    operator = _backward_triton_op if ctx.form.backend == "triton" else _backward_op
    gradients = operator(dy, *tensors, segments, h, s, u, needs, *ctx.form._replace(scaling=scaling))
    return *spread(gradients, needs), *(None,) * (1 + len(ctx.form))


def _save_backward(ctx, inputs, output):
    ctx.needs, ctx.form = inputs[_OPERANDS + 5], Form(*inputs[_OPERANDS + 6 :])._replace(scaling=None)
    ctx.save_for_backward(*inputs[: _OPERANDS + 2], inputs[_OPERANDS + 6 + Form._fields.index("scaling")])


def _differentiate_backward(ctx, cotangents):
    dy, *tensors, segments, scaling = ctx.saved_tensors
    asked = ctx.needs_input_grad[: 1 + _OPERANDS]
    form = ctx.form._replace(scaling=scaling)
    found = double_backward(cotangents, dy, Operands(*tensors), segments, ctx.needs, form, asked)
    return *found, *(None,) * (5 + len(ctx.form))


def _operator(register: Callable, name: str, function: Callable, fake: Callable | None) -> Any:
    operator = register(f"tarp_kernels::{name}", function, mutates_args=())
    if fake is not None:
        operator.register_fake(fake)
    differentiate, save = (
        (_differentiate_forward, _save_forward) if function is _forward else (_differentiate_backward, _save_backward)
    )
    operator.register_autograd(differentiate, setup_context=save)
    return operator


_forward_op = _operator(torch.library.custom_op, "lowrank_linear", _forward, _forward_fake)
_backward_op = _operator(torch.library.custom_op, "lowrank_linear_backward", _backward, _backward_fake)
_forward_triton_op = _operator(torch.library.triton_op, "lowrank_linear_triton", _forward, None)
_backward_triton_op = _operator(torch.library.triton_op, "lowrank_linear_triton_backward", _backward, None)
