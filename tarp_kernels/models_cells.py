"""Search cells in Hugging Face models: where they go in each family, and the architecture that they use."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tarp_kernels.models_targets import block_index
from tarp_kernels.nn import TarpConfig
from tarp_kernels.nn.cell_beside import CellBeside
from tarp_kernels.nn.cell_calls import Calls


class Place(NamedTuple):
    """Where the feed-forward block of a layer begins and ends, by `model.config.model_type`."""

    begins: str  # the module whose input is h
    ends: str  # the module to whose output the cell is added
    types: str


_DECODERS = Place(
    "mlp",
    "mlp",
    "gpt2 gpt_bigcode openai-gpt llama mistral qwen2 qwen3 gemma gemma2 gemma3_text smollm3 olmo olmo2 olmo3 cohere "
    "cohere2 stablelm granite helium seed_oss exaone4 arcee apertus ernie4_5 glm glm4 phi3",
)
_PLACES = (
    _DECODERS,
    Place("fc1", "fc2", "bart mbart blenderbot blenderbot-small pegasus marian m2m_100 plbart"),
    # Before the dropout and the norm of the output, like the block itself.
    Place("intermediate.dense", "output.dense", "bert roberta xlm-roberta camembert electra data2vec-text ernie"),
    Place("DenseReluDense", "DenseReluDense", "t5 mt5 umt5"),
)
NAME = "search_cell"  # of the cell in the module that holds the feed-forward block


def build_cells(model: Any, config: TarpConfig) -> dict[str, CellBeside]:
    """{name: cell} of the cells that `config.search_cell` asks for; nothing in the model is changed yet."""
    if config.search_cell is None:
        return {}
    place = _place(model)
    if getattr(model.config, "chunk_size_feed_forward", 0):
        raise ValueError(
            "search_cell: the model runs its feed-forward blocks in chunks, at whose ends convolutions would stop; "
            "set model.config.chunk_size_feed_forward = 0"
        )
    width = int(model.config.hidden_size)  # transformers maps every family's own name to this one
    cells: dict[str, CellBeside] = {}
    calls: dict[str, Calls] = {}
    for path, layer in model.named_modules():
        index = block_index(path)
        if index is None or (config.layers is not None and index not in config.layers):
            continue
        if not all(_has(layer, name) for name in (place.begins, place.ends)):
            continue
        stack = _stack(model, path)
        causal = place is _DECODERS or _decodes(model.get_submodule(stack))
        near = next(layer.get_submodule(place.begins).parameters())
        name = f"{path}.{NAME}"
        placed: Any = {"device": near.device, "dtype": near.dtype}
        shared = calls.setdefault(stack, Calls())
        cells[name] = CellBeside(width, config.search_cell, causal, shared, name, len(cells), **placed)
        cells[name].train(layer.training)
    if not cells:
        raise ValueError(f"search_cell: the model has no block with {place.begins!r} and {place.ends!r}; leave it None")
    return cells


def install_cells(model: Any, cells: dict[str, CellBeside]) -> None:
    """Put in what `build_cells` made, after the adapted layers."""
    hooked = set()
    for name, cell in cells.items():
        path = name.rpartition(".")[0]
        layer = model.get_submodule(path)
        place = _place(model)
        layer.add_module(NAME, cell)
        layer.get_submodule(place.begins).register_forward_pre_hook(cell.record, with_kwargs=True)
        layer.get_submodule(place.ends).register_forward_hook(cell.add)
        stack = model.get_submodule(_stack(model, path))
        if stack not in hooked:
            hooked.add(stack)
            stack.register_forward_pre_hook(cell.calls.enter, with_kwargs=True)
            stack.register_forward_hook(cell.calls.leave, always_call=True)


def search_cells(model: nn.Module) -> dict[str, CellBeside]:
    """{name: cell} of the cells in the model. Raises ValueError where there is none."""
    cells = {name: module for name, module in model.named_modules() if isinstance(module, CellBeside)}
    if not cells:
        raise ValueError(
            "model: has no search cell; call apply_tarp(model, TarpConfig(search_cell=SearchCellConfig()))"
        )
    return cells


@contextlib.contextmanager
def architecture(model: nn.Module, alpha: Tensor) -> Iterator[None]:
    """Within the block every search cell of the model uses this architecture; gradients flow to alpha.

    alpha  [9, operations], or one for each task of a `task_parallel` block, [tasks, 9, operations]; for cells with
           per_layer=True a leading dimension of one for each cell, in the model's order: [cells, 9, operations] or
           [cells, tasks, 9, operations]. Any float dtype; on the CPU no call has to wait for a device

    Checkpointed layers that are recomputed after the block still use it. Blocks may lie inside one another.
    Raises ValueError for a model without cells and for another shape.
    """
    cells = search_cells(model)
    _check_shape(cells, alpha, tasks=True)
    shared = list({id(cell.calls): cell.calls for cell in cells.values()}.values())
    before = [calls.alpha for calls in shared]
    try:
        for calls in shared:
            calls.alpha = alpha
        yield
    finally:
        for calls, one in zip(shared, before, strict=True):
            calls.alpha = one


@torch.no_grad()
def set_architecture(model: nn.Module, alpha: Tensor) -> None:
    """Give every search cell of the model this architecture for good, as its buffer `alpha`; `save_tarp` writes it.

    alpha  [9, operations], or [cells, 9, operations] for cells with per_layer=True; `architecture` goes before it
    """
    cells = search_cells(model)
    _check_shape(cells, alpha, tasks=False)
    for cell in cells.values():
        cell.alpha.copy_(alpha[cell.index] if cell.config.per_layer else alpha)


def _check_shape(cells: dict[str, CellBeside], alpha: Tensor, tasks: bool) -> None:
    first = next(iter(cells.values()))
    expected: list[Any] = [9, len(first.operations)]
    lead: list[Any] = [len(cells)] if first.config.per_layer else []
    if not isinstance(alpha, Tensor) or not alpha.is_floating_point():
        came = str(alpha.dtype) if isinstance(alpha, Tensor) else type(alpha).__name__
        raise TypeError(f"alpha: got {came}, expected a float tensor {lead + expected}; use alpha.float()")
    sizes = list(alpha.shape)
    alone, by_task = sizes == lead + expected, sizes[: len(lead)] == lead and sizes[len(lead) + 1 :] == expected
    if not alone and not (tasks and by_task and len(sizes) == len(lead) + 3):
        what = f"{lead + expected}" + (f" or {[*lead, 'tasks', *expected]}" if tasks else "")
        raise ValueError(
            f"alpha: got shape {sizes}, expected {what}: {'cells, ' if lead else ''}edges, operations "
            f"({', '.join(first.operations)})"
        )


# --- the model's parts ------------------------------------------------------------------------------------------------


def _place(model: nn.Module) -> Place:
    model_type = str(getattr(getattr(model, "config", None), "model_type", None))
    for place in _PLACES:
        if model_type in place.types.split():
            return place
    known = ", ".join(name for place in _PLACES for name in place.types.split())
    raise ValueError(
        f"search_cell: no place for search cells is known in model type {model_type}, expected one of {known}; "
        "leave it None"
    )


def _has(module: nn.Module, path: str) -> bool:
    for name in path.split("."):
        if name not in module._modules:
            return False
        module = module._modules[name]  # type: ignore[assignment]
    return True


def _stack(model: nn.Module, path: str) -> str:
    """Path of the innermost model around a block: the one whose forward gets the padding mask and the cache."""
    kind = sys.modules["transformers"].PreTrainedModel  # whoever has such a model has imported it
    parts = path.split(".")
    paths = (".".join(parts[:end]) for end in range(len(parts), -1, -1))
    return next(path for path in paths if isinstance(model.get_submodule(path), kind))


def _decodes(stack: Any) -> bool:
    """Whether position t of this stack must not see what follows."""
    flags = (getattr(stack, "is_decoder", False), getattr(stack.config, "is_decoder", False))
    return any(flags) or type(stack).__name__.endswith("Decoder")
