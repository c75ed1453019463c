"""What the compiled backends share around their kernels: room for what backward needs, and the layout of arguments.

h, s, u are what the kernels keep for backward, all float32:
h = x Vᵀ [T, r];  s = g(x) [T, S], S = 0 without generator;  u = x w1ᵀ + b1 [T, m] of an MLP generator, else [T, 0].
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tarp_kernels.ops.lowrank_linear.contract import Form, Operands

Saved = tuple[Tensor, Tensor, Tensor]


def empty_saved(operands: Operands, form: Form) -> Saved:
    """Room for h, s, u."""
    rank = operands.V.shape[-2]
    outputs = form.outputs(operands)
    hidden = 0 if operands.w1 is None or operands.w2 is None else operands.w1.shape[-2]
    return empty_floats(operands.x, rank), empty_floats(operands.x, outputs), empty_floats(operands.x, hidden)


def empty_floats(x: Tensor, columns: int) -> Tensor:
    """Room for `columns` float32 numbers for each row of x."""
    return x.new_empty((x.shape[0], columns), dtype=torch.float32)


def rows(x: Tensor) -> Tensor:
    """x with adjacent elements in each row."""
    return x.resolve_neg() if x.shape[1] <= 1 or x.stride(1) == 1 else x.contiguous()


def arranged(operands: Operands, plain: Callable[[Tensor], Tensor]) -> Operands:
    """The operands as kernels take them: `rows` of x, any strides of weight, `plain` adapter tensors."""
    x, weight, bias, *adapter = operands
    tensors: Any = (None if tensor is None else plain(tensor) for tensor in adapter)
    return Operands(rows(x), weight.resolve_neg(), None if bias is None else bias.contiguous().resolve_neg(), *tensors)


def dense_gradients(dy: Tensor, operands: Operands, wanted: list[str]) -> dict[str, Tensor]:
    """Gradients of weight and bias through the dense product alone: no kernel of ours runs for them."""
    found = {}
    if "weight" in wanted and operands.P is None:
        found["weight"] = dy.t() @ operands.x
    if "bias" in wanted:
        found["bias"] = dy.sum(0)
    return found
