"""Φ ⊙ W of a layer with a static factor, kept for as long as nothing that it is made of changes."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Seen(NamedTuple):
    """A tensor as it was. `memory` shares its storage, which therefore cannot be given to another tensor meanwhile."""

    tensor: Tensor
    memory: Tensor
    version: int

    def unchanged(self, now: Tensor) -> bool:
        places = [(tensor.data_ptr(), tensor.dtype, tensor.device) for tensor in (self.memory, now)]
        return now is self.tensor and now._version == self.version and places[0] == places[1]


class FactorCache:
    """Φ ⊙ W of one layer, and what it was made of. A copy of the layer, or its pickle, has None in its place."""

    def __init__(self) -> None:
        self.seen: list[Seen] = []
        self.kept: Tensor | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

    def forget(self) -> None:
        self.seen, self.kept = [], None

    def product(self, sources: Iterable[Tensor | None], make: Callable[[], Tensor]) -> Tensor | None:
        """Φ ⊙ W [N, K] in W's dtype; None where it may not be kept or needs a gradient.

        sources are W and the tensors of Φ, from which `make` computes the product in a wider dtype.
        """
        tensors = [tensor for tensor in sources if tensor is not None]
        if not self._may_keep(tensors):
            return None
        known = len(self.seen) == len(tensors)
        if not known or not all(seen.unchanged(now) for seen, now in zip(self.seen, tensors, strict=True)):
            weight = tensors[0]
            # an ordinary tensor even inside inference_mode, so that a later call may differentiate through it
            with torch.inference_mode(False), torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
                self.kept = make().to(weight.dtype)
            self.seen = [Seen(tensor, tensor.detach(), tensor._version) for tensor in tensors]
        return self.kept

    @staticmethod
    def _may_keep(tensors: list[Tensor]) -> bool:
        if torch.compiler.is_compiling():
            return False
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            return False
        return all(type(t) in (Tensor, nn.Parameter) and not (t.is_inference() or t.is_meta) for t in tensors)
