"""The CUDA kernels for many rows without a GPU: values of both; accesses and seeded mistakes of that for every GPU."""

import itertools
from functools import partial
from unittest import mock

import pytest
import torch

from tarp_kernels import backends
from tarp_kernels.ops.lowrank_linear import cuda_plans
from tests.lowrank_linear.cases import Case, build, cotangent, run_with_gradients
from tests.lowrank_linear.cuda_runs import needs_nvcc, on_ptx_machine
from tests.lowrank_linear.oracle import TensorCoreOracle, bounds, excess
from tests.lowrank_linear.selected import MODES, check, select
from tests.lowrank_linear.test_cuda import captured
from tests.ptx_machine import launch as machine

pytestmark = needs_nvcc

BF16, FP16 = torch.bfloat16, torch.float16
BASE = Case(dtype=BF16, shape=(70, 72, 50), rank=5, b1=True, scaling=-6.0)
CASES = [
    BASE,  # depth of three stages, of which the last is a quarter full; on sm_90 of two, of which it is an eighth
    BASE.with_(generator="none", shape=(130, 200, 136), bias=False),
    BASE.with_(sigma="full", rank=3, activation="tanh", shape=(129, 16, 130)),  # less depth than a stage
    BASE.with_(segments=(0, 1, 140, 0, 3), shape=(0, 136, 33), rank=40, seed=1),  # z deeper than a stage
    BASE.with_(dtype=FP16, generator="mlp", b2=True, hidden=7, shape=(65, 264, 72), x_layout="padded"),
    BASE.with_(shape=(66, 456, 264), rank=70, adapter_dtype=torch.float32),  # more stages than are under way
]  # fmt: skip
PROCESSORS = {"sm90": 108, "sm90_wide": 1}
"""Of a GPU that has more, or fewer, than there are tiles."""
RUNS = [*itertools.product(CASES, ["sm80", *PROCESSORS]), (CASES[-1], "sm100")]


@pytest.mark.parametrize(("case", "kernel"), RUNS, ids=str)
def test_values_without_a_fault(case, kernel):
    call = build(case)
    cc, sm90 = {"sm80": 80, "sm100": 100}.get(kernel, 90), kernel in PROCESSORS
    with on_ptx_machine(cc, processors=PROCESSORS.get(kernel, 108)) as launches:
        y = call.run("cuda")
    assert excess(y, bounds(call, cotangent(case), TensorCoreOracle)["y"]) <= 1
    (launch,) = launches
    report, plan = launch.report, launch.plan
    assert (plan.sm90, plan.columns) == (sm90, 256 if kernel == "sm90_wide" else 128)
    assert (report.mma > 0, report.wgmma > 0) == (not sm90, sm90)
    assert report.shared_wavefronts <= 1.1 * report.shared_ideal_wavefronts, report.worst_sites()


@pytest.mark.parametrize("case", [BASE, BASE.with_(segments=(30, 0, 40), dtype=FP16, shape=(0, 40, 24))], ids=str)
def test_gradients_follow(case):
    call, dy = build(case), cotangent(case)
    wanted = bounds(call, dy, TensorCoreOracle)
    with on_ptx_machine() as launches:
        found = run_with_gradients(call, dy, "cuda")
    assert (
        len(launches) == 1 and {name for name, value in found.items() if not excess(value, wanted[name]) <= 1} == set()
    )


@pytest.mark.parametrize("mode", MODES)
def test_rows_are_read_and_written_through_an_index(mode):
    selected = select(BASE.with_(segments=(0, 100, 60), shape=(0, 40, 24)), "runs", mode)
    with on_ptx_machine():
        check(selected, selected.run("cuda"), TensorCoreOracle)


def test_x_and_w_are_read_once_for_each_tile_and_y_is_written_once():
    """Two tiles of rows read W, two of columns read x; z, U and b are beside that what their types and places make."""
    case = Case(dtype=BF16, shape=(256, 512, 256), rank=16, generator="none")
    with on_ptx_machine() as launches:
        build(case).run("cuda")
    report, tensors = launches[0].report, launches[0].tensors
    x, weight, _, z, U, *_, y = tensors
    fewest = 2 * sum(tensor.numel() for tensor in (x, weight, z, U)) * 2 // 32
    assert fewest <= report.global_load_sectors <= 1.05 * fewest
    assert report.global_store_sectors == y.numel() * 2 // 32


SEEN_BY = BASE.with_(shape=(0, 200, 140), segments=(70, 0, 71), rank=40, seed=2)
MISTAKES = {
    "a stage is overwritten while it is read": ("__syncthreads();  // this stage is there, and", "//"),
    "a copy is not waited for": ("wait_for_copies<kStages - 2>", "wait_for_copies<kStages - 1>"),
    "z over a stage that is read": ("__syncthreads();  // the last stage has been read", ""),
    "z is read before it is there": ("__syncthreads();  // z and U are there", ""),
    "y over z that is read": ("__syncthreads();  // z and U have been read", ""),
    "y leaves before it is there": ("__syncthreads();  // y is there", ""),
    "one row of y too many": ("i < count * kColumns;", "i < (count + 1) * kColumns;"),
    "one row of W too many": ("row < columns ? weight", "row <= columns ? weight"),
    "the depth goes on": ("of_W[i] != nullptr && k < form.in", "of_W[i] != nullptr"),
    "one step too few": ("number < steps; ++number) {\n        wait", "number < steps - 1; ++number) {\n        wait"),
    "the first task's U": ("static_cast<int64_t>(rows.task) * form.out", "static_cast<int64_t>(0) * form.out"),
    "tiles cross into the next task": ("min(own.end, begin + height)", "begin + height"),
    "z of the first stage alone": ("from < form.rank; from", "from < kDepth; from"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_the_source_is_seen(name):
    call = build(SEEN_BY)
    wanted = bounds(call, cotangent(SEEN_BY), TensorCoreOracle)
    for together in (1024, 256):
        try:
            with mock.patch.object(machine, "_LANES_TOGETHER", together), on_ptx_machine(mistake=MISTAKES[name]):
                y = call.run("cuda")
        except AssertionError:
            return
        if not excess(y, wanted["y"]) <= 1:
            return
    pytest.fail("nobody saw it")


def test_pieces_that_are_not_exchanged_cost_wavefronts():
    with on_ptx_machine(mistake=("(piece ^ (row / kTogether % (8 / kTogether)))", "piece")) as launches:
        build(SEEN_BY).run("cuda")
    report = launches[0].report
    assert report.shared_wavefronts > 1.1 * report.shared_ideal_wavefronts


def test_without_a_mistake_there_is_nothing_to_see():
    call = build(SEEN_BY)
    with on_ptx_machine():
        assert excess(call.run("cuda"), bounds(call, cotangent(SEEN_BY), TensorCoreOracle)["y"]) <= 1


def test_the_automatic_choice_leaves_many_rows_to_triton_until_measured():
    operands, segments, form = captured(BASE)
    cuda = partial(cuda_plans.refusal, operands, segments, form)
    with mock.patch.object(backends, "_WHY_UNAVAILABLE", dict.fromkeys(backends.BACKENDS)):
        assert backends.choose(None, BF16, torch.device("cuda"), cuda) == "triton"
        assert backends.choose("cuda", BF16, torch.device("cuda"), cuda) == "cuda"
