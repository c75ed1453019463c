"""What `hadamard_linear` accepts beyond `lowrank_linear`: the tensors of the factor."""

import torch
from torch import Tensor

from tarp_kernels.ops.factor import FACTORS
from tarp_kernels.ops.lowrank_linear.contract import placed


def check(x, weight, P, Q, V, U, activation, segments) -> None:
    """Raise TypeError or ValueError that names the argument, what came, what was expected and the fix."""
    for name, tensor in (("x", x), ("weight", weight), ("P", P), ("Q", Q)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: got {type(tensor).__name__}, expected a torch.Tensor")
    if activation not in FACTORS:
        raise ValueError(f"activation: got {activation!r}, expected one of {', '.join(FACTORS)}")
    if (V is None) != (U is None):
        missing, there = ("V", "U") if V is None else ("U", "V")
        raise ValueError(f"{missing}: got None beside a {there}, expected both, or neither for no additive half")
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"weight: got shape {list(weight.shape)}, expected [N, K] with K = x.shape[-1]")
    N, K = weight.shape
    tasks = 0 if segments is None or not isinstance(segments, Tensor) else 1
    lead = "B, " if tasks else ""
    blocked = P.dim() == tasks + 3
    if P.dim() not in (tasks + 2, tasks + 3) or P.shape[-2] != N or P.shape[-1] < 1:
        raise ValueError(
            f"P: got shape {list(P.shape)}, expected [{lead}N, R] or [{lead}C, N, R] with N = {N}, R ≥ 1"
            + ("" if tasks else "; factors with a leading task dimension need segments")
        )
    blocks = P.shape[-3] if blocked else 1
    if blocks < 1 or K % blocks:
        raise ValueError(f"P: got C = {blocks} blocks of columns, expected a divisor of K = {K}")
    shape = (*P.shape[:tasks], P.shape[-1], K // blocks)
    if tuple(Q.shape) != shape:
        raise ValueError(f"Q: got shape {list(Q.shape)}, expected {list(shape)}, that is [{lead}R, K / C]")
    if tasks and P.shape[0] != segments.shape[0] - 1:
        raise ValueError(f"P: got {P.shape[0]} tasks, expected {segments.shape[0] - 1} like segments")
    dtypes = (x.dtype,) if x.dtype == torch.float64 else (x.dtype, torch.float32)
    for name, tensor in (("P", P), ("Q", Q)):
        placed(name, tensor, x, dtypes)
