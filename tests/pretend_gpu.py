"""A GPU that is none: its tensors lie on the CPU, but reading their values and copying from the host to it is noticed.

For processes of their own: PyTorch does not forget a kind of device. The tests' launches must take `inside`.
"""

import contextlib
import traceback
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend


class _Module(_DummyBackendModule):
    """With what torch.random asks of every device."""

    def get_rng_state(self, device: Any) -> Tensor:
        return torch.zeros(0)

    def set_rng_state(self, state: Tensor, device: Any) -> None:
        pass


_setup_privateuseone_for_python_backend("pretended", _Module())
GPU = torch.device("pretended", 0)
ASKING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal.default", "repeat_interleave.Tensor")
"""Operators that wait for values, or for a size that depends on them."""

crossings: list[tuple[str, str]] = []
"""(operator, the file of ours or of another library that called it) of all that waited or copied."""


class OnGpu(Tensor):
    """A tensor that says that it lies on `GPU`, and what it holds."""

    inside: Tensor

    @staticmethod
    def __new__(cls, inside: Tensor) -> "OnGpu":
        layout = {"strides": inside.stride(), "storage_offset": inside.storage_offset()}
        made = Tensor._make_wrapper_subclass(cls, inside.shape, dtype=inside.dtype, device=GPU, **layout)
        made.inside = inside
        return made

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})

    def tolist(self):
        _note("tolist")
        return self.inside.tolist()


class _Mode(TorchDispatchMode):
    """For operators without a tensor of ours among their arguments."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})


def _run(function: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    given: list[Tensor] = []

    def inside(value: Any) -> Any:
        if isinstance(value, Tensor):
            given.append(value)
        if isinstance(value, torch.device) and value.type == GPU.type:
            return torch.device("cpu")
        return value.inside if isinstance(value, OnGpu) else value

    inner_args, inner_kwargs = tree_map(inside, (args, kwargs))
    name, device = str(function).partition(".")[2], kwargs.get("device")
    there = [isinstance(tensor, OnGpu) for tensor in given]
    made_there = any(there) if device is None else torch.device(device).type == GPU.type
    by_mask = name == "index.Tensor" and any(one is not None and one.dtype == torch.bool for one in args[1])
    asks = any(there) and (by_mask or any(word in name for word in ASKING))
    # A single number of the host goes along with a launch, and a factory reads nothing of its argument.
    apart = any(t != made_there and (g.dim() or "copy" in name) for t, g in zip(there, given, strict=True))
    if asks or (apart and not name.startswith(("empty", "new_", "zeros_like", "ones_like"))):
        _note(name)
    found = function(*inner_args, **inner_kwargs)
    alias = function._schema.arguments[0].alias_info if args else None
    if alias is not None and alias.is_write:
        return args[0]
    return tree_map(lambda value: OnGpu(value) if isinstance(value, Tensor) else value, found) if made_there else found


def _note(what: str) -> None:
    files = [frame.filename for frame in traceback.extract_stack()]
    asking = [file for file in files if "/torch/" not in file and file != __file__]
    crossings.append((what, asking[-1].rpartition("/")[2]))


@contextlib.contextmanager
def pretending() -> Iterator[list[tuple[str, str]]]:
    """Within the block `GPU` serves; yields `crossings`, empty."""
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # else torch.tensor on the device is refused under a mode
    crossings.clear()
    try:
        with _Mode(), torch.autograd.set_multithreading_enabled(False):  # a mode does not reach other threads
            yield crossings
    finally:
        torch._C._set_only_lift_cpu_tensors(before)


def to_gpu(model: nn.Module) -> nn.Module:
    """The model with its parameters and buffers there; those that share memory go on doing so."""
    moved: dict[int, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    there: Tensor = OnGpu(tensor.detach())
                    if isinstance(tensor, nn.Parameter):
                        there = nn.Parameter(there, tensor.requires_grad)
                    tensors[name] = moved.setdefault(id(tensor), there)
    return model
