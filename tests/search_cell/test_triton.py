"""`search_cell` in Triton without a GPU: logic interpreted, PTX executed, binaries inspected, launches counted."""

import re
from pathlib import Path

import pytest
import torch

from tests import interpreting
from tests.lowrank_linear.triton_runs import compiling, on_ptx_machine
from tests.search_cell.cases import TOLERANCE, Case, build, deviations
from tests.search_cell.test_step import by_chunks
from tests.search_cell.test_values import MISTAKES

BF16 = Case(d=24, width=18, batch=(2, 20), dtype=torch.bfloat16, scale=0.7)
FORMS = [
    BF16.with_(batch=(3, 14), tasks=(14, 28), padding=(("left", 3), ("right", 4), ("left", 0))),
    BF16.with_(alpha="published", causal=False, norm=True, weights_dtype=torch.float32),
]


def test_in_the_interpreter():
    done = interpreting.run(Path(__file__).with_name("interpreted.py"))
    assert done.returncode == 0 and int(re.findall(r"(\d+) passed", done.stdout)[0]) >= 75, done.stdout[-4000:]


@pytest.mark.parametrize("cc", [80, 90])
@pytest.mark.parametrize("case", FORMS, ids=str)
def test_ptx_computes_values_and_gradients_without_a_fault(cc, case):
    call = build(case)
    with on_ptx_machine(cc) as reports:
        found = call.gradients("triton")
    wrong = {n: d for n, d in deviations(found, call.exact(), call.tensors["h"]).items() if not d < TOLERANCE}
    assert wrong == {}
    assert all(report.atomics == 0 for _, report in reports)
    launches = [name for name, _ in reports]
    assert launches[:5] == ["entry_kernel", *["node_kernel"] * 3, "exit_kernel"]


@pytest.mark.parametrize("cc", [80, 90])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_ptx_steps_have_the_bits_of_the_whole(cc, dtype):
    """However the sequences are cut, without a fault, in one launch more; and not without the state."""
    call = build(FORMS[0].with_(dtype=dtype))
    with on_ptx_machine(cc) as reports:
        whole = call.run("triton")
        at_once = len(reports)
        assert torch.equal(by_chunks(call, (5, 1, 0, 1, 7), backend="triton"), whole)
        assert len(reports) == at_once + 4 * (at_once + 1)
        assert not torch.equal(by_chunks(call, (5, 9), forget=True, backend="triton"), whole)
    assert all(report.atomics == 0 for _, report in reports)


NOT_IN_THE_SECOND_FORM = {"gate dropped", "another task's cell"}  # one task, no glu


@pytest.mark.parametrize("case", FORMS, ids=str)
@pytest.mark.parametrize("name", MISTAKES)
def test_the_tolerance_sees_every_mistake(name, case):
    call = build(case)
    seen = deviations(call.exact(MISTAKES[name]), call.exact(), call.tensors["h"])
    if case is FORMS[0] or name not in NOT_IN_THE_SECOND_FORM:
        assert max(seen.values()) > TOLERANCE, seen


# Registers of a thread at C = 64: two blocks of 256 threads fit a multiprocessor below 128.
REGISTERS = {"entry": 80, "node": 152, "exit": 80, "node_backward": 152, "input_backward": 112, "matrix_gradient": 128}


@pytest.mark.parametrize("cc", [80, 90, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width", [64, 128])
def test_binaries_spill_nothing_and_use_tensor_cores(cc, dtype, width):
    case = Case(d=128, width=width, batch=(2, 40), tasks=(40, 40), norm=True, dtype=dtype, alpha="published")
    other = build(case.with_(tasks=None, norm=False, causal=False))
    with compiling(cc) as kernels:
        build(case).gradients("triton")
        other.gradients("triton", tuple(name for name in other.tensors if name != "alpha"))
        by_chunks(build(case), (40,), backend="triton")
    own = [kernel for kernel in kernels if not kernel.name.startswith(("tall", "add", "skinny", "dense"))]
    assert {kernel.name.removesuffix("_kernel") for kernel in own} == {*REGISTERS, "state"}
    for kernel in own:
        assert kernel.stack_bytes == 0 and not kernel.count(r"\b(ld|st)\.local"), kernel[2:]
        assert kernel.registers <= (REGISTERS | {"state": 64} if width == 64 else {}).get(kernel.name[:-7], 255), kernel
        assert kernel.shared_bytes <= 163 * 1024
        if dtype == torch.bfloat16 and kernel.name != "state_kernel":
            assert kernel.count(r"mma\.sync|wgmma\.mma_async|tcgen05\.mma"), kernel.name


# Warp instructions of a node's C x C product for a tile of 32 rows at C = 64, 64 of them on tensor cores.
BUDGETS = {"node": 1250, "node_backward": 1250, "input_backward": 850}


@pytest.mark.parametrize("cc", [80, 90])
def test_a_product_costs_few_instructions(cc):
    """None on a tensor core twice; what all five-tap edges cost beside none, in forward and backward, by product."""
    issued, multiplied = {}, {}
    for alpha in ("none", "conv5"):
        call = build(Case(d=64, width=64, batch=(1, 32), dtype=torch.bfloat16, alpha=alpha))
        with on_ptx_machine(cc) as reports:
            call.gradients("triton", ("h",))
        for kernel in BUDGETS:
            own = [report for name, report in reports if name == f"{kernel}_kernel"]
            issued[kernel, alpha] = sum(report.warp_instructions for report in own)
            multiplied[kernel, alpha] = sum(report.mma for report in own)
            assert all(report.shared_wavefronts == report.shared_ideal_wavefronts for report in own)
    for kernel, budget in BUDGETS.items():
        assert multiplied[kernel, "none"] == 0 and multiplied[kernel, "conv5"] == 45 * (32 // 16) * (64 // 8) * (
            64 // 16
        )
        each = (issued[kernel, "conv5"] - issued[kernel, "none"]) / 45
        assert each <= budget, (kernel, each)


def test_neither_rows_nor_tasks_nor_alpha_compile_anything_anew():
    sources = set()
    for case in (
        BF16.with_(tasks=(20, 20), alpha="published"),
        BF16.with_(tasks=(20, 20, 20), batch=(3, 20), alpha="mixed"),
        BF16.with_(tasks=(7, 7), batch=(2, 7), alpha="conv5"),
    ):
        with compiling(80) as kernels:
            build(case).run("triton")
        sources.add(tuple(kernel.ptx for kernel in kernels))
    assert len(sources) == 1


def test_only_selected_operations_are_multiplied():
    """Tensor-core instructions of the node kernels: one product a tap and edge, none for none and identity."""
    counts = {}
    for alpha in ("none", "identity", "linear", "glu", "conv3", "conv5", "published"):
        with on_ptx_machine(80) as reports:
            build(BF16.with_(width=16, alpha=alpha)).run("triton")
        counts[alpha] = sum(report.mma for name, report in reports if name == "node_kernel")
    one = counts["linear"] // 9
    assert counts["none"] == counts["identity"] == 0 and one > 0
    assert (counts["conv3"], counts["conv5"], counts["published"]) == (27 * one, 45 * one, 23 * one)
    assert 18 * one <= counts["glu"] <= 36 * one  # on a tile this narrow warps repeat each other's products
