"""The launches that several passes of the Triton backend share: products of rows with each task's own matrix."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from tarp_kernels import tuning
from tarp_kernels.ops.lowrank_linear.layout import Selection
from tarp_kernels.ops.lowrank_linear.layout import rows as adjacent
from tarp_kernels.ops.lowrank_linear.triton_backward import add_parts_kernel, tall_kernel
from tarp_kernels.ops.lowrank_linear.triton_forward import dense_kernel, skinny_kernel
from tarp_kernels.ops.lowrank_linear.triton_plans import dtype_name, estimate, lanes
from tarp_kernels.ops.philox import drop_threshold
from tarp_kernels.tuning import Key, Tile


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Start a kernel on the current stream. One name for it, so that tests can run the same launches elsewhere."""
    if _traceable:
        kernel = torch.library.wrap_triton(kernel)
    kernel[grid](*arguments, **constants)


_traceable: list[bool] = []


@contextlib.contextmanager
def traceable() -> Iterator[None]:
    """Within the block launches can be recorded by whoever traces the registered operators."""
    _traceable.append(True)
    try:
        yield
    finally:
        _traceable.pop()


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device; of any other device, that of the first GPU the kernels run on."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)


def overlap(device: torch.device) -> dict[str, Any]:
    """Programmatic dependent launch, from Hopper on: a dense kernel starts before the kernel that makes its z ends."""
    early = not _traceable and capability(device) >= (9, 0)  # tracing does not know this launch option
    return {"EARLY": early, "launch_pdl": True} if early else {"EARLY": False}


def number(scaling: Any) -> Any:
    """An integer would be another type of argument, and compile another kernel."""
    return scaling if isinstance(scaling, Tensor) else float(scaling)


def tf32_allowed() -> bool:
    """torch's own setting for products of float32; the older of its two names raises once the newer has been used."""
    matmul = torch.backends.cuda.matmul
    precision = getattr(matmul, "fp32_precision", None)  # since torch 2.9
    return matmul.allow_tf32 if precision is None else precision == "tf32"


class Rows:
    """The rows of one call: how many and where, which tasks they belong to, which of their elements dropout keeps."""

    def __init__(
        self,
        x: Tensor,
        segments: Tensor | None,
        dropout_p: float = 0.0,
        dropout_seed: int = 0,
        selection: Selection | None = None,
    ) -> None:
        self.read, self.write = (None, None) if selection is None else (selection.read, selection.write)
        self.count = x.shape[0] if selection is None else selection.count(x)
        self.segments = None if segments is None else segments.to(x.device).contiguous()  # may lie on the CPU
        if self.segments is not None and _traceable:
            # Compilers take what a device function reads for written where its result becomes an address; they may
            # believe that of a copy, but not of a graph's input.
            self.segments = self.segments.clone()
        self.tasks = 0 if segments is None else segments.shape[0] - 1
        self.drops = dropout_p > 0
        self.mask = (drop_threshold(dropout_p), dropout_seed)
        self.inverse_keep = 1 / (1 - dropout_p)
        tf32 = x.dtype == torch.float32 and tf32_allowed()  # the half precisions have no choice
        self.common = {"SEGMENTS": segments is not None, "PRECISION": "tf32" if tf32 else "ieee"}

    def tiles(self, block: int) -> int:
        """Row tiles that cover every task's rows, whatever the segments are."""
        return triton.cdiv(self.count, block) if self.segments is None else self.count // block + self.tasks


def product(
    name: str, a: Tensor, b: Tensor, segments: Tensor | None, dropout: tuple[float, int], dtype: torch.dtype
) -> Tensor:
    """`contract`, `expand` or `reduce` of `second_order`, from factors in `dtype`: float32."""
    a, b = a.to(dtype), b.to(dtype)
    rows = Rows(a, segments, *dropout)
    if name == "contract":
        out = a.new_empty(rows.count, b.shape[-2], dtype=torch.float32)
    elif name == "expand":
        out = a.new_empty(rows.count, b.shape[-1], dtype=torch.float32)
    else:
        lead = () if segments is None else (rows.tasks,)
        out = a.new_empty(*lead, a.shape[1], b.shape[1], dtype=torch.float32)
    if rows.count == 0 or out.numel() == 0:
        return out.zero_()
    if name == "contract":
        skinny(rows, adjacent(a), b, out, rows.drops)
    elif name == "expand":
        wide = out.shape[1]
        tile = tuning.plan(
            Key(dtype_name(dtype), 0, wide, False, 16, 16, "static"), rows.count, a.device, estimate
        ).dense
        dense(rows, a[:, :0], a.new_empty(wide, 0), None, a.contiguous(), b.transpose(-1, -2), out, tile, rows.drops)
    else:
        tall(rows, adjacent(a), adjacent(b), {"out": a.shape[1]}, {"out": out}, rows.drops)
    return out


def skinny(rows: Rows, x: Tensor, q: Tensor, out: Tensor, drops: bool = False) -> None:
    """out [T, R] = x qᵀ, x [T, K] behind dropout if `drops`, q [R, K] or one [B, R, K] for each task, any strides."""
    wide, width = q.shape[-2:]
    block, features = min(64, lanes(wide)), 32
    launch(
        skinny_kernel,
        (rows.tiles(64), triton.cdiv(wide, block)),
        *(x, q, rows.segments, out, rows.count, rows.tasks, width, wide, x.stride(0)),
        *(q.stride(0) if q.dim() == 3 else 0, q.stride(-2), q.stride(-1), rows.inverse_keep, *rows.mask),
        **rows.common,
        DROPOUT=drops,
        EVEN=width % features == 0,
        BT=64,
        BK=features,
        R=block,
        num_warps=4,
    )


def dense(
    rows: Rows,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    z: Tensor,
    q: Tensor,
    out: Tensor,
    tile: Tile,
    drops: bool = False,
    after: bool = False,
    read: Tensor | None = None,
    write: Tensor | None = None,
) -> None:
    """out [T, N] = a bᵀ + bias + mask · z qᵀ, z [T, R] contiguous, q [N, R] or one [B, N, R] for each task.

    `read` and `write`: the rows of a and of out that the call's rows are.

    `after`: this is the launch right after the one that makes z, and may begin before that ends.
    """
    outer, inner = map(int, b.shape)
    bulk = (
        tile.bulk
        and inner > 0
        and read is None
        and capability(a.device) >= (9, 0)
        and _describable(a)
        and _describable(b)
    )
    bulk_low = bulk and z.shape[1] % 16 == 0 and z.dtype == q.dtype and _describable(z) and _describable(q)
    sources: tuple[Any, ...] = (a, b, bias, z, q)
    if tile.bulk and not bulk:  # addresses take the registers of half a step
        tile = tile._replace(features=min(tile.features, 32))
    if bulk:
        sources = (_described(a, tile.rows, tile.features), _described(b, tile.columns, tile.features), bias, z, q)
    if bulk_low:
        sources = (*sources[:3], _described(z, tile.rows, 16), _described(q, tile.columns, 16))
    launch(
        dense_kernel,
        (rows.tiles(tile.rows) * triton.cdiv(outer, tile.columns),),
        *(*sources, rows.segments, out, *places(read, a, write, out)),
        *(rows.count, rows.tasks, inner, outer, a.stride(0), *b.stride()),
        *(q.stride(0) if q.dim() == 3 else 0, q.stride(-2), q.stride(-1), out.stride(0)),
        *(rows.inverse_keep, *rows.mask),
        **rows.common,
        extra=z.shape[1],
        BIAS=bias is not None,
        DROPOUT=drops,
        EVEN=inner % tile.features == 0,
        BULK=bulk,
        BULK_LOW=bulk_low,
        TRANSPOSED=b.stride(1) != 1,
        TRANSPOSED_LOW=q.stride(-1) != 1,
        BT=tile.rows,
        BN=tile.columns,
        BK=tile.features,
        BE=16,
        GROUP=8,
        **(overlap(a.device) if after else {"EARLY": False}),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def places(first: Tensor | None, a: Tensor, second: Tensor | None, b: Tensor | None) -> tuple[Any, ...]:
    """Indices of rows of a and of b, and how many rows these have, as kernels take them."""
    totals = (
        None if index is None or matrix is None else matrix.shape[0] for index, matrix in ((first, a), (second, b))
    )
    return first, second, *totals


def _describable(matrix: Tensor) -> bool:
    """Whether a tensor descriptor can stand for it: one dimension of adjacent elements, the others whole 16 bytes."""
    if _traceable or matrix.numel() == 0 or matrix.data_ptr() % 16:
        return False
    *lead, columns, features = matrix.stride()
    if 1 not in (columns, features):
        return False
    width = columns if features == 1 else features
    flat = not lead or lead[0] == (matrix.shape[-2] * columns if features == 1 else matrix.shape[-1] * features)
    return flat and width * matrix.element_size() % 16 == 0


def _described(matrix: Tensor, columns: int, features: int) -> TensorDescriptor:
    """A descriptor of [N, K] or of all tasks' [B, N, K] one below the other; of the transposes where N is adjacent."""
    if matrix.stride(-1) != 1:
        matrix, columns, features = matrix.transpose(-1, -2), features, columns
    flat = [matrix.shape[:-1].numel(), matrix.shape[-1]]
    return TensorDescriptor(matrix, flat, [matrix.stride(-2), 1], [columns, features])


def tall(
    rows: Rows,
    a: Tensor,
    b: Tensor | None,
    names: dict[str, int],
    out: dict[str, Tensor],
    drops: bool = False,
    a_rows: Tensor | None = None,
    b_rows: Tensor | None = None,
) -> None:
    """out[name] = its rows of aᵀ b for each task, for the names in `out`; `names`: rows of each, one after the other.

    a [T, P], b [T, Q] behind dropout if `drops`. b None: a column of ones, that is the sums of a's columns.
    a_rows and b_rows: which of their rows the call's rows are.
    """
    p, q = sum(names.values()), 1 if b is None else b.shape[1]
    block_p, block_q = min(64, lanes(p)), min(64, lanes(q))
    blocks = (triton.cdiv(p, block_p), triton.cdiv(q, block_q))
    chunk = 2**20 if blocks[0] * blocks[1] >= 512 else 1024  # enough blocks without cutting the sum
    chunks = rows.tiles(chunk)
    parts = a.new_empty((chunks, p, q), dtype=torch.float32)
    launch(
        tall_kernel,
        (chunks, *blocks),
        *(a, b, rows.segments, parts, *places(a_rows, a, b_rows, b)),
        *(rows.count, rows.tasks, p, q, a.stride(0), 0 if b is None else b.stride(0), *rows.mask),
        **rows.common,
        ONES=b is None,
        DROPOUT=drops,
        CHUNK=chunk,
        BT=32,
        BP=block_p,
        BQ=block_q,
        num_warps=4 if a_rows is None and b_rows is None else 8,  # places to load from take registers
    )
    first, factor = 0, rows.inverse_keep if drops else 1.0
    for name, count in names.items():
        if name in out:
            _add_parts(parts.flatten(1), rows, out[name], chunk, first * q, count * q, factor)
        first += count


def add_chunks(rows: Rows, parts: Tensor, out: Tensor, chunk: int) -> None:
    """out [tasks, count] = the sum of each task's parts [chunks, count], one for `chunk` rows of it, in order."""
    _add_parts(parts, rows, out, chunk, 0, int(parts.shape[1]))


def add_parts(parts: Tensor, out: Tensor, task: int) -> None:
    """The sum of parts [P, count] in order, for one task's share of out: each part is a chunk of one row."""
    _add_parts(parts, Rows(parts, None), out, 1, 0, int(parts.shape[1]), shift=task)


def _add_parts(
    parts: Tensor, rows: Rows, out: Tensor, chunk: int, first: int, count: int, factor: float = 1.0, shift: int = 0
) -> None:
    """Columns [first, first + count) of parts [chunks, size], summed for each task, into out[shift + task]."""
    launch(
        add_parts_kernel,
        (max(1, rows.tasks), triton.cdiv(count, 1024)),
        *(parts, rows.segments, out, shift, rows.count, int(parts.shape[1]), first, count, factor),
        SEGMENTS=rows.segments is not None,
        CHUNK=chunk,
        BLOCK=1024,
    )


def aligned(tensor: Tensor | None) -> bool:
    """Whether a contiguous tensor, and each task's part of it, is known to lie at a multiple of 16 bytes."""
    if tensor is None or _traceable:
        return False
    whole = tensor.dim() < 3 or tensor.stride(0) * tensor.element_size() % 16 == 0
    return whole and tensor.data_ptr() % 16 == 0
