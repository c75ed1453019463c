"""Run one batch in which every task has its own adapter: stacked parameters, rows grouped by task.

The state lies on the modules, not in a context variable: autograd's own threads and the recomputation of activation
checkpointing see it as long as the block stays open, so keep it open until after backward.
"""

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from tarp_kernels.nn.adapter import ADAPTER_NAMES
from tarp_kernels.nn.cell_beside import CellBeside
from tarp_kernels.nn.linear import TarpLayer
from tarp_kernels.nn.task_norm import own_norm
from tarp_kernels.ops.search_cell.layout import Layouts


class Offsets:
    """Task boundaries over the batch dimension, turned into row segments for whatever a layer's input looks like.

    offsets  int64 CPU tensor [B+1], from 0 to the number of sequences in the batch

    Kept for several blocks on the same batch, it copies the segments to a device once, and search cells look at the
    batch's mask once. Whoever captures a CUDA graph inside such a block keeps it as long as the graph, together with
    `layouts.held()` and `tarp_kernels.ops.constants.held()`. Raises ValueError.
    """

    def __init__(self, offsets: Tensor):
        if not isinstance(offsets, Tensor) or offsets.dtype != torch.int64 or offsets.dim() != 1 or len(offsets) < 2:
            raise ValueError(f"offsets: got {offsets!r}, expected an int64 tensor [B+1] with B ≥ 1")
        self.offsets, self.sequences = offsets, int(offsets[-1])
        self._segments: dict[tuple[int, torch.device], Tensor] = {}
        self.layouts = Layouts()

    @property
    def tasks(self) -> int:
        return len(self.offsets) - 1

    def rows(self, x: Tensor, device: torch.device | None = None) -> Tensor:
        """Row segments int64 [B+1] for x [sequences, ..., K], there or on x's device; a decoder and its encoder may
        differ in length."""
        rows, device = x.shape[:-1].numel(), x.device if device is None else device
        if self.sequences == 0 or rows % self.sequences:
            raise ValueError(
                f"task_parallel: a layer's input has {rows} rows, expected a multiple of the {self.sequences} "
                "sequences that the offsets name; the batch dimension must come first in every adapted layer"
            )
        key = rows // self.sequences, device
        if key not in self._segments:
            with torch.inference_mode(False):  # a later backward may have to keep them
                self._segments[key] = (self.offsets * key[0]).to(device)
        return self._segments[key]


@contextlib.contextmanager
def task_parallel(model: nn.Module, parameters: Mapping[str, Tensor], offsets: Tensor | Offsets) -> Iterator[None]:
    """Within the block, batch entries offsets[i]:offsets[i+1] of a forward pass use adapter i.

    model       any model whose layers `apply_tarp` adapted; its search cells are stacked like its layers
    parameters  every name of `tarp_parameters(model)` -> tensor with a leading task dimension [B, *shape]; gradients
                flow to these tensors instead of the model's own parameters; the weights of norms that
                train_layernorm trains are among them, and every norm has the batch in its first dimension
    offsets     int64 CPU tensor [B+1], from 0 to the number of sequences in the batch, or the `Offsets` of one

    Raises ValueError for missing, unknown or wrongly shaped tensors and for blocks inside one another on one model.
    """
    shared = offsets if isinstance(offsets, Offsets) else Offsets(offsets)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, TarpLayer)}
    cells = {name: module for name, module in model.named_modules() if isinstance(module, CellBeside)}
    if not layers:
        raise ValueError("model: has no adapted layer; call apply_tarp first")
    for path, layer in layers.items():
        if layer.stacked is not None:
            raise ValueError(f"task_parallel: {path} is already in a task_parallel block; close that one first")
        if layer.original is not None:
            raise ValueError(f"task_parallel: {path} holds a merged adapter; call unmerge_tarp(model) first")
    norms = {name: module for name, module in model.named_modules() if "tarp_trained" in vars(module)}
    names = {path: layer.adapter_names() for path, layer in layers.items()}
    names |= {path: cell.adapter_names() for path, cell in cells.items()}
    names |= {path: vars(norm)["tarp_trained"] for path, norm in norms.items()}
    stacks = _stacks(model, parameters, names, shared.tasks)
    try:
        with contextlib.ExitStack() as inside:
            for path, layer in layers.items():
                layer.stacked = (tuple(stacks[path].get(name) for name in ADAPTER_NAMES), shared)
            for path, cell in cells.items():
                cell.stacked = (stacks[path], shared)
            for path, norm in norms.items():
                inside.enter_context(own_norm(norm, stacks[path], shared.offsets.diff().tolist()))
            yield
    finally:
        for layer in layers.values():
            layer.stacked = None
        for cell in cells.values():
            cell.stacked = None


def _stacks(
    model: nn.Module, parameters: Mapping[str, Tensor], names: Mapping[str, tuple[str, ...]], tasks: int
) -> dict[str, dict[str, Tensor]]:
    """{path: {name: [tasks, *shape]}} of the modules whose trained tensors `names` lists."""
    stacks: dict[str, dict[str, Tensor]] = {}
    used = set()
    for path, own in names.items():
        module, stacks[path] = model.get_submodule(path), {}
        for name in own:
            key, shape = f"{path}.{name}" if path else name, (tasks, *module.get_parameter(name).shape)
            tensor = parameters.get(key)
            if tensor is None or tuple(tensor.shape) != shape:
                came = "nothing" if tensor is None else f"shape {list(tensor.shape)}"
                raise ValueError(f"parameters[{key!r}]: got {came}, expected shape {list(shape)}, one for each task")
            stacks[path][name] = tensor
            used.add(key)
    unknown = next((key for key in parameters if key not in used), None)
    if unknown is not None:
        raise ValueError(f"parameters[{unknown!r}]: belongs to no adapter, so it would have no effect; leave it out")
    return stacks
