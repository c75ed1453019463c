"""W multiplied by a low-rank matrix from the left, the paper's "matrix multiplication" ablation: (I + P Q) W."""

import torch
from torch import Tensor

from tarp_kernels.ops import task_products
from tarp_kernels.ops.lowrank_linear import lowrank_linear
from tarp_kernels.ops.lowrank_linear.contract import Generator
from tarp_kernels.ops.lowrank_linear.reference import accumulation_dtype


def matmul_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    P: Tensor,
    Q: Tensor,
    V: Tensor | None,
    U: Tensor | None,
    generator: Generator | None,
    *,
    sigma: str,
    scaling: float,
    segments: Tensor | None,
    dropout: tuple[float, int] | None,
) -> Tensor:
    """y = x ((I + P Q) W)ᵀ + b + scaling · (Σ(x) x Vᵀ) Uᵀ for P [N, R], Q [R, N]; with segments both lead with B.

    Source: Hou, Salazar, Polovets, "Meta-Learning the Difference", TACL 10 (2022), the ablation of eq. 1's product.
    The other arguments, and the errors, are those of `lowrank_linear`; without V and U there is no additive half.

    P (Q W) is one more low-rank term: Q W [R, K] is made in W's dtype, and nothing of W's size is. Without an additive
    half the term is the fused kernels'; beside one it is float32, and y is rounded once more when the two meet.
    """
    with torch.autocast(x.device.type, enabled=False):
        right = Q.to(weight.dtype) @ weight  # [R, K]
    if V is None or U is None:
        return lowrank_linear(x, weight, bias, right, P, None, segments=segments)
    y = lowrank_linear(
        x, weight, bias, V, U, generator, sigma=sigma, scaling=scaling, segments=segments, dropout=dropout
    )
    with torch.autocast(x.device.type, enabled=False):
        wide = accumulation_dtype(x.dtype)
        rows = x.reshape(-1, x.shape[-1]).to(wide)
        tasks = None if segments is None else task_products.tasks_of_rows(rows, segments)
        term = task_products.expand(task_products.contract(rows, right.to(wide), tasks), P.to(wide).mT, tasks)
        return (y.to(wide) + term.reshape(y.shape)).to(y.dtype)
