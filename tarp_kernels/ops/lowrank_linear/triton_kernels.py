"""The Triton backend of `lowrank_linear`: tensors in, launches, tensors out, no autograd here.

    forward    one_pass y = x Wᵀ + z Uᵀ + b, z = scaling · Σ(x) x Vᵀ made by every tile    one launch
               or split z first, then the dense product with z Uᵀ as one more k-step    two launches
    backward   middle   dz = dy U, from it dh and du                                    one launch
               dense    dx = dy W + [dh, du] [V; w1]                                    one launch
               tall     dU = dyᵀ z, d[V; w1] = [dh, du]ᵀ x, …: sums over rows           two launches each

The kernels are in `triton_forward` and `triton_backward`.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from tarp_kernels import tuning
from tarp_kernels.ops.lowrank_linear.contract import Form, Operands
from tarp_kernels.ops.lowrank_linear.layout import Saved, arranged, dense_gradients
from tarp_kernels.ops.lowrank_linear.layout import rows as adjacent
from tarp_kernels.ops.lowrank_linear.triton_backward import add_parts_kernel, middle_backward_kernel, tall_kernel
from tarp_kernels.ops.lowrank_linear.triton_forward import dense_kernel, forward_kernel, skinny_kernel
from tarp_kernels.ops.philox import drop_threshold
from tarp_kernels.tuning import Key, Plan, Tile

WIDEST = 1024
"""Lanes of rank, or of an MLP generator's hidden width, that a row tile can hold in registers."""


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
    """The rows of one call: how many, which tasks they belong to, and which of their elements dropout keeps."""

    def __init__(self, x: Tensor, segments: Tensor | None, dropout_p: float = 0.0, dropout_seed: int = 0) -> None:
        self.count = x.shape[0]
        self.segments = None if segments is None else segments.to(x.device).contiguous()  # may lie on the CPU
        self.tasks = 0 if segments is None else segments.shape[0] - 1
        self.drops = dropout_p > 0
        self.mask = (drop_threshold(dropout_p), dropout_seed)
        self.inverse_keep = 1 / (1 - dropout_p)
        tf32 = x.dtype == torch.float32 and tf32_allowed()  # the half precisions have no choice
        self.common = {"SEGMENTS": segments is not None, "PRECISION": "tf32" if tf32 else "ieee"}

    def tiles(self, block: int) -> int:
        """Row tiles that cover every task's rows, whatever the segments are."""
        return triton.cdiv(self.count, block) if self.segments is None else self.count // block + self.tasks


class Middle:
    """The sizes of what lies between x and y in one call."""

    def __init__(self, operands: Operands, form: Form) -> None:
        self.rank = int(operands.V.shape[-2])  # sizes of an adapter are constants, even where a compiler has symbols
        self.first = 0 if operands.w1 is None else int(operands.w1.shape[-2])
        self.outputs = form.outputs(operands)
        self.mlp = operands.w2 is not None
        self.lanes = lanes(self.rank)
        self.hidden = lanes(self.first) if self.mlp else self.lanes
        if max(self.lanes, self.hidden) > WIDEST:
            raise ValueError(
                f"backend='triton': got rank r = {self.rank} and hidden width m = {self.first}, expected at most "
                f"{WIDEST} of each; use backend='reference'"
            )
        self.constants = {
            "r": self.rank,
            "first": self.first,
            "outputs": self.outputs,
            "FULL": form.sigma == "full",
            "HIDDEN": form.hidden_activation if self.mlp else None,
            "ACTIVATION": form.activation,
            "SCALING_IN_MEMORY": isinstance(form.scaling, Tensor),
            "R": self.lanes,
            "M": self.hidden,
        }


def lanes(size: int) -> int:
    """A power of two that holds `size`, at least the 16 that a tensor core needs."""
    return max(16, triton.next_power_of_2(size))


# --- which launches --------------------------------------------------------------------------------------------------


def key_of(operands: Operands, middle: Middle, segments: Tensor | None, form: Form) -> Key:
    """What the plan of a forward pass is chosen by."""
    marks = (("mlp", middle.mlp), ("dropout", form.dropout_p > 0), ("segments", segments is not None))
    name = "-".join(["static" if middle.outputs == 0 else form.sigma, *(mark for mark, present in marks if present)])
    outer, inner = map(int, operands.weight.shape)
    return Key(
        dtype_name(operands.x.dtype), inner, outer, operands.weight.stride(1) != 1, middle.lanes, middle.hidden, name
    )


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def estimate(key: Key, rows: int, variant: str | None = None) -> Plan:
    """one_pass recomputes z for every column of tiles: for few rows, where W is what is read, and for a narrow W.

    Tiles are as large as registers allow on every architecture: that a GPU spills none of them is tested.
    """
    few = rows <= 16
    if variant is None:
        variant = "one_pass" if few or key.outer <= 64 else "split"
    tall = 16 if few else _most_rows(key)
    wide = key.dtype == "float32" or max(key.lanes, key.hidden) > 32
    if variant == "one_pass":  # the tile of W needs registers too
        first = Tile(tall, 64, min(32, _features(key)), warps=8 if wide or not few else 4)
    else:
        first = Tile(tall, 16, _features(key), warps=8 if wide and (tall == 16 or key.dtype != "float32") else 4)
    return Plan(variant, first, _dense_tile(key, rows))


def _dense_tile(key: Key, rows: int) -> Tile:
    if rows <= 16:
        return Tile(16, 64, 32)
    if rows > 64 and key.outer > 64 and key.dtype != "float32" and not _ragged(key):
        return Tile(128, 128, 32, warps=8)
    # four warps would spill: the addresses of a strided W do not fit beside their share of the sums
    return Tile(64, 64, 16 if key.dtype == "float32" and _ragged(key) else 32, warps=8)


def _ragged(key: Key) -> bool:
    """Whether k-steps need a mask, which takes registers."""
    return key.inner % 64 != 0


def _most_rows(key: Key) -> int:
    return 64 if max(key.lanes, key.hidden) <= (32 if key.dtype == "float32" else 64) else 16


def _features(key: Key) -> int:
    """Of a k-step of the skinny product: fewer steps where nothing is masked and the lanes leave room."""
    crowd = (key.dtype == "float32") + ("dropout" in key.form) + (max(key.lanes, key.hidden) > 32)
    if crowd:
        return 32 if crowd == 1 or key.dtype == "float32" else 16
    return 128 if key.inner % 128 == 0 else 64


def candidates(key: Key, rows: int) -> list[Plan]:
    """What tuning measures, the estimate first: every one is a configuration that ships."""
    one_pass, split = estimate(key, rows, "one_pass"), estimate(key, rows, "split")
    tiles: list[Tile] = []
    roomy = key.dtype != "float32" and not _ragged(key)
    if rows <= 16:
        tiles = [Tile(16, 64, 64), Tile(16, 32, 64)] if roomy else [Tile(16, 32, 32)]
    elif roomy:
        tiles = [Tile(64, 64, 32, warps=8), Tile(64, 128, 32, warps=8), Tile(64, 64, 64, warps=8)]
        if rows > 64:
            tiles += [Tile(128, 128, 64, warps=8, bulk=1), Tile(128, 64, 64, warps=8)]
    found = [estimate(key, rows), *(split._replace(dense=tile) for tile in tiles), one_pass]
    if rows <= 16:
        columns = (32,) if key.dtype == "float32" else (32, 128)
        found += [one_pass._replace(first=one_pass.first._replace(columns=wide)) for wide in columns]
    return list(dict.fromkeys(found))


# --- forward and backward --------------------------------------------------------------------------------------------


def forward(operands: Operands, segments: Tensor | None, form: Form, saved: Saved | None = None) -> Tensor:
    """y [T, N]; h, s, u go into `saved`."""
    operands = arranged(operands, _plain)
    x, weight, bias, *_ = operands
    y = x.new_empty(x.shape[0], weight.shape[0])
    if x.shape[0] == 0:
        return y
    rows, middle = Rows(x, segments, form.dropout_p, form.dropout_seed), Middle(operands, form)
    variant, tile, dense_tile = tuning.plan(key_of(operands, middle, segments, form), rows.count, x.device, estimate)
    outer, inner = map(int, weight.shape)
    one_pass = variant == "one_pass"
    z = None if one_pass else x.new_empty(rows.count, middle.rank)
    launch(
        forward_kernel,
        (rows.tiles(tile.rows), triton.cdiv(outer, tile.columns) if one_pass else 1),
        *(*operands[:9], rows.segments, y, z, *(saved or (None, None, None))),
        *(rows.count, rows.tasks, inner, outer, x.stride(0), *weight.stride(), number(form.scaling)),
        *(rows.inverse_keep, *rows.mask),
        **rows.common,
        **middle.constants,
        BIAS=bias is not None,
        B1=operands.b1 is not None,
        B2=operands.b2 is not None,
        DENSE=one_pass,
        SAVE=saved is not None,
        DROPOUT=rows.drops,
        EVEN=inner % tile.features == 0,
        BT=tile.rows,
        BN=tile.columns if one_pass else 16,
        BK=tile.features,
        ALIGNED=_aligned(operands.V) and _aligned(operands.w1),
        EARLY=not one_pass and overlap(x.device)["EARLY"],
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    if z is not None:
        dense(rows, x, weight, bias, z, operands.U, y, dense_tile, after=True)
    return y


def backward(
    dy: Tensor, operands: Operands, segments: Tensor | None, saved: Saved, needs: Sequence[bool], form: Form
) -> list[Tensor]:
    """Gradients of the needed operands, in their order, each in its tensor's dtype."""
    given, operands, dy = operands._asdict(), arranged(operands, _plain), adjacent(dy)
    x, weight, _, V, U, w1, _, w2, *_ = operands
    wanted = [name for name, needed in zip(Operands._fields, needs, strict=True) if needed]
    out = {name: given[name].new_empty(given[name].shape) for name in wanted if name not in ("weight", "bias")}
    if out and x.shape[0] == 0:
        for gradient in out.values():
            gradient.zero_()
    elif out:
        rows, middle = Rows(x, segments, form.dropout_p, form.dropout_seed), Middle(operands, form)
        outer, inner = map(int, weight.shape)
        z, inputs = x.new_empty(rows.count, middle.rank), x.new_empty(rows.count, middle.rank + middle.first)
        dg = hidden = None
        if w2 is not None:
            dg, hidden = x.new_empty(rows.count, middle.outputs), x.new_empty(rows.count, middle.first)
        key = key_of(operands, middle, segments, form)
        block, features = _most_rows(key), _features(key._replace(inner=outer))
        stacked = V if w1 is None or "x" not in out else torch.cat((V.to(x.dtype), w1.to(x.dtype)), dim=-2)
        launch(
            middle_backward_kernel,
            (rows.tiles(block),),
            *(dy, U, w2, rows.segments, *saved, z, inputs, dg, hidden),
            *(rows.count, rows.tasks, outer, dy.stride(0), number(form.scaling)),
            **rows.common,
            **middle.constants,
            EVEN=outer % features == 0,
            EARLY="x" in out and overlap(x.device)["EARLY"],
            Z="U" in out,
            INPUTS=bool(out.keys() - {"U"}),
            BT=block,
            BK=features,
            num_warps=4,
        )
        if "x" in out:
            mirrored = key._replace(inner=outer, outer=inner, transposed=not key.transposed)
            tile = tuning.plan(mirrored, rows.count, x.device, estimate).dense
            q = stacked.transpose(-1, -2)
            dense(rows, dy, weight.t(), None, inputs, q, out["x"], tile, rows.drops, after=True)
        if "U" in out:
            tall(rows, dy, z, {"U": outer}, out)
        if "V" in out or "w1" in out:
            tall(rows, inputs, x, {"V": middle.rank, "w1": middle.first}, out, rows.drops)
        if "b1" in out:
            tall(rows, inputs[:, middle.rank :], None, {"b1": middle.first}, out)
        if dg is not None:
            for name, other in (("w2", hidden), ("b2", None)):
                if name in out:
                    tall(rows, dg, other, {name: middle.outputs}, out)
    out |= dense_gradients(dy, operands, segments, form, wanted)
    return [out[name] for name in wanted]


# --- products of rows with each task's own matrix --------------------------------------------------------------------


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
) -> None:
    """out [T, N] = a bᵀ + bias + mask · z qᵀ, z [T, R] contiguous, q [N, R] or one [B, N, R] for each task.

    `after`: this is the launch right after the one that makes z, and may begin before that ends.
    """
    outer, inner = map(int, b.shape)
    bulk = tile.bulk and inner > 0 and capability(a.device) >= (9, 0) and _describable(a) and _describable(b)
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
        *(*sources, rows.segments, out),
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
    rows: Rows, a: Tensor, b: Tensor | None, names: dict[str, int], out: dict[str, Tensor], drops: bool = False
) -> None:
    """out[name] = its rows of aᵀ b for each task, for the names in `out`; `names`: rows of each, one after the other.

    a [T, P], b [T, Q] behind dropout if `drops`. b None: a column of ones, that is the sums of a's columns.
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
        *(a, b, rows.segments, parts),
        *(rows.count, rows.tasks, p, q, a.stride(0), 0 if b is None else b.stride(0), *rows.mask),
        **rows.common,
        ONES=b is None,
        DROPOUT=drops,
        CHUNK=chunk,
        BT=32,
        BP=block_p,
        BQ=block_q,
        num_warps=4,
    )
    first = 0
    for name, count in names.items():
        if name in out:
            launch(
                add_parts_kernel,
                (max(1, rows.tasks), triton.cdiv(count * q, 1024)),
                *(parts, rows.segments, out[name], rows.count, p * q, first * q, count * q),
                rows.inverse_keep if drops else 1.0,
                SEGMENTS=rows.segments is not None,
                CHUNK=chunk,
                BLOCK=1024,
            )
        first += count


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().resolve_neg().contiguous()


def _aligned(tensor: Tensor | None) -> bool:
    """Whether a contiguous tensor, and each task's part of it, is known to lie at a multiple of 16 bytes."""
    if tensor is None or _traceable:
        return False
    whole = tensor.dim() < 3 or tensor.stride(0) * tensor.element_size() % 16 == 0
    return whole and tensor.data_ptr() % 16 == 0
