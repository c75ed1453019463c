"""`masked_sublayer`: run a sublayer on some rows only, and pay for those."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tarp_kernels.nn.linear import TarpLayer


def masked_sublayer(
    module: Callable[[Tensor], Tensor], x: Tensor, mask: Tensor, *, segments: Tensor | None = None
) -> Tensor:
    """`torch.where(mask, module(x), x)`, with module running on the selected rows only: [..., d] like x.

    This is masked sublayer execution (Hou, Salazar, Polovets, TACL 10 (2022)) for any row-wise sublayer: the selected
    rows are gathered to [rows, d], go through module, and are put back. Values and gradients are those of computing
    everything; with no row selected module is not called.

    module    a sublayer whose result for a row depends on that row alone (feed-forward block, stack of TarpLinear, not
              attention nor convolution), and which keeps the shape [rows, d]
    x         [..., d]
    mask      bool, on x's device: one value for each row, x.shape[:-1], or for each entry of its first dimensions, for
              example [B]; with segments one for each task, [tasks]
    segments  int32 or int64 offsets [tasks + 1] over the rows of x, flattened to [-1, d]; for a mask by task

    Adapted layers inside `task_parallel` get the tasks of the selected rows; what such a module recomputes by itself
    under activation checkpointing would not, so checkpoint around this call and not inside it.
    Raises TypeError or ValueError that names the argument, what came, what was expected and the fix.
    """
    rows = _rows(x, mask, segments)  # [T] bool
    if not bool(rows.any()):
        return x.clone()
    if bool(rows.all()):
        return _checked(module(x), x)
    index = rows.nonzero().squeeze(1)
    flat = x.reshape(-1, x.shape[-1])
    selected = flat.index_select(0, index)
    with _segments_of(module, x, rows):
        found = _checked(module(selected), selected)
    kind = torch.promote_types(found.dtype, x.dtype)  # under autocast they may differ; torch.where promotes too
    return flat.to(kind).index_copy(0, index, found.to(kind)).reshape(x.shape)


def _rows(x: Tensor, mask: Tensor, segments: Tensor | None) -> Tensor:
    """The mask for every row of x, [T]."""
    if not isinstance(x, Tensor) or x.dim() < 2:
        came = f"shape {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"x: got {came}, expected a tensor [..., d] of rows; a single row is x[None]")
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        came = str(mask.dtype) if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask: got {came}, expected a bool tensor, True for rows to compute; use mask.bool()")
    if mask.device != x.device:
        raise ValueError(f"mask: lies on {mask.device}, expected {x.device} like x; move it")
    count = x.shape[:-1].numel()
    if segments is not None:
        if segments.dim() != 1 or segments.dtype not in (torch.int32, torch.int64) or len(segments) < 1:
            raise ValueError(f"segments: got {segments!r}, expected int32 or int64 row offsets [tasks + 1]")
        sizes = segments.diff()
        if int(segments[0]) != 0 or int(segments[-1]) != count or bool((sizes < 0).any()):
            raise ValueError(f"segments: got {segments.tolist()}, expected offsets from 0 to the {count} rows of x")
        if tuple(mask.shape) != tuple(sizes.shape):
            raise ValueError(f"mask: got shape {list(mask.shape)}, expected [{len(sizes)}], one for each task")
        return torch.repeat_interleave(mask, sizes.to(x.device))
    lead = tuple(x.shape[: mask.dim()])
    if not 1 <= mask.dim() < x.dim() or tuple(mask.shape) != lead:
        raise ValueError(
            f"mask: got shape {list(mask.shape)} for x {list(x.shape)}, expected {list(x.shape[:-1])} or the first "
            "dimensions of that; a mask by task needs segments"
        )
    return mask.reshape(*mask.shape, *(1,) * (x.dim() - 1 - mask.dim())).expand(x.shape[:-1]).reshape(-1)


def _checked(found, given: Tensor) -> Tensor:
    if not isinstance(found, Tensor) or found.shape != given.shape:
        came = f"shape {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"module: returned {came} for {list(given.shape)}, expected the same shape; wrap it so")
    return found


class _Selected:
    """Stands in for the offsets of `task_parallel` while only some rows of a batch run."""

    def __init__(self, segments: Tensor):
        self.segments = segments

    def rows(self, x: Tensor) -> Tensor:
        count, expected = x.shape[:-1].numel(), int(self.segments[-1])
        if count != expected:
            raise ValueError(f"module: an adapted layer got {count} rows, expected the {expected} that mask selects")
        return self.segments


@contextlib.contextmanager
def _segments_of(module, x: Tensor, rows: Tensor) -> Iterator[None]:
    """Within the block stacked layers of the module find the tasks of the selected rows."""
    modules: list[Any] = list(module.modules()) if isinstance(module, nn.Module) else []
    stacked = [layer for layer in modules if getattr(layer, "stacked", None) is not None]
    for layer in modules:
        other = layer in stacked and not isinstance(layer, TarpLayer)
        if other or (stacked and "tarp_trained" in vars(layer)):
            raise ValueError(
                f"module: holds a {type(layer).__name__} that differs by task inside task_parallel, expected adapted "
                "linear layers alone; run that one outside masked_sublayer"
            )
    before = [layer.stacked for layer in stacked]
    selected_before = torch.cat((torch.zeros(1, dtype=torch.int64), rows.cpu().cumsum(0)))  # [T + 1]
    try:
        for layer, (tensors, offsets) in zip(stacked, before, strict=True):
            layer.stacked = (tensors, _Selected(selected_before[offsets.rows(x)]))
        yield
    finally:
        for layer, state in zip(stacked, before, strict=True):
            layer.stacked = state
