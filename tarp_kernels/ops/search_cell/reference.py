"""The oracle of `search_cell`: plain PyTorch that reads like the equations of method.md §3, for any dtype and device.

Masked execution holds here too: only operations with a non-zero alpha run. Everything is computed in float32 (float64
for float64 input) and rounded once. Autograd differentiates it as often as anyone likes.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tarp_kernels.ops import constants
from tarp_kernels.ops.lowrank_linear.reference import accumulation_dtype
from tarp_kernels.ops.search_cell.layout import Layout, Neighbours
from tarp_kernels.ops.search_cell.weights import FIRST_EDGES, OPERATIONS, STATE_ROWS, CellWeights

Values = Sequence[Sequence[float]]  # alpha [9, 6] as the host sees it


class Around:
    """What an operation knows beside its input: how many tokens there are, and the neighbours of each."""

    def __init__(self, neighbours: Neighbours, causal: bool, past: Tensor | None):
        self.neighbours, self.causal = neighbours, causal
        self.past = past  # [sequences, STATE_ROWS, C] of the same input, or None

    def extended(self, x: Tensor) -> Tensor:
        """[x; the past; a zero row], what `Neighbours` counts in."""
        zero = x.new_zeros(1, x.shape[1])
        return torch.cat([x, zero] if self.past is None else [x, self.past.flatten(0, 1), zero])


# --- the operations: input [T, C], or None for a node that is zero because nothing reaches it ------------------------


def affine(x: Tensor | None, weight: Tensor, bias: Tensor, tokens: int) -> Tensor:
    return bias.expand(tokens, -1) if x is None else F.linear(x, weight, bias)


def convolution(x: Tensor | None, taps: Tensor, bias: Tensor, around: Around) -> Tensor:
    """taps [k, C, C]; tap j sees the token j - (k - 1) places on, without causality j - (k - 1) / 2."""
    total = bias.expand(around.neighbours.tokens, -1)
    if x is None:
        return total
    rows, size = around.extended(x), taps.shape[0]
    first = 1 - size if around.causal else (1 - size) // 2
    for j in range(size):
        seen = x if first + j == 0 else rows.index_select(0, around.neighbours.at(first + j))
        total = torch.addmm(total, seen, taps[j].t())
    return total


def operate(name: str, x: Tensor | None, weight: Tensor | None, bias: Tensor | None, around: Around) -> Tensor | None:
    """op(x) [T, C] of one edge in x's dtype; None where that is zero."""
    if name == "identity":
        return x
    assert weight is not None and bias is not None
    tokens = around.neighbours.tokens
    if name == "linear":
        return torch.relu(affine(x, weight, bias, tokens))
    if name == "glu":
        return affine(x, weight[0], bias[0], tokens) * torch.sigmoid(affine(x, weight[1], bias[1], tokens))
    return torch.relu(convolution(x, weight, bias, around))


class _Unselected(torch.autograd.Function):
    """A node as it is, with a gradient for the alpha of an operation that did not run: ⟨∂L/∂node, op(input)⟩.

    The operation runs in backward and is not kept. Its other gradients are alpha = 0 times something, so only second
    derivatives see them: they are made where a graph of backward is.
    """

    @staticmethod
    def forward(ctx, node, alpha, name, around, x, weight, bias):
        ctx.name, ctx.around = name, around
        ctx.save_for_backward(alpha, x, weight, bias)
        return node.view_as(node)

    @staticmethod
    def backward(ctx, dnode):
        found: list[Tensor | None] = [dnode, *(None,) * 6]
        twice = torch.is_grad_enabled()
        # Views: a derivative for one of them does not run on through the history of another.
        saved = dict(zip((1, 4, 5, 6), ctx.saved_tensors, strict=True))
        at = {i: t.view_as(t) if twice and t is not None else t for i, t in saved.items()}
        value = operate(ctx.name, at[4], at[5], at[6], ctx.around)
        if value is None:
            return tuple(found)
        if not twice:
            found[1] = (dnode * value).sum()
            return tuple(found)
        places = [i for i in at if ctx.needs_input_grad[i]]
        gradients = torch.autograd.grad(at[1] * value, [at[i] for i in places], dnode, create_graph=True)
        for i, gradient in zip(places, gradients, strict=True):
            found[i] = gradient
        return tuple(found)


# --- the cell --------------------------------------------------------------------------------------------------------


def node(
    inputs: list[Tensor | None], first: int, edges: dict[str, tuple], alpha: list[Tensor], values: Values, arounds: list
) -> Tensor | None:
    """Σ over edges and operations of alpha · op(input): [T, C], or None where nothing reaches the node."""
    terms, missing = [], []
    for i, x in enumerate(inputs):
        edge = first + i
        for m, name in enumerate(OPERATIONS[1:], 1):
            weight, bias = edges[name][edge] if name in edges else (None, None)
            here = alpha[edge * len(OPERATIONS) + m]
            own = (name, x, weight, bias, arounds[i])
            if values[edge][m] == 0:
                missing.append((here, own))
                continue
            value = operate(*own)
            if value is not None:
                terms.append(value if values[edge][m] == 1 and not here.requires_grad else here * value)
    total = sum(terms[1:], terms[0]) if terms else None
    if alpha[0].requires_grad and torch.is_grad_enabled():
        if total is None:
            total = alpha[0].new_zeros(arounds[0].neighbours.tokens, edges["linear"][0][1].shape[0])
        for here, (name, x, weight, bias, around) in missing:
            total = _Unselected.apply(total, here, name, around, x, weight, bias)
    return total


def stem(h: Tensor, weights: CellWeights) -> Tensor:
    if weights.norm is None or weights.norm_bias is None:
        return h
    return F.layer_norm(h, h.shape[-1:], weights.norm, weights.norm_bias, weights.eps)


def one_task(
    h: Tensor, weights: CellWeights, alpha: Tensor, values: Values, neighbours: Neighbours, causal: bool, state
) -> tuple[Tensor, Tensor | None]:
    """h [T, d] -> out [T, d], all in the accumulation dtype, and the state after it where there was one before."""
    x = stem(h, weights)
    pairs = zip(weights.project, weights.project_bias, strict=True)
    nodes: list[Tensor | None] = [torch.relu(F.linear(x, *pair)) for pair in pairs]  # s0, s1
    edges = {
        name: tuple(zip(getattr(weights, name).unbind(), getattr(weights, f"{name}_bias").unbind(), strict=True))
        for name in OPERATIONS[2:]
    }
    arounds = [Around(neighbours, causal, None if state is None else state[:, i]) for i in range(4)]
    flat = list(alpha.flatten().unbind())
    for first in FIRST_EDGES:
        nodes.append(node(nodes, first, edges, flat, values, arounds))
    reached = [n for n in nodes[2:] if n is not None]
    out = h + weights.output_bias
    if reached:
        out = out + F.linear(sum(reached[1:], reached[0]) / 3, weights.output)
    if state is None:
        return out, None
    last = neighbours.last(STATE_ROWS)  # [sequences, STATE_ROWS]
    carried = [
        around.extended(x.new_zeros(len(x), state.shape[-1]) if n is None else n)[last]
        for n, around in zip(nodes[:4], arounds, strict=True)
    ]
    return out, torch.stack(carried, 1)


def search_cell(
    h: Tensor, weights: CellWeights, alpha: Tensor, found: Layout, *, causal: bool, state: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """out of h's shape, and the state [sequences, 4, STATE_ROWS, C] after the call where one came; rounded once."""
    rows = h.reshape(-1, h.shape[-1])
    tokens = rows if found.rows is None else rows[found.rows]
    wide, values = tokens.to(accumulation_dtype(h.dtype)), alpha.tolist()
    weights = weights.map(lambda tensor: tensor.to(wide))
    if alpha.device != h.device and not alpha.requires_grad:
        alpha = constants.on(h.device, alpha.to(wide.dtype))
    alpha = alpha.to(wide)
    outs, states, sequence = [], [], 0
    for task, part in enumerate(found.parts):
        own = weights.of_task(task) if weights.per_task else weights
        per_task = alpha.dim() == 3
        neighbours = found.neighbours(task, 0 if state is None else STATE_ROWS, h.device)
        before = None if state is None else state[sequence : sequence + neighbours.sequences].to(wide.dtype)
        out, after = one_task(
            wide[part.start : part.end],
            own,
            alpha[task] if per_task else alpha,
            values[task] if per_task else values,
            neighbours,
            causal,
            before,
        )
        outs.append(out)
        states.append(after)
        sequence += neighbours.sequences
    out = (torch.cat(outs) if outs else wide).to(h.dtype)
    if found.rows is not None:
        out = rows.index_copy(0, found.rows, out)  # padding stays as it came
    if state is None or not states:
        return out.reshape(h.shape), state
    return out.reshape(h.shape), torch.cat(states)  # type: ignore[arg-type]
