"""What the tests run on a machine with a GPU, on one without: the PTX machine stands for it."""

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch

from tarp_kernels import backends
from tests.lowrank_linear import backends as running
from tests.lowrank_linear import test_selected, test_values
from tests.lowrank_linear.backends import Runner
from tests.lowrank_linear.cases import Case, build, pairwise
from tests.lowrank_linear.cuda_runs import needs_nvcc
from tests.lowrank_linear.on_a_gpu import Elsewhere
from tests.search_cell import test_values as cell_values
from tests.search_cell.cases import Case as CellCase
from tests.search_cell.cuda_runs import cells_on_ptx_machine

ROOT = Path(__file__).resolve().parents[2]
CPU, CUDA = torch.device("cpu"), Runner("cuda")
SMALL = Case(dtype=torch.bfloat16, shape=(5, 40, 18), rank=3, b1=True, x_layout="padded")
CELL = CellCase(d=13, width=9, batch=(2, 20), alpha="mixed")


@contextlib.contextmanager
def a_gpu() -> Iterator[None]:
    """Within the block both backends of a GPU are there."""
    choose = backends.choose
    with (
        cells_on_ptx_machine(),
        mock.patch.object(backends, "choose", choose),
        mock.patch.dict(backends._WHY_UNAVAILABLE, cuda=None, triton=None),
        mock.patch.object(running, "GPU", CPU),
    ):
        yield


@needs_nvcc
@pytest.mark.parametrize("runner", [CUDA, Runner("triton")], ids=str)
@pytest.mark.parametrize("case", [SMALL, SMALL.with_(generator="mlp", x_layout="strided", segments=(2, 0, 3))], ids=str)
def test_values_and_gradients(runner, case):
    with a_gpu():
        test_values.check(runner, case)


@needs_nvcc
def test_values_and_gradients_on_some_rows():
    with a_gpu():
        test_selected.test_values_and_gradients(CUDA, "both", "sparse", SMALL)


@needs_nvcc
def test_values_and_gradients_of_a_cell():
    with a_gpu():
        cell_values.test_values_and_gradients(CUDA, CELL, torch.bfloat16)


def forgotten(self, tensor):
    return torch.zeros_like(tensor)


@needs_nvcc
@pytest.mark.parametrize("run", ["values", "cell"])
def test_a_copy_that_went_wrong_is_seen(run):
    with a_gpu(), mock.patch.object(Elsewhere, "copied", forgotten), pytest.raises(AssertionError):
        if run == "values":
            test_values.check(CUDA, SMALL)
        else:
            cell_values.test_values_and_gradients(CUDA, CELL, torch.bfloat16)


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (SMALL.with_(dtype=torch.float32), "backend='cuda' takes no torch.float32"),
        (SMALL.with_(dropout=0.3), "the kernels know no dropout"),
        (SMALL.with_(shape=(5, 33, 18)), "K a multiple of 8"),
    ],
    ids=str,
)
def test_what_is_not_served_is_skipped_with_the_reason(case, reason):
    with a_gpu(), pytest.raises(pytest.skip.Exception, match=reason):
        test_values.check(CUDA, case)


def test_a_mistake_is_no_reason_to_skip():
    with a_gpu(), pytest.raises(ValueError, match="bias"), CUDA.active():
        call = build(SMALL)
        call._replace(bias=call.bias[1:]).run("cuda")


@pytest.mark.parametrize("layout", ["contiguous", "padded", "strided", "conv1d", "conv1d_slice"])
def test_a_copy_has_the_strides_of_what_it_is_of(layout):
    kept = torch.randn(3, 8)
    tensor = build(SMALL.with_(weight_layout=layout, dtype=torch.float32)).weight
    copy = Elsewhere(None, CPU).copied(tensor)
    assert torch.equal(copy, tensor) and copy.stride() == tensor.stride()
    assert copy.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr()
    repeated = Elsewhere(None, CPU).copied(kept[:1].expand(5, 8))
    assert repeated.stride(0) == 0 and torch.equal(repeated, kept[:1].expand(5, 8))


def test_the_cases_of_the_cuda_backend_are_served():
    """All of them, and none is left to a skip."""
    cases = pairwise("cuda")
    assert len(cases) >= 30
    for case in cases:
        refused = []

        def choose(requested, dtype, device, cuda, refused=refused):
            refused.append(cuda(True))
            return "reference"

        with mock.patch.object(backends, "choose", choose):
            build(case).run("cuda")
        assert refused == [None], case


FORCED = """
import sys
import pytest
from tarp_kernels import backends
backends._WHY_UNAVAILABLE.update(cuda=None, triton=None)
sys.exit(pytest.main(["-q", "--collect-only", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""


def test_what_is_collected_where_both_backends_of_a_gpu_are():
    """Values and gradients are compared there; what draws at random or is about CPU tensors stays on the CPU."""
    here = Path(__file__).parent
    files = [here / f"test_{name}.py" for name in ("values", "selected", "properties", "segments", "contract")]
    files += [here.parent / "search_cell" / "test_values.py", here.parent / "test_philox.py"]
    done = subprocess.run(
        [sys.executable, "-c", FORCED, *map(str, files)], cwd=ROOT, env=os.environ, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    names = [line.partition("[") for line in done.stdout.splitlines() if "[" in line]
    found = {name for name, _, values in names if {"cuda", "triton"} & set(re.split("[-\\]]", values))}
    own, cells = "tests/lowrank_linear/test_", "tests/search_cell/test_values.py::test_"
    assert found == {
        f"{own}values.py::test_values_and_gradients",
        f"{own}values.py::test_operands_that_repeat_memory",
        f"{own}selected.py::test_values_and_gradients",
        f"{cells}values_and_gradients",
        f"{cells}without_a_gradient_of_alpha",
        f"{cells}the_same_bits_at_every_thread_count",
    }
