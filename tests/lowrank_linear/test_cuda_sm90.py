"""The CUDA kernel for many rows that is for sm_90 alone, without a GPU: when it runs, accesses, seeded mistakes.

Its values are among those of test_cuda_many.py.
"""

from unittest import mock

import pytest
import torch

from tarp_kernels.ops.lowrank_linear import cuda_plans
from tests.lowrank_linear.cases import Case, build, cotangent, run_with_gradients
from tests.lowrank_linear.cuda_runs import needs_nvcc, on_ptx_machine
from tests.lowrank_linear.oracle import TensorCoreOracle, bounds, excess
from tests.lowrank_linear.selected import MODES, check, select
from tests.lowrank_linear.test_cuda import made
from tests.ptx_machine import Deadlock
from tests.ptx_machine import launch as machine

pytestmark = needs_nvcc

BF16, FP16 = torch.bfloat16, torch.float16
BASE = Case(dtype=BF16, shape=(70, 72, 50), rank=5, b1=True, scaling=-6.0)


@pytest.mark.parametrize("case", [BASE, BASE.with_(segments=(30, 0, 40), dtype=FP16, shape=(0, 40, 24))], ids=str)
def test_gradients_follow(case):
    call, dy = build(case), cotangent(case)
    wanted = bounds(call, dy, TensorCoreOracle)
    with on_ptx_machine(90) as launches:
        found = run_with_gradients(call, dy, "cuda")
    assert [launch.plan.sm90 for launch in launches] == [True]
    assert {name for name, value in found.items() if not excess(value, wanted[name]) <= 1} == set()


@pytest.mark.parametrize("mode", MODES)
def test_rows_that_are_read_through_an_index_go_to_the_other_kernel(mode):
    """The copy engine brings neighbouring rows."""
    selected = select(BASE.with_(segments=(0, 100, 60), shape=(0, 40, 24)), "runs", mode)
    with on_ptx_machine(90) as launches:
        check(selected, selected.run("cuda"), TensorCoreOracle)
    assert {launch.plan.sm90 for launch in launches} == {mode == "write"}


def test_the_kernel_is_chosen_by_the_gpu_and_by_what_the_copy_engine_takes():
    x, weight = torch.zeros(1, dtype=BF16).expand(1024, 64), torch.zeros(1024, 64, dtype=BF16)

    def chosen(x=weight, weight=weight, read=None, capability=(9, 0), processors=132, tiles=8):
        plan = cuda_plans.many_rows(tiles, x, weight, read, capability, processors)
        assert plan.tiles == tiles
        return (plan.sm90, plan.columns)

    assert chosen() == (True, 128)
    assert chosen(tiles=33) == (True, 256) and chosen(tiles=32) == (True, 128)
    assert chosen(weight=weight[:1000], tiles=33) == (True, 256)  # the last tile is one too
    assert {chosen(capability=other, tiles=33) for other in [(8, 0), (8, 9), (10, 0), (12, 0)]} == {(False, 128)}
    assert chosen(read=torch.arange(1024)) == (False, 128)
    assert chosen(x=x) == chosen(weight=x) == (False, 128)  # rows that overlap


@pytest.mark.parametrize(("columns", "processors"), [(128, 108), (256, 1)])
def test_x_and_w_are_read_once_for_each_tile_and_y_is_written_once(columns, processors):
    """z, U and b are beside that what their types and places make."""
    case = Case(dtype=BF16, shape=(256, 1024, 256), rank=16, generator="none")
    with on_ptx_machine(90, processors=processors) as launches:
        build(case).run("cuda")
    report, (x, weight, _, z, U, *_, y) = launches[0].report, launches[0].tensors
    fewest = ((x.numel() + z.numel()) * 256 // columns + (weight.numel() + U.numel()) * 2) * 2 // 32
    assert fewest <= report.global_load_sectors <= 1.05 * fewest
    assert report.global_store_sectors == y.numel() * 2 // 32
    # two tiles of rows, all columns, 16 steps over the depth and one over the rank, as instructions of 64 rows
    assert report.wgmma == 2 * 2 * (256 // columns) * (16 + 1) * 4
    assert report.shared_wavefronts == report.shared_ideal_wavefronts


# Two tasks with rows, more steps over the depth than stages, two over the rank, no dimension a multiple of a tile.
SEEN_BY = BASE.with_(
    shape=(0, 504, 140),
    segments=(70, 0, 71),
    rank=70,
    scaling=-0.25,
    seed=2,
    generator="none",
    weight_layout="wide",
    bias=False,
)
WAIT_FULL = "wait_for_phase(full + number % kStages, number / kStages % 2);"
SWIZZLE = "swizzle_mode.shared::cta.b1024.b32 [%0], "
MISTAKES = {
    "a stage is not waited for": (WAIT_FULL, ""),
    "the other phase of a stage": (WAIT_FULL, WAIT_FULL.replace("number / kStages % 2", "(number / kStages + 1) % 2")),
    "the first phase of a stage": (WAIT_FULL, WAIT_FULL.replace("number / kStages % 2", "0")),
    "tiles over a stage that is read": ("wait_until_read(number);\n                arrive", "arrive"),
    "z over a stage that is read": ("wait_until_read(number);\n            for", "for"),
    "the other phase of what is read": ("(number / kStages - 1) % 2", "number / kStages % 2"),
    "the stage after the one that was read": ("read + (number - 1) % kStages", "read + number % kStages"),
    "half of the warps have read": ("read + i, kMultipliers / 32", "read + i, kMultipliers / 64"),
    "half of the bytes are waited for": ("barrier, Stage<kColumns>::kBytes", "barrier, Stage<kColumns>::kBytes / 2"),
    "more bytes are waited for": ("barrier, Stage<kColumns>::kBytes", "barrier, Stage<kColumns>::kBytes + 16"),
    "phases of z before their time": ("sync_warps<kOfBringers, kBringers>();  // all tiles", "// all tiles"),
    "z is read before it is there": ("sync_warps<kOfBringers, kBringers>();  // z and U are there", ""),
    "y over a stage that is read": ("sync_warps<kOfMultipliers, kMultipliers>();  // both", "// both"),
    "y leaves before it is there": ("sync_warps<kOfMultipliers, kMultipliers>();  // y is there", ""),
    "pieces are exchanged over 64 bytes": ("uint64_t{1} << 62", "uint64_t{2} << 62"),
    "pieces are not exchanged by the copy": (SWIZZLE + "3", SWIZZLE + "0"),
    "pieces of z are not exchanged": ("(piece ^ row % 8)", "piece"),
    "groups of eight rows lie closer": ("uint64_t{1024 >> 4} << 32", "uint64_t{512 >> 4} << 32"),
    "steps of eight elements": ("16 * 2 >> 4", "16 >> 4"),
    "both groups take the same rows": ("stage_of(number) + group_row * kDepth", "stage_of(number)"),
    "a row of W too many": ("weight, form.out, form.in", "weight, form.out + 1, form.in"),
    "W goes on in its depth": ("weight, form.out, form.in", "weight, form.out, form.in + 8"),
    "rows of W without their gaps": ("form.in, form.weight_row", "form.in, form.in"),
    "rows in the place of the depth": ("rows.begin, number * kDepth, barrier", "number * kDepth, rows.begin, barrier"),
    "a row of U too many": ("row < (of_z ? count : columns)", "row <= (of_z ? count : columns)"),
    "a row of y too many": ("i < count * kColumns;", "i < (count + 1) * kColumns;"),
    "a step too few": ("const int steps = (form.in + kDepth - 1) / kDepth", "const int steps = form.in / kDepth"),
    "the first task's U": ("static_cast<int64_t>(rows.task) * form.out", "static_cast<int64_t>(0) * form.out"),
    "the first task's x": ("map_of_x, rows.begin", "map_of_x, 0"),
    "tiles cross into the next task": ("min(own.end, begin + height)", "begin + height"),
    "z of the first stage alone": ("steps + (form.rank + kDepth - 1) / kDepth", "steps + 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_the_source_is_seen(name):
    call = made(SEEN_BY)
    wanted = bounds(call, cotangent(SEEN_BY), TensorCoreOracle)
    for together in (1024, 384):
        try:
            with (
                mock.patch.object(machine, "_LANES_TOGETHER", together),
                on_ptx_machine(90, mistake=MISTAKES[name], processors=1),
            ):
                y = call.run("cuda")
        except (AssertionError, Deadlock):
            return
        if not excess(y, wanted["y"]) <= 1:
            return
    pytest.fail("nobody saw it")


def test_without_a_mistake_there_is_nothing_to_see():
    call = made(SEEN_BY)
    with on_ptx_machine(90, processors=1) as launches:
        assert excess(call.run("cuda"), bounds(call, cotangent(SEEN_BY), TensorCoreOracle)["y"]) <= 1
    assert launches[0].plan == (4, 256, True)
