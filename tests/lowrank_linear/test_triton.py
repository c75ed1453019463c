"""The Triton backend on machines without a GPU: its logic interpreted, its PTX executed, its binaries inspected."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
import triton
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._higher_order_ops.triton_kernel_wrap import triton_kernel_wrapper_functional
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from tarp_kernels import backends, tuning
from tarp_kernels.ops.lowrank_linear import triton_kernels, triton_plans, triton_products
from tarp_kernels.ops.lowrank_linear.contract import Form, Operands
from tarp_kernels.tuning import Plan, Tile
from tests import interpreting
from tests.lowrank_linear import mutants
from tests.lowrank_linear.cases import Call, Case, build, cotangent, run_with_gradients
from tests.lowrank_linear.oracle import TensorCoreOracle, bounds, excess
from tests.lowrank_linear.test_second_order import directions_of, exact_and_bounds, second_order
from tests.lowrank_linear.test_second_order import mutants as second_order_mutants
from tests.lowrank_linear.triton_runs import compiling, on_ptx_machine
from tests.ptx_machine import run_triton

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


INTERPRETED = Path(__file__).with_name("interpreted.py")


def test_in_the_interpreter():
    done = interpreting.run(INTERPRETED)
    assert done.returncode == 0 and int(re.findall(r"(\d+) passed", done.stdout)[0]) >= 40, done.stdout[-4000:]


@pytest.mark.proof
def test_every_form_in_the_interpreter():
    done = interpreting.run(INTERPRETED, "-m", "proof")
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.mark.parametrize("cc", ARCHITECTURES)
@pytest.mark.parametrize("case", FORMS, ids=str)
def test_ptx_computes_values_and_gradients_without_a_fault(cc, case):
    call, dy = build(case), cotangent(case)
    wanted = bounds(call, dy, TensorCoreOracle)
    with on_ptx_machine(cc) as reports:
        with tuning.forced("split"):
            found = run_with_gradients(call, dy, "triton")
        with tuning.forced("one_pass"):
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


@pytest.mark.proof
@pytest.mark.parametrize("cc", [80, 90, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rows", [16, 64, 256])
@pytest.mark.parametrize("rank", [16, 64])
def test_every_shipped_plan_spills_nothing(cc, dtype, rows, rank):
    for case in (
        Case(dtype=dtype, shape=(rows, 256, 192), rank=rank),
        Case(
            dtype=dtype, shape=(rows, 250, 190), rank=rank, segments=(rows - 7, 7), dropout=0.3, weight_layout="conv1d"
        ),
    ):
        for plan in plans_of(case):
            with compiling(cc) as kernels, tuning.forced(plan):
                build(case).run("triton")
            for kernel in kernels:
                assert kernel.stack_bytes == 0 and kernel.registers <= 255, (kernel.name, plan)
                assert kernel.shared_bytes <= SHARED_BYTES[cc], (kernel.name, plan)


@pytest.mark.proof
@pytest.mark.parametrize("cc", ARCHITECTURES)
@pytest.mark.parametrize("rows", [13, 50, 130])
def test_every_shipped_plan_computes_values_without_a_fault(cc, rows):
    case = Case(dtype=torch.bfloat16, shape=(rows, 136, 104), rank=16, segments=(rows - 9, 0, 9), scaling=-6.0)
    call, dy = build(case), cotangent(case)
    wanted = bounds(call, dy, TensorCoreOracle)
    for plan in plans_of(case):
        with on_ptx_machine(cc), tuning.forced(plan):
            found = run_with_gradients(call, dy, "triton")
        for name, value in found.items():
            assert excess(value, wanted[name]) <= 1, (name, plan)


def plans_of(case: Case) -> list[Plan]:
    """What tuning would measure for a call."""
    call = build(case)
    operands = Operands(call.x, call.weight, call.bias, call.V, call.U, *(call.generator or (None,) * 4)[:4])
    dropout = case.dropout or 0.0
    form = Form(call.sigma, "silu", case.activation, "one_plus", 1.0, dropout, 0, "triton")
    key = triton_plans.key_of(operands, triton_plans.Middle(operands, form), call.segments, form)
    return triton_plans.candidates(key, case.rows)


@pytest.mark.parametrize("cc", [80, 90, 100])
@pytest.mark.parametrize("case", FORMS, ids=str)
def test_binaries_spill_nothing_and_use_tensor_cores(cc, case):
    with compiling(cc) as kernels:
        for variant in tuning.VARIANTS:
            with tuning.forced(variant):
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


def test_launches_overlap_from_hopper_on():
    """The dense kernel waits for the kernel that makes its z, and only after its own product."""
    for cc, programmatic in ((80, False), (90, True), (100, True)):
        with compiling(cc) as kernels, tuning.forced("split"):
            run_with_gradients(build(FORMS[1]), cotangent(FORMS[1]), "triton")
        starts = [kernel.name for kernel in kernels if kernel.count(r"griddepcontrol\.launch_dependents")]
        waits = [kernel for kernel in kernels if kernel.count(r"griddepcontrol\.wait")]
        assert starts == (["forward_kernel", "middle_backward_kernel"] if programmatic else [])
        assert [kernel.name for kernel in waits] == (["dense_kernel"] * 2 if programmatic else [])
        for kernel in waits:
            before, after = kernel.ptx.split("griddepcontrol.wait")
            assert all(re.search(r"mma\.sync|wgmma\.mma_async|tcgen05\.mma", half) for half in (before, after))


EVEN = BF16.with_(shape=(37, 72, 56), rank=16)  # rows of whole 16 bytes, which the copy engine needs
BULK = Plan("split", Tile(16, 16, 32), Tile(64, 64, 64, warps=4, bulk=1))


@pytest.mark.parametrize(
    "case",
    [
        EVEN.with_(weight_layout="conv1d", dropout=0.3),
        EVEN.with_(segments=(0, 1, 19, 0, 17)),
        EVEN.with_(rank=5, generator="none"),
    ],
    ids=str,
)
def test_tiles_that_the_copy_engine_brings_are_right(case):
    call, dy = build(case), cotangent(case)
    wanted = bounds(call, dy, TensorCoreOracle)
    with on_ptx_machine(90) as reports, tuning.forced(BULK):
        found = run_with_gradients(call, dy, "triton")
    for name, value in found.items():
        assert excess(value, wanted[name]) <= 1, name
    copied = [report for name, report in reports if name == "dense_kernel" and report.instructions.get("mbarrier")]
    assert len(copied) == 2, "the copy engine did not run"


def test_layouts_that_the_copy_engine_cannot_read_are_loaded_by_threads():
    with compiling(90) as kernels, tuning.forced(BULK):
        for case in (EVEN.with_(shape=(37, 72, 50)), EVEN.with_(shape=(37, 70, 56))):
            build(case).run("triton")
    dense = [kernel for kernel in kernels if kernel.name == "dense_kernel"]
    assert [kernel.count(r"cp\.async\.bulk\.tensor") > 0 for kernel in dense] == [True, False]


# --- under a compiler, and a second time ------------------------------------------------------------------------------


@contextlib.contextmanager
def compiled_launches_on_ptx_machine() -> Iterator[list[str]]:
    """Launches that a compiled graph makes, which go past `triton_products.launch`: the names of their kernels."""
    ran: list[str] = []

    def run(kernel, *arguments, grid, warmup, **constants):
        run_triton(kernel, grid, *arguments, cc=80, **constants).raise_on_faults()
        ran.append(kernel.__name__)

    gpu = mock.Mock(get_current_target=lambda: GPUTarget("cuda", 80, 32))
    with (
        mock.patch.object(backends, "choose", lambda *_: "triton"),
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(triton.runtime.driver, "_active", gpu),
    ):
        yield ran


def test_a_compiler_sees_the_launches_and_compiles_once_for_a_bucket_of_rows():
    """And once for all scalings, without a break; AOTAutograd has recorded the launches one by one."""
    torch._dynamo.reset()
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return make_boxed_func(graph)

    def call_with_scaling(call: Call, tensors: list[torch.Tensor], scaling: float) -> torch.Tensor:
        return call.with_tensors(dict(zip(call.tensors, tensors, strict=True)))._replace(scaling=scaling).run("triton")

    compiled = torch.compile(call_with_scaling, backend=aot_autograd(fw_compiler=keep), fullgraph=True, dynamic=True)
    with compiled_launches_on_ptx_machine() as ran:
        for rows, scaling in ((20, 2.0), (37, 0.5), (63, -1.0)):
            case = BF16.with_(shape=(rows, 72, 50), scaling=scaling)
            call, dy = build(case).leaves(), cotangent(case)
            y = compiled(call, list(call.tensors.values()), scaling)
            found = dict(zip(call.tensors, torch.autograd.grad(y, list(call.tensors.values()), dy), strict=True))
            wanted = bounds(build(case), dy, TensorCoreOracle)
            for name, value in ({"y": y.detach()} | found).items():
                assert excess(value, wanted[name]) <= 1, f"{name}, {rows} rows"
            assert ran[:2] == ["forward_kernel", "middle_backward_kernel"] and "tall_kernel" in ran
            ran.clear()
    assert len(graphs) == 2, "one forward, one backward"
    launches = [n for graph in graphs for n in graph.graph.nodes if n.target is triton_kernel_wrapper_functional]
    assert len(launches) >= 5
    torch._dynamo.reset()


def test_tasks_under_a_compiler():
    """Offsets are an input of the graph that no launch may seem to write to."""
    torch._dynamo.reset()
    case = BF16.with_(segments=(20, 17))
    call, dy = build(case).leaves(), cotangent(case)
    compiled = torch.compile(lambda call: call.run("triton"), backend="aot_eager", fullgraph=True)
    with compiled_launches_on_ptx_machine():
        y = compiled(call)
        found = dict(zip(call.tensors, torch.autograd.grad(y, list(call.tensors.values()), dy), strict=True))
    wanted = bounds(build(case), dy, TensorCoreOracle)
    for name, value in ({"y": y.detach()} | found).items():
        assert excess(value, wanted[name]) <= 1, name
    torch._dynamo.reset()


@pytest.mark.parametrize("cc", ARCHITECTURES)
def test_second_order_gradients_run_on_the_same_kernels(cc):
    case = BF16.with_(
        segments=(5, 0, 12), generator="mlp", activation="tanh", dropout=0.3, hidden=6, shape=(17, 24, 20)
    )
    call, dy = build(case), cotangent(case)
    directions = directions_of(case, call)
    exact, _ = exact_and_bounds(case)
    with on_ptx_machine(cc) as reports:
        found = second_order(call, dy, directions, lambda c: c.run("triton"))
    assert {name for name, _ in reports} >= {"skinny_kernel", "dense_kernel", "tall_kernel", "add_parts_kernel"}
    assert all(report.atomics == 0 for _, report in reports)
    deviations = {name: relative(found[name], wanted) for name, wanted in exact.items() if wanted is not None}
    assert max(deviations.values()) < SECOND_ORDER_TOLERANCE, deviations
    for name, run, changed, outputs in second_order_mutants(case):
        wrong = dict.fromkeys(exact)
        if run is not None:
            wrong = second_order(changed, dy.double(), {n: d.double() for n, d in directions.items()}, run)
        seen = {n: relative(wrong[n], exact[n]) for n in outputs.split() if exact.get(n) is not None}
        assert min(seen.values()) > SECOND_ORDER_TOLERANCE, name


# Roundings to bfloat16, 2⁻⁹ each on average less, of every factor along a chain of six products.
SECOND_ORDER_TOLERANCE = 0.02


def relative(found: torch.Tensor | None, wanted: torch.Tensor) -> float:
    return 1.0 if found is None else ((found.double() - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize(("wanted", "products"), [(("U",), 0), (("V",), 1), (("U", "V", "w1"), 1), (("x",), 2)])
def test_backward_multiplies_for_wanted_gradients_only(wanted, products):
    """dz = dy U is for all but U, dx for x alone; sums over rows come by tall_kernel."""
    with compiling(80) as kernels:
        run_with_gradients(build(BF16), cotangent(BF16), "triton", wanted)
    backward = [kernel for kernel in kernels[1:] if kernel.name in ("middle_backward_kernel", "dense_kernel")]
    assert sum(kernel.count(r"mma\.sync") > 0 for kernel in backward) == products
    assert sum(kernel.name == "tall_kernel" for kernel in kernels) == len({"U", "V"} & set(wanted))


def test_float32_is_multiplied_as_torch_says():
    from torch.backends.cuda import matmul

    before = matmul.fp32_precision
    try:
        for setting, exact in (("ieee", True), ("tf32", False)):
            matmul.fp32_precision = setting
            with compiling(80) as kernels:
                build(BF16.with_(dtype=torch.float32)).run("triton")
            assert (kernels[0].count(r"mma\.sync.*tf32") == 0) == exact
    finally:
        matmul.fp32_precision = before


# --- what the adapter costs -------------------------------------------------------------------------------------------

WIDE = Case(dtype=torch.bfloat16, shape=(256, 1024, 1024), rank=16, bias=False)
# Warp instructions of the dense kernel, and of both kernels, beside the dense kernel without adapter.
BUDGETS = {80: (1.01, 1.10), 90: (1.04, 1.10)}


@pytest.mark.parametrize("cc", ARCHITECTURES)
def test_the_adapter_costs_a_few_instructions_and_no_traffic(cc):
    call = build(WIDE)
    operands = Operands(call.x, call.weight, None, call.V, call.U, *call.generator[:4])
    plain = torch.empty(256, 1024, dtype=torch.bfloat16)
    form = Form("diag", "silu", "one_plus", "one_plus", 1.5, 0.0, 0, "triton")
    with on_ptx_machine(cc) as reports:
        triton_kernels.forward(operands, None, form)
        nothing, rows = torch.empty(256, 0, dtype=torch.bfloat16), triton_products.Rows(call.x, None)
        middle = triton_plans.Middle(operands, form)
        tile = triton_plans.estimate(triton_plans.key_of(operands, middle, None, form), 256).dense
        triton_products.dense(rows, call.x, call.weight, None, nothing, call.U, plain, tile)
    (_, skinny), (_, dense), (_, bare) = reports
    alone, both = BUDGETS[cc]
    issued = [sum(report.instructions.values()) for report in (skinny, dense, bare)]
    assert issued[1] <= alone * issued[2]
    assert issued[0] + issued[1] <= both * issued[2]
    tiles = 256 // 128 * (1024 // 128)
    operand_bytes = tiles * 2 * (128 * 16 + 128 * 16)  # a tile of z and a tile of U
    assert 32 * (dense.global_load_sectors - bare.global_load_sectors) <= operand_bytes
    with compiling(cc) as kernels:
        triton_kernels.forward(operands, None, form)
    assert all(kernel.count(r"cp\.async") for kernel in kernels), "loads do not overlap with products"
    assert dense.shared_wavefronts == dense.shared_ideal_wavefronts
    if cc == 90:
        faster = Plan("split", Tile(64, 16, 128), Tile(128, 128, 64, warps=8, bulk=1))
        with on_ptx_machine(cc) as reports, tuning.forced(faster):
            triton_kernels.forward(operands, None, form)
        bulk = [sum(report.instructions.values()) for _, report in reports]
        assert sum(bulk) <= 0.72 * (issued[0] + issued[1]), "whole tiles by the copy engine take fewer instructions"
    if cc == 80:
        steps = tiles * (1024 // 16 + 1)  # k-steps of 16, and one more for the adapter
        assert dense.mma <= steps * (128 // 16) * (128 // 8)
    else:
        assert dense.wgmma == bare.wgmma * (1024 // 16 + 1) // (1024 // 16)
