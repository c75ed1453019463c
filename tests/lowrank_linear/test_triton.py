"""The Triton backend on machines without a GPU: its logic interpreted, its PTX executed, its binaries inspected."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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
        found = run_with_gradients(call, dy, "triton")
    for name, value in found.items():
        assert excess(value, wanted[name]) <= 1, name
    assert {name for name, _ in reports} >= {"middle_kernel", "dense_kernel", "middle_backward_kernel", "tall_kernel"}
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
        run_with_gradients(build(case), cotangent(case), "triton")
    for kernel in kernels:
        assert kernel.stack_bytes == 0 and kernel.registers <= 255, kernel[2:]
        assert kernel.shared_bytes <= SHARED_BYTES[cc]
        if kernel.name != "add_parts_kernel":
            assert kernel.count(r"mma\.sync|wgmma\.mma_async|tcgen05\.mma"), kernel.name
