"""`hadamard_linear`: a dense layer whose weight is multiplied by a low-rank factor, element by element."""

from torch import Tensor

from tarp_kernels.ops.factor import kronecker
from tarp_kernels.ops.hadamard_linear.dynamic import dynamic_hadamard_linear
from tarp_kernels.ops.lowrank_linear import run
from tarp_kernels.ops.lowrank_linear.contract import Generator

__all__ = ["hadamard_linear", "kronecker"]


def hadamard_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    P: Tensor,
    Q: Tensor,
    V: Tensor | None = None,
    U: Tensor | None = None,
    generator: Generator | None = None,
    *,
    activation: str = "centred_softplus",
    sigma: str = "diag",
    scaling: float = 1.0,
    segments: Tensor | None = None,
    dropout: tuple[float, int] | None = None,
    backend: str | None = None,
    factor_generator: Generator | None = None,
) -> Tensor:
    """y = x (Φ ⊙ W)ᵀ + b + scaling · (Σ(x) x Vᵀ) Uᵀ with Φ = f(P Q): both halves of the update in one call.

    Source: Hou, Salazar, Polovets, "Meta-Learning the Difference", TACL 10 (2022), eq. 1; eq. 3 with factor_generator.

    x, weight, bias, V, U, generator, sigma, scaling, segments, dropout
                as for `lowrank_linear`; without V and U there is no additive half; dropout acts on that half only
    P, Q        [N, R], [R, K]; or [C, N, R], [R, K / C]: column block c of the argument is P[c] Q, which is how
                `kronecker` writes a sum of Kronecker products. In x's dtype or float32; with segments both lead with B
    activation  f: "centred_softplus", which is 1 at P Q = 0; "one_plus" (1 + P Q); "softplus", the published form
    backend     "reference" | "cpu" | "triton"; None chooses
    factor_generator
                None: Φ is static. A `Generator` of Σ1(x) [R, R], diagonal or full as `sigma` says: Φ is made for each
                row, 1 + P Σ1(x) Q for activation="one_plus" and P Σ1(x) Q, the published form, for "none"; no column
                blocks then. With segments its tensors lead with B

    Φ is made tile by tile inside the dense product: where weight is frozen nothing of its size is allocated, in forward
    or backward. Returns y [..., N] in x's dtype. Twice differentiable, deterministic, and with the errors of
    `lowrank_linear`.

    Made for each row, Φ costs R further products with W by torch's matmul and is never written out; the rest of y is
    `lowrank_linear` on the chosen backend. In half precision x ⊙ Q[b] and its product with W are rounded
    to x's dtype, their sum over b with the coefficients is float32, and y is rounded once more when it joins the rest.
    """
    if factor_generator is not None:
        return dynamic_hadamard_linear(
            *(x, weight, bias, P, Q, V, U, generator, factor_generator),
            *(activation, sigma, scaling, segments, dropout, backend),
        )
    factor = (P, Q, activation)
    return run(x, weight, bias, V, U, generator, sigma, scaling, segments, dropout, backend, factor)
