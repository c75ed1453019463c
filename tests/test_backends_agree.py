"""One matrix for all compiled backends: the same calls, the same float64 results, on a machine without a GPU.

Half precision, which is what all of them serve; Triton's and CUDA's launches run on the PTX machine.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.lowrank_linear import cuda_runs, triton_runs
from tests.lowrank_linear.cases import Case as Layer
from tests.lowrank_linear.cases import build as build_layer
from tests.lowrank_linear.cases import cotangent, run_with_gradients
from tests.lowrank_linear.oracle import TensorCoreOracle, bounds, excess
from tests.search_cell.cases import Case as Cell
from tests.search_cell.cases import build as build_cell
from tests.search_cell.cuda_runs import cells_on_ptx_machine
from tests.search_cell.test_cuda import wrong

BF16 = torch.bfloat16
Running = Callable[[], contextlib.AbstractContextManager[Any]]

LAYERS: dict[str, Running] = {
    "cpu": contextlib.nullcontext,
    "triton": lambda: triton_runs.on_ptx_machine(80),
    "cuda": lambda: cuda_runs.on_ptx_machine(80),
}
CELLS: dict[str, Running] = {**LAYERS, "cuda": cells_on_ptx_machine}


def each(backends: dict[str, Running]):
    marks = {"cpu": [pytest.mark.native], "triton": [], "cuda": [cuda_runs.needs_nvcc]}
    return pytest.mark.parametrize("backend", [pytest.param(name, marks=marks[name]) for name in backends])


LAYER = Layer(dtype=BF16, shape=(17, 72, 50), rank=5, b1=True)


@pytest.mark.parametrize(
    "case",
    [
        LAYER,
        LAYER.with_(shape=(1, 264, 33), generator="mlp", hidden=9, b2=True),
        LAYER.with_(segments=(0, 1, 20, 0, 3), sigma="full", rank=3, activation="tanh"),
        LAYER.with_(shape=(70, 136, 40), generator="none", rank=16),
        LAYER.with_(segments=(66, 0, 9), scaling=-6.0, adapter_dtype=torch.float32),
    ],
    ids=str,
)
@each(LAYERS)
def test_lowrank_linear(backend, case):
    call, dy = build_layer(case), cotangent(case)
    wanted = bounds(call, dy, TensorCoreOracle)
    with LAYERS[backend]():
        found = run_with_gradients(call, dy, backend)
    assert found.keys() == wanted.keys()
    assert {name for name, value in found.items() if not excess(value, wanted[name]) <= 1} == set()


CELL = Cell(dtype=BF16, d=24, width=18, batch=(2, 20), scale=0.7)


@pytest.mark.parametrize(
    "case",
    [
        CELL,
        CELL.with_(alpha="published", causal=False, norm=True, weights_dtype=torch.float32),
        CELL.with_(batch=(3, 14), tasks=(14, 28), padding=(("left", 3), ("right", 4), ("left", 0)), alpha="mixed"),
        CELL.with_(batch=None, lengths=(30, 1, 40), tasks=(31, 40), per_task_weights=False, width=64, d=72),
    ],
    ids=str,
)
@each(CELLS)
def test_search_cell(backend, case):
    call = build_cell(case)
    with CELLS[backend]():
        found = call.gradients(backend)
    assert wrong(found, call.exact(), call) == {}
