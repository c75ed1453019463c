"""The tensors of an adapter: their names, their shapes, and products of them written out."""

import torch
from torch import Tensor

from tarp_kernels.nn.config import TarpConfig
from tarp_kernels.ops.factor import kronecker

# The additive half, the factor, and the generator of a factor that is made from the input.
ADAPTER_NAMES = ("V", "U", "w1", "b1", "w2", "b2", "H", "P", "Q", "PH", "Pw1", "Pb1", "Pw2", "Pb2")


def adapter_shapes(config: TarpConfig, in_features: int, out_features: int) -> dict[str, tuple[int, ...]]:
    """{name: shape} of the adapter of one layer."""
    rank, outputs = config.r, config.generator_outputs
    columns = out_features if config.product == "matmul" else in_features  # of the factor
    left: tuple[int, ...] = (out_features, rank)
    right: tuple[int, ...] = (rank, in_features)
    factor: tuple[int, ...] = (rank, columns)
    mixed: tuple[int, ...] | None = None
    if config.kind == "kronecker":
        terms = config.kronecker_terms
        if in_features % terms or out_features % terms:
            sizes = f"in_features = {in_features} and out_features = {out_features}"
            raise ValueError(f"kronecker_terms: got {terms}, expected a divisor of {sizes}")
        left, right = (terms, out_features // terms, rank), (terms, rank, in_features // terms)
        factor, mixed = (terms, rank, columns // terms), (terms, terms, terms)

    def generator(prefix: str) -> dict[str, tuple[int, ...] | None]:
        mlp, bias = config.generator == "mlp", config.generator_bias
        hidden = (config.generator_hidden or rank) if mlp else outputs
        return {
            f"{prefix}w1": (hidden, in_features),
            f"{prefix}b1": (hidden,) if bias else None,
            f"{prefix}w2": (outputs, hidden) if mlp else None,
            f"{prefix}b2": (outputs,) if mlp and bias else None,
        }

    shapes: dict[str, tuple[int, ...] | None] = {}
    if config.additive:
        shapes |= {"V": right, "U": left, "H": mixed} | (generator("") if config.kind == "dynamic" else {})
    if config.multiplicative != "none":
        shapes |= {"P": left, "Q": factor, "PH": mixed}
        shapes |= generator("P") if config.multiplicative == "dynamic" else {}
    return {name: shape for name, shape in shapes.items() if shape is not None}


def written_out(H: Tensor, U: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    """U' [N, n t r] and V' [n t r, K] with U' V' = Σ_k H_k ⊗ (U_k V_k), or each [B, …]."""
    left, right = kronecker(H, U, V)  # [n, N, t r], [t r, K / n]: column block c of the sum is left[c] right
    eye = torch.eye(left.shape[-3], dtype=right.dtype, device=right.device)
    V = eye[:, None, :, None] * right[..., None, :, None, :]  # [n, t r, n, K / n]
    return left.movedim(-3, -2).flatten(-2), V.flatten(-2).flatten(-3, -2)
