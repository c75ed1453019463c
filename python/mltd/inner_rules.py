"""SGD, Adam and AdamW as functions: gradients in, directions out, so that a whole adaptation can be differentiated.

    θ ← θ - lr · u      SGD: u = g + λ θ
                        Adam: u = m̂ / (√v̂ + ε) of g + λ θ;  AdamW: the same of g, plus λ θ

with Adam's β = (0.9, 0.999) and ε = 1e-8, as torch.optim has them. Everything is elementwise, so tensors with a leading
task dimension have a state for each task.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

BETAS, EPSILON = (0.9, 0.999), 1e-8


class Rule:
    """One adaptation's optimiser: its name and weight decay, and Adam's moments so far."""

    def __init__(self, optimizer: str, weight_decay: float) -> None:
        self.optimizer, self.weight_decay = optimizer, weight_decay
        self.moments: list[tuple[Tensor, Tensor]] = []

    def directions(self, step: int, parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[Tensor]:
        """u of step 1, 2, … for each parameter."""
        decay = self.weight_decay
        if decay and self.optimizer != "adamw":
            gradients = [g + decay * p for g, p in zip(gradients, parameters, strict=True)]
        if self.optimizer == "sgd":
            return list(gradients)
        found = self._adam(step, gradients)
        if decay and self.optimizer == "adamw":
            found = [u + decay * p for u, p in zip(found, parameters, strict=True)]
        return found

    def _adam(self, step: int, gradients: Sequence[Tensor]) -> list[Tensor]:
        if not self.moments:
            self.moments = [(torch.zeros_like(g), torch.zeros_like(g)) for g in gradients]
        (b1, b2), found = BETAS, []
        for i, g in enumerate(gradients):
            m, v = self.moments[i]
            self.moments[i] = m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
            found.append((m / (1 - b1**step)) / (root(v / (1 - b2**step)) + EPSILON))
        return found


def root(squares: Tensor) -> Tensor:
    """The square root, whose gradient at 0 is finite: times the gradient of a square there, it is 0 as it should be."""
    return (squares + torch.finfo(squares.dtype).tiny).sqrt()
