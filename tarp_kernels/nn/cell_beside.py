"""`CellBeside`: a search cell beside the feed-forward block of a model that knows nothing of it."""

import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tarp_kernels.nn.cell_calls import Call, Calls
from tarp_kernels.nn.config import SearchCellConfig
from tarp_kernels.nn.search_cell import SearchCell
from tarp_kernels.ops.search_cell import search_cell_step, search_cell_with_layouts


class CellBeside(SearchCell):
    """Adds cell(h) - h to the output of a feed-forward block with the input h.

    It is called by two hooks: `record` where h enters the block and `add` where the block's output leaves. Hooks are
    bound methods, so they go along when the model is copied or pickled.

    alpha    buffer [9, operations]: the architecture where `architecture` gives none; at first all edges have the first
             operation, which is `none` unless it was left out
    enabled  False: the block is as it was
    """

    alpha: Tensor

    def __init__(
        self,
        hidden_size: int,
        config: SearchCellConfig,
        causal: bool,
        calls: Calls,
        path: str,
        index: int,
        **placed: Any,
    ):
        super().__init__(hidden_size, config.width, config.stem, causal, config.operations, **placed)
        self.config, self.calls, self.path, self.index = config, calls, path, index
        self.enabled = True
        # Set by task_parallel: the parameters by name with a leading task dimension, and the tasks' offsets.
        self.stacked: tuple[Mapping[str, Tensor], Any] | None = None
        alpha = torch.zeros(9, len(self.operations), device=placed.get("device"))
        alpha[:, 0] = 1
        self.register_buffer("alpha", alpha)

    def adapter_names(self) -> tuple[str, ...]:
        """Names of the cell's parameters."""
        return tuple(name for name, _ in self.named_parameters(recurse=False))

    def record(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook where h enters."""
        if self.enabled:
            h = args[0] if args else next(iter(kwargs.values()))
            self.calls.inputs[threading.get_ident(), self.path] = h

    def add(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Forward hook where the block's output leaves."""
        h = self.calls.inputs.pop((threading.get_ident(), self.path), None)
        if h is None or not self.enabled:
            return output
        if h.dim() != 3:
            raise ValueError(f"{self.path}: got h of shape {list(h.shape)}, expected [batch, tokens, d]")
        return output + (self._beside(h, self.calls.current()) - h).to(output.dtype)

    def _beside(self, h: Tensor, call: Call) -> Tensor:
        tensors, segments, layouts = None, None, call.layouts
        if self.stacked is not None:
            tensors, offsets = self.stacked
            segments = offsets.rows(h, torch.device("cpu"))  # where the cell reads them
            layouts = offsets.layouts
        weights, alpha, mask = self.weights(tensors), self.full_alpha(self._architecture(call)), call.mask
        if mask is not None:
            if mask.shape[1] != h.shape[1]:  # else it stays the same tensor, so that what it says is known already
                mask = mask[:, -h.shape[1] :]
            mask = mask.to(h.device)  # a split model's may be elsewhere
        if not self.causal or call.cache is None:
            return search_cell_with_layouts(
                layouts, h, weights, alpha, causal=self.causal, attention_mask=mask, segments=segments
            )
        before = call.cache.before(self.path)
        out, after = search_cell_step(h, weights, alpha, before, attention_mask=mask, segments=segments)
        call.cache.after(self.path, h.shape[1], after)
        return out

    def _architecture(self, call: Call) -> Tensor:
        if call.alpha is None:
            return self.alpha
        return call.alpha[self.index] if self.config.per_layer else call.alpha
