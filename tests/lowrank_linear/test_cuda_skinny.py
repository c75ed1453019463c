"""The CUDA kernel that makes z for many rows without a GPU: values, memory accesses and seeded mistakes of its PTX."""

from unittest import mock

import pytest
import torch

from tarp_kernels.ops.lowrank_linear import autograd, cuda_kernels, cuda_plans
from tarp_kernels.ops.lowrank_linear.layout import empty_saved
from tests.lowrank_linear.cases import Case, build, cotangent, run_with_gradients
from tests.lowrank_linear.cuda_product_runs import ProductLaunch, products_on_ptx_machine
from tests.lowrank_linear.cuda_runs import needs_nvcc, on_ptx_machine
from tests.lowrank_linear.oracle import TensorCoreOracle, bounds, excess
from tests.lowrank_linear.selected import MODES, check, select
from tests.lowrank_linear.test_cuda import captured
from tests.lowrank_linear.triton_runs import on_ptx_machine as triton_on_ptx_machine
from tests.ptx_machine import launch as machine

pytestmark = needs_nvcc

BF16, FP16 = torch.bfloat16, torch.float16
BASE = Case(dtype=BF16, shape=(70, 264, 24), rank=5, b1=True, scaling=-6.0)
MLP = BASE.with_(generator="mlp", b2=True, hidden=7)
WIDE: dict = {"adapter_dtype": torch.float32}

# (case, splits, GPU): every form and count of columns, whole stages and less
CASES = [
    (BASE, 1, 80),
    (BASE.with_(generator="none", shape=(130, 520, 24), rank=8), 3, 80),
    (BASE.with_(sigma="full", rank=3, activation="tanh", shape=(129, 256, 24)), 1, 90),
    (BASE.with_(sigma="full", rank=8, shape=(65, 256, 24), dtype=FP16, b1=False), 1, 80),
    (BASE.with_(segments=(0, 1, 140, 0, 3), shape=(0, 520, 24), rank=9, seed=1, activation="sigmoid"), 2, 80),
    (MLP.with_(dtype=FP16, shape=(65, 1032, 24), x_layout="padded", hidden_activation="gelu"), 4, 80),
    (MLP.with_(sigma="full", rank=3, segments=(70, 0, 5), shape=(0, 296, 24), hidden=9, **WIDE), 1, 100),
    (BASE.with_(shape=(66, 512, 24), rank=64, activation="softplus", **WIDE), 2, 80),
    (BASE.with_(generator="none", rank=17, shape=(128, 256, 8)), 1, 80),
    (BASE.with_(generator="none", sigma="full"), 1, 80),  # which without a generator means nothing
]  # fmt: skip


@pytest.mark.parametrize(("case", "splits", "cc"), CASES, ids=str)
def test_values_without_a_fault_or_a_launch_of_triton(case, splits, cc):
    call, wanted = build(case), bounds(build(case), cotangent(case), TensorCoreOracle)
    with on_ptx_machine(cc), triton_on_ptx_machine(cc) as of_triton, products_on_ptx_machine(cc, None, splits) as ours:
        y = call.run("cuda")
        again = call.leaves(("V",)).run("cuda").detach()
    assert excess(y, wanted["y"]) <= 1 and torch.equal(y, again) and of_triton == []
    assert [launch.tensors.h is None for launch in ours] == [True, False]
    for launch in ours:
        report = launch.report
        assert report.mma > 0
        assert report.shared_wavefronts <= 1.1 * report.shared_ideal_wavefronts, report.worst_sites()


@pytest.mark.parametrize("case", [CASES[i][0] for i in (1, 4, 5, 6)], ids=str)
def test_what_is_saved_is_what_triton_saves_and_gradients_follow(case):
    operands, segments, form = captured(case)
    saved = {}
    for name in ("cuda", "triton"):
        saved[name] = empty_saved(operands, form)
        with on_ptx_machine(), products_on_ptx_machine(splits=2):
            autograd.kernels(name).forward(operands, segments, form._replace(backend=name), saved[name])
    for found, expected in zip(saved["cuda"], saved["triton"], strict=True):
        torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)
        assert found.numel() == 0 or expected.abs().max() > 0.5
    call, dy = build(case), cotangent(case)
    wanted = bounds(call, dy, TensorCoreOracle)
    with on_ptx_machine():
        found = run_with_gradients(call, dy, "cuda")
    assert {name for name, value in found.items() if not excess(value, wanted[name]) <= 1} == set()


@pytest.mark.parametrize("mode", MODES)
def test_rows_are_read_through_an_index(mode):
    selected = select(BASE.with_(segments=(0, 100, 60), shape=(0, 264, 24)), "runs", mode)
    with on_ptx_machine(), products_on_ptx_machine() as launches:
        check(selected, selected.run("cuda"), TensorCoreOracle)
    assert (launches[0].tensors.read is None) == (mode == "write")


def test_a_number_on_the_gpu_scales_like_one_on_the_host():
    operands, segments, form = captured(BASE)
    with on_ptx_machine():
        wanted = cuda_kernels.forward(operands, segments, form)
        there = form._replace(scaling=torch.tensor(form.scaling, dtype=torch.float64))
        assert torch.equal(cuda_kernels.forward(operands, segments, there), wanted)


def test_the_bits_do_not_depend_on_which_block_arrives_last():
    call = build(BASE.with_(shape=(130, 520, 8)))
    results = []
    for together in (128, 384, 1024):  # threads that run side by side
        with (
            mock.patch.object(machine, "_LANES_TOGETHER", together),
            on_ptx_machine(),
            products_on_ptx_machine(splits=5),
        ):
            results.append(call.run("cuda"))
    assert all(torch.equal(results[0], result) for result in results)


# --- memory accesses -------------------------------------------------------------------------------------------------


def launched(case: Case, splits: int, mistake=None) -> ProductLaunch:
    with on_ptx_machine(), products_on_ptx_machine(80, mistake, splits) as launches:
        build(case).run("cuda")
    return launches[0]


def least_sectors(launch: ProductLaunch) -> tuple[int, int]:
    """To read: x once, [V; w1] for each tile of 64 rows, partial sums; to write: z, partial sums. No h, s, u."""
    t = launch.tensors
    tiles, partials = -(-t.x.shape[0] // 64), 0 if t.partials is None else t.partials.numel() * 4
    factor = sum(0 if tensor is None else tensor.numel() * tensor.element_size() for tensor in (t.V, t.w1))
    read, written = t.x.numel() * 2 + tiles * factor + partials, t.z.numel() * 2 + partials
    return read // 32, written // 32


@pytest.mark.parametrize(
    ("case", "splits"),
    [
        (Case(dtype=BF16, shape=(128, 512, 8), rank=8), 1),
        (Case(dtype=FP16, shape=(192, 1024, 8), rank=16), 2),
        (Case(dtype=BF16, shape=(128, 512, 8), rank=16, generator="none", adapter_dtype=torch.float32), 1),
    ],
    ids=str,
)
def test_x_is_read_once_and_nothing_is_written_beside_z_and_sums(case, splits):
    launch = launched(case, splits)
    read, written = least_sectors(launch)
    twice = launch.tensors.V.numel() * 2 * 4 // 32 if case.adapter_dtype else 0  # a sector of it is two requests
    assert launch.report.global_load_sectors - twice <= 1.05 * read, launch.report.worst_sites()
    assert launch.report.global_store_sectors <= 1.05 * written, launch.report.worst_sites()


# --- seeded mistakes -------------------------------------------------------------------------------------------------

SEEN_BY = BASE.with_(shape=(0, 520, 24), segments=(70, 0, 71), rank=5, seed=2)
OF_MLP = MLP.with_(shape=(70, 520, 24), seed=2)
MISTAKES = {
    "a stage is overwritten while it is read": ("__syncthreads();  // this stage is there, and", "//"),
    "a copy is not waited for": ("wait_for_copies<kStages - 2>", "wait_for_copies<kStages - 1>"),
    "sums over a stage that is read": ("__syncthreads();                                 // the last stage", "//"),
    "sums are read before they are there": ("__syncthreads();  // the sums are there", ""),
    "totals are read before they are there": ("__syncthreads();  // the totals are there", ""),
    "one row too many": ("count = rows.end - rows.begin,", "count = rows.end - rows.begin + 1,"),
    "rows of the next task": ("min(own.end, begin + height)", "begin + height"),
    "a tile belongs to the task before": ("segments, rows), height) <= tile", "segments, rows), height) < tile"),
    "one row of w1 too many": ("wanted = row < stacked &&", "wanted = row <= stacked &&"),
    "x goes on behind its end": ("of_x[i] != nullptr && k < form.in", "of_x[i] != nullptr"),
    "w1 in the place of V": ("of_V = row < form.rank,", "of_V = row < form.rank - 1,"),
    "the first task's w1": ("static_cast<int64_t>(rows.task) * form.first + row", "static_cast<int64_t>(row)"),
    "a step belongs to two splits": ("(split + 1) / form.splits;", "(split + 2) / form.splits;"),
    "a split is left out": ("part < form.splits;", "part < form.splits - 1;"),
    "added up before all have arrived": ("!= form.splits - 1)", "!= form.splits - 2)"),
    "the splits stay counted": ("if (thread == 0) counts[blockIdx.x] = 0;", ""),
    "the same eight columns twice": ("sum[2 * n + 1], a, b[2], b[3]", "sum[2 * n + 1], a, b[0], b[1]"),
    "the second step in the first one's order": ("k + lane / 8 % 2", "k + 1 - lane / 8 % 2"),
    "units are read before they are there": ("__syncthreads();  // the activated units are there", ""),
}  # fmt: skip


def is_seen(case: Case, mistake: tuple[str, str] | None) -> bool:
    call = build(case)
    wanted = bounds(call, cotangent(case), TensorCoreOracle)
    seeded = None if mistake is None else ("skinny", *mistake)
    for together in (1024, 128):  # threads that run side by side: eight blocks, or one after the other
        try:
            with (
                mock.patch.object(machine, "_LANES_TOGETHER", together),
                on_ptx_machine(),
                products_on_ptx_machine(80, seeded, 3),
            ):
                y = call.run("cuda")
        except AssertionError:  # a fault, or counts that are left
            return True
        if not excess(y, wanted["y"]) <= 1:
            return True
    return False


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_the_source_is_seen(name):
    assert is_seen(OF_MLP if "units" in name else SEEN_BY, MISTAKES[name])


@pytest.mark.parametrize("case", [SEEN_BY, OF_MLP], ids=str)
def test_without_a_mistake_there_is_nothing_to_see(case):
    assert not is_seen(case, None)


def test_pieces_that_are_not_exchanged_cost_wavefronts():
    report = launched(BASE.with_(shape=(128, 512, 8)), 1, ("skinny", "(piece ^ (row", "(piece ^ (0 * row")).report
    assert report.shared_wavefronts > 1.1 * report.shared_ideal_wavefronts


# --- which calls are served ------------------------------------------------------------------------------------------


def test_what_is_too_wide_is_left_to_triton():
    unserved = {
        "rank": BASE.with_(rank=70, generator="none"),
        "rows of w1": BASE.with_(sigma="full", rank=9),
        "numbers of s": MLP.with_(rank=40),
        "too little of x": BASE.with_(shape=(70, 248, 24)),
    }
    for case in unserved.values():
        operands, _, form = captured(case)
        assert not cuda_plans.makes_z(operands, form)
    call = build(unserved["rank"])
    with on_ptx_machine(), triton_on_ptx_machine(80) as of_triton, products_on_ptx_machine() as ours:
        y = call.run("cuda")
    assert [name for name, _ in of_triton] == ["forward_kernel"] and ours == []
    assert excess(y, bounds(call, cotangent(unserved["rank"]), TensorCoreOracle)["y"]) <= 1


def test_the_depth_is_cut_until_a_gpu_is_busy_and_partial_sums_stay_few():
    for tiles, stacked in ((2, 16), (32, 16), (32, 128), (1024, 16)):
        plan = cuda_plans.skinny(tiles, 4096, stacked, 108)
        assert plan.columns >= stacked and 4096 // plan.splits >= max(256, 16 * stacked)
    assert [cuda_plans.skinny(tiles, 4096, 16, 108).splits for tiles in (2, 32, 1024)] == [16, 13, 1]
