"""Fused kernels for task-adaptive reparameterisation (TARP): the operators, the layers, and the model tools."""

from tarp_kernels.backends import available_backends, backend
from tarp_kernels.nn import TarpConfig, TarpConv1D, TarpLinear, task_parallel
from tarp_kernels.ops.lowrank_linear import Generator, lowrank_linear

__all__ = [
    "Generator",
    "TarpConfig",
    "TarpConv1D",
    "TarpLinear",
    "available_backends",
    "backend",
    "lowrank_linear",
    "task_parallel",
]
