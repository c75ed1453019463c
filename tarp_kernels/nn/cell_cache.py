"""What search cells remember of the tokens before, kept on the key-value cache that `generate` carries along.

The cache object itself gets the states, and its class a parent that moves them with the keys and values: so they follow
beam search, and copies of a cache, without anyone else knowing of them.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class _CarriesCells:
    """Put before a cache's own class: whatever reorders its sequences reorders the cells' states too."""

    cell_states: dict[str, tuple[int, Tensor]]  # by cell: how many tokens it has seen, and its state [B, 4, 4, C]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._move(lambda state: state.index_select(0, beam_idx.to(state.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        self._move(lambda state: state[indices.to(state.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self._move(lambda state: state.repeat_interleave(repeats, dim=0))

    def __reduce_ex__(self, _: Any) -> tuple[Any, ...]:
        return _restored, (type(self).__mro__[2],), vars(self)  # its own class is made on the fly: no name to find

    def _move(self, function: Callable[[Tensor], Tensor]) -> None:
        self.cell_states = {name: (seen, function(state)) for name, (seen, state) in self.cell_states.items()}


@functools.cache
def _carrying(kind: Any) -> Any:
    return type(kind.__name__, (_CarriesCells, kind), {"__module__": kind.__module__})


def _restored(kind: type) -> Any:
    carrying = _carrying(kind)
    return carrying.__new__(carrying)


class CellCache:
    """The states of cells on one cache, during one call; `past` tokens were in the cache before it."""

    def __init__(self, cache: Any):
        self.cache = getattr(cache, "self_attention_cache", cache)
        if not callable(getattr(self.cache, "reorder_cache", None)) or getattr(self.cache, "is_compileable", False):
            raise ValueError(
                f"past_key_values: got {type(self.cache).__name__}, which cannot carry the states of search cells, "
                "expected a cache that grows; use DynamicCache, or generate without cache_implementation='static'"
            )
        self.past = int(self.cache.get_seq_length())

    def before(self, cell: str) -> Tensor | None:
        """The cell's state after the tokens in the cache; None where the sequences begin."""
        if self.past == 0:
            return None
        seen, state = getattr(self.cache, "cell_states", {}).get(cell, (0, None))
        if seen != self.past:
            raise ValueError(
                f"past_key_values: holds {self.past} tokens, of which the search cell {cell!r} has seen {seen}; it was "
                "cropped (assisted decoding does that), or filled by another model, or made inside a call: pass an "
                "empty DynamicCache(config=model.config) to the first call, and do not crop it"
            )
        return state

    def after(self, cell: str, tokens: int, state: Tensor) -> None:
        """Remember the state after `tokens` more of them."""
        if not isinstance(self.cache, _CarriesCells):
            self.cache.__class__ = _carrying(type(self.cache))  # type: ignore[arg-type]
            self.cache.cell_states = {}
        self.cache.cell_states[cell] = (self.past + tokens, state)


def refuse_packed_rows(position_ids: Any) -> None:
    """Without a mask, positions that start over mean several sequences in a row, which a cell would run together."""
    if isinstance(position_ids, Tensor) and position_ids.dim() == 2 and position_ids.shape[1] > 1:
        if bool((torch.diff(position_ids, dim=1) != 1).any()):
            raise ValueError(
                "position_ids: got positions that do not count up by one, and no attention_mask, expected one sequence "
                "in each row; search cells cannot run over packed sequences, pass them as padded rows"
            )
