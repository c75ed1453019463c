"""The launches of the CUDA backend of `search_cell` without a GPU: its source as PTX, on the PTX machine."""

import contextlib
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch

from tarp_kernels.ops.search_cell import cuda_kernels, cuda_plans
from tests.lowrank_linear.cuda_product_runs import Mistake, kernel, products_on_ptx_machine
from tests.lowrank_linear.cuda_runs import ELEMENTS, on_ptx_machine
from tests.ptx_machine import Report
from tests.ptx_machine.launch import run

GRADIENTS = {**ELEMENTS, torch.float32: "float"}


class CellLaunch(NamedTuple):
    name: str
    grid: tuple[int, ...]
    tensors: Any
    report: Report


@contextlib.contextmanager
def cells_on_ptx_machine(
    cc: int = 80, mistake: Mistake | None = None, stages: int | None = None, chunk: int = 64
) -> Iterator[list[CellLaunch]]:
    """Within the block backend="cuda" takes CPU tensors; yields the launches of cells, faults raised.

    mistake  (kernel, right, wrong): text of a kernel's source to be replaced
    stages   tiles of weights on their way; None: as planned
    chunk    rows of a part of the weights' gradients
    """
    launches: list[CellLaunch] = []
    arch = {80: "sm_80", 90: "sm_90a", 100: "sm_100"}[cc]

    def launch(name, dtype, grid, shared_bytes, tensors, *others):
        file = f"search_cell/search_cell_{'gradients' if name == 'add' else name}"
        program = kernel(file, f"search_cell_{name}", (GRADIENTS[dtype],), arch, mistake)
        numbers = others[:2] if name == "add" else others[:-2]
        form = [] if name == "add" else [struct.pack("8if", *others[-2], others[-1])]
        report = run(program, grid, 256, [*tensors, *numbers, *form], shared_bytes)
        report.raise_on_faults()
        launches.append(CellLaunch(name, grid, tensors, report))

    planned = cuda_plans.stages
    with (
        on_ptx_machine(cc),
        products_on_ptx_machine(cc),
        mock.patch.object(cuda_kernels, "launch", launch),
        mock.patch.object(cuda_plans, "stages", lambda *of: stages or planned(*of)),
        mock.patch.object(cuda_plans, "CHUNK", chunk),
    ):
        yield launches
