"""Small tables of numbers that the host knows, on a device: copied there once and not at every call.

A copy from the host makes it wait, and a CUDA graph cannot hold one. Whoever captures a graph runs the same calls
before, and must keep what `held` returns as long as the graph: the graph reads these tensors, but does not own them.
"""

import threading

import torch
from torch import Tensor

MOST = 8192
"""Tables that are kept; the one that was not asked for longest goes first."""

_held: dict[tuple, Tensor] = {}
_lock = threading.Lock()  # autograd's threads ask too


def on(device: torch.device, host: Tensor) -> Tensor:
    """The values of a tensor on the CPU, detached and contiguous: the same tensor for the same values, dtype and
    shape, which nobody may write to. What lies on the device already is returned as it is."""
    host = host.detach().contiguous()
    if host.device == device:
        return host
    key = (device, host.dtype, tuple(host.shape), host.view(-1).view(torch.uint8).numpy().tobytes())
    with _lock:
        table = _held.pop(key, None)
        if table is None:
            with torch.inference_mode(False):  # a later backward may have to keep it
                table = host.to(device)
        _held[key] = table
        if len(_held) > MOST:
            del _held[next(iter(_held))]
    return table


def held() -> list[Tensor]:
    """All tables that are kept now."""
    with _lock:
        return list(_held.values())
