"""The CUDA backend without a GPU: values, memory accesses and seeded mistakes of its PTX, on the PTX machine."""

from collections import Counter
from functools import partial
from unittest import mock

import pytest
import torch

from tarp_kernels import Generator, backends, lowrank_linear, tuning
from tarp_kernels.ops.lowrank_linear import cuda_arguments, cuda_kernels, cuda_plans, triton_plans
from tarp_kernels.ops.lowrank_linear.layout import Selection
from tests.lowrank_linear.cases import Case, build, cotangent, run_with_gradients
from tests.lowrank_linear.cuda_runs import Launch, needs_nvcc, on_ptx_machine
from tests.lowrank_linear.oracle import TensorCoreOracle, bounds, excess
from tests.lowrank_linear.selected import MODES, check, select
from tests.ptx_machine import launch as machine

pytestmark = needs_nvcc

BF16, FP16 = torch.bfloat16, torch.float16
BASE = Case(dtype=BF16, shape=(5, 72, 50), rank=5, b1=True, scaling=-6.0)
MLP = BASE.with_(generator="mlp", b2=True, hidden=7)
WIDE: dict = {"adapter_dtype": torch.float32}

# (case, splits, GPU): every form, activation and count of token tiles; K no multiple of 32, N none of 64
CASES = [
    (BASE, 1, 80),
    (BASE.with_(generator="none", shape=(1, 200, 70), bias=False), 2, 80),
    (BASE.with_(generator="none", sigma="full"), 1, 80),  # which without a generator means nothing
    (BASE.with_(sigma="full", rank=3, activation="tanh", shape=(7, 136, 130)), 3, 90),
    (BASE.with_(dtype=FP16, shape=(8, 520, 64), activation="sigmoid", x_layout="padded"), 5, 80),
    (BASE.with_(segments=(0, 1, 9, 0, 3), activation="softplus", shape=(0, 168, 50), seed=1), 4, 80),
    (MLP.with_(shape=(16, 72, 70), hidden_activation="gelu", activation="none"), 2, 80),
    (MLP.with_(dtype=FP16, shape=(0, 104, 50), segments=(12, 0, 13), hidden_activation="tanh"), 1, 80),
    (MLP.with_(sigma="full", rank=3, shape=(32, 40, 30), hidden_activation="relu", **WIDE), 1, 80),
    (BASE.with_(shape=(33, 72, 66), rank=64, b1=False, activation="none", weight_layout="wide"), 2, 80),
    (BASE.with_(dtype=FP16, shape=(0, 96, 20), segments=(40, 0, 24), sigma="full", rank=2, **WIDE), 3, 80),
    (BASE.with_(shape=(64, 8, 1), rank=1, adapter_layout="transposed"), 1, 80),
    (BASE.with_(shape=(17, 264, 65), generator="none"), 2, 100),
]  # fmt: skip


def made(case: Case):
    """The call of a case; a "wide" weight is a slice whose rows still start at multiples of 16 bytes."""
    if case.weight_layout != "wide":
        return build(case)
    call = build(case.with_(weight_layout="contiguous"))
    columns = call.weight.shape[1]
    target = torch.full((call.weight.shape[0] + 1, columns + 16), float("nan"), dtype=case.dtype)
    return call._replace(weight=target[1:, 8 : 8 + columns].copy_(call.weight))


@pytest.mark.parametrize(("case", "splits", "cc"), CASES, ids=lambda value: str(value))
def test_values_without_a_fault(case, splits, cc):
    """From a start of several stages, and the same bits whether backward is asked to follow or not."""
    call = made(case)
    wanted = bounds(call, cotangent(case), TensorCoreOracle)
    with on_ptx_machine(cc, splits=splits, staged_bytes=16 * 1024) as launches:
        y = call.run("cuda")
        again = call.leaves(("V",)).run("cuda").detach()
    assert excess(y, wanted["y"]) <= 1 and torch.equal(y, again)
    assert [launch.plan.splits for launch in launches] == [splits] * 2 and len(launches) == 2, "one launch a call"
    for launch in launches:
        assert launch.report.mma > 0
        assert launch.report.shared_wavefronts <= 1.1 * launch.report.shared_ideal_wavefronts, (
            launch.report.worst_sites()
        )


# One matrix for the backends of a GPU, and the CPU kernels where they know the dtype.
FORMS = [
    BASE.with_(segments=(0, 4, 3), seed=1),
    MLP.with_(shape=(9, 40, 24)),
    BASE.with_(sigma="full", rank=3, dtype=FP16, activation="tanh", shape=(3, 40, 24)),
    BASE.with_(generator="none", adapter_dtype=torch.float32, shape=(4, 40, 24)),
]


@pytest.mark.parametrize("backend", ["cuda", "triton", "cpu"])
@pytest.mark.parametrize("case", FORMS, ids=str)
def test_values_and_gradients_are_those_of_the_other_backends(case, backend):
    if backend == "cpu" and case.dtype == FP16:
        pytest.skip("the CPU kernels know no float16")
    call, dy = build(case), cotangent(case)
    wanted = bounds(call, dy, TensorCoreOracle)
    with on_ptx_machine(splits=2):
        found = run_with_gradients(call, dy, backend)
    for name, value in found.items():
        assert excess(value, wanted[name]) <= 1, name


def test_what_is_saved_is_what_triton_saves():
    from tarp_kernels.ops.lowrank_linear import autograd
    from tarp_kernels.ops.lowrank_linear.layout import empty_saved

    for case in (MLP.with_(shape=(9, 40, 24), segments=(3, 0, 6)), BASE.with_(sigma="full", rank=3, shape=(5, 40, 24))):
        operands, segments, form = captured(case)
        saved = {}
        for name in ("cuda", "triton"):
            saved[name] = empty_saved(operands, form)
            with on_ptx_machine():
                autograd.kernels(name).forward(operands, segments, form._replace(backend=name), saved[name])
        for found, wanted in zip(saved["cuda"], saved["triton"], strict=True):
            torch.testing.assert_close(found, wanted, atol=2e-2, rtol=2e-2)
            assert found.numel() == 0 or wanted.abs().max() > 0.5


def captured(case: Case):
    """What `autograd.apply` gets in a call of this case."""
    from tarp_kernels.ops.lowrank_linear import autograd

    with mock.patch.object(autograd, "apply", side_effect=lambda *arguments: arguments[0].x) as apply:
        call = build(case)
        lowrank_linear(*call[:6], **call.options, backend="reference")
    return apply.call_args.args


@pytest.mark.parametrize("mode", MODES)
def test_rows_are_read_and_written_through_an_index(mode):
    selected = select(BASE.with_(segments=(0, 4, 9), shape=(0, 40, 24)), "runs", mode)
    with on_ptx_machine(splits=2):
        check(selected, selected.run("cuda"), TensorCoreOracle)


def test_a_row_number_that_is_none_is_clamped():
    """On a GPU nobody looks at them before: they must lead nowhere else."""
    operands, segments, form = captured(BASE)
    with on_ptx_machine():
        for rows in ([-1, 0, 1, 2, 9], [0, 1, 2, 3, 2**40]):
            index = torch.tensor(rows)
            y = torch.zeros(5, 50, dtype=BF16)
            cuda_kernels.forward(operands, segments, form, None, Selection(index, index), y)
            assert y.isfinite().all()


def test_a_number_on_the_gpu_scales_like_one_on_the_host():
    operands, segments, form = captured(BASE)
    with on_ptx_machine():
        wanted = cuda_kernels.forward(operands, segments, form)
        there = form._replace(scaling=torch.tensor(form.scaling, dtype=torch.float64))
        found = cuda_kernels.forward(operands, segments, there)
    assert torch.equal(found, wanted)


def test_the_bits_do_not_depend_on_which_block_arrives_last():
    call = build(BASE.with_(shape=(3, 520, 130)))
    results = []
    for together in (256, 768, 1024, 3072):  # threads that run side by side
        with mock.patch.object(machine, "_LANES_TOGETHER", together), on_ptx_machine(splits=5):
            results.append(call.run("cuda"))
    assert all(torch.equal(results[0], result) for result in results)


# --- memory accesses -------------------------------------------------------------------------------------------------


def least_bytes(launch: Launch, tasks_with_rows: int) -> Counter:
    """What the launch must read and write, by name; rows are whole sectors.

    W, V, w1, b once; U once for each task that has rows; x once for each tile, which is what a block keeps of it; the
    sums h and x w1ᵀ once for each tile of W; partial sums once each way. Of a float32 V or w1 eight numbers of a
    lane are a sector, which two requests of 16 bytes read one after the other.
    """
    t, plan = launch.tensors, launch.plan
    rows, columns = t.x.shape[0], t.weight.shape[0]
    each = {
        name: 0 if tensor is None else tensor.numel() * tensor.element_size() for name, tensor in t._asdict().items()
    }
    tasks = max(1, t.V.shape[0] if t.V.dim() == 3 else 1)
    needed = (plan.first_tiles // tasks) * tasks_with_rows
    dense = plan.tiles - plan.first_tiles
    count = Counter(W=each["weight"], bias=each["bias"], y=each["y"], h=each["h"], s=each["s"], u=each["u"])
    requests = 2 if t.V.dtype == torch.float32 else 1
    count["V, w1"] = requests * (each["V"] + each["w1"]) * tasks_with_rows // tasks
    count["U"] = each["U"] * tasks_with_rows // tasks
    count["x"] = (needed + dense) * each["x"]
    count["middle"] = (dense + 1) * each["middle"]
    count["partials"] = 2 * each["partials"]
    count["b1"] = dense * min(each["b1"], rows * columns)
    return count


MEMORY = [
    BASE.with_(shape=(1, 2048, 256), rank=8, generator="linear"),
    BASE.with_(shape=(4, 1024, 200), rank=16, generator="none", dtype=FP16),
    BASE.with_(shape=(0, 1024, 128), rank=8, segments=(3, 0, 0, 5), b1=False),
    BASE.with_(shape=(40, 512, 128), rank=8, adapter_dtype=torch.float32),
]


def sectors(launch: Launch) -> int:
    """All but those of one thread that looks whether the others have come: how often depends on who runs when."""
    report = launch.report
    waiting = sum(site.actual for site in report.sites.values() if site.text.startswith("ld.acquire"))
    return report.global_load_sectors + report.global_store_sectors - waiting


def accessed(case: Case, mistake: tuple[str, str] | None = None) -> tuple[Launch, float, int]:
    """A launch, its bytes over the fewest that it needs, and the bytes of W; all of whole sectors."""
    lengths = case.lengths or (case.rows,)
    with on_ptx_machine(mistake=mistake) as launches:
        build(case).run("cuda")
    (launch,) = launches
    least = least_bytes(launch, sum(length > 0 for length in lengths))
    once = sum(site.actual for site in launch.report.sites.values() if "no_allocate" in site.text)
    return launch, 32 * sectors(launch) / least.total(), once * 32 - least["V, w1"]


@pytest.mark.parametrize("case", MEMORY, ids=str)
def test_w_is_read_once_and_nothing_much_beside_the_fewest_sectors(case):
    launch, ratio, of_weight = accessed(case)
    assert of_weight == launch.tensors.weight.numel() * 2
    assert ratio <= 1.05, launch.report.worst_sites()


def test_decoding_one_token_costs_little_more_than_every_operand_once():
    launch, _, _ = accessed(MEMORY[0])
    operands = [
        t for name, t in launch.tensors._asdict().items() if t is not None and name not in ("partials", "counts")
    ]
    assert launch.plan.splits > 1
    assert 32 * sectors(launch) <= 1.05 * sum(t.numel() * t.element_size() for t in operands)


# --- seeded mistakes -------------------------------------------------------------------------------------------------

SEEN_BY = BASE.with_(shape=(0, 520, 70), segments=(4, 0, 7), rank=5)
MISTAKES = {
    "x is overwritten while it is read": ("__syncthreads();  // the x of the last stage has been read", ""),
    "x is read before it is there": ("__syncthreads();  // the x of this one is there", ""),
    "sums over x that is still read": ("__syncthreads();  // x has been read", ""),
    "both halves at once": ("__syncthreads();  // the other half's turn", ""),
    "z is read before it is there": ("__syncthreads();  // z is there, and the last task's U has been read", ""),
    "U is read before it is there": ("__syncthreads();  // this task's U is there", ""),
    "one row of W too many": ("row >= rows || !needed", "row > rows || !needed"),
    "one row of x too many": ("inside = token < form.rows && k < depth", "inside = token <= form.rows && k < depth"),
    "x goes on behind its end": ("token < form.rows && k < depth;", "token < form.rows;"),
    "one row of U too many": ("min(kTileRows, form.out - row0)", "min(kTileRows, form.out - row0 + 1)"),
    "a split is left out": ("part < form.splits;", "part < form.splits - 1;"),
    "added up before all have arrived": ("== form.splits - 1;", "== form.splits - 2;"),
    "a chunk belongs to two splits": ("(split + 1) / form.splits * kChunk", "(split + 2) / form.splits * kChunk"),
    "the second step in the first one's order": ("second, of_x.z, of_x.w", "second, of_x.x, of_x.y"),
    "the blocks that are done stay counted": ("counts[0] = counts[1] = counts[2] = 0", "counts[0] = counts[1] = 0"),
    "the splits stay counted": ("if (thread == 0) counts[3 + tile] = 0;", ""),
    "nobody waits for h": ("wait_for(counts + 1, first_tiles);", ""),
    "the task before": ("segments[middle] <= token", "segments[middle] < token"),
    "the rows of all tasks": ("row < rows && tasks_of[token] == task", "row < rows"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_the_source_is_seen(name):
    call = build(SEEN_BY)
    wanted = bounds(call, cotangent(SEEN_BY), TensorCoreOracle)
    for together in (1024, 256):  # threads that run side by side: four blocks, or one after the other
        try:
            with (
                mock.patch.object(machine, "_LANES_TOGETHER", together),
                on_ptx_machine(mistake=MISTAKES[name], splits=3, staged_bytes=4 * 1024),
            ):
                y = call.run("cuda")
        except AssertionError:  # a fault, or counts that are left
            return
        if not excess(y, wanted["y"]) <= 1:
            return
    pytest.fail("nobody saw it")


def test_without_a_mistake_there_is_nothing_to_see():
    call = build(SEEN_BY)
    for together in (1024, 256):
        with (
            mock.patch.object(machine, "_LANES_TOGETHER", together),
            on_ptx_machine(splits=3, staged_bytes=4 * 1024),
        ):
            assert excess(call.run("cuda"), bounds(call, cotangent(SEEN_BY), TensorCoreOracle)["y"]) <= 1


def test_wasteful_accesses_are_seen():
    launch, ratio, _ = accessed(MEMORY[2], ("dense || form.tasks == 1 || segments[task] < segments[task + 1]", "true"))
    assert ratio > 1.05, "V of tasks without rows"
    launch, *_ = accessed(MEMORY[0], ("kPad = 32;", "kPad = 16;"))
    assert launch.report.shared_wavefronts > 1.1 * launch.report.shared_ideal_wavefronts


# --- which calls are served ------------------------------------------------------------------------------------------

REFUSED = {
    "dropout": (BASE.with_(dropout=0.2), "dropout"),
    "K": (BASE.with_(shape=(5, 70, 50)), "multiple of 8"),
    "Conv1D": (BASE.with_(weight_layout="conv1d"), "multiples of 16 bytes"),
    "a slice": (BASE.with_(weight_layout="slice"), "multiples of 16 bytes"),
    "rank": (BASE.with_(rank=65), "rank r = 65"),
    "hidden": (MLP.with_(hidden=65), "m = 65"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_kernel_serves_is_an_error_by_name_and_triton_otherwise(name):
    case, reason = REFUSED[name]
    operands, segments, form = captured(case)
    here = {"cuda": None, "triton": None, "cpu": None, "reference": None}
    device = torch.device("cuda")
    with mock.patch.object(backends, "_WHY_UNAVAILABLE", here):
        cuda = partial(cuda_plans.refusal, operands, segments, form)
        with pytest.raises(backends.NotServed, match=f"backend='cuda'.*{reason}.*backend='triton'"):
            backends.choose("cuda", case.dtype, device, cuda)
        assert backends.choose(None, case.dtype, device, cuda) == "triton"
        with pytest.raises(TypeError, match="float32"):
            backends.choose("cuda", torch.float32, device, cuda)
        with pytest.raises(ValueError, match="no CUDA C.. kernel"):  # of another operator
            backends.choose("cuda", case.dtype, device)
        assert backends.choose(None, case.dtype, device) == "triton"


def test_the_automatic_choice_takes_few_rows_of_a_layer_and_leaves_a_middle_that_outweighs_them():
    layer = BASE.with_(shape=(1, 1024, 64), rank=8)
    outweighs = layer.with_(sigma="full", rank=64, generator="linear", shape=(16, 64, 8))
    with mock.patch.object(backends, "_WHY_UNAVAILABLE", dict.fromkeys(backends.BACKENDS)):
        for case, expected in ((layer, "cuda"), (layer.with_(shape=(64, 1024, 64)), "cuda"), (outweighs, "triton")):
            operands, segments, form = captured(case)
            cuda = partial(cuda_plans.refusal, operands, segments, form)
            assert backends.choose(None, case.dtype, torch.device("cuda"), cuda) == expected
            assert backends.choose("cuda", case.dtype, torch.device("cuda"), cuda) == "cuda"


def test_what_was_measured_and_what_is_forced_go_before_the_estimate():
    case = BASE.with_(shape=(1, 1024, 64), rank=8)
    operands, segments, form = captured(case)
    refused = partial(cuda_plans.refusal, operands, segments, form)
    plan = triton_plans.estimate(tuning.Key("bfloat16", 1024, 64, False, 16, 16, "diag"), 1)
    for backend in tuning.BACKENDS:
        with (
            mock.patch.object(tuning, "has_measured", lambda device: True),
            mock.patch.object(tuning, "measured", lambda *_, b=backend: plan._replace(backend=b)),
        ):
            assert (refused(False) is None) == (backend == "cuda") and refused(True) is None
    with tuning.forced("split"):
        assert "Triton" in refused(False) and refused(True) is None


def test_no_rows_are_no_launch():
    with on_ptx_machine() as launches:
        assert build(BASE.with_(shape=(0, 72, 50))).run("cuda").shape == (0, 50)
    assert launches == []


@pytest.mark.parametrize("processors", [108, 132])
def test_a_plan_fills_the_gpu_and_fits_it(processors):
    for rows in (1, 8, 9, 33, 64):
        for inner, outer in ((1024, 3072), (4096, 4096), (4096, 11008), (8192, 1024), (8, 1), (4104, 72)):
            plan = cuda_plans.few_rows(rows, inner, outer, 64, 64, True, 1, processors)
            assert plan.token_tiles * 8 >= rows and plan.stage % 64 == 0 and plan.stage >= 64
            assert plan.shared_bytes <= 99 * 1024, "of a block, on the GPU with least"
            assert 1 <= plan.splits <= max(1, inner // 256)
            if inner * outer >= 2**23 and rows <= 8:
                slots, blocks = 2 * processors, plan.tiles * plan.splits
                assert blocks / (-(-blocks // slots) * slots) >= 0.8, (rows, inner, outer, plan)


def test_a_compiler_sees_one_opaque_operator():
    """Traced for another backend's sake too: the scaling is no constant, the choice costs no graph break."""
    call = build(BASE)
    tensors = [t.requires_grad_() for t in (call.x, call.V, call.U)]

    def layer(x, V, U, scaling):
        return lowrank_linear(x, call.weight, call.bias, V, U, call.generator, scaling=scaling, backend="cuda")

    with on_ptx_machine():
        wanted = layer(*tensors, -6.0)
        expected = torch.autograd.grad(wanted.sum(), tensors)
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
        found = compiled(*tensors, -6.0)
        gradients = torch.autograd.grad(found.sum(), tensors)
    assert torch.equal(found, wanted)
    for gradient, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, other)


def test_the_generator_of_the_tests_covers_what_the_kernel_knows():
    """Every activation appears among the cases, so that none is proved for nothing."""
    cases = [case for case, _, _ in CASES]
    assert {case.activation for case in cases} == {"none", "one_plus", "sigmoid", "tanh", "softplus"}
    assert {case.hidden_activation for case in cases if case.generator == "mlp"} == {"gelu", "tanh", "relu"}
    assert Generator._field_defaults["hidden_activation"] == "silu" == MLP.hidden_activation


def test_launches_of_a_stream_share_their_counts_and_a_graph_has_its_own(monkeypatch):
    streams, capturing, device = iter((1, 1, 2, 1)), [False], torch.device("cuda", 0)
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *arguments, device, **options: zeros(*arguments, **options))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: mock.Mock(cuda_stream=next(streams)))
    monkeypatch.setattr(cuda_arguments, "_counts", {})
    first, again, other = (cuda_arguments.counts(device, 7) for _ in range(3))
    assert first is again and other is not first and first.numel() >= 7 and not first.any()
    assert cuda_arguments.counts(device, 10**5).numel() >= 10**5, "more tiles than room"
    capturing[0] = True
    graph = cuda_arguments.counts(device, 7)
    assert all(graph is not held for held in cuda_arguments._counts.values())
