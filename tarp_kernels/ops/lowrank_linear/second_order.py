"""Second-order gradients of `lowrank_linear`, on every backend.

The dense product is bilinear, so its part is written out. The low-rank parts of all first-order gradients are the
gradients of one number, which takes no tensor of size T × N:

    φ = scaling · Σ_t ⟨Σ(x_t) V x_t, Uᵀ dy_t⟩

φ is made of one product of rows with their own task's matrix, `contract`. Three such products are each differentiated
by the other two, so any order of derivative runs on the same three kernels:

    contract  [T, K], [B, R, K] -> [T, R]     x_t q_bᵀ
    expand    [T, R], [B, R, K] -> [T, K]     z_t q_b
    reduce    [T, R], [T, K] -> [B, R, K]     Σ z_tᵀ x_t over the rows of task b
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tarp_kernels.ops.lowrank_linear import reference
from tarp_kernels.ops.lowrank_linear.contract import Form, Operands
from tarp_kernels.ops.lowrank_linear.dense_second_order import dense_double_backward, dense_number
from tarp_kernels.ops.philox import keep_mask


def double_backward(
    cotangents: Sequence[Tensor | None],
    dy: Tensor,
    operands: Operands,
    segments: Tensor | None,
    needs: Sequence[bool],
    form: Form,
    asked: Sequence[bool],
) -> list[Tensor | None]:
    """Vector-Jacobian product of the first-order gradients that `needs` names, for dy and each operand in `asked`."""
    higher = torch.is_grad_enabled()

    def leaf(tensor: Tensor | None, differentiate: bool) -> Any:
        """A place to differentiate at; a view keeps the history that yet higher derivatives need."""
        if tensor is None:
            return None
        if higher and tensor.requires_grad and differentiate:
            return tensor.view_as(tensor)
        return tensor.detach().requires_grad_(differentiate)

    with torch.enable_grad(), torch.autocast(dy.device.type, enabled=False):
        dy = leaf(dy, asked[0])
        operands = Operands(*(leaf(t, a or n) for t, a, n in zip(operands, asked[1:], needs, strict=True)))
        x, weight = operands.x, operands.weight
        wanted = [
            (name, t) for name, t, n in zip(Operands._fields, operands, needs, strict=True) if n and t is not None
        ]
        phi = low_rank_number(dy, operands, segments, form)
        multiplied = operands.P is not None
        if multiplied and higher:
            phi = phi + dense_number(dy, operands, segments, form.multiplicative)
        low: Sequence[Tensor | None] = [None] * len(wanted)
        if phi.requires_grad:
            low = torch.autograd.grad(phi, [t for _, t in wanted], create_graph=True, allow_unused=True)
        outputs, directions = [], []
        for (name, _), part, cotangent in zip(wanted, low, cotangents, strict=True):
            if cotangent is None:
                continue
            dense = {"x": lambda: dy @ weight, "weight": lambda: dy.t() @ x, "bias": lambda: dy.sum(0)}.get(name)
            dense = None if multiplied and name != "bias" else dense
            for output in (part, None if dense is None else dense()):
                if output is not None and output.requires_grad:
                    outputs.append(output)
                    directions.append(cotangent.to(output.dtype))
    named = dict(zip(("dy", *Operands._fields), (dy, *operands), strict=True))
    targets = {name: t for (name, t), a in zip(named.items(), asked, strict=True) if a and t is not None}
    found: dict[str, Tensor | None] = {}
    if outputs and targets:
        second = torch.autograd.grad(
            outputs, list(targets.values()), directions, allow_unused=True, create_graph=higher
        )
        found = dict(zip(targets, second, strict=True))
    if multiplied and not higher:
        given = {name: c for (name, _), c in zip(wanted, cotangents, strict=True) if c is not None}
        more = dense_double_backward(given, dy, operands, segments, form.multiplicative, set(targets))
        for name, own in more.items():
            low_part = found.get(name)
            found[name] = (own if low_part is None else own + low_part).to(targets[name].dtype)
    return [found.get(name) for name in named]


def low_rank_number(dy: Tensor, operands: Operands, segments: Tensor | None, form: Form) -> Tensor:
    """φ in the accumulation dtype."""
    dtype, wide = operands.x.dtype, reference.accumulation_dtype(operands.x.dtype)
    x, V, U = (tensor.to(wide) for tensor in (operands.x, operands.V, operands.U))
    w1, b1, w2, b2 = (None if tensor is None else tensor.to(wide) for tensor in operands[5:9])
    plain = Grouping(form.backend, segments, None, dtype)
    behind_dropout = plain._replace(dropout=(form.dropout_p, form.dropout_seed) if form.dropout_p > 0 else None)
    inside = plain._replace(dtype=wide)  # products without a tensor of x's width are small and lose nothing
    ones = x.new_ones(x.shape[0], 1)

    def affine(grouping: Grouping, rows: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
        product = contract(rows, matrix, grouping)
        return product if bias is None else product + contract(ones, bias[..., None], inside)

    z = contract(x, V, behind_dropout)
    if w1 is not None:
        s = affine(behind_dropout, x, w1, b1)
        if w2 is not None:
            s = affine(inside, reference.HIDDEN_ACTIVATIONS[form.hidden_activation](s), w2, b2)
        s = reference.output(s, form.activation, form.sigma)
        z = reference.times(s, z, form.sigma)
    return form.scaling * (z * contract(dy.to(wide), U.transpose(-1, -2), plain)).sum()


class Grouping(NamedTuple):
    """What a product of rows with their own task's matrix is besides its two tensors."""

    backend: str
    segments: Tensor | None
    dropout: tuple[float, int] | None  # of the tensor [T, K]
    dtype: torch.dtype  # in which factors enter the kernel; results have the accumulation dtype


def contract(x: Tensor, q: Tensor, grouping: Grouping) -> Tensor:
    """x [T, K], q [R, K] or one [B, R, K] for each task -> [T, R]."""
    if grouping.backend == "triton":
        return _Product.apply("contract", x, q, grouping)
    if grouping.dropout is not None:
        p, seed = grouping.dropout
        x = x * keep_mask(x.shape, p, seed, x.device).to(x.dtype) / (1 - p)
    tasks = [F.linear(x[own], q[i]) for i, own in reference.task_rows(x, grouping.segments)]
    return reference.joined(tasks, x, q.shape[-2])


class _Product(torch.autograd.Function):
    """contract, expand or reduce by the kernels; x [T, K], z [T, R], q [R, K] or [B, R, K]."""

    @staticmethod
    def forward(name: str, a: Tensor, b: Tensor, grouping: Grouping) -> Tensor:
        from tarp_kernels.ops.lowrank_linear import triton_products

        return triton_products.product(name, a, b, grouping.segments, grouping.dropout or (0.0, 0), grouping.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.name, a, b, ctx.grouping = inputs
        ctx.save_for_backward(a, b)

    @staticmethod
    def backward(ctx, g):
        a, b = ctx.saved_tensors

        def product(name: str, *factors: Tensor) -> Tensor:
            return _Product.apply(name, *factors, ctx.grouping)

        if ctx.name == "contract":  # x, q
            first, second = ("expand", g, b), ("reduce", g, a)
        elif ctx.name == "expand":  # z, q
            first, second = ("contract", g, b), ("reduce", a, g)
        else:  # z, x
            first, second = ("contract", b, g), ("expand", a, g)
        _, wanted_a, wanted_b, _ = ctx.needs_input_grad
        return None, product(*first) if wanted_a else None, product(*second) if wanted_b else None, None
