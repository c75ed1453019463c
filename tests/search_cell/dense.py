"""The search cell as an unfused mixture of all six operations, sequence by sequence: shares no code with the library.

Convolutions are `torch.nn.functional.conv1d`; nothing is skipped. The mistakes that tests must see are options here.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

EDGES = ((0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2), (2, 3))  # (node, input): inputs s0 s1 n0 n1


class Mistakes(NamedTuple):
    """What a wrong version does differently."""

    other_side: bool = False  # causal and non-causal swapped
    tap: int = 0  # convolutions see the token this many places further on
    flipped: bool = False  # taps in the other order
    no_relu: bool = False
    no_gate: bool = False
    halo_of: int = 0  # > 0: convolutions see nothing beyond multiples of this many tokens
    neighbour: bool = False  # the next task's cell
    joined: bool = False  # sequences flow into each other
    shuffled: bool = False  # alpha of the next edge
    third: bool = False  # the mean forgotten


def larger_norm(size: Tensor, h: Tensor, eps: float) -> Tensor:
    """For size = |h|: as large as what LayerNorm(h) subtracts, with a derivative as large as what its own adds up."""
    rstd = (h.var(-1, correction=0, keepdim=True) + eps).rsqrt()
    normal = ((h - h.mean(-1, keepdim=True)) * rstd).abs()
    steep = rstd * normal * (normal * size).mean(-1, keepdim=True)
    return rstd * (size + size.mean(-1, keepdim=True)) + (steep - steep.detach())


RIGHT = Mistakes()


def shifted_conv(x: Tensor, taps: Tensor, bias: Tensor, causal: bool, wrong: Mistakes) -> Tensor:
    """x [S, C], taps [k, C_out, C_in]."""
    size = taps.shape[0]
    causal = causal != wrong.other_side
    left = (size - 1 if causal else (size - 1) // 2) - wrong.tap
    right = size - 1 - left
    taps = taps.flip(0) if wrong.flipped else taps

    def whole(part: Tensor) -> Tensor:
        padded = F.pad(part.t()[None], (max(left, 0), max(right, 0)))
        return F.conv1d(padded[..., max(-left, 0) :], taps.permute(1, 2, 0), bias)[0, :, : len(part)].t()

    if wrong.halo_of:
        return torch.cat([whole(part) for part in x.split(wrong.halo_of)])
    return whole(x)


def mixture(
    x: Tensor, edge: int, weights: dict[str, Tensor], alpha: Tensor, causal: bool, wrong: Mistakes, larger: bool
):
    def affine(matrix: Tensor, bias: Tensor) -> Tensor:
        return x @ matrix.t() + bias

    relu = (lambda v: v) if wrong.no_relu else torch.relu
    glu, glu_bias = weights["glu"][edge], weights["glu_bias"][edge]
    gate = affine(glu[1], glu_bias[1])
    gate = 1 + gate / 4 if larger else torch.sigmoid(gate)  # larger and steeper where gate ≥ 0
    value = affine(glu[0], glu_bias[0])
    outputs = [
        torch.zeros_like(x),
        x,
        relu(affine(weights["linear"][edge], weights["linear_bias"][edge])),
        value if wrong.no_gate else value * gate,
        relu(shifted_conv(x, weights["conv3"][edge], weights["conv3_bias"][edge], causal, wrong)),
        relu(shifted_conv(x, weights["conv5"][edge], weights["conv5_bias"][edge], causal, wrong)),
    ]
    own = alpha[(edge + 1) % 9 if wrong.shuffled else edge]
    return sum(a * output for a, output in zip(own, outputs, strict=True))


def one_sequence(h: Tensor, weights: dict[str, Tensor], alpha: Tensor, causal: bool, eps: float, wrong: Mistakes, of):
    x = h
    if "norm" in weights and of is None:
        x = F.layer_norm(h, h.shape[-1:], weights["norm"], weights["norm_bias"], eps)
    elif "norm" in weights:
        x = larger_norm(h, of, eps) * weights["norm"] + weights["norm_bias"]
    inputs = [torch.relu(x @ weights["project"][i].t() + weights["project_bias"][i]) for i in range(2)]
    for node in range(3):
        own = [(edge, i) for edge, (n, i) in enumerate(EDGES) if n == node]
        inputs.append(sum(mixture(inputs[i], edge, weights, alpha, causal, wrong, of is not None) for edge, i in own))
    mean = sum(inputs[2:]) / (1 if wrong.third else 3)
    return h + mean @ weights["output"].t() + weights["output_bias"]


def dense_cell(
    h: Tensor,
    weights: dict[str, Tensor],
    alpha: Tensor,
    pieces: list[tuple[list[int], int]],
    *,
    causal: bool,
    eps: float = 1e-5,
    wrong: Mistakes = RIGHT,
    bounds_of: Tensor | None = None,
) -> Tensor:
    """h [T, d]; `pieces` lists every sequence as (its rows, its task). Rows in no sequence come out as they went in.

    With `bounds_of` = h and absolute values for all tensors: at least as large, in value and gradient, as everything
    that is added up on the way.
    """
    lead = weights["output"].dim() == 3
    tasks = len(weights["output"]) if lead else len(alpha) if alpha.dim() == 3 else 1
    if wrong.joined:
        pieces = [
            (sum((rows for rows, task in pieces if task == wanted), []), wanted)
            for wanted in dict.fromkeys(task for _, task in pieces)
        ]
    out = h.clone()
    for rows, task in pieces:
        if wrong.neighbour:
            task = (task + 1) % tasks
        own = {name: tensor[task] for name, tensor in weights.items()} if lead else weights
        index = torch.tensor(rows, dtype=torch.int64)
        of = None if bounds_of is None else bounds_of[index]
        result = one_sequence(h[index], own, alpha[task] if alpha.dim() == 3 else alpha, causal, eps, wrong, of)
        out = out.index_copy(0, index, result)
    return out
