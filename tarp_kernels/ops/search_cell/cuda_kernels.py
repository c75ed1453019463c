"""The CUDA backend of `search_cell`, called by pointer: tensors in, launches, tensors out, no autograd here.

    forward    forward    out from h: nothing else is written                                        one launch
    backward   backward   the gradients of h and alpha, and the rows whose sums are those of weights  one launch
               gradients  the sums for the edges' weights, by chunks of rows; then the chunks         two launches
               the sums for the projections and the output, products of matrices                      two launches each

`cuda_plans.refusal` says which calls have a kernel here.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tarp_kernels.ops import constants
from tarp_kernels.ops.lowrank_linear import cuda_gradients
from tarp_kernels.ops.lowrank_linear.cuda_arguments import plain
from tarp_kernels.ops.search_cell import cuda_plans, stems
from tarp_kernels.ops.search_cell.cuda_plans import Windows
from tarp_kernels.ops.search_cell.layout import Layout
from tarp_kernels.ops.search_cell.weights import EDGES, OPERATIONS, CellWeights

EDGE_WEIGHTS = CellWeights._fields[2:10]
MAPS = ("linear", "glu", "glu", "conv3", "conv5")
"""The operation of each affine map of an edge."""


class Saved(NamedTuple):
    """What backward needs of forward: nothing."""


def forward(
    h: Tensor, weights: CellWeights, alpha: Tensor, found: Layout, causal: bool, keep: bool
) -> tuple[Tensor, Saved | None]:
    """out in h's shape and dtype."""
    call = Call(h, weights, alpha, found, causal)
    out = torch.empty_like(call.h)
    if call.h.numel():
        windows = constants.on(h.device, call.windows(back=False, every=False).table)
        stages = cuda_plans.stages(cuda_plans.FORWARD_TILES, 2, h.device)
        tensors = (*call.tensors, call.weights.output_bias, call.alpha, *call.places, windows, out)
        shared_bytes = (cuda_plans.FORWARD_TILES + stages) * cuda_plans.TILE_BYTES
        launch("forward", h.dtype, (len(windows),), shared_bytes, tensors, *call.numbers(stages))
    return found.with_padding(out, h), Saved() if keep else None


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
    call = Call(h, weights, alpha, found, causal)
    given = {"h": h, "alpha": alpha, **weights.tensors}
    if not call.h.numel():
        return {name: torch.zeros_like(given[name]) for name in needs if name != "h"} | {"h": dout.clone()}
    dtokens = plain(found.tokens(dout.reshape(-1, call.d)))
    tokens, width = call.h.shape[0], call.width
    slots = call.slots()
    used = sum(slot >= 0 for slot in slots)
    edges = [name for name in EDGE_WEIGHTS if name in needs and call.selected(name)]

    def rows(wanted: bool, *shape: int) -> Tensor | None:
        return call.h.new_empty(shape) if wanted else None

    stem = rows(bool({"h", "norm", "norm_bias"} & set(needs)), tokens, call.d)
    flow, nodes = rows(bool(edges), used, tokens, width), rows(bool(edges), 4, tokens, width)
    mean = rows("output" in needs, tokens, width)
    ds = rows(bool({"project", "project_bias"} & set(needs)), tokens, 2 * width)
    windows = call.windows(back=True, every="alpha" in needs)
    parts = None
    if "alpha" in needs:
        parts = call.h.new_empty(len(windows.table), EDGES * len(OPERATIONS), dtype=torch.float32)
    table = constants.on(h.device, torch.tensor(slots, dtype=torch.int32))
    stages = cuda_plans.stages(cuda_plans.BACKWARD_TILES, 1, h.device)
    tensors = (*call.tensors, call.alpha, *call.places, constants.on(h.device, windows.table), table, dtokens)
    outs = (stem, parts, flow, nodes, mean, ds)
    shared_bytes = (cuda_plans.BACKWARD_TILES + stages) * cuda_plans.TILE_BYTES
    launch("backward", h.dtype, (len(windows.table),), shared_bytes, (*tensors, *outs), *call.numbers(stages))

    out: dict[str, Tensor] = {}
    if parts is not None:
        if alpha.dim() == 3:
            out["alpha"] = torch.segment_reduce(parts, "sum", offsets=constants.on(h.device, windows.ends), initial=0)
        else:
            out["alpha"] = parts.sum(0)
    if flow is not None and nodes is not None:
        out |= call.edge_gradients(edges, flow, nodes, table, used)
    for name, a, b in (("output", dtokens, mean), ("project", ds, call.stem if "project" in needs else None)):
        for key, other in ((name, b), (f"{name}_bias", None)):
            if key in needs and a is not None:
                out[key] = call.sums(a, other)
    if stem is not None:  # without a LayerNorm the kernel has added dtokens
        out |= stems.gradients(stem, dtokens, call.h, weights, found) if weights.norm is not None else {"h": stem}
    if "h" in needs:
        out["h"] = found.with_padding(out["h"], dout)
    return {n: out[n].reshape(given[n].shape).to(given[n]) for n in needs if n in out}  # alpha may lie on the CPU


class Call:
    """Sizes and tensors of a call as the kernels take them."""

    def __init__(self, h: Tensor, weights: CellWeights, alpha: Tensor, found: Layout, causal: bool):
        self.h = plain(found.tokens(h.detach().reshape(-1, h.shape[-1])))
        (self.count, self.d), self.width, self.found, self.causal = self.h.shape, weights.width, found, causal
        # Matrices enter tensor cores in h's dtype; biases do not, and are all of one.
        vectors = {t.dtype for name, t in weights.tensors.items() if name.endswith("bias") or name == "norm"}
        self.wide = vectors != {h.dtype}
        vector = torch.float32 if self.wide else h.dtype
        dtypes = {name: vector if name.endswith("bias") or name == "norm" else h.dtype for name in weights.tensors}
        tensors: Any = {name: plain(t.detach().to(dtypes[name])) for name, t in weights.tensors.items()}
        self.weights = weights._replace(**tensors)
        self.given = weights
        self.alphas = alpha.reshape(-1, EDGES, len(OPERATIONS)).tolist()
        self.alpha = constants.on(h.device, alpha.float())
        self.places = found.places(h.device)
        self.apart = weights.per_task or alpha.dim() == 3

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """What both kernels begin with, to `output`."""
        w = self.weights
        edges = (getattr(w, name) for name in EDGE_WEIGHTS)
        return (self.h, w.norm, w.norm_bias, w.project, w.project_bias, *edges, w.output)

    def numbers(self, stages: int) -> tuple[tuple[int, ...], float]:
        alpha_task = EDGES * len(OPERATIONS) if self.alpha.dim() == 3 else 0
        flags = (int(self.causal), int(self.weights.per_task), alpha_task, int(self.wide), stages)
        return (self.count, self.d, self.width, *flags), self.weights.eps

    def windows(self, back: bool, every: bool) -> Windows:
        parts = cuda_plans.tasks_of(self.found, self.count, self.apart)
        return cuda_plans.windows(parts, self.alphas, self.causal, back, every)

    def selected(self, name: str) -> bool:
        """Whether some task's edge selected the operation of these weights."""
        operation = OPERATIONS.index(name.removesuffix("_bias"))
        return any(edge[operation] != 0 for alpha in self.alphas for edge in alpha)

    def slots(self) -> list[int]:
        """The array of `flow` for each edge's map that some task selected, -1 for the others."""
        slots: list[int] = []
        for edge in range(EDGES):
            for name in MAPS:
                alive = any(alpha[edge][OPERATIONS.index(name)] != 0 for alpha in self.alphas)
                slots.append(sum(slot >= 0 for slot in slots) if alive else -1)
        return slots

    @property
    def stem(self) -> Tensor:
        """What the projections read."""
        return self.h if self.given.norm is None else stems.normed(self.h, self.given, self.found)

    def edge_gradients(
        self, names: list[str], flow: Tensor, nodes: Tensor, slots: Tensor, used: int
    ) -> dict[str, Tensor]:
        """Of the named tensors; edges without a selected map have zeros beside those with one."""
        parts = cuda_plans.chunks(cuda_plans.tasks_of(self.found, self.count, self.weights.per_task))
        table, ends = (constants.on(flow.device, tensor) for tensor in (parts.table, parts.ends.int()))
        tasks = len(ends) - 1
        dtypes = {getattr(self.given, name).dtype for name in names}
        dtype = flow.dtype if dtypes == {flow.dtype} else torch.float32
        found = {name: flow.new_zeros(getattr(self.given, name).shape, dtype=dtype) for name in names}
        size = cuda_plans.part_size(self.width)
        sums = flow.new_empty(len(table), used, size, dtype=torch.float32)
        arguments = (flow, nodes, *self.places, table, slots, sums)
        launch(
            "gradients", flow.dtype, (len(table), used), cuda_plans.GRADIENT_BYTES, arguments, size, *self.numbers(0)
        )
        every = (found.get(name) for name in EDGE_WEIGHTS)
        wide = dtype == torch.float32
        launch("add", dtype, (-(-size // 256), used, tasks), 0, (sums, ends, slots, *every), self.width, size, wide)
        return found

    def sums(self, a: Tensor, b: Tensor | None) -> Tensor:
        """aᵀ b over the rows of each task, or the sums of a's columns; float32."""
        from tarp_kernels.ops.lowrank_linear.triton_products import Rows  # imports triton

        rows = Rows(a, self.found.task_ends(a.device) if self.weights.per_task else None)
        lead = (rows.tasks,) if self.weights.per_task else ()
        out = a.new_empty(*lead, a.shape[1], 1 if b is None else b.shape[1], dtype=torch.float32)
        cuda_gradients.tall(rows, a, b, {"sums": a.shape[1]}, {"sums": out})
        return out


def launch(
    name: str,
    dtype: torch.dtype,
    grid: tuple[int, ...],
    shared_bytes: int,
    tensors: Sequence[Tensor | None],
    *others: Any,
) -> None:
    """Start a kernel on the current stream. One name for all, so that tests can run the same launches elsewhere."""
    from tarp_kernels import _C

    first: Any = tensors[0]
    stream = torch.cuda.current_stream(first.device).cuda_stream
    pointers = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    start = getattr(_C, f"search_cell_cuda_{name}")
    start((first.device.index, stream, dtype == torch.bfloat16, grid[0], shared_bytes), pointers, *grid[1:], *others)
