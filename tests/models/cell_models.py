"""Tiny models with search cells that are off their start."""

import torch
from torch import nn

from tarp_kernels import SearchCellConfig, TarpConfig, apply_tarp
from tests.models.tiny import base_model, move

PUBLISHED = (5, 5, 0, 5, 1, 4, 5, 1, 1)
MIXED = (2, 3, 4, 4, 5, 1, 3, 2, 4)


def one_hot(operations=PUBLISHED) -> torch.Tensor:
    return torch.eye(6)[list(operations)]


def cell_model(family: str, moved: bool = True, changes=None, dtype=torch.float32, **config) -> nn.Module:
    """A tiny model with search cells of width 5; `moved` takes cells and adapters off their start."""
    cells = {name: config.pop(name) for name in ("stem", "operations", "per_layer") if name in config}
    model = base_model(family, **changes or {}).to(dtype)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        apply_tarp(model, TarpConfig(r=2, search_cell=SearchCellConfig(width=5, **cells), **config))
    return move(model, scale=0.3) if moved else model
