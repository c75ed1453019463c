"""Launch configurations: what decides, what is kept, and that a damaged or foreign table is never used."""

import json
import warnings

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from mltd.bench import tune
from mltd.cli import app
from tarp_kernels import _C, CellWeights, backends, tuning
from tarp_kernels.ops.lowrank_linear import triton_plans
from tarp_kernels.ops.search_cell import cuda_kernels
from tarp_kernels.ops.search_cell import cuda_plans as cell_plans
from tarp_kernels.tuning import CellKey, Key, Plan, Table, Tile
from tests.lowrank_linear.cuda_runs import needs_nvcc
from tests.search_cell.cuda_runs import cells_on_ptx_machine

KEY = Key("bfloat16", 1024, 4096, False, 16, 16, "diag")
CELL = CellKey("bfloat16", 768, 64, False)
GPU, CUDA = "NVIDIA Test 100", torch.device("cuda", 0)
ODD = Plan("one_pass", Tile(16, 32, 64), Tile(16, 64, 32))


@pytest.fixture(autouse=True)
def gpu(monkeypatch, tmp_path):
    """A GPU by name, and a folder of its own for tables."""
    monkeypatch.setenv("TARP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: GPU)
    forget()
    yield
    forget()


def forget():
    tuning.table.cache_clear()
    tuning._steps.cache_clear()
    tuning._measured.cache_clear()
    tuning.gpu_name.cache_clear()


def write(plans: dict[str, Plan], cells: dict[str, str] | None = None):
    return tuning.write(GPU, Table(plans, cells or {}))


def chosen(rows: int, key: Key = KEY) -> Plan:
    return tuning.plan(key, rows, CUDA, triton_plans.estimate)


def test_an_unknown_gpu_runs_estimates_and_says_so_once():
    with pytest.warns(RuntimeWarning, match=f"{GPU}.*estimates.*tarp bench --tune") as warned:
        found = [chosen(rows) for rows in (1, 100, 5000)] + [chosen(7, KEY._replace(outer=64))]
    assert len(warned) == 1
    assert found[0] == triton_plans.estimate(KEY, 1) and found[1] == triton_plans.estimate(KEY, 128)


def test_what_was_measured_decides_for_its_bucket_and_key_alone():
    write({KEY.entry(256): ODD})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen(129) == chosen(256) == ODD
        for other in (chosen(128), chosen(257), chosen(200, KEY._replace(transposed=True))):
            assert other != ODD


def test_a_table_says_which_backend_was_faster():
    with pytest.warns(RuntimeWarning, match="estimates"):
        assert not tuning.has_measured(CUDA)
    write({KEY.entry(16): ODD._replace(backend="cuda"), KEY.entry(32): ODD})
    forget()
    assert tuning.has_measured(CUDA) and not tuning.has_measured(torch.device("cpu"))
    found = [tuning.measured(KEY, rows, CUDA) for rows in (2, 16, 17, 33)]
    assert found == [ODD._replace(backend="cuda")] * 2 + [ODD, None]


def test_every_field_of_a_key_makes_another_entry():
    changed = [
        KEY._replace(**{name: value * 2 if isinstance(value, int | str) else value})
        for name, value in KEY._asdict().items()
        if name != "transposed"
    ]
    entries = {key.entry(256) for key in (KEY, KEY._replace(transposed=True), *changed)} | {KEY.entry(128)}
    assert len(entries) == len(KEY) + 2


def test_more_rows_than_the_last_bucket_run_as_that():
    write({KEY.entry(tuning.ROWS[-1]): ODD})
    assert chosen(10**6) == ODD


def test_tables_add_up():
    write({KEY.entry(1): ODD}, {CELL.entry(64): "cuda", CELL.entry(128): "cuda"})
    write({KEY.entry(16): ODD})
    write({}, {CELL.entry(64): "triton"})
    found = tuning.read(GPU)
    assert set(found.plans) == {KEY.entry(1), KEY.entry(16)}
    assert found.cells == {CELL.entry(64): "triton", CELL.entry(128): "cuda"}


def changed(**values):
    def change(path):
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


DAMAGE = {
    "truncated": lambda path: path.write_text(path.read_text()[:-9]),
    "empty": lambda path: path.write_text(""),
    "a list": lambda path: path.write_text("[]"),
    "another version": changed(version=tuning.VERSION + 1),
    "other kernels": changed(kernels="0" * 16),
    "other CUDA kernels": changed(cuda="0" * 16),
    "another Triton": changed(triton="0.1"),
    "another GPU": changed(gpu="NVIDIA Other"),
    "no plans": changed(plans=None),
    "no cells": changed(cells=None),
    "cells in a list": changed(cells=[CELL.entry(256)]),
    "an unknown backend of a cell": changed(cells={CELL.entry(256): "cpu"}),
    "a plan for a cell": changed(cells={CELL.entry(256): ODD._asdict()}),
    "a plan without tiles": changed(plans={KEY.entry(256): {"variant": "split"}}),
    "an unknown variant": changed(plans={KEY.entry(256): {**ODD._asdict(), "variant": "three_pass"}}),
    "an unknown backend": changed(plans={KEY.entry(256): {**ODD._asdict(), "backend": "cpu"}}),
    "a tile of nothing": changed(plans={KEY.entry(256): {**ODD._asdict(), "first": [0, 32, 64, 4, 3]}}),
    "a tile that is no power of two": changed(plans={KEY.entry(256): {**ODD._asdict(), "first": [16, 33, 64, 4, 3]}}),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_table_that_does_not_fit_is_not_used(name):
    DAMAGE[name](write({KEY.entry(256): ODD}, {CELL.entry(256): "triton"}))
    forget()
    with pytest.warns(RuntimeWarning, match="estimates"):
        assert chosen(256) == triton_plans.estimate(KEY, 256)
    assert tuning.faster_for_cell(CELL, 256, CUDA) is None
    write({KEY.entry(256): ODD}, {CELL.entry(128): "triton"})  # and is replaced by the next measurement
    assert chosen(256) == ODD and tuning.read(GPU).cells == {CELL.entry(128): "triton"}


# --- search cells ----------------------------------------------------------------------------------------------------


def cell(rows=256, d=768, width=64, dtype=torch.bfloat16, per_task=False) -> tuple:
    """h and weights as `search_cell` asks for a backend with, on a device that is none."""
    lead = (2,) if per_task else ()
    shapes = CellWeights.shapes(d, width)
    weights = CellWeights(**{n: torch.empty(*lead, *s, dtype=dtype, device="meta") for n, s in shapes.items()})
    return OnCuda(torch.empty(2, rows // 2, d, dtype=dtype, device="meta")), weights


class OnCuda:
    """A tensor that says that it lies on a GPU."""

    device = CUDA

    def __init__(self, tensor):
        self.tensor = tensor

    def __getattr__(self, name):
        return getattr(self.tensor, name)


def test_a_cell_goes_where_it_was_faster_for_its_bucket_and_key_alone():
    write({}, {CELL.entry(256): "triton", CELL._replace(per_task=True).entry(256): "cuda"})
    forget()
    for rows, expected in ((130, False), (256, False), (128, True), (258, True)):
        assert (cell_plans.refusal(*cell(rows), named=False) is None) == expected, rows
    for other in ({"d": 776}, {"width": 32}, {"dtype": torch.float16}, {"per_task": True}):
        assert cell_plans.refusal(*cell(**other), named=False) is None, other
    assert "Triton's kernels are the better choice" in cell_plans.refusal(*cell(), named=False)
    assert cell_plans.refusal(*cell(), named=True) is None, "asked for by name"
    assert cell_plans.refusal(*cell(), named=True, with_state=True) is not None


def test_every_field_of_a_cells_key_makes_another_entry():
    changed = [{"dtype": "float16"}, {"d": 776}, {"width": 32}, {"per_task": True}]
    entries = {CELL._replace(**change).entry(256) for change in ({}, *changed)} | {CELL.entry(128)}
    assert len(entries) == len(CELL) + 2


def test_a_table_of_plans_says_nothing_of_cells_and_the_other_way_round():
    write({KEY.entry(256): ODD})
    forget()
    assert tuning.faster_for_cell(CELL, 256, CUDA) is None
    tuning.path_of(GPU).unlink()
    write({}, {CELL.entry(256): "triton"})
    forget()
    assert not tuning.has_measured(CUDA) and chosen(256) == triton_plans.estimate(KEY, 256)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("faster", ["cuda", "triton"])
def test_the_automatic_choice_of_a_cell_asks_the_table(faster, dtype, monkeypatch):
    monkeypatch.setattr(backends, "_WHY_UNAVAILABLE", dict.fromkeys(backends.BACKENDS))
    write({}, {CELL.entry(256): faster, CELL._replace(dtype="float32").entry(256): "cuda"})
    forget()
    arguments = cell(dtype=dtype)
    found = backends.choose(None, dtype, CUDA, lambda named: cell_plans.refusal(*arguments, named))
    assert found == (faster if dtype == torch.bfloat16 else "triton")


@pytest.mark.parametrize(
    ("rows", "d", "cuda"), [(2, 768, True), (4096, 768, True), (2, 8192, False), (6912, 8192, True)]
)
def test_a_cell_that_nobody_measured_goes_by_the_estimate(rows, d, cuda):
    with pytest.warns(RuntimeWarning, match="estimates"):
        assert (cell_plans.refusal(*cell(rows, d), named=False) is None) == cuda


def test_what_is_compiled_goes_by_the_estimate(monkeypatch):
    write({}, {CELL.entry(256): "triton"})
    forget()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(tuning, "faster_for_cell", lambda *_: pytest.fail("was read"))
    assert cell_plans.refusal(*cell(), named=False) is None


def test_a_table_holds_for_the_cuda_kernels_of_the_extension():
    assert tuning.origin()["cuda"] == _C.build_info()["cuda_sources"][:16]
    assert bool(tuning.origin()["cuda"]) == bool(_C.build_info()["cuda"])


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "cache").write_text("")
    with pytest.raises(OSError, match="TARP_CACHE"):
        write({KEY.entry(256): ODD})


def test_a_forced_variant_or_plan_goes_before_everything():
    write({KEY.entry(256): ODD})
    with tuning.forced("split"):
        assert chosen(256).variant == "split"
        with tuning.forced(None):
            assert chosen(256) == ODD
    with tuning.forced(ODD):
        assert chosen(5000) == ODD
    with pytest.raises(ValueError, match="'three_pass'.*'one_pass'"), tuning.forced("three_pass"):
        pass


@pytest.mark.parametrize("rows", tuning.ROWS)
def test_candidates_begin_with_the_estimate_and_are_distinct(rows):
    found = triton_plans.candidates(KEY, rows)
    assert found[0] == triton_plans.estimate(KEY, rows) and len(set(found)) == len(found) >= 4
    assert {plan.variant for plan in found} == set(tuning.VARIANTS)


def test_neighbours_that_agree_are_one_step():
    steps = tuning._steps(KEY, None, triton_plans.estimate, None)
    assert [most for most, _ in steps] == [16, 64, tuning.ROWS[-1]]


def test_the_fastest_candidate_wins_and_one_without_room_is_left_out():
    plans = [ODD, ODD._replace(variant="split"), ODD._replace(dense=Tile(64, 64, 32))]
    seconds = {plans[0]: 3.0, plans[2]: 2.0}

    def timed() -> float:
        plan = tuning._forced[-1]
        if plan not in seconds:
            raise RuntimeError("out of resource: shared memory")
        return seconds[plan]

    assert tuning.fastest(plans, timed) == (plans[2], 2.0)
    with pytest.raises(ValueError, match="no candidate"):
        tuning.fastest(plans[1:2], timed)

    def broken():
        raise RuntimeError("illegal memory access")

    with pytest.raises(RuntimeError, match="illegal"):
        tuning.fastest(plans, broken)


def test_tuning_finds_a_plan_for_every_bucket_in_both_directions():
    asked = []

    def seconds(call) -> float:
        asked.append(tuning._forced[-1])
        return 1.0 if tuning._forced[-1].dense.features == 64 else 2.0

    found = tune.tune("70x64x128x3", torch.device("cpu"), seconds, Console(quiet=True))
    assert set(found) == {
        Key("bfloat16", inner, outer, transposed, 16, 16, "diag").entry(rows)
        for inner, outer, transposed in ((64, 128, False), (128, 64, True))
        for rows in (1, 16, 32, 64)
    }
    assert all(plan.dense.features == 64 for plan in found.values())
    assert len(asked) == sum(
        len(triton_plans.candidates(KEY._replace(inner=inner, outer=outer), rows))
        for inner, outer in ((64, 128), (128, 64))
        for rows in (1, 16, 32, 64)
    )


@pytest.mark.parametrize("faster", [True, False])
def test_tuning_measures_the_cuda_kernel_where_it_serves(monkeypatch, faster):
    monkeypatch.setattr(tune.backends, "why_unavailable", lambda name: None)
    best = 0.5 if faster else 2.0

    def seconds(call) -> float:
        return best if call.func.__module__.endswith("cuda_kernels") else 1.0

    found = tune.tune("128x64x128x3", torch.device("cpu"), seconds, Console(quiet=True))
    cuda = {key for key, plan in found.items() if plan.backend == "cuda"}
    forward = KEY._replace(inner=64, outer=128)
    expected = {forward.entry(rows) for rows in (1, 16, 32, 64, 128)}
    assert cuda == (expected if faster else set()), "dx has a transposed W"


@pytest.mark.parametrize("faster", ["cuda", "triton"])
def test_tuning_measures_both_backends_of_a_cell(monkeypatch, faster):
    monkeypatch.setattr(tune.backends, "why_unavailable", lambda name: None)
    asked = []

    def seconds(call) -> float:
        kernels, h, weights = call.args
        asked.append((kernels.__name__.rpartition(".")[2], len(h), weights.per_task and len(weights.output)))
        return 1.0 if kernels.__name__.endswith(f"{faster}_kernels") else 2.0

    found = tune.tune_cell("40x768x128x3", torch.device("cpu"), seconds, Console(quiet=True))
    buckets = {(1, 1), (16, 8), (32, 8)}
    expected = {CELL._replace(per_task=per_task).entry(rows) for rows, _ in buckets for per_task in (False, True)}
    assert found == dict.fromkeys(expected, faster)
    kernels = ("triton_kernels", "cuda_kernels")
    assert sorted(asked) == sorted((k, rows, tasks) for k in kernels for rows, most in buckets for tasks in (0, most))


def test_a_cell_is_not_measured_where_one_backend_alone_serves(monkeypatch):
    measured = lambda call: pytest.fail("was measured")  # noqa: E731
    console, cpu = Console(quiet=True), torch.device("cpu")
    monkeypatch.setitem(backends._WHY_UNAVAILABLE, "cuda", "built without nvcc")
    assert tune.tune_cell("40x768x128x3", cpu, measured, console) == {}
    monkeypatch.setitem(backends._WHY_UNAVAILABLE, "cuda", None)
    assert tune.tune_cell("40x772x128x3", cpu, measured, console) == {}, "d is no multiple of 8"


@needs_nvcc
def test_what_is_measured_of_a_cell_runs():
    h = torch.randn(18, 16, dtype=torch.bfloat16)
    weights = tune._cell_weights(16, 8, (2,), h)
    with cells_on_ptx_machine() as launches:
        tune._train(cuda_kernels, h, weights)
    assert [launch.name for launch in launches] == ["forward", "backward", "gradients", "add"]


def test_tuning_without_a_gpu_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(backends._WHY_UNAVAILABLE, "triton", "torch sees no CUDA device")
    done = CliRunner().invoke(app, ["bench", "--tune"])
    assert done.exit_code == 1 and "tuning measures the Triton kernels on a GPU: torch sees no CUDA" in done.output
