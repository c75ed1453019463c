"""Ways to run the launches of the Triton backend on a machine without a GPU: on the PTX machine, or compiled only."""

import contextlib
import functools
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import triton

from tarp_kernels import backends
from tarp_kernels.ops.lowrank_linear import triton_products
from tests.ptx_machine import Report, compile_call, run_triton

NVIDIA = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Compiled(NamedTuple):
    """One kernel as a GPU of some architecture would load it."""

    name: str
    ptx: str
    shared_bytes: int
    registers: int
    stack_bytes: int  # spills lie here

    def count(self, pattern: str) -> int:
        return len(re.findall(pattern, self.ptx))


@contextlib.contextmanager
def launching(launch: Callable, cc: int) -> Iterator[None]:
    """Within the block backend="triton" takes CPU tensors, and its launches, for this GPU, go to `launch`."""
    with (
        mock.patch.object(backends, "choose", lambda requested, *_: requested),
        mock.patch.object(triton_products, "launch", launch),
        mock.patch.object(triton_products, "capability", lambda device: divmod(cc, 10)),
    ):
        yield


@contextlib.contextmanager
def on_ptx_machine(cc: int) -> Iterator[list[tuple[str, Report]]]:
    """Run every launch as PTX for compute capability 80, 90 or 100, faults raised; yields name and report of each."""
    reports: list[tuple[str, Report]] = []

    def launch(kernel, grid, *arguments, launch_pdl=False, maxnreg=None, **constants):
        options = {"launch_pdl": launch_pdl, "maxnreg": maxnreg}
        report = run_triton(kernel, grid, *arguments, cc=cc, options=options, **constants)
        report.raise_on_faults()
        reports.append((kernel.__name__, report))

    with launching(launch, cc):
        yield reports


@contextlib.contextmanager
def compiling(cc: int) -> Iterator[list[Compiled]]:
    """Compile every launch and run none: results are whatever lay in memory."""
    found: list[Compiled] = []

    def launch(kernel, grid, *arguments, num_warps=4, num_stages=3, launch_pdl=False, maxnreg=None, **constants):
        options = {"launch_pdl": launch_pdl, "maxnreg": maxnreg}
        compiled, *_ = compile_call(kernel, arguments, constants, cc, num_warps, num_stages, options=options)
        found.append(Compiled(kernel.__name__, compiled.ptx, compiled.shared_bytes, *resources(compiled.cubin)))

    with launching(launch, cc):
        yield found


@functools.cache
def resources(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread and bytes of its stack, as cuobjdump reads them from the binary."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [NVIDIA / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    usage = dict(re.findall(r"(REG|STACK):(\d+)", text))
    return int(usage["REG"]), int(usage["STACK"])
