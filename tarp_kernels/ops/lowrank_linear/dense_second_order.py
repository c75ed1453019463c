"""The dense half of second-order gradients where W has a factor, a few columns of W at a time.

All first-order gradients of x (Φ ⊙ W)ᵀ are the gradients of one number, a sum over tasks and columns:

    ψ = Σ_t ⟨x_t (Φ ⊙ W)ᵀ, dy_t⟩ = Σ ⟨dyᵀ x, Φ ⊙ W⟩ over each task's rows

so the columns can be differentiated twice one group after the other, and nothing of W's size is held. The offsets of
tasks are read by the host.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from tarp_kernels.ops.factor import FACTORS
from tarp_kernels.ops.lowrank_linear import reference
from tarp_kernels.ops.lowrank_linear.contract import Operands

COLUMNS = 256


def dense_number(dy: Tensor, operands: Operands, segments: Tensor | None, activation: str) -> Tensor:
    """ψ in the accumulation dtype as one graph, for derivatives of yet higher order; takes tensors of W's size."""
    total = dy.new_zeros((), dtype=reference.accumulation_dtype(dy.dtype))
    for index in _groups(operands, segments, operands.x.shape[1]):
        total = total + _number({name: t[index[name]] for name, t in _tensors(dy, operands).items()}, activation)
    return total


def dense_double_backward(
    cotangents: Mapping[str, Tensor],
    dy: Tensor,
    operands: Operands,
    segments: Tensor | None,
    activation: str,
    asked: set[str],
) -> dict[str, Tensor]:
    """What ψ's gradients add to the gradients of "dy", "x", "weight", "P", "Q", those in `asked`."""
    tensors = _tensors(dy, operands)
    total = {name: torch.zeros_like(tensor) for name, tensor in tensors.items() if name in asked}
    directions = {name: cotangents[name] for name in tensors if name in cotangents}
    if not total or not directions:
        return {}
    for index in _groups(operands, segments, COLUMNS):
        with torch.enable_grad():
            parts = {name: t[index[name]].detach().requires_grad_() for name, t in tensors.items()}
            number = _number(parts, activation)
            first = torch.autograd.grad(number, [parts[name] for name in directions], create_graph=True)
            given = [direction[index[name]].to(number.dtype) for name, direction in directions.items()]
            second = torch.autograd.grad(first, [parts[name] for name in total], given, allow_unused=True)
        for (name, sum_), own in zip(total.items(), second, strict=True):
            if own is not None:
                sum_[index[name]] += own
    return total


def _tensors(dy: Tensor, operands: Operands) -> dict[str, Tensor]:
    """What ψ is made of, in the accumulation dtype."""
    wide = reference.accumulation_dtype(dy.dtype)
    named: dict[str, Any] = {"dy": dy} | {name: getattr(operands, name) for name in ("x", "weight", "P", "Q")}
    return {name: tensor.to(wide) for name, tensor in named.items()}


def _groups(operands: Operands, segments: Tensor | None, columns: int) -> Iterator[dict[str, Any]]:
    """Where each task's group of columns lies in every tensor; none straddles a block of P."""
    P, Q = operands.P, operands.Q
    assert P is not None and Q is not None
    blocks = P.shape[-3] if P.dim() == (3 if segments is None else 4) else None
    width = Q.shape[-1]
    for task, rows in reference.task_rows(operands.x, segments):
        for block in range(blocks or 1):
            for start in range(0, width, columns):
                own = slice(start, min(start + columns, width))
                whole = slice(block * width + own.start, block * width + own.stop)
                lead = () if task is ... else (task,)
                yield {
                    "dy": (rows,),
                    "x": (rows, whole),
                    "weight": (slice(None), whole),
                    "P": lead if blocks is None else (*lead, block),
                    "Q": (*lead, slice(None), own),
                }


def _number(parts: Mapping[str, Tensor], activation: str) -> Tensor:
    phi = FACTORS[activation](parts["P"] @ parts["Q"])
    return (parts["dy"].t() @ parts["x"] * parts["weight"] * phi).sum()
