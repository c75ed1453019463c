"""Which calls the CUDA kernels of `search_cell` serve, and how their rows are cut into windows and chunks."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tarp_kernels import tuning
from tarp_kernels.ops.search_cell.layout import Layout
from tarp_kernels.ops.search_cell.weights import FIRST_EDGES, OPERATIONS, CellWeights

WIDEST = 64
"""Of a cell: a node of a window is one tile of 64 x 64."""
WINDOW = 64
"""Rows that a block makes, those that it makes for its neighbours included."""
WIDEST_STEM = 6144
"""Of h, while there are fewer windows than multiprocessors: one block makes all of a row of out."""
FEWEST_PROCESSORS = 108
"""Multiprocessors of the smallest GPU of a data centre that the kernels are meant for."""
CHUNK = 512
"""Rows of a part of the weights' gradients."""
TILE_BYTES = 8192
FORWARD_TILES = 4
BACKWARD_TILES = 10
"""Tiles in shared memory beside those of weights on their way."""
MOST_STAGES = 8
GRADIENT_BYTES = 4 * (64 + 72) * 128
"""Shared memory of the sums over rows: four stages of 64 rows of what flows back, and 72 of what taps see."""

_STATIC_BYTES = 3072  # shared memory of a block that is not tiles, at most
_RESERVED_BYTES = 1024  # of each block, by the GPU
_SPANS = {OPERATIONS.index("conv3"): 2, OPERATIONS.index("conv5"): 4}  # rows that an operation sees beside its own
_NODES = 5

Alpha = Sequence[Sequence[float]]  # [9, 6] of one task


class Windows(NamedTuple):
    """The windows of a launch, int32 [windows, 4] each: the task, the first row, and the rows [begin, end) it owns.

    They are on the CPU, in the order of tasks; `ends` int64 [tasks + 1] says whose they are.
    """

    table: Tensor
    ends: Tensor


def refusal(h: Tensor, weights: CellWeights, named: bool, with_state: bool = False) -> str | None:
    """Why no CUDA kernel serves a call that passed `check`, or unless `named` should not; None where one does."""
    if with_state:
        return "the kernels know no state from before the call"
    if weights.width > WIDEST:
        return f"the cell has width C = {weights.width}, the kernels serve at most {WIDEST}"
    if h.shape[-1] % 8:
        return f"h has shape {list(h.shape)}, the kernels serve d a multiple of 8"
    return None if named or _preferred(h, weights) else "Triton's kernels are the better choice"


def _preferred(h: Tensor, weights: CellWeights) -> bool:
    """Whether the CUDA kernels are the better choice where Triton's serve too: as measured, or else as estimated.

    What is compiled goes by the estimate: a compiler would take the reading of a table for a part of the model.
    """
    if not torch.compiler.is_compiling():
        key = tuning.CellKey(str(h.dtype).removeprefix("torch."), h.shape[-1], weights.width, weights.per_task)
        faster = tuning.faster_for_cell(key, h.shape[:-1].numel(), h.device)
        if faster is not None:
            return faster == "cuda"
    return _estimated(h)


def _estimated(h: Tensor) -> bool:
    """Whether the CUDA kernels should be the faster ones, by bytes and operations.

    Where every multiprocessor has blocks they should, because both are bound by the bytes that come from the
    second-level cache:
    - Nodes. Triton's five launches write five float32 nodes a row and read twelve, 68 C bytes, beside h twice and out,
      6 d: at d = 768 and C = 64 that is 4352 and 4608. In CUDA nodes do not leave their block.
    - Weights. A block reads every selected matrix, 2 C² bytes, for its rows: 32 in Triton. A window of 64 rows owns 60
      in the published cell, 52 where three five-tap convolutions follow each other, and backward, which has rows to
      spare on both sides, 40: it still reads less than Triton does. What it makes twice, up to 64 / 40 of the products,
      hides behind the copies: a product takes a fifth of the time of its matrix.
    - Backward makes the nodes again, once the products of forward. Triton's reads what forward kept, but multiplies
      again too, for the slopes; and it sums each selected map by launches of its own, about forty with the others,
      where the CUDA kernels need eleven.

    Of few rows, fewer windows than multiprocessors, what counts is the way through one block. CUDA's takes the weights
    of the projections and of the output, 3 d / 64 tiles of 64 x 64; Triton's takes the first 2 d / 64, its blocks of
    the output are side by side. That it has twice as many tiles of rows helps it little, since copies bind and not
    products, and it starts four more launches one behind the other, each for the time of about 25 tiles. So CUDA should
    be behind where d / 64 is about a hundred.
    """
    return h.shape[-1] <= WIDEST_STEM or h.shape[:-1].numel() >= WINDOW * FEWEST_PROCESSORS


def halo(alpha: Alpha, every: bool) -> int:
    """Rows beside its own that a chain of selected convolutions makes a row of out see, of all nodes the most.

    every  each operation looks at its node's owned rows once, selected or not
    """
    reach = [max(_SPANS.values()) if every else 0] * _NODES
    reach[-1] = 0  # n2, which no edge reads
    for reader, first in reversed(list(enumerate(FIRST_EDGES, 2))):
        for source in range(reader):
            spans = [_SPANS.get(m, 0) for m, a in enumerate(alpha[first + source]) if m > 0 and a != 0]
            if spans:
                reach[source] = max(reach[source], max(spans) + reach[reader])
    return max(reach)


def windows(
    parts: Sequence[tuple[int, int]], alphas: Sequence[Alpha], causal: bool, back: bool, every: bool
) -> Windows:
    """The windows of tasks with rows [start, end), forward or `back`.

    Forward sees only what lies on the side of the past, or as much on either side. Back needs the halo of what reads a
    row as well, and that is on the other side.
    """
    found = []
    for task in range(len(parts)):
        seen = halo(alphas[task if len(alphas) > 1 else 0], every)
        before = seen if back or causal else seen // 2
        found.append((before, WINDOW - before - (seen if back else seen - before)))
    return _cut(parts, found)


def chunks(parts: Sequence[tuple[int, int]]) -> Windows:
    """The chunks of tasks with rows [start, end): windows that own all of their rows."""
    return _cut(parts, [(0, CHUNK)] * len(parts))


def _cut(parts: Sequence[tuple[int, int]], sizes: Sequence[tuple[int, int]]) -> Windows:
    """sizes: rows in front of those that a window of the task owns, and how many it owns."""
    found, ends = [], [0]
    for task, ((start, end), (before, owned)) in enumerate(zip(parts, sizes, strict=True)):
        begins = torch.arange(start, end, owned, dtype=torch.int32)
        columns = (torch.full_like(begins, task), begins - before, begins, (begins + owned).clamp(max=end))
        found.append(torch.stack(columns, 1))
        ends.append(ends[-1] + len(begins))
    return Windows(torch.cat(found), torch.tensor(ends))


def tasks_of(found: Layout, tokens: int, apart: bool) -> list[tuple[int, int]]:
    """Each task's rows; all of them are one where nothing of theirs is `apart`: no sequence crosses into the next."""
    return [(part.start, part.end) for part in found.parts] if apart else [(0, tokens)]


def part_size(width: int) -> int:
    """Numbers of the largest map's part: five matrices with rows of 64 and a bias; parts begin at whole sectors."""
    return 5 * 64 * width + 64


def stages(tiles: int, blocks: int, device: torch.device) -> int:
    """Tiles of weights on the way of a block that has `tiles` others, `blocks` of which share a multiprocessor if they
    can: a product takes a fifth of the time that a copy takes, so four must be on the way at least."""
    block, multiprocessor = shared_bytes(device)
    most = (block - _STATIC_BYTES) // TILE_BYTES - tiles
    together = (multiprocessor // blocks - _STATIC_BYTES - _RESERVED_BYTES) // TILE_BYTES - tiles
    return min(MOST_STAGES, together if 4 <= together <= most else most)


@functools.cache
def shared_bytes(device: torch.device) -> tuple[int, int]:
    """Of a block and of a multiprocessor; elsewhere than on a GPU those of the smallest that the kernels serve."""
    if device.type != "cuda":
        return 99 * 1024, 100 * 1024
    found: Any = torch.cuda.get_device_properties(device)
    return found.shared_memory_per_block_optin, found.shared_memory_per_multiprocessor
