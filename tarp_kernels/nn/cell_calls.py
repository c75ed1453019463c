"""What the cells of a model must know of a forward call: its padding mask, its cache, and the architecture to use.

A call is noted where it enters the stack of layers, on an object that the cells share, by thread: that needs no change
in model code, and autograd's own threads and copies of the model find it. Activation checkpointing runs a layer again
when the call is long over, so during a call every checkpoint is made to remember which call it belongs to.
"""

import functools
import inspect
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tarp_kernels.nn.cell_cache import CellCache, refuse_packed_rows
from tarp_kernels.ops.search_cell.layout import Layouts


class Call(NamedTuple):
    """One forward call of a stack of layers."""

    alpha: Tensor | None  # of `architecture`
    mask: Tensor | None  # [B, past + S]
    cache: CellCache | None
    replaced: tuple[tuple[nn.Module, Any], ...]  # blocks and their own checkpointing functions
    layouts: Layouts  # of its mask


class Calls:
    """The calls that are going on in one stack, an encoder or a decoder. Its methods are hooks of that stack."""

    def __init__(self) -> None:
        self.alpha: Tensor | None = None  # set by `architecture`
        self.open: dict[int, list[Call]] = {}  # by thread, the innermost last
        self.inputs: dict[tuple[int, str], Tensor] = {}  # by thread and cell: h, until its feed-forward block is done

    def __getstate__(self) -> dict[str, Any]:
        return {"alpha": None, "open": {}, "inputs": {}}  # a copy of the model has no call going on

    # --- around a call -----------------------------------------------------------------------------------------------

    def enter(self, stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the stack."""
        given = dict(zip(_parameter_names(type(stack).forward), args, strict=False)) | kwargs
        mask, cache = given.get("attention_mask"), given.get("past_key_values")
        if mask is None:
            refuse_packed_rows(given.get("position_ids"))
        elif not isinstance(mask, Tensor) or mask.dim() != 2:
            came = f"shape {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(
                f"attention_mask: got {came}, expected [batch, tokens] with 0 for padding, which search cells need; "
                "pass the tokenizer's mask, and generate without cache_implementation='static'"
            )
        checkpointed = self._checkpointed(stack)
        if checkpointed and cache is not None:
            raise ValueError(
                "past_key_values: got a cache in training mode with activation checkpointing, whose second run would "
                "find its own tokens in it; call model.eval() to generate"
            )
        for checkpoint in checkpointed.values():
            self._refuse_reentrant(checkpoint)
        states = None if cache is None else CellCache(cache)
        call = Call(self.alpha, mask, states, tuple(checkpointed.items()), Layouts())
        for block, checkpoint in checkpointed.items():
            vars(block)["_gradient_checkpointing_func"] = functools.partial(self._remembering, call, checkpoint)
        self.open.setdefault(threading.get_ident(), []).append(call)

    def leave(self, stack: nn.Module, args: Any, output: Any) -> None:
        """Forward hook of the stack, called after errors too."""
        thread = threading.get_ident()
        calls = self.open.get(thread)
        if not calls:
            return  # `enter` refused the call
        for block, checkpoint in calls.pop().replaced:
            vars(block)["_gradient_checkpointing_func"] = checkpoint
        self._tidy(thread)

    def _tidy(self, thread: int) -> None:
        if not self.open.get(thread):
            self.open.pop(thread, None)
            for key in [key for key in self.inputs if key[0] == thread]:
                del self.inputs[key]

    # --- checkpointing -----------------------------------------------------------------------------------------------

    @staticmethod
    def _checkpointed(stack: nn.Module) -> dict[nn.Module, Any]:
        if not stack.training:
            return {}
        return {
            block: vars(block)["_gradient_checkpointing_func"]
            for block in stack.modules()
            if getattr(block, "gradient_checkpointing", False) and "_gradient_checkpointing_func" in vars(block)
        }

    def _refuse_reentrant(self, checkpoint: Any) -> None:
        reentrant = getattr(checkpoint, "keywords", {}).get("use_reentrant", False)
        if reentrant and self.alpha is not None and self.alpha.grad_fn is not None:
            raise ValueError(
                "alpha: got a tensor that was computed with gradients, which re-entrant checkpointing would go back "
                "through once for every layer; use gradient_checkpointing_kwargs={'use_reentrant': False}"
            )

    def _remembering(self, call: Call, checkpoint: Callable, function: Callable, *args: Any, **kwargs: Any) -> Any:
        """A block's checkpointing function that runs the block, and later runs it again, as part of `call`."""
        return checkpoint(functools.partial(self._within, call, function), *args, **kwargs)

    def _within(self, call: Call, function: Callable, *args: Any, **kwargs: Any) -> Any:
        thread = threading.get_ident()
        self.open.setdefault(thread, []).append(call)
        try:
            return function(*args, **kwargs)
        finally:
            self.open[thread].pop()
            self._tidy(thread)

    # --- inside a call -----------------------------------------------------------------------------------------------

    def current(self) -> Call:
        """The call that this thread is in; none for a layer that is called by itself."""
        calls = self.open.get(threading.get_ident())
        if calls:
            return calls[-1]
        if torch._C._current_graph_task_id() != -1:  # inside backward
            raise RuntimeError(
                "search cell: its block is recomputed by a checkpoint that does not remember the call, so padding and "
                "architecture are unknown; use model.gradient_checkpointing_enable()"
            )
        return Call(self.alpha, None, None, (), Layouts())


@functools.cache
def _parameter_names(forward: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(forward).parameters)[1:]  # without self
