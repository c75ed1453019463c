"""The inner loop in the benchmarks: green as it is, red for what is wrong, each contender what it is said to be."""

import copy
import io
from dataclasses import replace
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from rich.console import Console

from mltd.bench import cell_models, inner_loop, inner_memory, memory, models, run
from mltd.bench.cases import GateError
from mltd.inner_loop import adapt as ADAPT
from tarp_kernels import tarp_parameters
from tests.benchmarks import wrong_cells
from tests.benchmarks.wrong_cells import spoil_cells
from tests.threads import on_one_thread  # noqa: F401

pytestmark = pytest.mark.usefixtures("small_llama")


def test_contenders_agree():
    case = inner_loop.inner_case(2, with_cells=False)
    assert list(case.calls) == ["mltd", "batched PyTorch", "straightforward"] and case.baseline == "straightforward"
    assert case.gate() < 1e-3


def test_contenders_with_cells_agree():
    case = inner_loop.inner_case(2, with_cells=True)
    assert case.kind == "inner loop with cells 2-shot"
    assert case.gate() < 0.15


def mixed(model, tasks, config, **given):
    return {name: value.roll(1, 0) for name, value in ADAPT(model, tasks, config, **given).items()}


def one_step_less(model, tasks, config, **given):
    return ADAPT(model, tasks, replace(config, steps=max(1, config.steps - 1)), **given)


def a_little_shorter(model, tasks, config, **given):
    return ADAPT(model, tasks, replace(config, lr=config.lr * 0.99), **given)


@pytest.mark.parametrize("wrong", [mixed, one_step_less, a_little_shorter])
def test_the_gate_is_red_when_mltd_moves_otherwise(wrong, monkeypatch):
    monkeypatch.setattr(inner_loop, "adapt", wrong)
    with pytest.raises(GateError, match="mltd: .* moved otherwise"):
        inner_loop.inner_case(1, with_cells=False).gate()


def test_the_gate_with_cells_tells_two_steps_from_three(monkeypatch):
    monkeypatch.setattr(inner_loop, "adapt", one_step_less)
    with pytest.raises(GateError, match="mltd: .* moved otherwise"):
        inner_loop.inner_case(1, with_cells=True).gate()


@pytest.mark.parametrize("spoil", [wrong_cells.idle, wrong_cells.edge_left_out, *wrong_cells.GRADIENTS])
def test_the_gate_is_red_when_a_cell_is_wrong(spoil, monkeypatch):
    spoil_cells(monkeypatch, spoil)
    with pytest.raises(GateError, match="mltd: .* moved otherwise"):
        inner_loop.inner_case(2, with_cells=True).gate()


def test_the_straightforward_form_takes_gradients_of_everything_on_a_copy(monkeypatch):
    model, plain = inner_loop.made(with_cells=False)
    tasks, copied = models.random_tasks(1), []
    watched = SimpleNamespace(deepcopy=lambda given: copied.append(copy.deepcopy(given)) or copied[-1])
    monkeypatch.setattr(inner_loop, "copy", watched)
    before = {name: parameter.clone() for name, parameter in plain.named_parameters()}
    inner_loop.inner_calls(model, plain, tasks, with_cells=False)["straightforward"]()
    assert len(copied) == len(tasks) and all(own is not plain for own in copied)
    assert all(parameter.grad is not None for own in copied for parameter in own.parameters())
    assert all(torch.equal(parameter, before[name]) for name, parameter in plain.named_parameters())
    assert all(parameter.grad is None for parameter in plain.parameters())


def test_the_straightforward_cell_runs_all_six_operations(monkeypatch):
    from mltd.bench import unfused_cell

    model, plain = inner_loop.made(with_cells=True)
    seen, right = set(), unfused_cell.operate
    monkeypatch.setattr(
        unfused_cell, "operate", lambda name, edge, *rest: seen.add((name, edge)) or right(name, edge, *rest)
    )
    calls = inner_loop.inner_calls(model, plain, models.random_tasks(1), with_cells=True, steps=1)
    calls["mltd"]()
    assert not seen
    calls["straightforward"]()
    assert len(seen) == 6 * 9


def test_growth_is_what_each_further_task_adds(monkeypatch):
    peaks = iter(mib * memory.MIB for mib in (10, 20, 30, 5, 40, 32, 30, 11))  # FEW tasks, then MANY, by contender
    monkeypatch.setattr(memory, "peak", lambda call: next(peaks))
    rows = {row.contender: row for row in inner_memory.measure_here()}
    assert list(rows) == ["mltd", "batched PyTorch", "straightforward", inner_memory.ONE_TASK]
    assert [row.peak_mib for row in rows.values()] == [40, 32, 30, 11]
    assert [row.task_mib for row in rows.values()] == [5, 2, 0, 1]
    model, _ = inner_loop.made(with_cells=False)
    adapter = sum(p.nbytes for p in tarp_parameters(model).values())
    assert rows["mltd"].adapter_mib == adapter / memory.MIB
    assert rows["mltd"].model_mib == (sum(p.nbytes for p in model.parameters()) - adapter) / memory.MIB


def test_tolerances_after_one_step_are_those_of_the_other_cases():
    assert inner_loop.TOLERANCES[True, 1] == cell_models.TOLERANCE


def test_the_part_writes_its_table_its_picture_and_its_memory(tmp_path, monkeypatch):
    row = inner_memory.InnerMemory("mltd", 99.0, 2.75, 369.5, 45.25)
    monkeypatch.setattr(run, "measure_inner_memory", lambda: [row])
    console = Console(record=True, width=160, file=io.StringIO())
    assert run.run_bench(tmp_path, None, 2, ["inner"], console) == 0
    speed, found = pd.read_csv(tmp_path / "speed.csv"), pd.read_csv(tmp_path / "inner_memory.csv")
    kinds = ["inner loop 5-shot", "inner loop 1-shot", "inner loop with cells 5-shot"]
    assert list(speed["kind"].unique()) == kinds and set(speed["baseline"]) == {"straightforward"}
    assert {"p20_ms", "p50_ms", "p80_ms"} <= set(speed) and (tmp_path / "inner.png").stat().st_size > 0
    assert found.loc[0, "task_mib"] == 45.25 and found.loc[0, "torch"]
    shown = console.export_text()
    assert all(f"{kind:28s} speed-up" in shown for kind in kinds) and "369.5" in shown
