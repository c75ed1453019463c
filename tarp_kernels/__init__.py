"""Fused kernels for task-adaptive reparameterisation (TARP): the operators, the layers, and the model tools."""

from tarp_kernels.backends import available_backends, backend
from tarp_kernels.models import apply_tarp, disable_tarp, tarp_parameters, tarp_report
from tarp_kernels.models_files import load_tarp, save_tarp
from tarp_kernels.nn import TarpConfig, TarpConv1D, TarpLinear, task_parallel
from tarp_kernels.ops.lowrank_linear import Generator, lowrank_linear

__all__ = [
    "Generator",
    "TarpConfig",
    "TarpConv1D",
    "TarpLinear",
    "apply_tarp",
    "available_backends",
    "backend",
    "disable_tarp",
    "load_tarp",
    "lowrank_linear",
    "save_tarp",
    "tarp_parameters",
    "tarp_report",
    "task_parallel",
]
