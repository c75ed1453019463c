"""Which launches serve a call of the Triton backend: estimates until somebody has measured, and what may be."""

import torch
import triton
from torch import Tensor

from tarp_kernels.ops.lowrank_linear.contract import Form, Operands
from tarp_kernels.tuning import Key, Plan, Tile

WIDEST = 1024
"""Lanes of rank, or of an MLP generator's hidden width, that a row tile can hold in registers."""


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


def key_of(operands: Operands, middle: Middle, segments: Tensor | None, form: Form) -> Key:
    """What the plan of a forward pass is chosen by."""
    present = {
        "mlp": middle.mlp,
        "dropout": form.dropout_p > 0,
        "segments": segments is not None,
        "factor": operands.P is not None,
    }
    name = "-".join(["static" if middle.outputs == 0 else form.sigma, *(mark for mark in present if present[mark])])
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
    if "factor" in key.form:  # the kernel of one pass knows none
        variant = "split"
    elif variant is None:
        variant = "one_pass" if few or key.outer <= 64 else "split"
    tall = 16 if few else most_rows(key)
    wide = key.dtype == "float32" or max(key.lanes, key.hidden) > 32
    if variant == "one_pass":  # the tile of W needs registers too
        first = Tile(tall, 64, min(32, features_of(key)), warps=8 if wide or not few else 4)
    else:
        first = Tile(tall, 16, features_of(key), warps=8 if wide and (tall == 16 or key.dtype != "float32") else 4)
    return Plan(variant, first, _dense_tile(key, rows))


def _dense_tile(key: Key, rows: int) -> Tile:
    if "factor" in key.form:  # its tile takes registers as W's does
        if key.dtype == "float32":
            return Tile(32, 32, 32, warps=8)
        tall = 16 if rows <= 16 else 128 if rows > 64 and key.outer > 64 and not _ragged(key) else 64
        return Tile(tall, 64, 32, warps=8)
    if rows <= 16:
        return Tile(16, 64, 32)
    if rows > 64 and key.outer > 64 and key.dtype != "float32" and not _ragged(key):
        return Tile(128, 128, 32, warps=8)
    # four warps would spill: the addresses of a strided W do not fit beside their share of the sums
    return Tile(64, 64, 16 if key.dtype == "float32" and _ragged(key) else 32, warps=8)


def _ragged(key: Key) -> bool:
    """Whether k-steps need a mask, which takes registers."""
    return key.inner % 64 != 0


def most_rows(key: Key) -> int:
    return 64 if max(key.lanes, key.hidden) <= (32 if key.dtype == "float32" else 64) else 16


def features_of(key: Key) -> int:
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
