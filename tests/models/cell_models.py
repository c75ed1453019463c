"""Tiny models with search cells that are off their start, and what each cell must add, computed without the library."""

import torch
from torch import Tensor, nn

from tarp_kernels import SearchCellConfig, TarpConfig, apply_tarp, architecture
from tarp_kernels.models_cells import _place, search_cells
from tests.models.tiny import base_model, logits, move
from tests.search_cell.dense import dense_cell

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


def logits_of_checked_cells(model: nn.Module, batch: dict[str, Tensor], alpha: Tensor) -> Tensor:
    """The logits, after a check of every cell on the h that its block got: what it added to the block's output is what
    the unfused mixture of all six operations adds to that h."""
    records: dict[str, dict[str, Tensor]] = {name: {} for name in search_cells(model)}
    place, hooks = _place(model), []
    for name, record in records.items():
        layer = model.get_submodule(name.rpartition(".")[0])
        begins, ends = layer.get_submodule(place.begins), layer.get_submodule(place.ends)

        def enter(_, args, kwargs, record=record):
            record["h"] = args[0] if args else next(iter(kwargs.values()))

        def leave(_, __, output, record=record, moment="without"):
            record[moment] = output

        def leave_last(_, __, output, leave=leave):
            leave(_, __, output, moment="with")

        hooks += [begins.register_forward_pre_hook(enter, with_kwargs=True)]
        hooks += [ends.register_forward_hook(leave, prepend=True), ends.register_forward_hook(leave_last)]
    with architecture(model, alpha):
        found = logits(model, batch)
    for hook in hooks:
        hook.remove()
    for name, cell in search_cells(model).items():
        h, without, with_cell = (records[name][key].detach() for key in ("h", "without", "with"))
        mask = torch.ones(h.shape[:2], dtype=torch.int64)
        if not (model.config.is_encoder_decoder and ".decoder." in f".{name}"):
            mask = batch["attention_mask"]
        pieces = [(row.nonzero().squeeze(1).add(i * h.shape[1]).tolist(), 0) for i, row in enumerate(mask)]
        weights = {key: parameter.detach() for key, parameter in cell.named_parameters(recurse=False)}
        added = dense_cell(h.flatten(0, 1), weights, alpha.to(h), pieces, causal=cell.causal).reshape(h.shape) - h
        assert added.abs().max() > 1e-2, f"{name}: a cell that is left out would go unnoticed"
        tolerance = 1e-9 if h.dtype == torch.float64 else 1e-4
        difference = (with_cell - without - added).abs()
        assert (difference <= tolerance * (1 + added.abs())).all(), f"{name}: {difference.max()} away from {added}"
    return found
