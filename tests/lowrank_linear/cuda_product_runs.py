"""The CUDA launches beside the dense product, z of many rows and sums over rows, on the PTX machine."""

import contextlib
import functools
import re
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

from tarp_kernels.ops.lowrank_linear import cuda_gradients, cuda_plans, cuda_skinny
from tests.lowrank_linear.cuda_runs import ELEMENTS, written_out
from tests.ptx_machine import Report
from tests.ptx_machine.launch import load, run
from tests.ptx_machine.nvcc_launch import compile_cuda

Mistake = tuple[str, str, str]  # a kernel, text of its source, and what takes its place


class ProductLaunch(NamedTuple):
    name: str  # of the kernel
    plan: Any
    tensors: Any
    report: Report


def source(file: str, name: str, *constants: str) -> str:
    """A kernel of a file, <folder>/<operator>, for some template arguments as one text, our own headers written out."""
    folder, _, operator = file.rpartition("/")
    text = written_out(operator, folder)
    parameters = re.search(rf"template <([^>]*)>\n__global__[^;{{]*?\b{name}_kernel\((.*?)\)\s*\{{", text, re.DOTALL)
    names = [parameter.split()[-1] for parameter in parameters[1].split(",")]
    types = re.sub(r"[*\s]\w+(,|$)", lambda m: m[0][0].strip() + m[1], " ".join(parameters[2].split()))
    for parameter, constant in zip(names, constants, strict=True):
        types = re.sub(rf"\b{parameter}\b", constant, types)
    return f"{text}\ntemplate __global__ void tarp::cuda::{name}_kernel<{', '.join(constants)}>({types});\n"


@functools.lru_cache(maxsize=64)
def kernel(file: str, name: str, constants: tuple[str, ...], arch: str, mistake: Mistake | None):
    """A program for the PTX machine."""
    text = source(file, name, *constants)
    if mistake is not None and mistake[0] == name:
        _, right, wrong = mistake
        assert text.count(right) == 1, f"{right!r} is in the source {text.count(right)} times"
        text = text.replace(right, wrong)
    return load(compile_cuda(text, arch), f"{name}_kernel")


@contextlib.contextmanager
def products_on_ptx_machine(
    cc: int = 80, mistake: Mistake | None = None, splits: int | None = None, chunk: int = 128
) -> Iterator[list[ProductLaunch]]:
    """Within the block these launches run on CPU tensors, as in `cuda_runs.on_ptx_machine`; yields them.

    mistake  text of a kernel's source to be replaced
    splits   in how many parts the depth of z is cut; None: as planned
    chunk    rows of a part of a sum over rows
    """
    launches: list[ProductLaunch] = []
    arch = {80: "sm_80", 90: "sm_90a", 100: "sm_100"}[cc]

    def skinny(plan, tiles, tensors, numbers, scaling):
        program = kernel(
            "lowrank_linear/skinny", "skinny", (ELEMENTS[tensors.x.dtype], str(plan.columns)), arch, mistake
        )
        form = struct.pack(f"{len(numbers)}if", *numbers, scaling)
        shared_bytes = 4 * (64 + plan.columns) * 64 * 2
        report = run(program, (tiles, plan.splits), 128, [*tensors, form], shared_bytes)
        report.raise_on_faults()
        assert tensors.counts is None or not tensors.counts.any(), "the next launch would find other counts than zeros"
        launches.append(ProductLaunch("skinny", plan, tensors, report))

    def tall(chunks, narrow_columns, tensors, numbers):
        program = kernel(
            "lowrank_linear/gradients", "tall", (ELEMENTS[tensors.wide.dtype], str(narrow_columns)), arch, mistake
        )
        grid = (chunks * -(-numbers[0] // 64), -(-numbers[5] // narrow_columns))
        shared_bytes = 4 * 64 * (64 + narrow_columns) * 2
        report = run(program, grid, 128, [*tensors, struct.pack("13i", *numbers)], shared_bytes)
        report.raise_on_faults()
        launches.append(ProductLaunch("tall", narrow_columns, tensors, report))

    def add_parts(parts, segments, out, numbers):
        program = kernel("lowrank_linear/gradients", "add_parts", (ELEMENTS.get(out.dtype, "float"),), arch, mistake)
        grid = (-(-numbers[5] // 256) * numbers[1],)
        report = run(program, grid, 256, [parts, segments, out, struct.pack("6i", *numbers)])
        report.raise_on_faults()
        launches.append(ProductLaunch("add_parts", None, (parts, segments, out), report))

    planned = cuda_plans.skinny

    def plan(*numbers):
        found = planned(*numbers)
        return found if splits is None else found._replace(splits=splits)

    with (
        mock.patch.object(cuda_skinny, "launch", skinny),
        mock.patch.object(cuda_plans, "skinny", plan),
        mock.patch.object(cuda_gradients, "launch_tall", tall),
        mock.patch.object(cuda_gradients, "launch_add_parts", add_parts),
        mock.patch.object(cuda_plans, "CHUNK", chunk),
    ):
        yield launches
