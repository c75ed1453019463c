"""The Triton backend of `search_cell`: tensors in, launches, tensors out, no autograd here.

    forward    entry   s0, s1 from one pass over h (a LayerNorm reads it twice more)    one launch
               node    n0, then n1, then n2: the selected operations of their edges     three launches
               exit    out = h + Linear((n0 + n1 + n2) / 3)                             one launch
    step       as forward, each node with the past of the sequences; the state after    one launch more
    backward   skinny  the mean's gradient dout · output / 3                            one launch
               node    n2, then n1, then n0: what flows back into their selected maps   three launches
               input   n1 and n0 in between, then s0 and s1                             four launches
               dense   the gradient of the stem                                         one launch
               sums over rows for each weight that is asked for                         two launches each

Beside out, five arrays [T, C] are written and kept. The kernels are in `triton_forward` and `triton_backward`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from tarp_kernels.ops import constants
from tarp_kernels.ops.lowrank_linear import triton_products as products
from tarp_kernels.ops.lowrank_linear.triton_plans import lanes
from tarp_kernels.ops.search_cell import stems
from tarp_kernels.ops.search_cell.layout import Layout
from tarp_kernels.ops.search_cell.triton_backward import (
    input_backward_kernel,
    matrix_gradient_kernel,
    node_backward_kernel,
)
from tarp_kernels.ops.search_cell.triton_forward import entry_kernel, exit_kernel, node_kernel, state_kernel
from tarp_kernels.ops.search_cell.weights import EDGES, FIRST_EDGES, OPERATIONS, CellWeights
from tarp_kernels.tuning import Tile

WIDEST = 128
"""Of a cell: a tile of rows holds all of its width in registers."""
# Of an edge: its tensor, and which part of it.
MAPS: tuple[tuple[str, int | None], ...] = (("linear", None), ("glu", 0), ("glu", 1), ("conv3", None), ("conv5", None))
TAPS = (1, 1, 1, 3, 5)


class Cell:
    """What all launches of one call share."""

    def __init__(self, h: Tensor, weights: CellWeights, alpha: Tensor, found: Layout, causal: bool) -> None:
        if weights.width > WIDEST:
            raise ValueError(
                f"backend='triton': got a cell of width C = {weights.width}, expected at most {WIDEST}; use "
                "backend='reference'"
            )
        self.given = h.detach().reshape(-1, h.shape[-1])
        self.found, self.causal, self.values = found, causal, alpha.reshape(-1, EDGES, len(OPERATIONS)).tolist()
        self.h = _plain(found.tokens(self.given))
        self.weights = weights.map(_plain)
        (self.count, self.d), self.width = self.h.shape, weights.width
        many = len(found.parts) > 1 or weights.per_task or alpha.dim() == 3
        self.rows = products.Rows(self.h, found.task_ends(h.device) if many else None)
        self.weight_rows = self.rows if weights.per_task else products.Rows(self.h, None)
        self.positions, self.lengths = found.places(h.device)
        self.alpha = constants.on(h.device, alpha.float())
        self.alpha_task = self.alpha.stride(0) if alpha.dim() == 3 else 0
        self.block = 16 if h.dtype == torch.float32 else 32
        self.common: dict[str, Any] = {
            **self.rows.common,
            "PER_TASK": weights.per_task,
            "BT": self.block,
            "C": lanes(weights.width),
            "num_warps": 8,
        }
        self.edges = {
            **self.common,
            "CAUSAL": causal,
            # Slices that leave registers for all else; without a limit the assembler spills for more blocks at a time.
            "BK": min(lanes(weights.width), 32 if self.block == 32 and weights.width <= 64 else 16),
            "maxnreg": 255,
        }

    @property
    def edge_weights(self) -> list[Tensor]:
        """Of one dtype: the kernels choose among them as they run."""
        found = [getattr(self.weights, name) for name in CellWeights._fields[2:10]]
        same = len({tensor.dtype for tensor in found}) == 1
        return found if same else [tensor.float() for tensor in found]


class Saved(NamedTuple):
    """What backward needs of forward."""

    nodes: Tensor  # s0, s1, n0, n1, n2 [5, T, C] float32


def forward(
    h: Tensor, weights: CellWeights, alpha: Tensor, found: Layout, causal: bool, keep: bool
) -> tuple[Tensor, Saved | None]:
    """out in h's shape and dtype, and what backward needs where that is to be kept."""
    cell = Cell(h, weights, alpha, found, causal)
    out, nodes = torch.empty_like(cell.h), cell.h.new_empty(5, cell.count, cell.width, dtype=torch.float32)
    if cell.h.numel():
        _launch_forward(cell, nodes, out)
    return found.with_padding(out, h), Saved(nodes) if keep else None


def step(h: Tensor, weights: CellWeights, alpha: Tensor, found: Layout, state: Tensor) -> tuple[Tensor, Tensor]:
    """out of the next tokens of each sequence, and the state after them; state [sequences, 4, STATE_ROWS, C] float32.

    The bits of one causal `forward` on the whole sequences, however they are cut.
    """
    cell = Cell(h, weights, alpha, found, causal=True)
    if not cell.h.numel():
        return h.clone(), state.clone()
    out, nodes = torch.empty_like(cell.h), cell.h.new_empty(5, cell.count, cell.width, dtype=torch.float32)
    state, after = _plain(state), torch.empty_like(state, memory_format=torch.contiguous_format)
    _launch_forward(cell, nodes, out, state, found.sequence_numbers(h.device))
    products.launch(
        state_kernel,
        (len(state),),
        *(nodes, state, found.sequence_ends(h.device), after, cell.count, cell.width),
        C=lanes(cell.width),
    )
    return found.with_padding(out, h), after


def _launch_forward(
    cell: Cell, nodes: Tensor, out: Tensor, state: Tensor | None = None, sequences: Tensor | None = None
) -> None:
    """With a state: sequences int32 [T], each token's number in it."""
    rows, h, w, d, width = cell.rows, cell.h, cell.weights, cell.d, cell.width
    grid = rows.tiles(cell.block)
    products.launch(
        entry_kernel,
        (grid,),
        *(h, w.norm, w.norm_bias, w.project, w.project_bias, rows.segments, nodes, rows.count, rows.tasks),
        *(d, width, w.eps),
        **cell.common,
        NORM=w.norm is not None,
        EVEN=d % 32 == 0,
        BK=32,
    )
    arguments = (h, nodes, cell.alpha, *cell.edge_weights, cell.positions, cell.lengths)
    for inputs, first in enumerate(FIRST_EDGES, 2):
        products.launch(
            node_kernel,
            (grid,),
            *(*arguments, state, sequences, rows.segments, rows.count, rows.tasks, cell.alpha_task, width),
            *(first, inputs),
            **cell.edges,
            STATE=state is not None,
        )
    products.launch(
        exit_kernel,
        (grid, triton.cdiv(d, 64)),
        *(h, nodes, w.output, w.output_bias, rows.segments, out, rows.count, rows.tasks, d, width),
        **cell.common,
        BN=64,
    )


# --- backward --------------------------------------------------------------------------------------------------------


def backward(
    dout: Tensor,
    h: Tensor,
    weights: CellWeights,
    alpha: Tensor,
    found: Layout,
    causal: bool,
    saved: Saved,
    needs: Sequence[str],
) -> dict[str, Tensor]:
    """The gradients of the tensors that `needs` names ("h", "alpha", fields of `CellWeights`), each in its dtype.

    Weights that no task selected are left out.
    """
    cell = Cell(h, weights, alpha, found, causal)
    given = {"h": h, "alpha": alpha, **weights.tensors}
    if not cell.h.numel():
        return {name: torch.zeros_like(given[name]) for name in needs if name != "h"} | {"h": dout.clone()}
    nodes = saved.nodes
    dtokens = _plain(found.tokens(dout.reshape(-1, cell.d)))
    out: dict[str, Tensor] = {}
    dmean = torch.empty_like(nodes[0])
    products.skinny(cell.rows, dtokens, cell.weights.output.mT / 3, dmean)
    mean = (nodes[2:].sum(0) / 3).to(h.dtype)
    _sums(cell, dtokens, mean, out, needs, "output", cell.d)
    slots, flow, ds = _through_nodes(cell, nodes, dmean, out, "alpha" in needs)
    _edge_gradients(cell, nodes, slots, flow, out, needs)
    stem = cell.h
    if cell.weights.norm is not None:
        stem = stems.normed(cell.h, cell.weights, found)
    _sums(cell, ds, stem, out, needs, "project", 2 * cell.width)
    if {"h", "norm", "norm_bias"} & set(needs):
        dstem = torch.empty_like(cell.h)
        empty = cell.h.new_empty(cell.d, 0)
        projections = cell.weights.project.flatten(-3, -2).mT.to(h.dtype)  # [d, 2 C]
        tile = Tile(cell.block, 64, 32, warps=8)
        products.dense(cell.rows, ds[:, :0], empty, None, ds, projections, dstem, tile)
        out |= stems.gradients(dstem, dtokens, cell.h, cell.weights, found)
    if "h" in needs:
        out["h"] = found.with_padding(out["h"], dout)
    return {n: out[n].reshape(given[n].shape).to(given[n]) for n in needs if n in out}  # alpha may lie on the CPU


def _sums(
    cell: Cell, a: Tensor, b: Tensor, out: dict[str, Tensor], needs: Sequence[str], name: str, columns: int
) -> None:
    """The gradients of a matrix and of its bias, aᵀ b and the sums of a's columns."""
    like = getattr(cell.weights, name)
    for key, other in ((name, b), (f"{name}_bias", None)):
        if key in needs:
            out[key] = torch.empty_like(getattr(cell.weights, key) if other is None else like)
            products.tall(cell.weight_rows, a, other, {key: columns}, out)


def _through_nodes(
    cell: Cell, nodes: Tensor, dmean: Tensor, out: dict[str, Tensor], wants_alpha: bool
) -> tuple[list[list[int]], Tensor, Tensor]:
    """(slot of each edge's maps or -1, what flows back into those maps, the gradient of both projections [T, 2 C])."""
    rows, width = cell.rows, cell.width
    slots, used = [[-1] * len(MAPS) for _ in range(EDGES)], 0
    for edge in range(EDGES):
        for number, (name, _) in enumerate(MAPS):
            if any(values[edge][OPERATIONS.index(name)] != 0 for values in cell.values):
                slots[edge][number], used = used, used + 1
    table = constants.on(cell.h.device, torch.tensor(slots, dtype=torch.int32))
    flow = cell.h.new_empty(max(used, 1), cell.count, width)
    ds = cell.h.new_empty(cell.count, 2 * width)
    dnodes = torch.empty_like(nodes[2:])
    dnodes[2] = dmean
    grid, tasks = rows.tiles(cell.block), max(1, rows.tasks)
    parts = dmean.new_zeros(grid if wants_alpha else 1, EDGES * len(OPERATIONS))
    for node in (2, 1, 0):
        if node < 2:
            _into(cell, nodes, dmean, dnodes, table, flow, node + 2, ds)
        products.launch(
            node_backward_kernel,
            (grid,),
            *(cell.h, nodes, dnodes[node], cell.alpha, *cell.edge_weights, cell.positions, cell.lengths, table),
            *(rows.segments, flow, parts, rows.count, rows.tasks, cell.alpha_task, width),
            *(FIRST_EDGES[node], node + 2),
            **cell.edges,
            ALPHA=wants_alpha,
        )
    for source in (0, 1):
        _into(cell, nodes, dmean, dnodes, table, flow, source, ds)
    if wants_alpha:
        total = parts.new_empty(tasks, parts.shape[1])
        products.add_chunks(rows, parts, total, cell.block)
        out["alpha"] = total if cell.alpha.dim() == 3 else total.sum(0)
    return slots, flow, ds


def _into(
    cell: Cell, nodes: Tensor, dmean: Tensor, dnodes: Tensor, slots: Tensor, flow: Tensor, node: int, ds: Tensor
) -> None:
    rows = cell.rows
    products.launch(
        input_backward_kernel,
        (rows.tiles(cell.block),),
        *(cell.h, nodes, dmean, dnodes, cell.alpha, *cell.edge_weights[::2], cell.positions, cell.lengths),
        *(slots, rows.segments, flow, ds, rows.count, rows.tasks, cell.alpha_task, cell.width, node),
        **cell.edges,
    )


def _edge_gradients(
    cell: Cell, nodes: Tensor, slots: list[list[int]], flow: Tensor, out: dict[str, Tensor], needs: Sequence[str]
) -> None:
    """Gradients of the maps' matrices and biases; edges without a selected map keep zeros beside those with one."""
    rows, width, chunk = cell.weight_rows, cell.width, 1024
    tasks = max(1, rows.tasks)
    for edge in range(EDGES):
        source = edge - FIRST_EDGES[sum(edge >= first for first in FIRST_EDGES) - 1]
        for number, (name, half) in enumerate(MAPS):
            slot, taps = slots[edge][number], TAPS[number]
            if slot < 0:
                continue
            for key in (name, f"{name}_bias"):
                if key in needs and key not in out:
                    out[key] = torch.zeros_like(getattr(cell.weights, key))
            if name in needs:
                own = flow.new_empty(tasks, taps * width * width, dtype=torch.float32)
                parts = own.new_empty(rows.tiles(chunk), taps * width * width)
                products.launch(
                    matrix_gradient_kernel,
                    (rows.tiles(chunk), taps),
                    *(cell.h, nodes, flow, cell.positions, cell.lengths, rows.segments, parts),
                    *(rows.count, rows.tasks, slot, source, width),
                    **rows.common,
                    SIZE=taps,
                    CAUSAL=cell.causal,
                    CHUNK=chunk,
                    BT=cell.block,
                    C=lanes(width),
                    num_warps=8,
                )
                products.add_chunks(rows, parts, own, chunk)
                _place(out[name], cell, edge, half, own)
            if f"{name}_bias" in needs:
                summed = flow.new_empty(tasks, width, dtype=torch.float32)
                products.tall(rows, flow[slot], None, {"sum": width}, {"sum": summed})
                _place(out[f"{name}_bias"], cell, edge, half, summed)


def _place(target: Tensor, cell: Cell, edge: int, half: int | None, values: Tensor) -> None:
    """Write each task's values to its place in a stacked gradient."""
    place = target[:, edge] if cell.weights.per_task else target[edge][None]
    if half is not None:
        place = place[:, half]
    place.copy_(values.reshape(place.shape))


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().resolve_neg().contiguous()
