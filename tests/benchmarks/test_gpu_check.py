"""The parts of benchmarks/gpu_check.py that need no GPU."""

import contextlib
import json
import time
from unittest import mock

import pytest
import torch
from rich.console import Console

from benchmarks import gpu_check
from tarp_kernels import available_backends, backends
from tarp_kernels.backends import NotServed

CPU = torch.device("cpu")
pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif("cpu" not in available_backends(), reason="the native backend is not built"),
]
BFLOAT16 = gpu_check.TOLERANCE[torch.bfloat16]


def test_a_run_without_a_gpu_writes_results_and_a_picture_and_says_what_is_missing(tmp_path):
    assert gpu_check.run(tmp_path, CPU, 8.0, Console(quiet=True)) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert all(row["ok"] for row in results["correctness"]) and len(results["correctness"]) >= 100
    assert all(row["ok"] for row in results["search cell"]) and len(results["search cell"]) >= 80
    assert {row["contender"] for row in results["search cell speed"]} >= {"mixture", "masked", "step"}
    assert results["second order"]["ok"] and results["facts"]["device"] == "CPU"
    assert {part.partition(":")[0] for part in results["left out"]} == {"graph", "memory", "tuning"}
    assert {row["contender"] for row in results["speed"]} >= {"linear", "tarp", "unfused"}
    assert (tmp_path / "grid-r4.png").stat().st_size > 10_000


def test_every_compiled_backend_of_the_device_is_checked_and_one_that_serves_nothing_is_wrong(monkeypatch):
    call = next(gpu_check.calls(CPU))
    monkeypatch.setattr(gpu_check, "calls", lambda device: [call])
    assert gpu_check.backends_of(CPU) == ["cpu"]
    monkeypatch.setattr(gpu_check, "available_backends", lambda: ("cuda", "triton", "reference"))
    assert gpu_check.backends_of(torch.device("cuda")) == ["cuda", "triton"]
    assert [row["backend"] for row in gpu_check.correctness(CPU, "cpu")] == ["cpu"] * 2

    def refuse(call, dtype, backend):
        raise NotServed("not this call")

    monkeypatch.setattr(gpu_check, "check", refuse)
    assert [row["ok"] for row in gpu_check.correctness(CPU, "cpu")] == [False]


def test_few_rows_are_among_the_calls_and_the_cuda_kernels_serve_some_of_every_form():
    served: dict[str, int] = {}
    for call in gpu_check.calls(CPU):
        with mock.patch.object(backends, "choose", serving(call.name, served)), contextlib.suppress(NotServed):
            call.to(torch.bfloat16).run("cuda")
    assert {"none", "linear", "mlp"} <= {name.split()[0].strip(",") for name in served}
    assert any("segments" in name for name in served) and any("full" in name for name in served)


def serving(name, served):
    """`backends.choose` that counts the calls which the CUDA kernels serve, and runs none."""

    def choose(requested, dtype, device, cuda):
        if cuda(True) is None:
            served[name] = 1
        raise NotServed(name)

    return choose


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


def test_what_the_deadline_cuts_off_is_named():
    grid = gpu_check.grid_of(**gpu_check.SMALL)
    rows, left_out = gpu_check.speed(grid, CPU, deadline=time.monotonic() - 1)
    assert rows == [] and left_out == ["tiny, 1 rows, rank 4", "tiny, 33 rows, rank 4"]


def test_the_grid_is_the_promised_one_and_rank_16_comes_first():
    grid = gpu_check.grid_of(gpu_check.LAYERS, gpu_check.ROWS, gpu_check.RANKS)
    assert {case[4] for case in grid} == {4, 16, 64} and [case[4] for case in grid[:42]] == [16] * 42
    assert {case[3] for case in grid} >= {1, 16384} and len(grid) == len(set(grid))


def test_without_a_gpu_the_command_says_what_to_do():
    import typer
    from typer.testing import CliRunner

    app = typer.Typer()
    app.command()(gpu_check.main)
    done = CliRunner().invoke(app, [])
    assert done.exit_code == 2 and "--device cpu" in done.output
