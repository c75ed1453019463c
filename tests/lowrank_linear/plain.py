"""The operator once more as differentiable float64 PyTorch with exchangeable activations.

With activations that are cut off at some derivative it makes mutants; with majorants in place of everything it gives
the sum of magnitudes behind a derivative, of any order up to the second.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tarp_kernels.ops.philox import keep_mask
from tests.lowrank_linear.cases import Call

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda v: v,
    "one_plus": lambda v: 1 + v,
    "relu": torch.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
}


def _linearised(function):
    def activation(v: Tensor) -> Tensor:
        with torch.enable_grad():
            at = v.detach().requires_grad_()
            value = function(at)
            (slope,) = torch.autograd.grad(value.sum(), at)
        return value.detach() + slope * (v - v.detach())

    return activation


# Right in value and slope, without curvature; right in value, without slope.
LINEARISED = {name: _linearised(function) for name, function in ACTIVATIONS.items()}
NO_SLOPE = {name: (lambda v, f=function: f(v).detach()) for name, function in ACTIVATIONS.items()}


def evaluate(call: Call, activations=ACTIVATIONS, kept: list[Tensor] | None = None) -> Tensor:
    """y of a call. `kept` receives what each activation was applied to, in order."""
    x = call.x.reshape(-1, call.x.shape[-1])
    seen = x
    if call.dropout is not None:
        p, seed = call.dropout
        seen = x * keep_mask(x.shape, p, seed) / (1 - p)
    ends = [0, x.shape[0]] if call.segments is None else call.segments.tolist()
    parts = []
    for i, (start, end) in enumerate(zip(ends[:-1], ends[1:], strict=True)):
        own = call if call.segments is None else _task(call, i)
        parts.append(_low(seen[start:end], own, activations, kept))
    y = x @ call.weight.t() + call.scaling * torch.cat(parts)
    y = y if call.bias is None else y + call.bias
    return y.reshape(*call.x.shape[:-1], y.shape[-1])


def _task(call: Call, i: int) -> Call:
    generator = call.generator and call.generator.map(lambda tensor: tensor[i])
    return call._replace(V=call.V[i], U=call.U[i], generator=generator)


def _low(x: Tensor, call: Call, activations, kept) -> Tensor:
    h = x @ call.V.t()
    if call.generator is None:
        return h @ call.U.t()
    w1, b1, w2, b2, hidden, output = call.generator
    rank = h.shape[-1]

    def activated(name: str, v: Tensor) -> Tensor:
        if kept is not None:
            kept.append(v.detach())
        return activations[name](v)

    g = x @ w1.t() + (0 if b1 is None else b1)
    if w2 is not None:
        g = activated(hidden, g) @ w2.t() + (0 if b2 is None else b2)
    if output == "one_plus" and call.sigma == "full":
        s = activated("none", g) + torch.eye(rank, dtype=g.dtype).flatten()
    else:
        s = activated(output, g)
    z = s * h if call.sigma == "diag" else (s.reshape(-1, rank, rank) * h[:, None, :]).sum(-1)
    return z @ call.U.t()


def majorant(sizes: Call, call: Call, share: float) -> Tensor:
    """A function of `sizes`, the magnitudes of all tensors of `call`, that bounds y's terms, and whose derivatives
    bound the terms of y's derivatives, up to the second.

    An activation becomes a parabola whose value, slope and curvature at the sum of magnitudes v̄ are the most that those
    of the activation can be, and can change by when its argument moves by e = `share` · v̄: |f| ≤ |f(v)| + 1.13 e,
    |f'| ≤ 1.13 + e, |f''| ≤ 1 + 2 e.
    """
    arguments: list[Tensor] = []
    evaluate(call, kept=arguments)
    remaining = iter(arguments)

    def parabola(name: str) -> Callable[[Tensor], Tensor]:
        def activation(size: Tensor) -> Tensor:
            v, at = next(remaining), size.detach()
            step, moved = size - at, share * at
            value = ACTIVATIONS[name](v).abs() + 1.13 * moved
            return value + (1.13 + moved) * step + (1 + 2 * moved) * step.square() / 2

        return activation

    bounding = {name: parabola(name) for name in ACTIVATIONS}
    return evaluate(sizes._replace(scaling=abs(sizes.scaling)), bounding)
