"""The oracle of `lowrank_linear`: plain PyTorch that reads like the equation, for any dtype and device.

Everything is computed in float32 (float64 for float64 input) and rounded once, which is the contract's precision.
Autograd differentiates it as often as anyone likes; the fast backends are tested against it.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tarp_kernels.ops.factor import factor, factor_slope
from tarp_kernels.ops.philox import keep_mask

HIDDEN_ACTIVATIONS = {"relu": torch.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh}
OUTPUT_ACTIVATIONS = {
    "none": lambda g: g,
    "one_plus": lambda g: g + 1,  # a full Σ starts at the identity matrix instead: see `output`
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "softplus": F.softplus,
}


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def task_rows(x: Tensor, segments: Tensor | None) -> list[tuple[Any, slice]]:
    """(index, rows) of every task; without segments one task, whose index ... leaves a tensor as it is."""
    if segments is None:
        return [(..., slice(None))]
    ends = segments.tolist()
    return [(i, slice(*pair)) for i, pair in enumerate(zip(ends[:-1], ends[1:], strict=True))]


def joined(tasks: list[Tensor], x: Tensor, columns: int) -> Tensor:
    """The tasks' rows one below the other."""
    if not tasks:
        return x.new_zeros(0, columns)
    return tasks[0] if len(tasks) == 1 else torch.cat(tasks)


def generate(x: Tensor, generator, sigma: str) -> Tensor:
    """s = g(x): x [T, K] -> [T, r] for a diagonal Σ, [T, r²] for a full one."""
    g = F.linear(x, generator.w1, generator.b1)  # [T, r | r² | m]
    if generator.w2 is not None:
        g = F.linear(HIDDEN_ACTIVATIONS[generator.hidden_activation](g), generator.w2, generator.b2)
    return output(g, generator.activation, sigma)


def output(g: Tensor, activation: str, sigma: str) -> Tensor:
    """s from what the generator's last layer gives: [T, r] or [T, r²]."""
    if activation == "one_plus" and sigma == "full":
        rank = round(g.shape[-1] ** 0.5)
        return g + torch.eye(rank, dtype=g.dtype, device=g.device).flatten()
    return OUTPUT_ACTIVATIONS[activation](g)


def times(s: Tensor, h: Tensor, sigma: str) -> Tensor:
    """Σ h, row by row: [T, r]."""
    if sigma == "diag":
        return s * h
    rank = h.shape[-1]
    return torch.einsum("tij,tj->ti", s.reshape(-1, rank, rank), h)


def middle(x: Tensor, h: Tensor, generator, sigma: str) -> Tensor:
    """z = Σ(x) h: [T, r]."""
    return h if generator is None else times(generate(x, generator, sigma), h, sigma)


def one_task(x: Tensor, V: Tensor, U: Tensor, generator, sigma: str) -> Tensor:
    h = F.linear(x, V)  # [T, r]
    return F.linear(middle(x, h, generator, sigma), U)  # [T, N]


def lowrank_term(x, V, U, generator, *, sigma="diag", scaling=1.0, segments=None, dropout=None) -> Tensor:
    """scaling · Σ(x) applied between V and U: x [T, K] -> [T, N], in the accumulation dtype (method.md, eq. 3)."""
    wide = accumulation_dtype(x.dtype)
    x, V, U = x.to(wide), V.to(wide), U.to(wide)
    if generator is not None:
        generator = generator.map(lambda tensor: tensor.to(wide))
    if dropout is not None and dropout[0] > 0:
        p, seed = dropout
        x = x * keep_mask(x.shape, p, seed, x.device).to(wide) / (1 - p)
    tasks = [
        one_task(x[own], V[i], U[i], generator and generator.map(lambda tensor, i=i: tensor[i]), sigma)
        for i, own in task_rows(x, segments)
    ]
    return scaling * joined(tasks, x, U.shape[-2])


def dense_term(x, weight, bias, P, Q, multiplicative, segments) -> Tensor:
    """x (f(P Q) ⊙ W)ᵀ + b, each task with its own factor; x Wᵀ + b without one."""
    if P is None:
        return F.linear(x, weight, bias)
    P, Q = P.to(x.dtype), Q.to(x.dtype)
    tasks = [F.linear(x[own], weight * factor(P[i], Q[i], multiplicative), bias) for i, own in task_rows(x, segments)]
    return joined(tasks, x, weight.shape[0])


def lowrank_linear(
    x, weight, bias, V, U, generator, *, P=None, Q=None, multiplicative="one_plus", segments=None, **options
) -> Tensor:
    """y = x (Φ ⊙ W)ᵀ + b + scaling · (Σ(x) x Vᵀ) Uᵀ for x [T, K], Φ = 1 without P and Q; rounded once to x's dtype."""
    dtype, wide = x.dtype, accumulation_dtype(x.dtype)
    x = x.to(wide)  # once, so that both parts of its gradient meet before they are rounded
    bias = None if bias is None else bias.to(wide)
    dense = dense_term(x, weight.to(wide), bias, P, Q, multiplicative, segments)
    options["segments"] = segments
    return (dense + lowrank_term(x, V, U, generator, **options)).to(dtype)


# --- first-order gradients, written out -------------------------------------------------------------------------------

_SLOPES = {  # derivative of the output activation, from its value s
    "none": torch.ones_like,
    "one_plus": torch.ones_like,
    "sigmoid": lambda s: s * (1 - s),
    "tanh": lambda s: 1 - s * s,
    "softplus": lambda s: -torch.expm1(-s),
}


def one_task_backward(dy: Tensor, x: Tensor, V: Tensor, U: Tensor, generator, sigma: str, scaling: float):
    """(dx, dV, dU, dw1, db1, dw2, db2) of scaling · one_task for one task's rows; None where there is no tensor."""
    h = F.linear(x, V)
    dz = scaling * dy @ U  # [T, r]
    dU = scaling * dy.t() @ middle(x, h, generator, sigma)  # [N, r]
    if generator is None:
        return dz @ V, dz.t() @ x, dU, None, None, None, None
    s = generate(x, generator, sigma)
    if sigma == "diag":
        dh, ds = s * dz, h * dz
    else:
        rank = h.shape[-1]
        dh = torch.einsum("tij,ti->tj", s.reshape(-1, rank, rank), dz)
        ds = torch.einsum("ti,tj->tij", dz, h).flatten(1)
    dg = ds * _SLOPES[generator.activation](s)
    dw2 = db2 = None
    du = dg
    if generator.w2 is not None:
        u = F.linear(x, generator.w1, generator.b1)
        activation = HIDDEN_ACTIVATIONS[generator.hidden_activation]
        dw2 = dg.t() @ activation(u)
        db2 = None if generator.b2 is None else dg.sum(0)
        du = dg @ generator.w2 * hidden_slope(u, generator.hidden_activation)
    db1 = None if generator.b1 is None else du.sum(0)
    return dh @ V + du @ generator.w1, dh.t() @ x, dU, du.t() @ x, db1, dw2, db2


def hidden_slope(u: Tensor, name: str) -> Tensor:
    """Derivative of the hidden activation at u."""
    if name == "relu":
        return (u > 0).to(u.dtype)
    if name == "tanh":
        return 1 - torch.tanh(u) ** 2
    if name == "silu":
        gate = torch.sigmoid(u)
        return gate * (1 + u * (1 - gate))
    density = torch.exp(-u * u / 2) / (2 * torch.pi) ** 0.5
    return 0.5 * (1 + torch.erf(u / 2**0.5)) + u * density


def dense_backward(dy, x, weight, P, Q, multiplicative, segments):
    """Gradients of x, weight, P, Q through `dense_term`."""
    if P is None:
        return dy @ weight, dy.t() @ x, None, None
    P, Q = P.to(dy.dtype), Q.to(dy.dtype)
    dx, dweight, dP, dQ = torch.empty_like(x), torch.zeros_like(weight), torch.empty_like(P), torch.empty_like(Q)
    for task, own in task_rows(x, segments):
        phi = factor(P[task], Q[task], multiplicative)
        dx[own] = dy[own] @ (weight * phi)
        product = dy[own].t() @ x[own]
        dweight += product * phi
        argument = product * weight * factor_slope(P[task], Q[task], multiplicative)
        if P[task].dim() == 3:  # [N, C K'] -> [C, N, K']
            argument = argument.unflatten(1, (P[task].shape[0], -1)).transpose(0, 1)
        dP[task] = argument @ Q[task].t()
        dQ[task] = (P[task].transpose(-1, -2) @ argument).reshape(-1, *Q[task].shape).sum(0)
    return dx, dweight, dP, dQ


def lowrank_linear_backward(
    dy, x, weight, bias, V, U, generator, *, sigma, scaling, segments, dropout, P, Q, multiplicative
):
    """Gradients of the operands in their order (None where there is no tensor), each in its tensor's dtype.

    For callers below autograd; everywhere else differentiate `lowrank_linear`.
    """
    tensors = (x, weight, bias, V, U, *((None,) * 4 if generator is None else generator[:4]), P, Q)
    wide = accumulation_dtype(x.dtype)
    dy, x, weight, V, U = (tensor.to(wide) for tensor in (dy, x, weight, V, U))
    mask = None
    if dropout is not None:
        mask = keep_mask(x.shape, *dropout, x.device).to(wide) / (1 - dropout[0])
    dropped = x if mask is None else x * mask
    if generator is not None:
        generator = generator.map(lambda tensor: tensor.to(wide))
    if segments is None:
        low = one_task_backward(dy, dropped, V, U, generator, sigma, scaling)
    else:
        ends = segments.tolist()
        tasks = []
        for i, (start, end) in enumerate(zip(ends[:-1], ends[1:], strict=True)):
            own = generator and generator.map(lambda tensor, i=i: tensor[i])
            tasks.append(one_task_backward(dy[start:end], dropped[start:end], V[i], U[i], own, sigma, scaling))
        if tasks:
            dx, *rest = zip(*tasks, strict=True)
            low = (torch.cat(dx), *(None if grads[0] is None else torch.stack(grads) for grads in rest))
        else:
            low = tuple(None if t is None else torch.zeros_like(t, dtype=wide) for t in (x, *tensors[3:9]))
    dx, dweight, dP, dQ = dense_backward(dy, x, weight, P, Q, multiplicative, segments)
    gradients = (dx + (low[0] if mask is None else low[0] * mask), dweight, dy.sum(0), *low[1:7], dP, dQ)
    return [None if tensor is None else g.to(tensor.dtype) for tensor, g in zip(tensors, gradients, strict=True)]
