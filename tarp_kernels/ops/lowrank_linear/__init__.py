"""`lowrank_linear`: a dense layer plus a low-rank update whose middle is made from the input."""

from functools import partial

import torch
from torch import Tensor

from tarp_kernels import backends
from tarp_kernels.ops.lowrank_linear import autograd, cuda_plans
from tarp_kernels.ops.lowrank_linear.contract import Form, Generator, Operands, check, check_factor
from tarp_kernels.ops.lowrank_linear.selected import on_rows

__all__ = ["Generator", "lowrank_linear"]


def lowrank_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    V: Tensor,
    U: Tensor,
    generator: Generator | None,
    *,
    sigma: str = "diag",
    scaling: float = 1.0,
    segments: Tensor | None = None,
    dropout: tuple[float, int] | None = None,
    backend: str | None = None,
    rows: Tensor | None = None,
    into: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """y = x Wᵀ + b + scaling · (Σ(x) x Vᵀ) Uᵀ, with Σ(x) generated per row of x.

    Source: Hou, Salazar, Polovets, "Meta-Learning the Difference", TACL 10 (2022), eq. 1 and 3, additive half.

    x          [..., K] float32, bfloat16, float16 or float64
    weight     [N, K] in x's dtype, any strides (a Conv1D passes the transposed view of its [K, N])
    bias       [N] in x's dtype, or None
    V, U       [r, K], [N, r], r ≥ 1, in x's dtype or float32; with segments [B, r, K], [B, N, r]
    generator  `Generator`, or None for the static update Σ = I (LoRA); with segments each tensor has a leading B
    sigma      "diag": Σ(x) = diag(s), s = g(x) [r]; "full": Σ(x) = g(x) as [r, r]
    scaling    a number; a new value recompiles nothing
    segments   int32 or int64 [B+1] row offsets over the flattened rows: task i owns rows segments[i]:segments[i+1],
               empty ones are legal; starts at 0 and ends at the number of rows
    dropout    (p, seed): drops elements of x before V and the generator (not before W) and scales by 1 / (1 - p);
               Philox counted by row·K + column, so the same seed drops the same elements
    backend    "reference" | "cpu" | "triton" | "cuda"; None chooses. "cuda" serves half precision, adjacent numbers in
               W's rows, K a multiple of 8, up to 64 rows r ≤ 64, no dropout; by name all else is an error
    rows       int64 [T'] on x's device, strictly rising: computes x[rows] alone, x flattened to [-1, K]; y is [T', N].
               segments and dropout count those rows
    into       (base, index): base [..., N] in x's dtype, index like `rows`, a number for each row that is computed;
               the result is base, flattened to [-1, N], with its rows `index` replaced by y, in base's shape

    Returns y [..., N] in x's dtype: accumulated in float32 (float64 for float64) and rounded once.
    With rows and into the kernels read and write through the index: no x[rows], no y beside the result, and backward
    likewise (the gradient of a trained weight or bias and second-order gradients do gather; so does autocast that casts
    x). Numbers on a device are not checked by value but clamped.
    Twice differentiable in every tensor argument. The same inputs give the same bits at a fixed thread count.
    Under autocast x, weight and bias are cast like those of torch.nn.functional.linear; the adapter keeps its dtype.
    Raises TypeError or ValueError that names the argument, what came, what was expected and the fix.
    """
    if rows is not into:  # type: ignore[comparison-overlap]  # one test for two: at least one is there
        chosen = {"backend": backend, "rows": rows, "into": into}
        return on_rows(run, x, weight, bias, V, U, generator, sigma, scaling, segments, dropout, **chosen)
    return run(x, weight, bias, V, U, generator, sigma, scaling, segments, dropout, backend)


def run(
    x, weight, bias, V, U, generator, sigma, scaling, segments, dropout, backend, factor=None, apply=None
) -> Tensor:
    """The operator; with factor = (P, Q, activation) W times f(P Q), and then V and U may both be None.

    apply  what runs the checked call in place of `autograd.apply`
    """
    autocast = isinstance(x, Tensor) and x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)
    P, Q, multiplicative = factor or (None, None, "one_plus")
    if autocast:
        x, weight, bias, V, U, P, Q, generator = autocast_operands(x, weight, bias, V, U, P, Q, generator)
    if factor is not None:
        check_factor(x, weight, P, Q, multiplicative, V, U, generator, segments)
        if V is None:
            lead = () if segments is None else (segments.shape[0] - 1,)
            V, U = x.new_empty(*lead, 0, x.shape[-1]), x.new_empty(*lead, weight.shape[0], 0)
    check(x, weight, bias, V, U, generator, sigma, scaling, segments, dropout, least_rank=1 if factor is None else 0)
    p, seed = dropout if dropout is not None else (0.0, 0)
    form = Form(
        sigma,
        "silu" if generator is None else generator.hidden_activation,
        "none" if generator is None else generator.activation,
        multiplicative,
        scaling,
        float(p),
        seed,
        "",
    )
    rows = x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])
    w1, b1, w2, b2 = (None,) * 4 if generator is None else generator[:4]
    operands = Operands(rows, weight, bias, V, U, w1, b1, w2, b2, P, Q)
    cuda = partial(cuda_plans.refusal, operands, segments, form)
    form = form._replace(backend=backends.choose(backend, x.dtype, x.device, cuda))
    if autocast:  # everything is cast: the products inside keep their precision
        with torch.autocast(x.device.type, enabled=False):
            y = (apply or autograd.apply)(operands, segments, form)
    else:
        y = (apply or autograd.apply)(operands, segments, form)
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], weight.shape[0])


def autocast_operands(x, weight, bias, V, U, P, Q, generator):
    """The operands as autocast has them."""
    dtype = torch.get_autocast_dtype(x.device.type)

    def cast(tensor):
        castable = isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dtype != torch.float64
        return tensor.to(dtype) if castable else tensor

    def keep(tensor):  # an adapter in the other half precision would match neither x nor float32
        half = isinstance(tensor, Tensor) and tensor.dtype in (torch.bfloat16, torch.float16) and tensor.dtype != dtype
        return tensor.float() if half else tensor

    if isinstance(generator, Generator):
        generator = generator.map(keep)
    return cast(x), cast(weight), cast(bias), keep(V), keep(U), keep(P), keep(Q), generator
