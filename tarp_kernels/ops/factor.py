"""The multiplicative factor Φ = f(argument) of method.md §2 in plain PyTorch, and how its arguments are stored.

P [C, N, R] and Q [R, K / C]: column block c of the argument is P[c] Q. A plain low-rank argument is P [N, R], Q [R, K].
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

CENTRE = math.log(math.e - 1)
"""softplus is 1 here."""

FACTORS = {
    "centred_softplus": lambda v: F.softplus(v + CENTRE),
    "one_plus": lambda v: 1 + v,
    "softplus": F.softplus,
}


_SLOPES = {
    "centred_softplus": lambda v: torch.sigmoid(v + CENTRE),
    "one_plus": torch.ones_like,
    "softplus": torch.sigmoid,
}


def _argument(P: Tensor, Q: Tensor) -> Tensor:
    product = P @ Q
    return product if P.dim() == 2 else product.transpose(0, 1).flatten(1)  # [C, N, K / C] -> [N, K]


def factor(P: Tensor, Q: Tensor, activation: str) -> Tensor:
    """Φ [N, K] of one task."""
    return FACTORS[activation](_argument(P, Q))


def multiplied(weight: Tensor, P: Tensor, Q: Tensor, activation: str) -> Tensor:
    """Φ ⊙ W [N, K] of one task in float32, or float64 for a weight in float64."""
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return weight.to(wide) * factor(P.to(wide), Q.to(wide), activation)


def factor_slope(P: Tensor, Q: Tensor, activation: str) -> Tensor:
    """f' at the argument [N, K] of one task."""
    return _SLOPES[activation](_argument(P, Q))


def kronecker(H: Tensor, U: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    """P and Q of the argument Σ_k H_k ⊗ (U_k V_k): H [t, n, n], U [t, N / n, r], V [t, r, K / n], or each [B, …].

    Row a · N/n + c of column block b is Σ_k H_k[a, b] U_k[c] V_k: P [n, N, t r] holds H_k[a, b] U_k[c], and Q the V_k.
    """
    H = H.transpose(-3, -1)[..., None, :, None]  # [k, a, b] -> [b, a, 1, k, 1]
    U = U.transpose(-3, -2)[..., None, None, :, :, :]  # [k, c, r] -> [1, 1, c, k, r]
    P = H * U  # of elements, which autocast leaves in their precision
    return P.flatten(-2).flatten(-3, -2), V.flatten(-3, -2)
