"""`cached_factors`: every layer with a static factor keeps Φ ⊙ W between calls."""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from tarp_kernels.nn.factor_cache import FactorCache
from tarp_kernels.nn.linear import TarpLayer


@contextlib.contextmanager
def cached_factors(model: nn.Module) -> Iterator[nn.Module]:
    """Within the block every layer with a static factor keeps Φ ⊙ W [N, K] from its first call on.

    A call then costs what the layer costs without a factor, and memory grows by W for each such layer. Φ ⊙ W is made in
    float32 (float64 for float64), rounded once to W's dtype, and used where no gradient of P, Q, PH or the weight is
    asked for: without grad mode, or where none of them requires one (x may). It is made anew when one of them changed:
    replaced, moved, converted, written to in place, or stepped by a torch.optim optimiser. It is not used inside
    `task_parallel` and `torch.compile`, nor for merged or disabled layers, and is gone after the block; copies, pickles
    and state_dict never hold it.

    What leaves no trace cannot be seen: writing through `.data`, or calling a fused optimiser function by itself.

    Raises ValueError for a model without a static factor of product="hadamard".
    """
    layers = [layer for layer in model.modules() if isinstance(layer, TarpLayer) and layer.has_static_factor]
    if not layers:
        raise ValueError(
            "model: has no layer with a factor to keep; cached_factors serves multiplicative='static' with "
            "product='hadamard'"
        )
    own = [layer for layer in layers if layer.cache is None]  # the others belong to a block around this one

    def forget(*_: Any) -> None:  # fused optimisers do not raise the version of what they write to
        for layer in own:
            if layer.cache is not None:
                layer.cache.forget()

    hook = register_optimizer_step_post_hook(forget)
    try:
        for layer in own:
            layer.cache = FactorCache()
        yield model
    finally:
        hook.remove()
        for layer in own:
            layer.cache = None
