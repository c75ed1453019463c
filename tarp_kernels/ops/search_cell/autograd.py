"""Forward, backward and double backward of `search_cell`, eager and through torch.library.

Eager calls go straight to an autograd.Function; compiled, faked and traced ones go through the registered operators
`tarp_kernels::search_cell` and `tarp_kernels::search_cell_backward`, which run the same code and are opaque: alpha and
the offsets are read inside, so one graph serves every architecture. What backward needs has a size that depends on
alpha, so there the backward operator runs forward once more instead.
"""

import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from tarp_kernels.ops.dispatch import autograd_inside_an_operator, needs_dispatcher
from tarp_kernels.ops.search_cell import native, reference
from tarp_kernels.ops.search_cell.contract import check_layout
from tarp_kernels.ops.search_cell.layout import Layout, layout
from tarp_kernels.ops.search_cell.weights import CellWeights


@functools.cache
def kernels(backend: str) -> ModuleType:
    """The module of a backend's kernels: forward, backward. Triton is imported when it is needed."""
    return native if backend == "cpu" else importlib.import_module(f"tarp_kernels.ops.search_cell.{backend}_kernels")


def apply(
    h: Tensor,
    weights: CellWeights,
    alpha: Tensor,
    causal: bool,
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    segments: Tensor | None,
    backend: str,
    layouts: Callable[..., Layout] = layout,
) -> Tensor:
    """out for checked arguments. layouts: `layout`, or `Layouts` that remember what it found; eager calls ask it."""
    if needs_dispatcher(h):
        return _forward_op(h, alpha, *weights[:-1], attention_mask, cu_seqlens, segments, causal, weights.eps, backend)
    found = layouts(h, attention_mask, cu_seqlens, segments)
    if backend == "reference":
        return reference.search_cell(h, weights, alpha, found, causal=causal)[0]
    tensors = (h, alpha, *weights[:-1])
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        return _SearchCell.apply(kernels(backend), found, causal, weights.eps, *tensors)
    return kernels(backend).forward(h, weights, alpha, found, causal, keep=False)[0]


_NAMES = ("h", "alpha", *CellWeights._fields[:-1])


class _SearchCell(torch.autograd.Function):
    """A backend's kernels; derivatives of backward come from the reference formulas."""

    @staticmethod
    def forward(ctx, own, found, causal, eps, h, alpha, *weights):
        out, saved = own.forward(h, CellWeights(*weights, eps), alpha, found, causal, keep=True)
        ctx.own, ctx.found, ctx.causal, ctx.eps = own, found, causal, eps
        ctx.save_for_backward(*saved, h, alpha, *weights)
        return out

    @staticmethod
    def backward(ctx, dout):
        tensors = ctx.saved_tensors  # once: under activation checkpointing each look recomputes
        kept, (h, alpha, *weights) = tensors[: -len(_NAMES)], tensors[-len(_NAMES) :]
        needs = [name for name, needed in zip(_NAMES, ctx.needs_input_grad[4:], strict=True) if needed]
        if torch.is_grad_enabled():  # create_graph=True
            found = _differentiable_backward(dout, (h, alpha, *weights), ctx.eps, ctx.found, ctx.causal, needs)
        else:
            cell, saved = CellWeights(*weights, ctx.eps), ctx.own.Saved(*kept)
            found = ctx.own.backward(dout, h, cell, alpha, ctx.found, ctx.causal, saved, needs)
        return *(None,) * 4, *(found.get(name) for name in _NAMES)


def _differentiable_backward(dout, tensors, eps: float, found: Layout, causal: bool, needs: list[str]):
    """The gradients as functions of dout and every tensor."""
    # Views: a derivative for one tensor does not run on through the history of another.
    views: list[Any] = [None if tensor is None else tensor.view_as(tensor) for tensor in tensors]
    h, alpha, *weights = views
    out = reference.search_cell(h, CellWeights._make((*weights, eps)), alpha, found, causal=causal)[0]
    named = dict(zip(_NAMES, views, strict=True))
    gradients = torch.autograd.grad(out, [named[n] for n in needs], dout, create_graph=True, allow_unused=True)
    return dict(zip(needs, gradients, strict=True))


def step(
    h: Tensor,
    weights: CellWeights,
    alpha: Tensor,
    state: Tensor,
    attention_mask: Tensor | None,
    segments: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(out, state) for checked arguments.

    Where a gradient is asked for, the reference formulas run: they are differentiable.
    """
    found = layout(h, attention_mask, None, segments)
    tensors = (h, alpha, *weights.tensors.values())
    differentiable = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    if backend != "reference" and not differentiable:
        return kernels(backend).step(h, weights, alpha, found, state)
    out, after = reference.search_cell(h, weights, alpha, found, causal=True, state=state)
    assert after is not None
    return out, after.detach()


# --- torch.library ---------------------------------------------------------------------------------------------------


_LAYOUT = ("attention_mask", "cu_seqlens", "segments")
_TENSORS = len(_NAMES) + len(_LAYOUT)
_ARGUMENTS = ", ".join(
    [f"Tensor{'?' if name.startswith('norm') else ''} {name}" for name in _NAMES]
    + [f"Tensor? {name}" for name in _LAYOUT]
    + ["bool causal", "float eps", "str backend"]
)


def _forward(h, alpha, *rest):
    *weights, attention_mask, cu_seqlens, segments, causal, eps, backend = rest
    cell = CellWeights._make((*weights, eps))
    check_layout(h, cu_seqlens, segments)
    found = layout(h, attention_mask, cu_seqlens, segments)
    if not found.parts:
        return h.clone()
    if backend == "reference":
        return reference.search_cell(h, cell, alpha, found, causal=causal)[0]
    return kernels(backend).forward(h, cell, alpha, found, causal, keep=False)[0]


def _backward(dout, *arguments):
    *given, attention_mask, cu_seqlens, segments, causal, eps, backend, needs = arguments
    h, alpha, *weights = tensors = [None if tensor is None else tensor.detach() for tensor in given]
    found = layout(h, attention_mask, cu_seqlens, segments)
    names = [name for name, needed in zip(_NAMES, needs, strict=True) if needed]
    like = dict(zip(_NAMES, tensors, strict=True))
    dout = dout.detach()
    with autograd_inside_an_operator(), torch.autocast(h.device.type, enabled=False):
        if not found.parts:
            gradients: Any = {"h": dout.clone()}
        elif backend == "reference":
            gradients = _reference_backward(dout, like, eps, found, causal, names)
        else:
            cell = CellWeights._make((*weights, eps))
            _, saved = kernels(backend).forward(h, cell, alpha, found, causal, keep=True)
            gradients = kernels(backend).backward(dout, h, cell, alpha, found, causal, saved, names)
    return [_owned(gradients.get(name), like[name]) for name in names]


def _reference_backward(dout: Tensor, tensors: dict, eps: float, found: Layout, causal: bool, names: list[str]):
    """Of the tensors that ask for a gradient only: without alpha's, operations that nobody selected do not run."""
    for name in names:
        tensors[name].requires_grad_()
    h, alpha, *weights = tensors.values()
    with torch.enable_grad():
        out = reference.search_cell(h, CellWeights._make((*weights, eps)), alpha, found, causal=causal)[0]
    if not out.requires_grad:  # asked for weights alone that nobody selected
        return {}
    gradients = torch.autograd.grad(out, [tensors[name] for name in names], dout, allow_unused=True)
    return dict(zip(names, gradients, strict=True))


def _owned(gradient: Tensor | None, like: Any) -> Tensor:
    """Zeros where there is none: a compiler counts on a tensor."""
    if gradient is None:
        return torch.zeros(like.shape, dtype=like.dtype, device=like.device)
    return gradient.detach().contiguous()


def _save_forward(ctx, inputs, output):
    ctx.rest = inputs[_TENSORS:]
    ctx.save_for_backward(*inputs[:_TENSORS])


def _differentiate_forward(ctx, dout):
    needs = list(ctx.needs_input_grad[: len(_NAMES)])
    gradients = iter(_backward_op(dout, *ctx.saved_tensors, *ctx.rest, needs))
    return *(next(gradients) if needed else None for needed in needs), *(None,) * (len(_LAYOUT) + len(ctx.rest))


def _operator(name: str, function: Callable, schema: str) -> Any:
    return torch.library.custom_op(f"tarp_kernels::{name}", function, mutates_args=(), schema=schema)


_forward_op = _operator("search_cell", _forward, f"({_ARGUMENTS}) -> Tensor")
_backward_op = _operator("search_cell_backward", _backward, f"(Tensor dout, {_ARGUMENTS}, bool[] needs) -> Tensor[]")
_forward_op.register_fake(lambda h, *_: h.new_empty(h.shape))
_forward_op.register_autograd(_differentiate_forward, setup_context=_save_forward)


@_backward_op.register_fake
def _(dout, *arguments):
    needed = zip(arguments[: len(_NAMES)], arguments[-1], strict=True)
    return [tensor.new_empty(tensor.shape) for tensor, needs in needed if needs]
