"""Fused kernels for task-adaptive reparameterisation (TARP): the operators, the layers, and the model tools."""

from tarp_kernels.backends import available_backends, backend
from tarp_kernels.models import apply_tarp, disable_tarp, tarp_parameters, tarp_report
from tarp_kernels.models_cache import cached_factors
from tarp_kernels.models_cells import architecture, set_architecture
from tarp_kernels.models_files import load_tarp, save_tarp
from tarp_kernels.models_merge import merge_tarp, unmerge_tarp
from tarp_kernels.nn import (
    SearchCell,
    SearchCellConfig,
    TarpConfig,
    TarpConv1D,
    TarpLinear,
    masked_sublayer,
    task_parallel,
)
from tarp_kernels.ops.hadamard_linear import hadamard_linear
from tarp_kernels.ops.lowrank_linear import Generator, lowrank_linear
from tarp_kernels.ops.search_cell import CellWeights, search_cell, search_cell_step

__all__ = [
    "CellWeights",
    "Generator",
    "SearchCell",
    "SearchCellConfig",
    "TarpConfig",
    "TarpConv1D",
    "TarpLinear",
    "apply_tarp",
    "architecture",
    "available_backends",
    "backend",
    "cached_factors",
    "disable_tarp",
    "hadamard_linear",
    "load_tarp",
    "lowrank_linear",
    "masked_sublayer",
    "merge_tarp",
    "save_tarp",
    "search_cell",
    "search_cell_step",
    "set_architecture",
    "tarp_parameters",
    "tarp_report",
    "task_parallel",
    "unmerge_tarp",
]
