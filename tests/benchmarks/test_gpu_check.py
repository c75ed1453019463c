"""The parts of benchmarks/gpu_check.py that need no GPU."""

import contextlib
import functools
import json
import time
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from rich.console import Console

from benchmarks import cell_check, gpu_check, measuring, sublayer_check
from tarp_kernels import _C, available_backends, backends
from tarp_kernels.backends import NotServed
from tarp_kernels.ops import row_copies
from tarp_kernels.ops.lowrank_linear import cuda_kernels, cuda_plans, triton_products

CPU = torch.device("cpu")
pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif("cpu" not in available_backends(), reason="the native backend is not built"),
]
needs_cuda = pytest.mark.skipif(not measuring.cuda_entries(), reason="the extension was built without CUDA kernels")
BFLOAT16 = gpu_check.TOLERANCE[torch.bfloat16]


def test_a_run_without_a_gpu_writes_results_and_a_picture_and_says_what_is_missing(tmp_path):
    assert gpu_check.run(tmp_path, CPU, 8.0, Console(quiet=True)) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert all(row["ok"] for row in results["correctness"]) and len(results["correctness"]) >= 100
    assert all(row["ok"] for row in results["search cell"]) and len(results["search cell"]) >= 80
    assert {row["contender"] for row in results["search cell speed"]} >= {"mixture", "masked", "step"}
    assert all(row["ok"] for row in results["masked sublayer"]) and len(results["masked sublayer"]) == 20
    assert results["served"]["lowrank_linear"]["cpu"] == {"served": counted(results, "lowrank_linear"), "not served": 0}
    assert set(results["served"]) == {*OPERATORS, "masked_sublayer", "lowrank_linear, second order"}
    assert not any(results["launches"].values())
    assert results["second order"]["ok"] and results["facts"]["device"] == "CPU"
    assert {part.partition(":")[0] for part in results["left out"]} == {"graph", "memory", "tuning"}
    for kind in ("forward", "forward+backward"):
        timed = {row["contender"] for row in results["speed"] if row["kind"] == kind}
        assert timed >= {"linear", "tarp", "unfused", "cpu"}
    assert (tmp_path / "grid-r4.png").stat().st_size > 10_000


OPERATORS = ("lowrank_linear", "hadamard_linear", "search_cell", "search_cell_step")


def counted(results, operator):
    return sum(row["operator"] == operator for row in results["correctness"])


def test_every_compiled_backend_of_the_device_is_checked_and_one_that_serves_nothing_is_wrong(monkeypatch):
    call = next(gpu_check.calls(CPU))
    monkeypatch.setattr(gpu_check, "calls", lambda device: [call])
    assert measuring.backends_of(CPU) == ["cpu"]
    monkeypatch.setattr(measuring, "available_backends", lambda: ("cuda", "triton", "reference"))
    assert measuring.backends_of(torch.device("cuda")) == ["cuda", "triton"]
    assert [row["backend"] for row in gpu_check.correctness(CPU, "cpu")] == ["cpu"] * 2

    def refuse(call, dtype, backend):
        raise NotServed("not this call")

    monkeypatch.setattr(gpu_check, "check", refuse)
    rows = gpu_check.correctness(CPU, "cpu")
    assert [row["not served"] for row in rows] == ["not this call"] * 2 and not measuring.wrong(rows)
    counts = measuring.served(rows)
    assert counts == {"lowrank_linear": {"cpu": {"served": 0, "not served": 2}}}
    found = measuring.unserved(counts, ("lowrank_linear", "search_cell"), ["cpu"])
    assert [row["operator"] for row in measuring.wrong(found)] == ["lowrank_linear", "search_cell"]
    assert not measuring.unserved({"lowrank_linear": {"cpu": {"served": 1}}}, ("lowrank_linear",), ["cpu"])


# --- the CUDA kernels, of which none runs here -----------------------------------------------------------------------


@contextlib.contextmanager
def starting_nothing(capability):
    """backend="cuda" takes CPU tensors; its launches, and Triton's beside them, are counted and not started."""

    def choose(requested, dtype, device, cuda):
        name = backends._default[-1] if requested is None else requested
        if name == "cuda" and (reason := cuda(True)) is not None:
            raise NotServed(reason)
        assert name != "cuda" or dtype in backends.DTYPES["cuda"], f"{dtype} was asked of it"
        return name

    with contextlib.ExitStack() as stack:
        for name in measuring.cuda_entries():
            nothing = functools.wraps(getattr(_C, name))(lambda *arguments: None)
            stack.enter_context(mock.patch.object(_C, name, nothing))
        for owner, name, value in (
            (torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0)),
            (triton_products, "launch", lambda *arguments, **constants: None),
            (triton_products, "capability", lambda device: capability),
            (cuda_plans, "multiprocessors", lambda device: 132),
            (row_copies, "_served", lambda x: backends._default[-1] == "cuda"),
            (backends, "choose", choose),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(mock.patch.dict(backends._WHY_UNAVAILABLE, cuda=None))
        yield stack.enter_context(measuring.counted_launches())


@pytest.fixture(scope="module")
def on_sm90():
    """The rows of all that is checked of backend "cuda", whose results are nothing, and what was started."""
    with starting_nothing((9, 0)) as launches:
        rows = [
            *gpu_check.correctness(CPU, "cuda"),
            *sublayer_check.correctness(CPU, "cuda", gpu_check.TOLERANCE),
            *cell_check.correctness(CPU, "cuda"),
        ]
    return rows, launches


@needs_cuda
def test_what_the_cuda_kernels_serve_and_what_they_do_not(on_sm90):
    rows, _ = on_sm90
    found = measuring.served(rows)
    assert set(found) == {*OPERATORS, "masked_sublayer"}
    for operator in ("hadamard_linear", "search_cell_step"):
        assert found[operator]["cuda"]["served"] == 0 < found[operator]["cuda"]["not served"]
    for operator in ("search_cell", "masked_sublayer"):
        assert found[operator]["cuda"]["not served"] == 0 < found[operator]["cuda"]["served"]
    linear = found["lowrank_linear"]["cuda"]
    assert linear["served"] >= 25 and linear["served"] + linear["not served"] == 2 * calls_of("lowrank_linear")
    reasons = {row["not served"] for row in rows if "not served" in row}
    assert all(any(word in reason for reason in reasons) for word in ("no factor", "no dropout", "no state"))
    assert {row["dtype"] for row in rows} == {"torch.bfloat16", "torch.float16"}, "float32 is not asked of it"
    assert all(row["backend"] == "cuda" for row in rows)
    names = {row["call"] for row in rows if row["operator"] == "lowrank_linear" and "not served" not in row}
    assert {"none", "linear", "mlp"} <= {name.split()[0].strip(",") for name in names}
    assert any("segments" in name for name in names) and any("full" in name for name in names)


def calls_of(operator):
    return sum(call.operator == operator for call in gpu_check.calls(CPU))


@needs_cuda
def test_results_that_nothing_wrote_are_wrong(on_sm90):
    rows, _ = on_sm90
    assert all(not row["ok"] for row in rows if row["operator"] != "masked_sublayer" and "not served" not in row)
    assert all(not row["ok"] for row in rows if row["operator"] == "masked_sublayer")


@needs_cuda
def test_every_cuda_kernel_is_started_by_some_call(on_sm90):
    """On capability 9.0 the one of many rows that is its own, and elsewhere the other."""
    _, launches = on_sm90
    assert set(launches) >= {"lowrank_linear_few_rows", "lowrank_linear_skinny", "gather_rows", "search_cell_cuda_add"}
    assert {name for name, count in launches.items() if not count} <= {"lowrank_linear_many_rows"}
    (missing,) = measuring.unreached(launches | {"lowrank_linear_many_rows": 0}, (9, 0))
    assert missing["operator"] == "lowrank_linear_many_rows" and measuring.wrong([missing])
    with starting_nothing((8, 0)) as launches:
        wide = next(call for call in gpu_check.calls(CPU) if "2200 rows" in call.name)
        wide.to(torch.bfloat16).run("cuda")
    assert launches["lowrank_linear_many_rows"] == 1 and not launches["lowrank_linear_many_rows_sm90"]
    names = {row["operator"] for row in measuring.unreached(launches, (8, 0))}
    assert "gather_rows" in names and not any("many_rows" in name for name in names)


@needs_cuda
def test_wide_and_narrow_tiles_are_among_the_calls(monkeypatch):
    wide = []
    monkeypatch.setattr(cuda_kernels, "launch_many", lambda plan, *_: wide.append(plan.columns))
    with starting_nothing((9, 0)):
        for call in gpu_check.calls(CPU):
            if call.operator == "lowrank_linear" and "300 rows, transposed" not in call.name:
                with contextlib.suppress(NotServed):
                    call.to(torch.bfloat16).run("cuda")
    assert set(wide) == {cuda_plans.MANY_TILE, cuda_plans.WIDE_TILE}


def test_a_backend_that_does_not_serve_a_case_is_named_beside_the_times(monkeypatch):
    def refuse(calls, device):
        if backends._default[-1] == "cpu":
            raise NotServed("not this one")
        return dict.fromkeys(calls, 1.0)

    monkeypatch.setattr(measuring, "timed", refuse)
    for part in (gpu_check, cell_check):
        monkeypatch.setattr(part, "timed", refuse)
    deadline = time.monotonic() + 600
    rows, left_out = gpu_check.speed([("tiny", 16, 8, 3, 2)], CPU, deadline)
    assert rows and left_out == [
        f"tiny, 3 rows, rank 2, {kind}: not this one" for kind in ("forward", "forward+backward")
    ]
    rows, left_out = cell_check.speed(((1, 4, 8, 4),), CPU, deadline)
    assert rows and len(left_out) == 3 and all(reason.endswith(": not this one") for reason in left_out)


def test_replays_that_a_backend_does_not_serve_are_rows_too(monkeypatch):
    def replay(device, backend, lengths, p):
        if p > 0:
            raise NotServed("no dropout")
        return {"ok": backend == "cpu", "same bits": True}

    monkeypatch.setattr(gpu_check, "graph_replay", replay)
    rows = gpu_check.graph_replays(CPU)
    assert [row.get("not served") for row in rows] == ["no dropout", None, None] and not measuring.wrong(rows)
    monkeypatch.setattr(measuring, "backends_of", lambda device: ["cuda"])
    assert len(measuring.wrong(gpu_check.graph_replays(CPU))) == 2


# --- calls and tolerances --------------------------------------------------------------------------------------------


def test_calls_cover_every_form_and_name_it():
    calls = list(gpu_check.calls(CPU))
    names = [call.name for call in calls]
    assert len(set(names)) == len(names)
    for word in (
        "none",
        "linear",
        "mlp",
        "diag",
        "full",
        "relu",
        "gelu",
        "softplus",
        "segments",
        "dropout",
        "W",
        "factor one_plus",
    ):
        assert any(word in name for name in names), word
    for call in calls:
        for tensor in (*call.tensors.values(), call.dy):
            assert torch.equal(tensor, tensor.bfloat16().double()), "rounded on the way into the call"


def without_scaling(call):
    return call._replace(options=call.options | {"scaling": 1.45})


def without_dropout(call):
    return call._replace(options={name: value for name, value in call.options.items() if name != "dropout"})


def neighbours_adapter(call):
    per_task = ("V", "U", "w1", "b1", "w2", "b2")
    return call._replace(tensors={n: t.roll(1, 0) if n in per_task else t for n, t in call.tensors.items()})


def without_bias(call):
    return call._replace(tensors=call.tensors | {"bias": call.tensors["bias"] * 0})


def segment_one_row_off(call):
    moved = call.options["segments"].clone()
    moved[1] -= 1
    return call._replace(options=call.options | {"segments": moved})


MUTANTS = {
    without_scaling: "U",
    without_dropout: "y",
    neighbours_adapter: "y",
    without_bias: "y",
    segment_one_row_off: "y",
}


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
@pytest.mark.parametrize("generator", ["linear", "mlp"])
def test_the_widest_tolerance_sees_a_mistake(mutant, generator):
    form = {"generator": generator, "sigma": "full", "activation": "tanh", "hidden_activation": "gelu"}
    call = gpu_check.make(form, (33, 0, 20, 1), 0.25, rows=0, seed=1, device=CPU)
    wanted, found = call.run("reference"), mutant(call).run("reference")
    assert gpu_check.relative(found[MUTANTS[mutant]], wanted[MUTANTS[mutant]]) > BFLOAT16


def test_zeros_and_nan_are_wrong():
    wanted = torch.randn(3, 4, dtype=torch.float64)
    assert gpu_check.relative(torch.zeros(3, 4), wanted) > BFLOAT16
    assert not gpu_check.relative(torch.full((3, 4), float("nan")), wanted) <= BFLOAT16


def test_nothing_is_timed_when_a_result_is_wrong(tmp_path, monkeypatch):
    monkeypatch.setitem(gpu_check.TOLERANCE, torch.float32, 1e-12)
    for part in (gpu_check, gpu_check.cell_check):
        monkeypatch.setattr(part, "speed", lambda *arguments: pytest.fail("was timed"))
    assert gpu_check.run(tmp_path, CPU, 8.0, Console(quiet=True)) == 1
    results = json.loads((tmp_path / "results.json").read_text())
    assert not all(row["ok"] for row in results["correctness"])


def test_nothing_is_timed_when_a_backend_serves_nothing(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise NotServed("not this call")

    monkeypatch.setattr(gpu_check, "check", refuse)
    monkeypatch.setattr(gpu_check, "speed", lambda *arguments: pytest.fail("was timed"))
    assert gpu_check.run(tmp_path, CPU, 8.0, Console(quiet=True)) == 1
    counts = json.loads((tmp_path / "results.json").read_text())["served"]
    assert counts["hadamard_linear"]["cpu"]["served"] == 0 < counts["search_cell"]["cpu"]["served"]


def test_what_the_deadline_cuts_off_is_named():
    grid = gpu_check.grid_of(**gpu_check.SMALL)
    rows, left_out = gpu_check.speed(grid, CPU, deadline=time.monotonic() - 1)
    assert rows == [] and left_out == ["tiny, 1 rows, rank 4", "tiny, 33 rows, rank 4"]


def test_the_grid_is_the_promised_one_and_rank_16_comes_first():
    grid = gpu_check.grid_of(gpu_check.LAYERS, gpu_check.ROWS, gpu_check.RANKS)
    assert {case[4] for case in grid} == {4, 16, 64} and [case[4] for case in grid[:42]] == [16] * 42
    assert {case[3] for case in grid} >= {1, 16384} and len(grid) == len(set(grid))


def test_without_a_gpu_the_command_says_what_to_do(monkeypatch):
    import typer
    from typer.testing import CliRunner

    monkeypatch.setitem(backends._WHY_UNAVAILABLE, "triton", "torch sees no CUDA device")
    app = typer.Typer()
    app.command()(gpu_check.main)
    done = CliRunner().invoke(app, [])
    assert done.exit_code == 2 and "--device cpu" in done.output
