"""What the CUDA launches of `lowrank_linear` share around their kernels: codes, adapters of one dtype, counts."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tarp_kernels.ops.lowrank_linear.contract import Form, Operands
from tarp_kernels.ops.lowrank_linear.cuda_plans import aligned

ACTIVATIONS = ("none", "one_plus", "sigmoid", "tanh", "softplus", "relu", "gelu", "silu")
"""In the order of `Activation` in csrc/common/cuda/activations.cuh."""


def activations(form: Form) -> tuple[int, int]:
    """The codes of a generator's hidden and its output activation."""
    return ACTIVATIONS.index(form.hidden_activation), ACTIVATIONS.index(form.activation)


def full(form: Form, operands: Operands) -> int:
    """1 where Σ(x) is a full matrix. Without generator there is none, whatever sigma says, and z is h."""
    return int(form.sigma == "full" and operands.w1 is not None)


def of_one_dtype(adapter: Sequence[Tensor | None]) -> tuple[list[Tensor | None], bool]:
    """The tensors in the dtype of all of them, or in float32 where they differ; whether that is float32."""
    dtypes = {tensor.dtype for tensor in adapter if tensor is not None}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    return [None if tensor is None else tensor.to(dtype) for tensor in adapter], dtype == torch.float32


def plain(tensor: Tensor) -> Tensor:
    """Contiguous, and at a multiple of 16 bytes."""
    tensor = tensor.detach().resolve_neg().contiguous()
    return tensor if aligned(tensor) else tensor.clone()


_counts: dict[tuple[torch.device, int], Tensor] = {}


def counts(device: torch.device, size: int) -> Tensor:
    """Zeros by which the blocks of a launch find each other; a launch leaves them as zeros.

    Launches of one stream run one after the other and share them. A graph has its own: it may run on any stream.
    """
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return torch.zeros(size, dtype=torch.int32, device=device)
    key = (device, torch.cuda.current_stream(device).cuda_stream)
    held = _counts.get(key)
    if held is None or held.numel() < size:
        held = _counts[key] = torch.zeros(max(size, 4096), dtype=torch.int32, device=device)
    return held
