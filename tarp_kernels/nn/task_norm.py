"""Norms inside `task_parallel`: every batch entry is normalised with its own task's weight and bias."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@contextlib.contextmanager
def own_norm(norm: nn.Module, stack: Mapping[str, Tensor], sizes: list[int]) -> Iterator[None]:
    """Within the block the first sizes[0] entries of norm's input use stack[name][0], the next ones stack[name][1], …

    The norm's forward is replaced on the module itself, so recomputation and other threads see it too.
    """
    before, forward = vars(norm).get("forward"), norm.forward

    def of_each_task(x: Tensor, *arguments: Any, **options: Any) -> Any:
        if "tarp_own" in vars(norm):  # inside disable_tarp, which shows the base model's norm
            return forward(x, *arguments, **options)
        own = {name: spread(tensor, sizes, x) for name, tensor in stack.items()}
        return _AFFINE_LAST.get(type(norm).forward, _with_parameters)(norm, forward, own, x, *arguments, **options)

    vars(norm)["forward"] = of_each_task
    try:
        yield
    finally:
        if before is None:
            vars(norm).pop("forward")
        else:
            vars(norm)["forward"] = before


def spread(tensor: Tensor, sizes: list[int], x: Tensor) -> Tensor:
    """Each task's [*shape] of tensor [B, *shape] for its own entries of x: [entries, 1, …, *shape]."""
    entries, sequences = x.shape[0], sum(sizes)
    if sequences == 0 or entries % sequences:
        raise ValueError(
            f"task_parallel: a norm's input has {entries} entries, expected a multiple of the {sequences} sequences "
            "that the offsets name; the batch dimension must come first"
        )
    shape = tensor.shape[1:]
    each = [own.expand(size * (entries // sequences), *shape) for own, size in zip(tensor, sizes, strict=True)]
    # expand and cat, not an index: the gradient is a sum in a fixed order
    return torch.cat(each).view(entries, *(1,) * (x.dim() - 1 - len(shape)), *shape)


def _with_parameters(norm: Any, forward: Callable, own: dict[str, Tensor], x: Tensor, *arguments, **options) -> Any:
    """The class's own forward, which multiplies by its weight, with weights that differ along the batch."""
    before = {name: norm._parameters[name] for name in own}
    norm._parameters.update(own)
    try:
        return forward(x, *arguments, **options)
    finally:
        norm._parameters.update(before)


def _layer_norm(norm: Any, _: Callable, own: dict[str, Tensor], x: Tensor) -> Tensor:
    y = F.layer_norm(x, norm.normalized_shape, None, None, norm.eps)
    scaled = y * own["weight"]
    return (scaled + own["bias"] if "bias" in own else scaled).to(y.dtype)


def _rms_norm(norm: Any, _: Callable, own: dict[str, Tensor], x: Tensor) -> Tensor:
    y = F.rms_norm(x, norm.normalized_shape, None, norm.eps)
    return (y * own["weight"]).to(y.dtype)


# PyTorch's own take one weight for the whole batch only.
_AFFINE_LAST: dict[Any, Callable] = {nn.LayerNorm.forward: _layer_norm, nn.RMSNorm.forward: _rms_norm}
