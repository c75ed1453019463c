"""Which backends exist here, which one runs, and why.

`auto` (None) takes the fastest backend that serves the tensor; a backend asked for by name runs or raises. The order
of preference is the order of `BACKENDS`.
"""

import contextlib
import importlib
import warnings
from collections.abc import Iterator

import torch

BACKENDS = ("cuda", "triton", "cpu", "reference")
_CPU_DTYPES = (torch.float32, torch.bfloat16)
_default: list[str | None] = [None]


def _probe_cpu() -> str | None:
    try:
        extension = importlib.import_module("tarp_kernels._C")
    except ImportError as error:
        return f"the native extension is missing ({error}); build it with `pip install .` (needs gcc)"
    if not hasattr(extension, "lowrank_linear_forward"):
        return "the native extension was built from older sources; build it again with `pip install .`"
    return None


_NO_GPU_KERNELS = "this version has no GPU kernels; use backend='reference', which runs on any device"
# Probed once at import and constant afterwards, so that compiled code can look at it.
_WHY_UNAVAILABLE = {"cuda": _NO_GPU_KERNELS, "triton": _NO_GPU_KERNELS, "cpu": _probe_cpu(), "reference": None}


def why_unavailable(name: str) -> str | None:
    """None where the backend can run on this machine, else one sentence that says why not and what would help."""
    if name not in _WHY_UNAVAILABLE:
        raise ValueError(
            f"backend: got {name!r}, expected one of {', '.join(BACKENDS)} or None for the automatic choice"
        )
    return _WHY_UNAVAILABLE[name]


def available_backends() -> tuple[str, ...]:
    """Names of the backends that can run on this machine, in order of preference."""
    return tuple(name for name in BACKENDS if why_unavailable(name) is None)


@contextlib.contextmanager
def backend(name: str | None) -> Iterator[None]:
    """Run every operator of the block on the named backend (None: automatic choice).

    The choice is one per process. Backward runs on the backend that forward used; with activation checkpointing keep
    the block open until after backward, because recomputation chooses anew.
    """
    if name is not None:
        _require(name)
    _default.append(name)
    try:
        yield
    finally:
        _default.pop()


def choose(requested: str | None, dtype: torch.dtype, device: torch.device) -> str:
    """The backend that runs an operator on tensors of this dtype and device."""
    name = requested if requested is not None else _default[-1]
    if name is not None:
        _require(name)
        if name == "cpu":
            if device.type != "cpu":
                raise ValueError(f"backend='cpu': x lies on {device}, expected the CPU; move it or leave backend=None")
            if dtype not in _CPU_DTYPES:
                raise TypeError(
                    f"backend='cpu': x has dtype {dtype}, expected torch.float32 or torch.bfloat16; "
                    "convert it, or use backend='reference'"
                )
        return name
    if device.type == "cpu" and dtype in _CPU_DTYPES:
        if why_unavailable("cpu") is None:
            return "cpu"
        warnings.warn(f"the slow reference backend runs: {why_unavailable('cpu')}", RuntimeWarning, stacklevel=3)
    return "reference"


def _require(name: str) -> None:
    reason = why_unavailable(name)
    if reason is not None:
        raise ValueError(f"backend={name!r} cannot run here: {reason}")
