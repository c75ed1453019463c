"""`masked_sublayer`: run a sublayer on some rows only, and pay for those."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tarp_kernels.nn.linear import TarpLayer, watched
from tarp_kernels.ops.row_copies import Picked, gather_rows, scatter_rows


def masked_sublayer(
    module: Callable[[Tensor], Tensor], x: Tensor, mask: Tensor, *, segments: Tensor | None = None
) -> Tensor:
    """`torch.where(mask, module(x), x)`, with module running on the selected rows only: [..., d] like x.

    This is masked sublayer execution (Hou, Salazar, Polovets, TACL 10 (2022)) for any row-wise sublayer: the selected
    rows are gathered to [rows, d], go through module, and are put back. Values and gradients are those of computing
    everything; with no row selected module is not called.

    A TarpLinear or TarpConv1D with an additive adapter reads the selected rows where they lie when it is the module, or
    comes first in an nn.Sequential, and leaves its results where they belong when it is the module or comes last: its
    kernels take the row numbers, and with frozen weights nothing is gathered, or put back, by itself. Everything else
    is: other modules, layers with a multiplicative part, merged, disabled or with hooks, and dtypes that change on the
    way, as under autocast; on a GPU by CUDA kernels that read and write each row once, where they were built.

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
    with _segments_of(module, x, rows):
        picked = Picked(rows.nonzero().squeeze(1), rows)
        return _through(_stages(module), x.reshape(-1, x.shape[-1]), picked).reshape(x.shape)


def _stages(module) -> list[Any]:
    """What runs one after the other: the parts of an nn.Sequential that nobody watches, else the module."""
    if type(module) is not nn.Sequential or len(module) == 0 or watched(module):
        return [module]
    return [stage for part in module for stage in _stages(part)]


def _through(stages: list[Any], flat: Tensor, picked: Picked) -> Tensor:
    """flat [T, d] with the picked rows replaced by what the stages make of them."""
    found, index = flat, picked.numbers
    rows: Picked | None = picked  # which of `found` are meant, until a stage has read them
    for stage in stages[:-1]:
        found, rows = _stage(stage, found, rows), None
    last = stages[-1]
    ours = isinstance(last, TarpLayer) and last.takes_rows and last.out_features == flat.shape[1]
    if ours and isinstance(found, Tensor) and found.dtype == flat.dtype and found.dim() == 2:
        if rows is not None or len(found) == len(index):
            return last.on_rows(found, None if rows is None else index, (flat, index))
    found = _stage(last, found, rows)
    _checked(found, flat[: len(index)])
    kind = torch.promote_types(found.dtype, flat.dtype)  # under autocast they may differ; torch.where promotes too
    return scatter_rows(flat.to(kind), picked, found.to(kind))


def _stage(stage, x: Tensor, rows: Picked | None) -> Tensor:
    """A stage on the rows of x, all of them for None."""
    if rows is None:
        return stage(x)
    if isinstance(stage, TarpLayer) and stage.takes_rows:
        return stage.on_rows(x, rows.numbers)
    return stage(gather_rows(x, rows))


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
