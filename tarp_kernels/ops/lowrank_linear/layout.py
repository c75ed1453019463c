"""What the compiled backends share around their kernels: room for what backward needs, and the layout of arguments.

h, s, u are what the kernels keep for backward, all float32:
h = x Vᵀ [T, r];  s = g(x) [T, S], S = 0 without generator;  u = x w1ᵀ + b1 [T, m] of an MLP generator, else [T, 0].
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tarp_kernels.ops.lowrank_linear.contract import Form, Operands

Saved = tuple[Tensor, Tensor, Tensor]


class Selection(NamedTuple):
    """Which rows a call computes: its row i is row read[i] of x and dx, and row write[i] of y and dy.

    Strictly rising int64 [T'] on x's device; None: row i is row i. What counts rows (segments, dropout, h, s, u) counts
    the call's.
    """

    read: Tensor | None
    write: Tensor | None

    def count(self, x: Tensor) -> int:
        """How many rows the call has."""
        return (x if self.read is None else self.read).shape[0]

    def picked(self, dy: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """The call's rows of dy and x, copied."""
        return (
            dy if self.write is None else dy.index_select(0, self.write),
            x if self.read is None else x.index_select(0, self.read),
        )


def empty_saved(operands: Operands, form: Form, selection: Selection | None = None) -> Saved:
    """Room for h, s, u."""
    x, count = operands.x, operands.x.shape[0] if selection is None else selection.count(operands.x)
    rank = operands.V.shape[-2]
    outputs = form.outputs(operands)
    hidden = 0 if operands.w1 is None or operands.w2 is None else operands.w1.shape[-2]
    return empty_floats(x, count, rank), empty_floats(x, count, outputs), empty_floats(x, count, hidden)


def empty_floats(x: Tensor, count: int, columns: int) -> Tensor:
    """Room for `columns` float32 numbers for each of a call's rows."""
    return x.new_empty((count, columns), dtype=torch.float32)


def rows(x: Tensor) -> Tensor:
    """x with adjacent elements in each row."""
    return x.resolve_neg() if x.shape[1] <= 1 or x.stride(1) == 1 else x.contiguous()


def arranged(operands: Operands, plain: Callable[[Tensor], Tensor]) -> Operands:
    """The operands as kernels take them: `rows` of x, any strides of weight, `plain` adapter tensors."""
    x, weight, bias, *adapter = operands
    tensors: Any = (None if tensor is None else plain(tensor) for tensor in adapter)
    return Operands(rows(x), weight.resolve_neg(), None if bias is None else bias.contiguous().resolve_neg(), *tensors)


def dense_gradients(
    dy: Tensor, operands: Operands, wanted: list[str], selection: Selection | None = None
) -> dict[str, Tensor]:
    """Gradients of weight and bias through the dense product alone: no kernel of ours runs for them."""
    found: dict[str, Tensor] = {}
    if "weight" not in wanted and "bias" not in wanted:
        return found
    x = operands.x
    if selection is not None:  # PyTorch's product takes no index
        dy, x = selection.picked(dy, x)
    if "weight" in wanted and operands.P is None:
        found["weight"] = dy.t() @ x
    if "bias" in wanted:
        found["bias"] = dy.sum(0)
    return found
