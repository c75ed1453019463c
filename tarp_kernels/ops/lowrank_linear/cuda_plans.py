"""Which calls the CUDA kernels of `lowrank_linear` serve, and how they are cut into blocks."""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from tarp_kernels import tuning
from tarp_kernels.ops.lowrank_linear.contract import Form, Operands

MOST_ROWS = 64
"""Of the kernel for few rows; more go to the one for many."""
WIDEST = 64
"""The rank, or the hidden width of an MLP generator, that a block has shared memory for."""
MOST_SPLITS = 64
MANY_TILE = 128
"""Rows of x of a block of the kernels for many rows, and of W; sm_90's may have more of W."""
WIDE_TILE = 256
MAP_BYTES = 256
"""What that kernel's descriptions of x and W take."""
SKINNY_ROWS = 64
"""Rows of x of a block of the kernel that makes z for many rows."""
SHALLOWEST = 256
"""K of a call whose z that kernel makes."""
CHUNK = 1024
"""Rows of a part of an adapter's gradients: enough blocks without cutting the sum more often than that."""
TILE = 64
"""Rows of W, or of [V; w1], of a block."""
MIDDLE = 4
"""Numbers of z, s and an MLP's w2 that every tile makes anew, for each column of W, before that outweighs its bytes."""

_STAGED_BYTES = 48 * 1024  # of x at a time: two blocks of it fit on every GPU
_BLOCKS_AT_A_TIME = 2  # of one multiprocessor


class FewRows(NamedTuple):
    """One launch for few rows."""

    token_tiles: int  # of 8 rows each
    first_tiles: int  # tiles of [V; w1] of all tasks
    tiles: int  # these and the tiles of W
    splits: int  # blocks that share the depth of a tile
    stage: int  # depth of x in shared memory at a time
    shared_bytes: int


class ManyRows(NamedTuple):
    """One launch for many rows."""

    tiles: int  # of MANY_TILE rows
    columns: int  # rows of W of a tile
    sm90: bool  # by the kernel that is for compute capability 9.0 alone


class Skinny(NamedTuple):
    """One launch that makes z for many rows."""

    columns: int  # rows of [V; w1] that the kernel has room for
    splits: int  # blocks that share the depth of a tile


def makes_z(operands: Operands, form: Form) -> bool:
    """Whether the CUDA kernel makes z for many rows; Triton's launch does for what it does not serve.

    A block has all of [V; w1] in shared memory. And what it makes of s it makes one number at a time, S times the
    hidden width for each row: more than the K numbers of the row would take longer than these do to come. Below a
    depth of SHALLOWEST the same holds for how the sums become rows.
    """
    V, w1 = operands.V, operands.w1
    first = 0 if w1 is None else w1.shape[-2]
    made = form.outputs(operands) * (1 if operands.w2 is None else first)
    depth = operands.x.shape[1]
    return V.shape[-2] <= WIDEST and first <= WIDEST and max(made, SHALLOWEST) <= depth


def sums(wide: Tensor, drops: bool) -> bool:
    """Whether the CUDA kernels make gradients that are sums over rows; Triton's launches do those that they do not.

    Rows that are not whole pieces of 16 bytes come number by number, which one tile of columns can afford.
    """
    return not drops and (whole(wide) or wide.shape[1] <= TILE)


def whole(rows: Tensor) -> bool:
    """Whether the rows of a matrix are pieces of 16 bytes."""
    return rows.shape[1] % 8 == 0 and rows.stride(0) % 8 == 0 and aligned(rows)


def refusal(operands: Operands, segments: Tensor | None, form: Form, named: bool) -> str | None:
    """Why no CUDA kernel serves a call that passed `check`, or unless `named` should not; None where one does."""
    x, weight, _, V, _, w1, _, w2, *_ = operands
    rank, in_features = V.shape[-2], x.shape[1]
    if operands.P is not None:
        return "the kernels know no factor on W"
    if form.dropout_p > 0:
        return "the kernels know no dropout"
    few = x.shape[0] <= MOST_ROWS
    if rank < 1 or (few and rank > WIDEST):
        return f"V has rank r = {rank}, the kernels serve 1 to {WIDEST}"
    if few and w1 is not None and w2 is not None and w1.shape[-2] > WIDEST:
        return f"generator.w1 has hidden width m = {w1.shape[-2]}, the kernels serve at most {WIDEST}"
    if in_features % 8 or in_features == 0 or weight.shape[0] == 0:
        return f"weight has shape {list(weight.shape)}, the kernels serve K a multiple of 8"
    offset = 0 if torch.compiler.is_compiling() else weight.storage_offset()
    if weight.stride(1) != 1 or weight.stride(0) % 8 or offset % 8:
        return "weight's rows are not adjacent numbers that start at multiples of 16 bytes"
    return None if named or _preferred(operands, segments, form) else "Triton's kernels are the better choice"


def _preferred(operands: Operands, segments: Tensor | None, form: Form) -> bool:
    """Whether the CUDA kernel is the better choice where Triton's would serve too: as measured, or else as estimated.

    What is compiled goes by the estimate: a compiler would take the reading of a table for a part of the model.
    """
    if torch.compiler.is_compiling():
        return _estimated(operands, form)
    if tuning.is_forced():
        return False
    if not tuning.has_measured(operands.x.device):  # known at once, where a key takes 8 µs to make
        return _estimated(operands, form)
    from tarp_kernels.ops.lowrank_linear import triton_plans  # imports triton

    key = triton_plans.key_of(operands, triton_plans.Middle(operands, form), segments, form)
    plan = tuning.measured(key, operands.x.shape[0], operands.x.device)
    return _estimated(operands, form) if plan is None else plan.backend == "cuda"


def _estimated(operands: Operands, form: Form) -> bool:
    """Whether the CUDA kernel should be the faster one, by bytes and operations.

    Of many rows it should not: both do the same operations on tiles of about the same bytes, Triton's tiles are chosen
    by the shape, and from capability 9.0 on they too use instructions of four warps, beyond 9.0 with memory of their
    own, which the CUDA kernels do not.

    Of few rows it should:
    Both are bound by the bytes of W, 2 N K. Triton's launch of one pass makes h and u anew for every tile of W, that is
    (r + first) / 64 of these bytes once more, and has one block for each 64 columns, 64 of them for N = 4096, where a
    GPU needs two for each of its 108 to 132 multiprocessors to keep its memory busy. Its two launches, for more than 16
    rows, read V and w1 once but start the second behind the first, with as few blocks. The CUDA kernel reads V and w1
    once and cuts the depth of W until the GPU is full. What it makes anew for every tile is s and z: that must be few
    numbers beside the tile's 64 K.
    """
    if operands.x.shape[0] > MOST_ROWS:
        return False
    hidden = 1 if operands.w1 is None or operands.w2 is None else operands.w1.shape[-2]
    made = operands.x.shape[0] * max(operands.V.shape[-2], form.outputs(operands)) * hidden
    return made <= MIDDLE * operands.x.shape[1]


def many_rows(
    tiles: int, x: Tensor, weight: Tensor, read: Tensor | None, capability: tuple[int, int], processors: int
) -> ManyRows:
    """The launch for `tiles` tiles of rows of x, or of its rows `read`; both tensors start rows at 16 bytes.

    sm_90's kernel is the better one where it can run: its instructions do twice the operations of the other's in a
    cycle. The copy engine brings its tiles: of neighbouring rows, which do not overlap. Wide tiles read a quarter less,
    but leave multiprocessors idle where there are fewer tiles than those.
    """
    apart = all(tensor.stride(0) >= tensor.shape[1] for tensor in (x, weight))
    if capability != (9, 0) or read is not None or not apart:
        return ManyRows(tiles, MANY_TILE, False)
    wide = tiles * -(-weight.shape[0] // WIDE_TILE) >= processors
    return ManyRows(tiles, WIDE_TILE if wide else MANY_TILE, True)


@functools.lru_cache(maxsize=4096)
def few_rows(
    rows: int, in_features: int, out_features: int, rank: int, first: int, mlp: bool, tasks: int, processors: int
) -> FewRows:
    """The launch for x [rows, in_features]; `first` rows of w1, `processors` multiprocessors.

    Splits are chosen so that whole waves of blocks fill the GPU. A block's share of W is 128 bytes for each column, and
    costs 64 partial sums a row, written and read: 512 bytes. With 16 columns for every row, and 256 at least, these are
    at most a quarter of W's bytes, and do not leave the second-level cache.
    """
    first_tiles = max(1, tasks) * -(-(rank + first) // TILE)
    tiles = first_tiles + -(-out_features // TILE)
    splits = _splits(tiles, in_features // max(256, 16 * rows), processors)
    token_tiles = next(count for count in (1, 2, 4, 8) if 8 * count >= rows)
    return with_splits(rows, in_features, rank, first if mlp else 0, token_tiles, first_tiles, tiles, splits)


@functools.lru_cache(maxsize=4096)
def skinny(tiles: int, in_features: int, stacked: int, processors: int) -> Skinny:
    """The launch that makes z for `tiles` tiles of rows; `stacked` rows of [V; w1].

    A block's share of x is 128 bytes for each column, and costs 64 partial sums for each row of [V; w1], written and
    read: with 16 columns for each of these, and 256 at least, at most a quarter of x's bytes, as above.
    """
    return Skinny(columns(stacked), _splits(tiles, in_features // max(SHALLOWEST, 16 * stacked), processors))


def columns(wanted: int) -> int:
    """Of the narrow operand of a block: all that are wanted, or as many as there are accumulators for."""
    return next((count for count in (16, 32, 64) if count >= wanted), 128)


def _splits(tiles: int, most: int, processors: int) -> int:
    """In how many parts to cut the depth of `tiles` tiles, for whole waves of blocks."""
    most, slots = min(MOST_SPLITS, max(1, most)), _BLOCKS_AT_A_TIME * processors

    def busy(splits: int) -> float:
        blocks = tiles * splits
        return blocks / (-(-blocks // slots) * slots)

    best = max(map(busy, range(1, most + 1)))
    return next(splits for splits in range(1, most + 1) if busy(splits) >= 0.95 * best)


def with_splits(
    rows: int, in_features: int, rank: int, hidden: int, token_tiles: int, first_tiles: int, tiles: int, splits: int
) -> FewRows:
    """A launch with the shared memory that it takes: of x on the way, then of the sums and what joins them."""
    tokens, share = 8 * token_tiles, -(-in_features // 32 // splits) * 32 + 32
    room = _STAGED_BYTES // (2 * tokens) - 32
    stage = min(-(-share // 64), room // 64) * 64
    after = tokens * (TILE + 4) + rows * (rank + hidden) + TILE * (rank | 1)
    return FewRows(token_tiles, first_tiles, tiles, splits, stage, max(2 * tokens * (stage + 32), 4 * after))


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of a CUDA device; of any other, those of the smallest GPU that the kernels are meant for."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 108


def aligned(tensor: Tensor) -> bool:
    """Whether it starts at a multiple of 16 bytes."""
    return tensor.data_ptr() % 16 == 0
