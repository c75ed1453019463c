"""Forward, backward and double backward of `search_cell`."""

import functools
import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from tarp_kernels.ops.search_cell import native, reference
from tarp_kernels.ops.search_cell.layout import Layout, layout
from tarp_kernels.ops.search_cell.weights import CellWeights


@functools.cache
def kernels(backend: str) -> ModuleType:
    """The module of a backend's kernels: forward, backward. Triton is imported when it is needed."""
    return native if backend == "cpu" else importlib.import_module("tarp_kernels.ops.search_cell.triton_kernels")


def apply(
    h: Tensor,
    weights: CellWeights,
    alpha: Tensor,
    causal: bool,
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    segments: Tensor | None,
    backend: str,
) -> Tensor:
    """out for checked arguments."""
    found = layout(h, attention_mask, cu_seqlens, segments)
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
    if backend == "triton" and not differentiable:
        return kernels(backend).step(h, weights, alpha, found, state)
    out, after = reference.search_cell(h, weights, alpha, found, causal=True, state=state)
    assert after is not None
    return out, after.detach()
