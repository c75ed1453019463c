"""Modules over the operators."""

from tarp_kernels.nn.config import SearchCellConfig, TarpConfig
from tarp_kernels.nn.linear import TarpConv1D, TarpLinear
from tarp_kernels.nn.masked_sublayer import masked_sublayer
from tarp_kernels.nn.search_cell import SearchCell
from tarp_kernels.nn.task_parallel import task_parallel

__all__ = [
    "SearchCell",
    "SearchCellConfig",
    "TarpConfig",
    "TarpConv1D",
    "TarpLinear",
    "masked_sublayer",
    "task_parallel",
]
