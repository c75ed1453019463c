"""The Triton backend of `lowrank_linear`: tensors in, launches, tensors out, no autograd here.

    forward    one_pass y = x Wᵀ + z Uᵀ + b, z = scaling · Σ(x) x Vᵀ made by every tile    one launch
               or split z first, then the dense product with z Uᵀ as one more k-step    two launches
    backward   middle   dz = dy U, from it dh and du                                    one launch
               dense    dx = dy W + [dh, du] [V; w1]                                    one launch
               tall     dU = dyᵀ z, d[V; w1] = [dh, du]ᵀ x, …: sums over rows           two launches each

The kernels are in `triton_forward` and `triton_backward`. A factor on W takes the dense product's place with one that
knows it, and brings gradients of its own: `tarp_kernels.ops.hadamard_linear.triton_kernels`.
"""

from collections.abc import Callable, Sequence

import torch
import triton
from torch import Tensor

from tarp_kernels import tuning
from tarp_kernels.ops.hadamard_linear.triton_kernels import Factor, factor_gradients, weighed_dense
from tarp_kernels.ops.lowrank_linear import triton_products as products
from tarp_kernels.ops.lowrank_linear.contract import Form, Operands
from tarp_kernels.ops.lowrank_linear.layout import Saved, Selection, arranged, dense_gradients
from tarp_kernels.ops.lowrank_linear.layout import rows as adjacent
from tarp_kernels.ops.lowrank_linear.triton_backward import middle_backward_kernel
from tarp_kernels.ops.lowrank_linear.triton_forward import forward_kernel
from tarp_kernels.ops.lowrank_linear.triton_plans import Middle, estimate, features_of, key_of, most_rows
from tarp_kernels.ops.lowrank_linear.triton_products import Rows, aligned, dense, number, places, tall
from tarp_kernels.tuning import Key


def forward(
    operands: Operands,
    segments: Tensor | None,
    form: Form,
    saved: Saved | None = None,
    selection: Selection | None = None,
    y: Tensor | None = None,
    product: Callable[..., None] | None = None,
) -> Tensor:
    """y [T, N]; h, s, u go into `saved`. A selection of rows to write goes into `y`, contiguous.

    product  in the place of `triton_products.dense`, after a launch that makes z
    """
    operands = arranged(operands, _plain)
    x, weight, bias, *_ = operands
    rows, middle = Rows(x, segments, form.dropout_p, form.dropout_seed, selection), Middle(operands, form)
    if y is None:
        y = x.new_empty(rows.count, weight.shape[0])
    if rows.count == 0:
        return y
    factor = factor_of(operands, form, segments)
    variant, tile, dense_tile, _ = tuning.plan(key_of(operands, middle, segments, form), rows.count, x.device, estimate)
    outer, inner = map(int, weight.shape)
    one_pass = variant == "one_pass" and factor is None and product is None
    z = None if one_pass else x.new_empty(rows.count, middle.rank)
    if middle.rank > 0:
        products.launch(
            forward_kernel,
            (rows.tiles(tile.rows), triton.cdiv(outer, tile.columns) if one_pass else 1),
            *(*operands[:9], rows.segments, y, z, *(saved or (None, None, None)), *places(rows.read, x, rows.write, y)),
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
            ALIGNED=aligned(operands.V) and aligned(operands.w1),
            EARLY=not one_pass and products.overlap(x.device)["EARLY"],
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    if z is not None:
        after = middle.rank > 0
        if product is not None:
            product(rows, x, weight, bias, z, operands.U, y)
        elif factor is None:
            dense(rows, x, weight, bias, z, operands.U, y, dense_tile, after=after, read=rows.read, write=rows.write)
        else:
            weighed_dense(rows, x, weight, bias, z, operands.U, factor, y, dense_tile, after=after)
    return y


def backward(
    dy: Tensor,
    operands: Operands,
    segments: Tensor | None,
    saved: Saved,
    needs: Sequence[bool],
    form: Form,
    selection: Selection | None = None,
    sums: Callable[..., None] = tall,
) -> list[Tensor]:
    """Gradients of the needed operands, in their order, each in its tensor's dtype; dx is 0 where x is not read.

    sums  in the place of `triton_products.tall`
    """
    given, operands, dy = operands._asdict(), arranged(operands, _plain), adjacent(dy)
    x, weight = operands.x, operands.weight
    wanted = [name for name, needed in zip(Operands._fields, needs, strict=True) if needed]
    ours = [name for name in wanted if name != "bias" and (name != "weight" or operands.P is not None)]
    out = {name: given[name].new_empty(given[name].shape) for name in ours}
    rows = Rows(x, segments, form.dropout_p, form.dropout_seed, selection)
    if "x" in out and rows.read is not None:
        out["x"].zero_()
    if out and rows.count == 0:
        for gradient in out.values():
            gradient.zero_()
    elif out:
        middle = Middle(operands, form)
        key, factor = key_of(operands, middle, segments, form), factor_of(operands, form, segments)
        inner = Inner(x, rows.count, operands, middle)
        low = middle.rank > 0 and bool(out.keys() - {"weight", "P", "Q"})
        if low:
            inner.launch(rows, dy, operands, saved, key, form, out)
        if "x" in out:
            _input_gradient(rows, dy, operands, inner.inputs, key, factor, out["x"], after=low)
        if low:
            inner.sums(rows, dy, x, out, sums)
        if factor is not None and out.keys() & {"weight", "P", "Q"}:
            factor_gradients(rows, dy, x, weight, factor, out)
    out |= dense_gradients(dy, operands, wanted, selection)
    return [out[name] for name in wanted]


class Inner:
    """What flows back to the middle: z, inputs = [dh, du], and of an MLP generator dg and its activated units."""

    def __init__(self, x: Tensor, count: int, operands: Operands, middle: Middle) -> None:
        self.middle = middle
        self.z = x.new_empty(count, middle.rank)
        self.inputs = x.new_empty(count, middle.rank + middle.first)
        self.dg = x.new_empty(count, middle.outputs) if middle.mlp else None
        self.hidden = x.new_empty(count, middle.first) if middle.mlp else None

    def launch(
        self, rows: Rows, dy: Tensor, operands: Operands, saved: Saved, key: Key, form: Form, out: dict[str, Tensor]
    ) -> None:
        outer = int(operands.weight.shape[0])
        block, features = most_rows(key), features_of(key._replace(inner=outer))
        products.launch(
            middle_backward_kernel,
            (rows.tiles(block),),
            *(dy, operands.U, operands.w2, rows.segments, *saved, self.z, self.inputs, self.dg, self.hidden),
            *(rows.write, None if rows.write is None else dy.shape[0]),
            *(rows.count, rows.tasks, outer, dy.stride(0), number(form.scaling)),
            **rows.common,
            **self.middle.constants,
            EVEN=outer % features == 0,
            EARLY="x" in out and products.overlap(dy.device)["EARLY"],
            Z="U" in out,
            INPUTS=bool(out.keys() - {"U", "weight", "P", "Q"}),
            BT=block,
            BK=features,
            num_warps=4,
        )

    def sums(self, rows: Rows, dy: Tensor, x: Tensor, out: dict[str, Tensor], tall: Callable[..., None]) -> None:
        """The gradients that are sums over rows, by `tall`."""
        rank, first = self.middle.rank, self.middle.first
        if "U" in out:
            tall(rows, dy, self.z, {"U": dy.shape[1]}, out, a_rows=rows.write)
        if "V" in out or "w1" in out:
            tall(rows, self.inputs, x, {"V": rank, "w1": first}, out, rows.drops, b_rows=rows.read)
        if "b1" in out:
            tall(rows, self.inputs[:, rank:], None, {"b1": first}, out)
        if self.dg is not None:
            for name, other in (("w2", self.hidden), ("b2", None)):
                if name in out:
                    tall(rows, self.dg, other, {name: self.middle.outputs}, out)


def _input_gradient(
    rows: Rows,
    dy: Tensor,
    operands: Operands,
    inputs: Tensor,
    key: Key,
    factor: Factor | None,
    out: Tensor,
    after: bool,
) -> None:
    """dx = dy (Φ ⊙ W) + mask · [dh, du] [V; w1]."""
    x, weight, V, w1 = operands.x, operands.weight, operands.V, operands.w1
    mirrored = key._replace(inner=key.outer, outer=key.inner, transposed=not key.transposed)
    tile = tuning.plan(mirrored, rows.count, x.device, estimate).dense
    q = (V if w1 is None else torch.cat((V.to(x.dtype), w1.to(x.dtype)), dim=-2)).transpose(-1, -2)
    if factor is None:
        dense(rows, dy, weight.t(), None, inputs, q, out, tile, rows.drops, after, read=rows.write, write=rows.read)
    else:
        weighed_dense(rows, dy, weight.t(), None, inputs, q, factor, out, tile, True, rows.drops, after)


def factor_of(operands: Operands, form: Form, segments: Tensor | None) -> Factor | None:
    """The factor on W of a call of `hadamard_linear`."""
    if operands.P is None or operands.Q is None:
        return None
    return Factor(operands.P, operands.Q, form.multiplicative, segments)


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().resolve_neg().contiguous()
