"""A GPU's kernels for tests whose tensors lie on the CPU: they get copies there, and what they return comes back."""

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch.utils._pytree import tree_map_only

from tarp_kernels import backends
from tarp_kernels.ops.lowrank_linear import autograd as lowrank_linear
from tarp_kernels.ops.search_cell import autograd as search_cell


class Elsewhere:
    """The kernels of a backend on another device than their tensors'."""

    def __init__(self, kernels: Any, device: torch.device):
        self.kernels, self.device = kernels, device

    def __getattr__(self, name: str) -> Any:
        function = getattr(self.kernels, name)
        if name not in ("forward", "backward", "step"):
            return function

        def call(*arguments, **named):
            given = inspect.signature(function).bind(*arguments, **named)
            there = tree_map_only(torch.Tensor, self.copied, (given.args, given.kwargs))
            found = function(*there[0], **there[1])
            if name == "forward" and given.arguments.get("saved") is not None:  # what the kernels write for backward
                place = list(given.arguments).index("saved")
                for here, tensor in zip(given.arguments["saved"], there[0][place], strict=True):
                    here.copy_(tensor)
            return tree_map_only(torch.Tensor, torch.Tensor.cpu, found)

        return call

    def copied(self, tensor: torch.Tensor) -> torch.Tensor:
        """All of the memory that the tensor is a view of: with its strides, and what lies between its elements."""
        tensor = tensor.detach().resolve_neg()
        whole = tensor.new_empty(0).set_(tensor.untyped_storage()).to(self.device, copy=True)
        return whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


@contextlib.contextmanager
def taking_cpu_tensors(device: torch.device) -> Iterator[None]:
    """Within the block the backends of a GPU take tensors on the CPU, and refuse dtypes as they refuse other calls."""

    def fit(name: str, dtype: torch.dtype, where: torch.device) -> None:
        if dtype not in backends.DTYPES[name]:
            raise backends.NotServed(f"backend={name!r} takes no {dtype}")

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(backends, "_require_fit", fit))
        for operator in (lowrank_linear, search_cell):
            kernels = operator.kernels
            own = mock.patch.object(operator, "kernels", lambda name, k=kernels: Elsewhere(k(name), device))
            stack.enter_context(own)
        yield
