"""The launches of `hadamard_linear` in Triton that `lowrank_linear` does not have; the kernels are in `triton_factor`.

forward    dense with Φ ⊙ W, and z Uᵀ of the additive half as one more k-step       one launch
backward   the same for dx, with Φᵀ ⊙ Wᵀ                                            one launch
           factor_gradients, and the sums of its parts for P and for Q              up to three launches a task
"""

from collections.abc import Mapping
from typing import Any

import torch
import triton
from torch import Tensor

from tarp_kernels.ops.hadamard_linear.triton_factor import factor_gradients_kernel, weighed_dense_kernel
from tarp_kernels.ops.lowrank_linear import triton_products as products
from tarp_kernels.ops.lowrank_linear.triton_products import Rows
from tarp_kernels.tuning import Tile


class Factor:
    """Φ = f(P Q): P [N, R] or [C, N, R], Q [R, K / C], contiguous; with segments both lead with the task."""

    def __init__(self, P: Tensor, Q: Tensor, activation: str, segments: Tensor | None) -> None:
        self.P, self.Q, self.activation = P, Q, activation
        self.outer, self.rank, self.width = int(P.shape[-2]), int(P.shape[-1]), int(Q.shape[-1])
        self.blocks = int(P.shape[-3]) if P.dim() - (segments is not None) == 3 else 1
        self.constants = {"factor_rank": self.rank, "FACTOR": activation, "BR": 16}

    def strides(self, mirrored: bool) -> dict[str, Any]:
        """How `weighed_dense_kernel` walks over P and Q, as its own arguments call it."""
        P_size, Q_size = self.blocks * self.outer * self.rank, self.rank * self.width
        P = {"task": P_size, "block": self.outer * self.rank, "rank": 1}
        Q = {"task": Q_size, "block": 0, "rank": self.width}
        left, right = (P | {"inner": self.rank}, Q | {"outer": 1}) if mirrored else (Q | {"inner": 1}, P)
        if not mirrored:
            right = right | {"outer": self.rank}
        return {f"left_{name}": size for name, size in left.items()} | {
            f"right_{name}": size for name, size in right.items()
        }


def weighed_dense(
    rows: Rows,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    z: Tensor,
    q: Tensor,
    factor: Factor,
    out: Tensor,
    tile: Tile,
    mirrored: bool = False,
    drops: bool = False,
    after: bool = False,
) -> None:
    """out [T, N] = a (Φ ⊙ b)ᵀ + bias + mask · z qᵀ: `triton_products.dense` with a factor; of Φᵀ if `mirrored`."""
    outer, inner = map(int, b.shape)
    inner_blocks, outer_blocks = (1, factor.blocks) if mirrored else (factor.blocks, 1)
    left, right = (factor.P, factor.Q) if mirrored else (factor.Q, factor.P)
    strides = factor.strides(mirrored)
    products.launch(
        weighed_dense_kernel,
        (rows.tiles(tile.rows) * outer_blocks * triton.cdiv(outer // outer_blocks, tile.columns),),
        *(a, b, bias, z, q, left, right, rows.segments, out),
        *(rows.count, rows.tasks, inner, outer, a.stride(0), *b.stride()),
        *(q.stride(0) if q.dim() == 3 else 0, q.stride(-2), q.stride(-1)),
        *(strides[f"left_{name}"] for name in ("task", "block", "inner", "rank")),
        *(strides[f"right_{name}"] for name in ("task", "block", "outer", "rank")),
        *(out.stride(0), rows.inverse_keep, *rows.mask),
        **rows.common,
        **factor.constants,
        extra=z.shape[1],
        INNER_BLOCKS=inner_blocks,
        OUTER_BLOCKS=outer_blocks,
        BIAS=bias is not None,
        DROPOUT=drops,
        EVEN=inner // inner_blocks % tile.features == 0,
        BT=tile.rows,
        BN=tile.columns,
        BK=tile.features,
        BE=16,
        GROUP=8,
        **(products.overlap(a.device) if after else {"EARLY": False}),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


# Of the gradients' launch, for half precision and for float32: none spills.
TILES = ({"BT": 32, "BN": 64, "BK": 32, "num_warps": 8}, {"BT": 32, "BN": 32, "BK": 16, "num_warps": 8})
MOST_BLOCKS = 256  # of the gradients' launch: enough to fill a GPU
LARGEST_UNIT = 1024


def unit_of(factor: Factor) -> int:
    """Rows and columns of W that one block takes: many, so that the parts stay small, but enough blocks."""
    unit = 64
    while unit < LARGEST_UNIT and _units(factor, 2 * unit) >= MOST_BLOCKS:
        unit *= 2
    return unit


def _units(factor: Factor, unit: int) -> int:
    return triton.cdiv(factor.outer, unit) * factor.blocks * triton.cdiv(factor.width, unit)


def factor_gradients(
    rows: Rows, dy: Tensor, x: Tensor, weight: Tensor, factor: Factor, out: Mapping[str, Tensor]
) -> None:
    """Fill out["P"], out["Q"] and out["weight"], those of them that are there."""
    outer, inner, unit = factor.outer, factor.blocks * factor.width, unit_of(factor)
    down, across = triton.cdiv(outer, unit), triton.cdiv(factor.width, unit)
    P_size = (across, factor.blocks * outer * factor.rank)
    Q_size = (down * factor.blocks, factor.rank * factor.width)
    parts = {
        name: x.new_empty(size, dtype=torch.float32) if name in out else None
        for name, size in (("P", P_size), ("Q", Q_size))
    }
    weight_sum = None
    if "weight" in out:  # summed task by task; in half precision beside the gradient itself
        whole = out["weight"].dtype == torch.float32
        weight_sum = out["weight"].zero_() if whole else torch.zeros_like(out["weight"], dtype=torch.float32)
    for task in range(max(1, rows.tasks)):  # one after the other through the same parts
        products.launch(
            factor_gradients_kernel,
            (down, factor.blocks * across),
            *(dy, x, weight, factor.P, factor.Q, rows.segments, parts["P"], parts["Q"], weight_sum),
            *(rows.count, task, outer, inner, dy.stride(0), x.stride(0), *weight.stride()),
            **rows.common,
            **factor.constants,
            BLOCKS=factor.blocks,
            LEFT=parts["P"] is not None,
            RIGHT=parts["Q"] is not None,
            WEIGHT=weight_sum is not None,
            UNIT=unit,
            **TILES[x.dtype == torch.float32],
        )
        for name, own in parts.items():
            if own is not None:
                products.add_parts(own, out[name], task)
    if weight_sum is not None and weight_sum is not out["weight"]:
        out["weight"].copy_(weight_sum)
