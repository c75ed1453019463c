"""The multiplicative term with a factor made from the input: Φ1(x) = 1 + U1 Σ1(x) V1 or U1 Σ1(x) V1, one for each row.

Row t's product with Φ1(x_t) ⊙ W is a sum of R products with W, so no factor is ever written out:

    x_t (U1 Σ_t V1 ⊙ W)ᵀ = Σ_b [(x_t ⊙ V1[b]) Wᵀ] ⊙ c_b[t],    c_b[t, n] = Σ_a U1[n, a] Σ_t[a, b]

Backward makes one b after the other anew, so that R tensors of y's size are never alive together.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tarp_kernels import backends
from tarp_kernels.ops import task_products
from tarp_kernels.ops.lowrank_linear import autocast_operands, run
from tarp_kernels.ops.lowrank_linear.contract import Generator, check, check_factor, check_generator
from tarp_kernels.ops.lowrank_linear.reference import HIDDEN_ACTIVATIONS, accumulation_dtype, output

ACTIVATIONS = ("one_plus", "none")


def dynamic_hadamard_linear(
    x, weight, bias, P, Q, V, U, generator, factor_generator, activation, sigma, scaling, segments, dropout, backend
) -> Tensor:
    """`hadamard_linear` with a factor_generator: its contract, checked here."""
    if isinstance(x, Tensor) and x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        x, weight, bias, V, U, P, Q, generator = autocast_operands(x, weight, bias, V, U, P, Q, generator)
        *_, factor_generator = autocast_operands(x, *(None,) * 6, factor_generator)
        with torch.autocast(x.device.type, enabled=False):
            return dynamic_hadamard_linear(
                *(x, weight, bias, P, Q, V, U, generator, factor_generator),
                *(activation, sigma, scaling, segments, dropout, backend),
            )
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"activation: got {activation!r} with a factor_generator, expected 'one_plus' or 'none'; the other ones do "
            "not split into products with W"
        )
    check_factor(x, weight, P, Q, "one_plus", V, U, generator, segments)
    lead = () if segments is None else (segments.shape[0] - 1,)
    if P.dim() != 2 + len(lead):
        raise ValueError(
            f"P: got shape {list(P.shape)} with a factor_generator, expected [{'B, ' * len(lead)}N, R]; column blocks "
            "belong to the static factor"
        )
    none = x.new_empty(*lead, 0, x.shape[-1]), x.new_empty(*lead, weight.shape[0], 0)
    check(x, weight, bias, *(none if V is None else (V, U)), generator, sigma, scaling, segments, dropout, least_rank=0)
    check_generator(factor_generator, x, P.shape[-1], sigma, segments, "factor_generator")

    # The published form has no product with W itself; a zero of W's shape costs no memory.
    plain = weight if activation == "one_plus" else weight.new_zeros(()).expand(weight.shape)
    if V is not None:
        y = run(x, plain, bias, V, U, generator, sigma, scaling, segments, dropout, backend)
    else:
        backends.choose(backend, x.dtype, x.device)  # PyTorch's product serves all, but a wrong name is an error
        y = F.linear(x, plain, bias)
    term = multiplicative_term(x.reshape(-1, x.shape[-1]), weight, P, Q, factor_generator, sigma, segments)
    return (y.to(term.dtype) + term.reshape(y.shape)).to(x.dtype)


def multiplicative_term(
    x: Tensor, weight: Tensor, P: Tensor, Q: Tensor, generator: Generator, sigma: str, segments: Tensor | None
) -> Tensor:
    """Σ_b [(x ⊙ V1[b]) Wᵀ] ⊙ c_b for rows x [T, K]: [T, N] in the accumulation dtype."""
    tasks = None if segments is None else task_products.tasks_of_rows(x, segments)
    middle = _middle(x, generator, sigma, tasks)
    if torch.compiler.is_compiling():  # the compiler decides itself what to make anew
        return _Terms.forward(None, x, weight, P, Q, middle, tasks, sigma)
    return _Terms.apply(x, weight, P, Q, middle, tasks, sigma)


def _middle(x: Tensor, generator: Generator, sigma: str, tasks: Tensor | None) -> Tensor:
    """Σ1(x) of every row: [T, R] or [T, R²]."""
    wide = accumulation_dtype(x.dtype)
    w1, b1, w2, b2 = (None if tensor is None else tensor.to(wide) for tensor in generator[:4])

    def affine(rows: Tensor, matrix: Any, bias: Tensor | None) -> Tensor:
        product = task_products.contract(rows, matrix, tasks)
        if bias is None:
            return product
        return product + task_products.expand(rows.new_ones(rows.shape[0], 1), bias.unsqueeze(-2), tasks)

    g = affine(x.to(wide), w1, b1)
    if w2 is not None:
        g = affine(HIDDEN_ACTIVATIONS[generator.hidden_activation](g), w2, b2)
    return output(g, generator.activation, sigma)


def _term(b: int, x, weight, P, Q, middle, tasks: Tensor | None, sigma: str) -> Tensor:
    """[(x ⊙ V1[b]) Wᵀ] ⊙ c_b: x, P, Q and middle wide, W in its own dtype, which the factor x ⊙ V1[b] is rounded to."""
    ones = x.new_ones(x.shape[0], 1)
    scaled = x * task_products.expand(ones, Q[..., b : b + 1, :], tasks)  # [T, K]
    if sigma == "diag":
        coefficient = task_products.expand(middle[:, b : b + 1], P[..., b : b + 1].mT, tasks)  # [T, N]
    else:
        rank = P.shape[-1]
        coefficient = task_products.expand(middle.view(-1, rank, rank)[:, :, b], P.mT, tasks)
    return F.linear(scaled.to(weight.dtype), weight).to(x.dtype) * coefficient


class _Terms(torch.autograd.Function):
    """The sum of all terms; backward differentiates them one by one and adds up in the accumulation dtype."""

    @staticmethod
    def forward(ctx, x, weight, P, Q, middle, tasks, sigma):
        if ctx is not None:
            ctx.save_for_backward(x, weight, P, Q, middle, tasks)
            ctx.sigma = sigma
        wide = [tensor.to(middle.dtype) for tensor in (x, P, Q)]
        y = middle.new_zeros(x.shape[0], weight.shape[0])
        for b in range(Q.shape[-2]):
            y = y + _term(b, wide[0], weight, *wide[1:], middle, tasks, sigma)
        return y

    @staticmethod
    def backward(ctx, dy):
        *tensors, tasks = ctx.saved_tensors
        needs = ctx.needs_input_grad[:5]
        higher = torch.is_grad_enabled()  # create_graph=True
        with torch.enable_grad():
            # Views: Σ is a function of x too, and what reaches x through it is not this function's to add.
            leaves = [
                tensor.view_as(tensor) if higher and tensor.requires_grad else tensor.detach().requires_grad_(needed)
                for tensor, needed in zip(tensors, needs, strict=True)
            ]
            x, weight, P, Q, middle = leaves
            x, P, Q = (tensor.to(dy.dtype) for tensor in (x, P, Q))
            places = [t for t, needed in zip((x, weight, P, Q, middle), needs, strict=True) if needed]
            totals = [0] * len(places)
            for b in range(Q.shape[-2]):
                term = _term(b, x, weight, P, Q, middle, tasks, ctx.sigma)
                found = torch.autograd.grad(term, places, dy, create_graph=higher)
                totals = [total + gradient.to(dy.dtype) for total, gradient in zip(totals, found, strict=True)]
            gradients = iter(totals)
            return (
                *(next(gradients).to(t.dtype) if n else None for t, n in zip(tensors, needs, strict=True)),
                None,
                None,
            )
