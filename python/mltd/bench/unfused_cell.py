"""The search cell as a reader of the paper would write it: plain PyTorch, every operation of every edge, then a sum."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tarp_kernels import SearchCell
from tarp_kernels.nn.cell_beside import CellBeside
from tarp_kernels.ops.search_cell import OPERATIONS, CellWeights

INPUTS = ((0, 1), (0, 1, 2), (0, 1, 2, 3))  # of n0, n1, n2 among s0, s1, n0, n1


def unfused_cell(h: Tensor, weights: CellWeights, alpha: Tensor, causal: bool, skipping: bool = False) -> Tensor:
    """One call per symbol, torch's own convolutions: h [B, S, d] whole sequences of one task -> the same shape.

    alpha     [9, 6]
    skipping  False: every operation of every edge runs, as in the paper's code; True: those with alpha = 0 do not
    """
    x = h if weights.norm is None else F.layer_norm(h, h.shape[-1:], weights.norm, weights.norm_bias, weights.eps)
    pairs = zip(weights.project, weights.project_bias, strict=True)
    nodes = [torch.relu(F.linear(x, *pair)) for pair in pairs]  # [B, S, C] each
    values, edge = alpha.tolist(), 0
    for inputs in INPUTS:
        terms = []
        for i in inputs:
            for m, name in enumerate(OPERATIONS):
                if not skipping or values[edge][m] != 0:
                    terms.append(alpha[edge, m] * operate(name, edge, nodes[i], weights, causal))
            edge += 1
        nodes.append(sum(terms[1:], terms[0]))
    return h + F.linear((nodes[2] + nodes[3] + nodes[4]) / 3, weights.output, weights.output_bias)


def operate(name: str, edge: int, x: Tensor, weights: CellWeights, causal: bool) -> Tensor:
    """One operation of one edge: x [B, S, C] -> [B, S, C]."""
    if name == "none":
        return torch.zeros_like(x)
    if name == "identity":
        return x
    weight, bias = getattr(weights, name)[edge], getattr(weights, f"{name}_bias")[edge]
    if name == "linear":
        return torch.relu(F.linear(x, weight, bias))
    if name == "glu":
        return F.linear(x, weight[0], bias[0]) * torch.sigmoid(F.linear(x, weight[1], bias[1]))
    taps = len(weight)
    left = taps - 1 if causal else taps // 2
    padded = F.pad(x.transpose(1, 2), (left, taps - 1 - left))
    return torch.relu(F.conv1d(padded, weight.permute(1, 2, 0), bias)).transpose(1, 2)


class UnfusedCell(SearchCell):
    """SearchCell in plain PyTorch, with weights of its own that equal the cell's; `skipping` as in `unfused_cell`."""

    def __init__(self, cell: SearchCell, skipping: bool):
        super().__init__(cell.hidden_size, cell.width, cell.stem, cell.causal)
        self.skipping = skipping
        self.load_state_dict(cell.state_dict())

    def forward(self, h, alpha, attention_mask=None, segments=None):
        if attention_mask is not None or segments is not None:
            raise ValueError("unfused: knows whole sequences of one task only")
        return unfused_cell(h, self.weights(), alpha, self.causal, self.skipping)


class UnfusedBeside(CellBeside):
    """The cells of a model in plain PyTorch, all six operations; inside ``task_parallel`` one task after the other."""

    def _beside(self, h: Tensor, call: Any) -> Tensor:
        if call.cache is not None or not (call.mask is None or bool(call.mask.all())):
            raise ValueError("unfused: knows whole sequences without padding only")
        alpha = self.full_alpha(self._architecture(call))
        if self.stacked is None:
            return unfused_cell(h, self.weights(), alpha, self.causal)
        stacks, offsets = self.stacked
        weights, bounds = self.weights(stacks), offsets.offsets.tolist()
        alphas = alpha.expand(len(bounds) - 1, -1, -1)
        parts = [
            unfused_cell(h[start:end], weights.of_task(task), alphas[task], self.causal)
            for task, (start, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True))
        ]
        return torch.cat(parts)


def unfused_cells(model: nn.Module) -> nn.Module:
    """Let, in place, every search cell inside ``model`` run in plain PyTorch, over the same parameters."""
    for cell in model.modules():
        if type(cell) is CellBeside:
            cell.__class__ = UnfusedBeside  # the model's hooks hold on to this very object, so it cannot be replaced
    return model
