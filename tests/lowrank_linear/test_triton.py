"""The Triton backend on machines without a GPU: its logic interpreted, its PTX executed, its binaries inspected."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tarp_kernels.ops.lowrank_linear import triton_kernels
from tarp_kernels.ops.lowrank_linear.contract import Form, Operands
from tests.lowrank_linear import mutants
from tests.lowrank_linear.cases import Case, build, cotangent, run_with_gradients
from tests.lowrank_linear.oracle import TensorCoreOracle, bounds, excess
from tests.lowrank_linear.triton_runs import compiling, on_ptx_machine

BF16 = Case(dtype=torch.bfloat16, shape=(37, 72, 50), rank=5, b1=True, scaling=-6.0)
FORMS = [
    BF16.with_(generator="none", weight_layout="conv1d"),
    BF16.with_(segments=(0, 1, 19, 0, 17), seed=1),
    BF16.with_(generator="mlp", b2=True, dropout=0.3, hidden=7, x_layout="padded"),
    BF16.with_(sigma="full", rank=3, activation="tanh", segments=(18, 4)),
    BF16.with_(
        sigma="full", generator="mlp", rank=3, hidden_activation="gelu", adapter_dtype=torch.float32, shape=(37, 24, 50)
    ),
]
ARCHITECTURES = (80, 90)
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # of one block, CUDA C++ programming guide, table 27


def interpreted(*arguments: str) -> subprocess.CompletedProcess:
    """Pytest on interpreted.py in a process of its own."""
    file = Path(__file__).with_name("interpreted.py")
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", *arguments, str(file)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )


def test_in_the_interpreter():
    done = interpreted()
    assert done.returncode == 0 and int(re.findall(r"(\d+) passed", done.stdout)[0]) >= 40, done.stdout[-4000:]


@pytest.mark.proof
def test_every_form_in_the_interpreter():
    done = interpreted("-m", "proof")
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.mark.parametrize("cc", ARCHITECTURES)
@pytest.mark.parametrize("case", FORMS, ids=str)
def test_ptx_computes_values_and_gradients_without_a_fault(cc, case):
    call, dy = build(case), cotangent(case)
    wanted = bounds(call, dy, TensorCoreOracle)
    with on_ptx_machine(cc) as reports:
        with triton_kernels.forced("split"):
            found = run_with_gradients(call, dy, "triton")
        with triton_kernels.forced("one_pass"):
            y = call.run("triton")
    for name, value in (*found.items(), ("y", y)):
        assert excess(value, wanted[name]) <= 1, name
    ran = [name for name, _ in reports]
    assert set(ran) >= {"forward_kernel", "dense_kernel", "middle_backward_kernel", "tall_kernel", "add_parts_kernel"}
    assert ran[-1] == "forward_kernel", "one pass is one launch"
    assert all(report.atomics == 0 for _, report in reports)


PRECISION = {"LowRankTermRoundedBeforeItJoins", "SmallFactorRounded", "adapter_rounded"}


@pytest.mark.parametrize("case", FORMS, ids=str)
def test_the_tolerances_tell_every_mutant_apart(case):
    """Except for those that round what a tensor core rounds."""
    call, dy = build(case), cotangent(case)
    wanted = bounds(call, dy, TensorCoreOracle)
    passed = mutants.undetected(call, dy, lambda name, value: excess(value, wanted[name]))
    assert {name.partition(":")[0] for name in passed} <= PRECISION, passed


@pytest.mark.parametrize("cc", [80, 90, 100])
@pytest.mark.parametrize("case", FORMS, ids=str)
def test_binaries_spill_nothing_and_use_tensor_cores(cc, case):
    with compiling(cc) as kernels:
        for variant in triton_kernels.VARIANTS:
            with triton_kernels.forced(variant):
                run_with_gradients(build(case), cotangent(case), "triton")
    for kernel in kernels:
        assert kernel.stack_bytes == 0 and kernel.registers <= 255, kernel[2:]
        assert kernel.shared_bytes <= SHARED_BYTES[cc]
        if kernel.name != "add_parts_kernel":
            assert kernel.count(r"mma\.sync|wgmma\.mma_async|tcgen05\.mma"), kernel.name


def test_the_number_of_rows_tasks_and_the_scaling_compile_nothing_anew():
    """Within a bucket of shapes: few rows, or many."""
    calls = [
        BF16.with_(segments=segments, scaling=scaling)
        for segments in ((20, 17), (1, 40, 3, 0, 15), (64,), (16, 16, 16), (1,) * 31)
        for scaling in (1.0, 2.0, 0.5)
    ]
    sources = set()
    for case in calls:
        with compiling(80) as kernels:
            run_with_gradients(build(case), cotangent(case), "triton")
        sources.add(tuple(kernel.ptx for kernel in kernels))
    assert len(sources) == 1


WIDE = Case(dtype=torch.bfloat16, shape=(256, 1024, 1024), rank=16, bias=False)
# Warp instructions of the dense kernel, and of both kernels, beside the dense kernel without adapter. Both together
# should stay within 1.10 on sm_90a as well, where wgmma leaves so little to compare with; they take 1.107.
BUDGETS = {80: (1.01, 1.10), 90: (1.04, 1.11)}


@pytest.mark.parametrize("cc", ARCHITECTURES)
def test_the_adapter_costs_a_few_instructions_and_no_traffic(cc):
    call = build(WIDE)
    operands = Operands(call.x, call.weight, None, call.V, call.U, *call.generator[:4])
    plain = torch.empty(256, 1024, dtype=torch.bfloat16)
    form = Form("diag", "silu", "one_plus", 1.5, 0.0, 0, "triton")
    with on_ptx_machine(cc) as reports:
        triton_kernels.forward(operands, None, form)
        shared = triton_kernels._Call(operands, None, form)
        nothing = torch.empty(256, 0, dtype=torch.bfloat16)
        triton_kernels._dense(shared, call.x, call.weight, None, nothing, call.U, (16, 1), plain)
    (_, skinny), (_, dense), (_, bare) = reports
    alone, both = BUDGETS[cc]
    issued = [sum(report.instructions.values()) for report in (skinny, dense, bare)]
    assert issued[1] <= alone * issued[2]
    assert issued[0] + issued[1] <= both * issued[2]
    tiles = 256 // 128 * (1024 // 128)
    operand_bytes = tiles * 2 * (128 * 16 + 128 * 16)  # a tile of z and a tile of U
    assert 32 * (dense.global_load_sectors - bare.global_load_sectors) <= operand_bytes
    assert dense.shared_wavefronts == dense.shared_ideal_wavefronts
    if cc == 80:
        steps = tiles * (1024 // 16 + 1)  # k-steps of 16, and one more for the adapter
        assert dense.mma <= steps * (128 // 16) * (128 // 8)
    else:
        assert dense.wgmma == bare.wgmma * (1024 // 16 + 1) // (1024 // 16)
