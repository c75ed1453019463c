"""The CUDA kernels of `search_cell` without a GPU: values, memory accesses, cuts and seeded mistakes of their PTX."""

from unittest import mock

import pytest
import torch

from tarp_kernels import _C, CellWeights, backends, search_cell_step
from tarp_kernels.ops.search_cell import cuda_kernels, cuda_plans
from tests.lowrank_linear.cuda_runs import needs_nvcc
from tests.search_cell.cases import ALPHAS, PADDING, Case, build, one_hot
from tests.search_cell.cuda_runs import cells_on_ptx_machine
from tests.search_cell.dense import EDGES
from tests.search_cell.test_triton import TOLERANCE as BF16_TOLERANCE
from tests.search_cell.test_triton import deviations
from tests.search_cell.test_values import MISTAKES as WRONG_CELLS

pytestmark = needs_nvcc

BF16, FP16 = torch.bfloat16, torch.float16
# Roundings of float16 are an eighth of those of bfloat16, and a relu that opens by mistake as rare.
TOLERANCES = {BF16: BF16_TOLERANCE, FP16: 0.05}
TOLERANCES_OF_OUT = {BF16: 8e-3, FP16: 1e-3}
BASE = Case(d=24, width=18, batch=(2, 20), dtype=FP16, scale=0.7)
CASES = [
    (BASE, 80),
    (BASE.with_(dtype=BF16, batch=(3, 14), tasks=(14, 28), padding=(("left", 3), ("right", 4), ("left", 0))), 90),
    (BASE.with_(alpha="published", causal=False, norm=True, weights_dtype=torch.float32), 80),
    (BASE.with_(alpha="mixed", width=64, batch=(1, 90), d=136), 80),  # two windows, depth of three stages
    (BASE.with_(batch=None, lengths=(9, 1, 0, 4, 51), tasks=(9, 5, 0, 51), causal=False, norm=True, width=8), 100),
    (BASE.with_(batch=None, lengths=(21,), tasks=(8, 13), width=33, d=72, dtype=BF16), 80),  # tasks cut a sequence
    (BASE.with_(tasks=(11, 0, 22), batch=(3, 11), per_task_weights=False, alpha="published"), 90),
    (BASE.with_(tasks=(11, 0, 22), batch=(3, 11), per_task_alpha=False, width=1, d=8), 80),
    (BASE.with_(alpha="from nothing"), 80),
    (BASE.with_(alpha="none"), 80),
    (BASE.with_(alpha="identity", norm=True), 80),
]  # fmt: skip


def wrong(found, wanted, call) -> dict[str, float]:
    """What is further from `wanted` than roundings of h's dtype make it."""
    dtype = call.tensors["h"].dtype
    most = {name: TOLERANCES_OF_OUT[dtype] if name == "out" else TOLERANCES[dtype] for name in wanted}
    found, wanted = dict(found), dict(wanted)
    zero = {name for name, value in wanted.items() if not value.any() and found[name].any()}
    if "h" in wanted:  # dout goes straight through; what counts is what the cell adds to it
        found["h"], wanted["h"] = (value["h"].double() - call.dout.double() for value in (found, wanted))
    found = deviations(found, wanted, call.tensors["h"])
    return {name: value for name, value in found.items() if not value <= most[name]} | dict.fromkeys(zero, float("inf"))


@pytest.mark.parametrize(("case", "cc"), CASES, ids=str)
def test_values_and_gradients_without_a_fault(case, cc):
    call = build(case)
    with cells_on_ptx_machine(cc) as launches:
        found = call.gradients("cuda")
    assert wrong(found, call.exact(), call) == {}
    sums = [] if case.alpha in ("none", "identity") else ["gradients", "add"]
    assert [launch.name for launch in launches] == ["forward", "backward", *sums]
    for launch in launches:
        report = launch.report
        assert report.atomics == 0 and report.shared_wavefronts <= 1.1 * report.shared_ideal_wavefronts, launch.name


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("name", WRONG_CELLS)
def test_the_tolerances_see_every_wrong_cell(name, dtype):
    call = build(CASES[1][0].with_(dtype=dtype))
    seen = wrong(call.exact(WRONG_CELLS[name]), call.exact(), call).keys()
    assert "out" in seen and len(seen) > 1  # by gradients too


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_the_tolerances_see_zeros(dtype):
    call = build(BASE.with_(dtype=dtype, norm=True))
    wanted = call.exact()
    zeros = {name: torch.zeros_like(value) for name, value in wanted.items()} | {"out": call.tensors["h"]}
    assert wrong(zeros, wanted, call).keys() == wanted.keys()


# --- what a launch does ----------------------------------------------------------------------------------------------

PRODUCT = 64 // 16 * 64 // 8 * 64 // 16  # warp products of 64 x 64 x 64
LARGE = Case(d=256, width=64, batch=(1, 128), dtype=BF16, alpha="published")
TAPS = {0: 0, 1: 0, 2: 1, 3: 2, 4: 3, 5: 5}  # C x C products of an operation


def test_forward_multiplies_for_selected_operations_alone_and_writes_out_alone():
    """Of 128 rows in windows of 64, of which 4 are made for the neighbour: h is read twice, each weight by each."""
    call = build(LARGE)
    with cells_on_ptx_machine(stages=6) as launches:
        call.run("cuda")
    (launch,) = launches
    windows, report = launch.grid[0], launch.report
    taps = sum(TAPS[m] for m in ALPHAS["published"])
    assert windows == 3 and report.mma == windows * PRODUCT * (3 * 256 // 64 + taps)
    row, matrix = 256 * 2 // 32, 64 * 64 * 2 // 32  # sectors
    rows = 64 + 64 + 16 + 128  # of the windows, three of them with four rows more in front, and once more as they leave
    weights = windows * (3 * 64 * 256 * 2 // 32 + taps * matrix)
    assert report.global_store_sectors == 128 * row
    fewest = rows * row + weights
    assert fewest <= report.global_load_sectors <= 1.05 * fewest


def test_backward_multiplies_for_selected_operations_alone():
    """Again forward to n0 and n1, then each map forward and back; without alpha's gradient nothing else."""
    call = build(LARGE)
    with cells_on_ptx_machine() as launches:
        call.gradients("cuda", tuple(name for name in call.tensors if name != "alpha"))
    backward = next(launch for launch in launches if launch.name == "backward")
    taps = [TAPS[m] for m in ALPHAS["published"]]
    each = 2 * 256 // 64 + 256 // 64 + 2 * 256 // 64 + sum(taps[:5]) + 2 * sum(taps)
    assert backward.report.mma == backward.grid[0] * PRODUCT * each
    sums = next(launch for launch in launches if launch.name == "gradients")
    live = sum(taps)
    # tall products of 64 rows for each tap, and one with ones for each map's bias
    maps = sum(m > 1 for m in ALPHAS["published"])
    chunks = sums.grid[0]
    assert sums.report.mma == chunks * (live * PRODUCT + maps * 8 * 4 * 2)
    array = 128 * 64 * 2 // 32
    fewest = 2 * maps * array
    assert fewest <= sums.report.global_load_sectors <= 1.2 * fewest  # eight rows more of each chunk's 64: a test's


def test_only_what_is_asked_for_is_written():
    call = build(LARGE)
    with cells_on_ptx_machine() as launches:
        call.gradients("cuda", ("h",))
    backward = launches[-1]
    assert [launch.name for launch in launches] == ["forward", "backward"]
    assert backward.report.global_store_sectors == 128 * 256 * 2 // 32


# --- windows ---------------------------------------------------------------------------------------------------------


def longest(node: int, chosen: tuple[int, ...], every: bool) -> int:
    """The most rows back that out, or with `every` any operation of a row that counts, sees of a node (s0 to n2)."""
    found = 4 if every and node < 4 else 0
    for operation, (reader, source) in zip(chosen, EDGES, strict=True):
        if source == node and operation:
            found = max(found, {4: 2, 5: 4}.get(operation, 0) + longest(reader + 2, chosen, every))
    return found


@pytest.mark.parametrize("every", [False, True])
@pytest.mark.parametrize("name", ALPHAS)
def test_the_halo_is_the_longest_chain(name, every):
    chosen = ALPHAS[name]
    wanted = max(longest(node, chosen, every) for node in range(5))
    assert cuda_plans.halo(one_hot(chosen).tolist(), every) == wanted
    if not every:
        known = {"published": 4, "conv5": 12, "conv3": 6, "identity": 0, "none": 0}
        assert wanted == known.get(name, wanted)


def halo_and(extra: int):
    """The halo, and that many rows more."""
    right = cuda_plans.halo
    return mock.patch.object(cuda_plans, "halo", lambda alpha, every: right(alpha, every) + extra)


CUT = Case(d=16, width=8, batch=(1, 140), dtype=FP16, alpha="conv5", scale=0.7)


@pytest.mark.parametrize("causal", [True, False])
def test_nobody_sees_the_cuts_nor_how_many_tiles_are_on_their_way(causal):
    """To the bit, out and what flows back row by row; sums over windows are other sums, of the same size."""
    call = build(CUT.with_(causal=causal))
    names = ("h", "alpha", "conv5")
    with cells_on_ptx_machine(stages=2):
        found = call.gradients("cuda", names)
    assert wrong(found, {name: call.exact()[name] for name in found}, call) == {}
    with halo_and(6), cells_on_ptx_machine(stages=8):
        other = call.gradients("cuda", names)
    assert torch.equal(found["out"], other["out"]) and torch.equal(found["h"], other["h"])
    assert torch.equal(found["conv5"], other["conv5"])  # by chunks, which no halo moves
    torch.testing.assert_close(found["alpha"], other["alpha"])


# Rows too few in front, or behind. In a cell that looks on both sides a gradient sees the farther half of its tokens
# through gates and the signs of relus alone, of which roundings leave nothing.
MISSING = {(True, "out"): -1, (True, "h"): -1, (False, "out"): -2, (False, "h"): -6}


@pytest.mark.parametrize(("causal", "name"), MISSING)
def test_a_missing_row_of_the_halo_is_seen(causal, name):
    call = build(CUT.with_(causal=causal, alpha="soft" if name == "h" else "conv5", scale=1.5))
    call.tensors["conv5"].abs_()[:, slice(1, None) if name == "out" else slice(1, 4)] = 0  # the farthest tokens alone
    names, results = ("h",) if name == "h" else (), []
    for extra in (0, 2, MISSING[causal, name]):
        with halo_and(extra), cells_on_ptx_machine():
            results.append(call.gradients("cuda", names)[name])
    right, more, missing = results
    assert torch.equal(more, right) and not torch.equal(missing, right)


def test_the_future_moves_no_bit():
    call = build(CUT.with_(batch=(2, 40), alpha="soft"))
    with cells_on_ptx_machine():
        before = call.run("cuda")
        for t in (0, 7, 38):
            h = call.tensors["h"].clone()
            h[:, t + 1 :] = float("nan")
            after = call.run("cuda", h=h)
            assert torch.equal(after[:, : t + 1], before[:, : t + 1]) and after[:, t + 1 :].isnan().all()


@pytest.mark.parametrize("causal", [True, False])
def test_a_ragged_batch_of_tasks_equals_its_sequences_one_by_one(causal):
    call = build(CUT.with_(batch=None, lengths=(9, 1, 17, 62, 2), tasks=(10, 81), causal=causal, alpha="soft"))
    with cells_on_ptx_machine():
        whole = call.run("cuda")
        for rows, task in call.pieces:
            one = {name: tensor[task] for name, tensor in call.tensors.items() if name != "h"}
            alone = call._replace(options={"causal": causal}).run("cuda", h=call.tensors["h"][rows], **one)
            assert torch.equal(alone, whole[rows])


def test_padding_is_as_if_it_were_not_there():
    call = build(CUT.with_(batch=(3, 11), padding=PADDING, norm=True, alpha="mixed"))
    mask = call.options["attention_mask"].bool()
    h = call.tensors["h"].clone()
    h[~mask] = float("nan")
    with cells_on_ptx_machine():
        out = call.run("cuda")
        assert torch.equal(out[~mask], call.tensors["h"][~mask]) and torch.equal(call.run("cuda", h=h)[mask], out[mask])


def test_weights_may_have_any_strides():
    """As a convolution's own weights have, seen as taps."""
    call = build(BASE)
    wanted = call.exact()
    for name in ("linear", "glu", "conv3", "conv5", "project", "output"):
        tensor = call.tensors[name]
        call.tensors[name] = (
            tensor.movedim(-3 if tensor.dim() > 2 else 0, -1).contiguous().movedim(-1, -3 if tensor.dim() > 2 else 0)
        )
        assert not call.tensors[name].is_contiguous()
    with cells_on_ptx_machine():
        assert wrong(call.gradients("cuda"), wanted, call) == {}


def test_operations_that_nobody_selected_may_hold_anything():
    """NaN in their weights touches no gradient but alpha's."""
    call = build(BASE.with_(alpha="mixed"))
    wanted = call.exact()
    for name, operation in (("linear", 2), ("glu", 3), ("conv3", 4), ("conv5", 5)):
        for edge, own in enumerate(ALPHAS["mixed"]):
            if own != operation:
                call.tensors[name][edge] = call.tensors[f"{name}_bias"][edge] = float("nan")
    with cells_on_ptx_machine():
        found = call.gradients("cuda")
    del found["alpha"], wanted["alpha"]
    assert wrong(found, wanted, call) == {}


@pytest.mark.parametrize("batch", [(2, 0), (0, 5)])
def test_no_rows(batch):
    call = build(BASE.with_(batch=batch))
    with cells_on_ptx_machine() as launches:
        found = call.gradients("cuda")
    assert launches == [] and all(not value.any() for value in found.values())


# --- which calls there are kernels for -------------------------------------------------------------------------------


@pytest.mark.parametrize(("change", "why"), [({"d": 20}, "d a multiple of 8"), ({"width": 65}, "at most 64")])
def test_a_call_without_a_kernel_says_why(change, why):
    call = build(BASE.with_(**change))
    with mock.patch.object(backends, "_WHY_UNAVAILABLE", dict.fromkeys(backends.BACKENDS)):
        with mock.patch.object(backends, "_require_fit"), pytest.raises(backends.NotServed, match=why):
            call.run("cuda")


def test_a_step_with_a_state_says_why():
    call = build(BASE)
    tensors = {name: tensor for name, tensor in call.tensors.items() if name not in ("h", "alpha")}
    with mock.patch.object(backends, "_WHY_UNAVAILABLE", dict.fromkeys(backends.BACKENDS)):
        with mock.patch.object(backends, "_require_fit"), pytest.raises(backends.NotServed, match="no state"):
            search_cell_step(call.tensors["h"], CellWeights(**tensors), call.tensors["alpha"], backend="cuda")


@pytest.mark.skipif(not hasattr(_C, "search_cell_cuda_forward"), reason="the extension was built without CUDA kernels")
def test_the_extension_takes_what_python_hands_over():
    """As far as CUDA itself, which has no GPU here and elsewhere refuses a launch of no blocks."""
    handed = []
    with cells_on_ptx_machine():
        run = cuda_kernels.launch

        def launch(name, dtype, grid, shared_bytes, tensors, *others):
            handed.append((name, grid, shared_bytes, len(tensors), others))
            run(name, dtype, grid, shared_bytes, tensors, *others)

        with mock.patch.object(cuda_kernels, "launch", launch):
            build(BASE).gradients("cuda")
    assert [name for name, *_ in handed] == ["forward", "backward", "gradients", "add"]
    for name, grid, shared_bytes, tensors, others in handed:
        with pytest.raises(RuntimeError, match="backend='cuda'"):
            start = getattr(_C, f"search_cell_cuda_{name}")
            start((0, 0, True, 0, shared_bytes), [0] * tensors, *grid[1:], *others)
