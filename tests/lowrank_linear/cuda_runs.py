"""Ways to run the launches of the CUDA backend on a machine without a GPU: its source as PTX, on the PTX machine."""

import contextlib
import functools
import os
import re
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch

from tarp_kernels import backends
from tarp_kernels.ops.lowrank_linear import cuda_kernels, cuda_plans
from tarp_kernels.ops.lowrank_linear.cuda_plans import FewRows, ManyRows
from tests.lowrank_linear.triton_runs import on_ptx_machine as triton_on_ptx_machine
from tests.ptx_machine import GlobalMemory, Report
from tests.ptx_machine.launch import load, run
from tests.ptx_machine.nvcc_launch import compile_cuda

CSRC = Path(__file__).resolve().parents[2] / "csrc"
ELEMENTS = {torch.bfloat16: "__nv_bfloat16", torch.float16: "__half"}


class Launch(NamedTuple):
    plan: FewRows | ManyRows
    tensors: Any
    report: Report


needs_nvcc = pytest.mark.skipif(
    shutil.which("nvcc") is None or not CSRC.is_dir(), reason="needs nvcc on PATH and the source tree"
)


def source(name: str, dtype: torch.dtype, *constants: int) -> str:
    """The kernel of <name>_cuda.cuh for one type as one text, our own headers written out: mistakes can be put in."""
    text = written_out(name)
    arguments = re.search(rf"{name}_kernel\((.*?)\)\s*\{{", text, re.DOTALL)
    types = re.sub(r"[*\s]\w+(,|$)", lambda m: m[0][0].strip() + m[1], " ".join(arguments[1].split()))
    element = ELEMENTS[dtype]
    types = re.sub(r"\bElement\b", element, types)
    values = ", ".join(map(str, (element, *constants)))
    return f"{text}\ntemplate __global__ void tarp::cuda::{name}_kernel<{values}>({types});\n"


def written_out(name: str, folder: str = "lowrank_linear") -> str:
    """<name>_cuda.cuh of a folder with our own headers in it."""
    return _written_out(CSRC / folder / f"{name}_cuda.cuh", set())


def _written_out(path: Path, seen: set[Path]) -> str:
    seen.add(path)

    def include(match: re.Match) -> str:
        wanted = CSRC / match[1]
        return "" if wanted in seen else _written_out(wanted, seen)

    return re.sub(r'#include "(.*?)"', include, path.read_text().replace("#pragma once", ""))


@functools.lru_cache(maxsize=64)
def _kernel(
    name: str,
    dtype: torch.dtype,
    constants: tuple[int, ...],
    arch: str,
    mistake: tuple[str, str] | None,
    entry: str | None = None,
):
    """A kernel of <name>_cuda.cuh: the one of that name, or `entry`."""
    text = source(name, dtype, *constants)
    if mistake is not None:
        right, wrong = mistake
        assert text.count(right) == 1, f"{right!r} is in the source {text.count(right)} times"
        text = text.replace(right, wrong)
    return load(compile_cuda(text, arch), entry or f"{name}_kernel")


@contextlib.contextmanager
def on_ptx_machine(
    cc: int = 80,
    mistake: tuple[str, str] | None = None,
    splits: int | None = None,
    staged_bytes: int = 48 * 1024,
    processors: int = 108,
) -> Iterator[list[Launch]]:
    """Within the block backend="cuda" takes CPU tensors; yields its own launches, faults raised.

    mistake  (right, wrong): text of the source to be replaced
    splits   in how many parts the depth is cut; None: as planned
    staged_bytes  of x in shared memory at a time
    processors  multiprocessors of the GPU
    """
    launches: list[Launch] = []
    arch = {80: "sm_80", 90: "sm_90a", 100: "sm_100"}[cc]

    def launch(plan, tensors, numbers, scaling):
        kernel = _kernel("few_rows", tensors.x.dtype, (plan.token_tiles,), arch, mistake)
        form = struct.pack(f"{len(numbers)}if", *numbers, scaling)
        blocks = plan.tiles * plan.splits
        report = run(kernel, (blocks,), 256, [*tensors, form], plan.shared_bytes)
        report.raise_on_faults()
        assert not tensors.counts.any(), "the next launch would find other counts than zeros"
        launches.append(Launch(plan, tensors, report))

    def launch_many(plan, tensors, numbers):
        form, grid = struct.pack(f"{len(numbers)}i", *numbers), (-(-numbers[2] // plan.columns), plan.tiles)
        x, weight, bias, z, U, segments, read, write, y = tensors
        if plan.sm90:
            own = ("many_rows_sm90", x.dtype, (plan.columns,), arch, mistake)
            memory, maps = GlobalMemory(), torch.full((cuda_plans.MAP_BYTES,), 255, dtype=torch.uint8)
            arguments = [x, weight, maps, plan.columns, form]
            run(_kernel(*own, "tile_maps_kernel"), (1,), 64, arguments, memory=memory).raise_on_faults()
            arguments = [maps, bias, z, U, segments, write, y, form]
            report = run(_kernel(*own), grid, 384, arguments, 192 * 1024 + 96, memory=memory)
        else:
            report = run(_kernel("many_rows", x.dtype, (), arch, mistake), grid, 256, [*tensors, form], 64 * 1024)
        report.raise_on_faults()
        launches.append(Launch(plan, tensors, report))

    def choose(requested, dtype, device, cuda):
        reason = cuda(True) if requested == "cuda" else None
        if reason is not None:
            raise backends.NotServed(reason)
        return requested

    plan = cuda_plans.few_rows.__wrapped__  # what it remembers does not know of `staged_bytes`

    def planned(rows, in_features, out_features, rank, first, mlp, tasks, processors):
        found = plan(rows, in_features, out_features, rank, first, mlp, tasks, processors)
        if splits is None:
            return found
        hidden = first if mlp else 0
        return cuda_plans.with_splits(
            rows, in_features, rank, hidden, found.token_tiles, found.first_tiles, found.tiles, splits
        )

    from tests.lowrank_linear.cuda_product_runs import products_on_ptx_machine  # which imports from here

    with (
        triton_on_ptx_machine(cc),  # backward
        products_on_ptx_machine(cc),
        mock.patch.object(backends, "choose", choose),
        mock.patch.object(cuda_kernels, "launch", launch),
        mock.patch.object(cuda_kernels, "launch_many", launch_many),
        mock.patch.object(cuda_plans, "few_rows", planned),
        mock.patch.object(cuda_plans, "_STAGED_BYTES", staged_bytes),
        mock.patch.object(cuda_plans, "multiprocessors", lambda device: processors),
    ):
        yield launches


def tool(name: str) -> Path:
    """A program of the CUDA toolkit: on PATH, beside nvcc, or in the triton wheel."""
    import triton

    places = [*os.get_exec_path(), Path(triton.__file__).parent / "backends" / "nvidia" / "bin"]
    found = shutil.which(name, path=os.pathsep.join(map(str, places)))
    assert found is not None, name
    return Path(found)
