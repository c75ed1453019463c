"""Which backends exist here, which one runs, and why.

`auto` (None) takes the fastest backend that serves the tensor; a backend asked for by name runs or raises. The order
of preference is the order of `BACKENDS`, but the CUDA C++ kernels serve some calls of some operators only, and each
operator says which: where they do not, auto takes the next backend.
"""

import contextlib
import importlib
import importlib.util
import warnings
from collections.abc import Callable, Iterator

import torch

BACKENDS = ("cuda", "triton", "cpu", "reference")
DTYPES = {
    "cuda": (torch.bfloat16, torch.float16),
    "triton": (torch.float32, torch.bfloat16, torch.float16),
    "cpu": (torch.float32, torch.bfloat16),
}
DEVICES = {"cuda": ("cuda", "a CUDA device"), "triton": ("cuda", "a CUDA device"), "cpu": ("cpu", "the CPU")}
_default: list[str | None] = [None]


def _probe_cpu() -> str | None:
    try:
        extension = importlib.import_module("tarp_kernels._C")
    except ImportError as error:
        return f"the native extension is missing ({error}); build it with `pip install .` (needs gcc)"
    if not hasattr(extension, "search_cell_forward"):
        return "the native extension was built from older sources; build it again with `pip install .`"
    return None


def _probe_triton() -> str | None:
    why = None
    if importlib.util.find_spec("triton") is None:
        why = "the package triton is not installed; `pip install triton`"
    elif not torch.cuda.is_available():
        why = "torch sees no CUDA device; check the driver, and that this torch was built for CUDA"
    elif torch.cuda.get_device_capability() < (8, 0):
        why = "the kernels need a GPU of compute capability 8.0 or higher"
    return why and f"{why}; backend='reference' runs on any device"


def _probe_cuda() -> str | None:
    without_a_gpu = _probe_triton()  # which its backward needs too
    if without_a_gpu is not None:
        return without_a_gpu
    why = _probe_cpu()
    if why is None:
        extension = importlib.import_module("tarp_kernels._C")
        if not extension.build_info()["cuda"]:
            why = (
                "the native extension was built without nvcc; put nvcc on PATH and build it again with `pip install .`"
            )
        else:
            runtime, driver = (version // 1000 for version in extension.cuda_versions())
            if driver < runtime:
                why = (
                    f"the native extension was built with CUDA {runtime}, the driver knows CUDA {driver}; "
                    "update the driver, or build with an older nvcc"
                )
    return why and f"{why}; backend='triton' needs neither, backend='reference' runs on any device"


# Probed once at import and constant afterwards, so that compiled code can look at it.
_WHY_UNAVAILABLE = {
    "cuda": _probe_cuda(),
    "triton": _probe_triton(),
    "cpu": _probe_cpu(),
    "reference": None,
}


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


class NotServed(ValueError):
    """A backend was asked for by name that runs here, but not for this call."""


def choose(
    requested: str | None,
    dtype: torch.dtype,
    device: torch.device,
    cuda: Callable[[bool], str | None] = lambda named: "this operator has no CUDA C++ kernel",
) -> str:
    """The backend that runs an operator on tensors of this dtype and device.

    cuda  why the operator's CUDA C++ kernels do not serve the call, None where they do; its argument says whether they
          were asked for by name: otherwise it is also a reason that Triton's are faster
    """
    name = requested if requested is not None else _default[-1]
    if name is not None:
        _require(name)
        if name != "reference":
            _require_fit(name, dtype, device)
        if name == "cuda" and (reason := cuda(True)) is not None:
            raise NotServed(f"backend='cuda': {reason}; use backend='triton', or None for the automatic choice")
        return name
    if device.type == "cpu" and dtype in DTYPES["cpu"]:
        if why_unavailable("cpu") is None:
            return "cpu"
        warnings.warn(f"the slow reference backend runs: {why_unavailable('cpu')}", RuntimeWarning, stacklevel=3)
    if device.type == "cuda" and dtype in DTYPES["triton"]:
        if dtype in DTYPES["cuda"] and why_unavailable("cuda") is None and cuda(False) is None:
            return "cuda"
        if why_unavailable("triton") is None:
            return "triton"
        warnings.warn(f"the slow reference backend runs: {why_unavailable('triton')}", RuntimeWarning, stacklevel=3)
    return "reference"


def _require_fit(name: str, dtype: torch.dtype, device: torch.device) -> None:
    kind, words = DEVICES[name]
    if device.type != kind:
        raise ValueError(f"backend={name!r}: x lies on {device}, expected {words}; move it or leave backend=None")
    if dtype not in DTYPES[name]:
        raise TypeError(
            f"backend={name!r}: x has dtype {dtype}, expected {' or '.join(map(str, DTYPES[name]))}; "
            "convert it, or use backend='reference'"
        )


def _require(name: str) -> None:
    reason = why_unavailable(name)
    if reason is not None:
        raise ValueError(f"backend={name!r} cannot run here: {reason}")
