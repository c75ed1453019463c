"""Which calls the CUDA kernels of `search_cell` serve, and how their rows are cut into windows and chunks."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tarp_kernels.ops.search_cell.layout import Layout
from tarp_kernels.ops.search_cell.weights import FIRST_EDGES, OPERATIONS, CellWeights

WIDEST = 64
"""Of a cell: a node of a window is one tile of 64 x 64."""
WINDOW = 64
"""Rows that a block makes, those that it makes for its neighbours included."""
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
    return None


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
