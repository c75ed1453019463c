"""Whole models with search cells in the benchmarks: gates that are green as it is and red for what is wrong."""

from dataclasses import replace

import pytest
import torch

from mltd.bench import cell_models, cells, models
from mltd.bench.cases import GateError
from mltd.inner_loop import adapt as ADAPT
from tarp_kernels import TarpLinear
from tarp_kernels.ops.search_cell import search_cell as RIGHT
from tests.benchmarks import wrong_cells
from tests.benchmarks.wrong_cells import spoil_cells

pytestmark = pytest.mark.usefixtures("small_llama")


def whole(folder):
    return cell_models.whole_model_with_cells_case(folder, batch=2, length=5)


def test_a_whole_model_with_cells_is_compared_by_its_logits(tmp_path):
    case = whole(tmp_path)
    assert list(case.calls) == ["base", "tarp + cells", "unfused"] and case.baseline == "base"
    assert case.calls["tarp + cells"]().shape == (2, 5, 49152)
    assert case.gate() < 1e-4


class OnlyOnce:
    """An identity in place of the first cell that is called, the others as they are."""

    def __init__(self):
        self.calls = 0

    def __call__(self, h, weights, alpha, **options):
        self.calls += 1
        return h if self.calls == 1 else RIGHT(h, weights, alpha, **options)


@pytest.mark.parametrize("spoil", [*wrong_cells.VALUES, OnlyOnce()], ids=lambda s: getattr(s, "__name__", "one_idle"))
def test_a_whole_models_gate_is_red_when_a_cell_is_wrong_or_idle(spoil, tmp_path, monkeypatch):
    case = whole(tmp_path)
    spoil_cells(monkeypatch, spoil)
    with pytest.raises(GateError, match="logits"):
        case.gate()


def test_a_whole_models_gate_is_red_when_an_adapted_layer_is_wrong(tmp_path, monkeypatch):
    case, right = whole(tmp_path), TarpLinear._adapt
    monkeypatch.setattr(TarpLinear, "_adapt", lambda layer, x, weight: right(layer, x, weight) * 1.001)
    with pytest.raises(GateError, match="logits"):
        case.gate()


def test_inner_steps_with_cells_agree_with_plain_pytorch_task_by_task():
    case = cell_models.inner_step_with_cells_case(shots=2)
    assert list(case.calls) == ["all live", "masked", "without cells", "unfused all live"]
    assert case.baseline == "unfused all live"
    assert case.gate() < cell_models.TOLERANCE


def test_all_six_operations_are_live_where_they_are_said_to_be(monkeypatch):
    case, seen = cell_models.inner_step_with_cells_case(shots=1), []

    def watched(h, weights, alpha, **options):
        seen.append(alpha)
        return RIGHT(h, weights, alpha, **options)

    spoil_cells(monkeypatch, watched)
    case.calls["all live"]()
    assert seen and all(alpha.shape == (models.TASKS, 9, 6) and bool((alpha > 0).all()) for alpha in seen)
    seen.clear()
    case.calls["masked"]()
    assert seen and all(torch.equal(alpha, cells.architecture().expand(models.TASKS, 9, 6)) for alpha in seen)
    seen.clear()
    case.calls["without cells"]()
    assert not seen


def anothers_architecture(h, weights, alpha, **options):
    return RIGHT(h, weights, alpha.roll(1, 0), **options)


def anothers_cell(h, weights, alpha, **options):
    other = weights._replace(conv3=weights.conv3.roll(1, 0))
    return RIGHT(h, other, alpha, **options)


WRONG_STEPS = [
    wrong_cells.idle,
    wrong_cells.acausal,
    wrong_cells.another_operation,
    wrong_cells.edge_left_out,
    *wrong_cells.GRADIENTS,
    anothers_architecture,
    anothers_cell,
]


@pytest.mark.parametrize("spoil", WRONG_STEPS)
def test_the_inner_steps_gate_is_red_when_a_cell_is_wrong(spoil, monkeypatch):
    case = cell_models.inner_step_with_cells_case(shots=2)
    spoil_cells(monkeypatch, spoil)
    with pytest.raises(GateError, match="moved otherwise"):
        case.gate()


@pytest.mark.parametrize("name", ["all live", "masked", "without cells", "unfused all live"])
def test_the_inner_steps_gate_holds_every_contender_against_an_oracle(name):
    case = cell_models.inner_step_with_cells_case(shots=2)
    right = case.calls[name]
    case.calls[name] = lambda: {key: value.roll(1, 0) for key, value in right().items()}
    with pytest.raises(GateError, match=f"{name}: .* moved otherwise"):
        case.gate()


def test_the_inner_steps_gate_is_red_when_nothing_moves(monkeypatch):
    case = cell_models.inner_step_with_cells_case(shots=2)
    monkeypatch.setattr(models, "adapt", lambda model, tasks, config: ADAPT(model, tasks, replace(config, steps=0)))
    with pytest.raises(GateError):
        case.gate()


def test_only_what_nobody_selected_may_stay_where_it_is():
    assert cell_models.unselected(cells.architecture()) == ["linear", "glu"]
    start = {"cell.linear": torch.zeros(2, 3), "cell.conv5": torch.zeros(2, 3)}
    moved = {"cell.linear": torch.zeros(2, 3), "cell.conv5": torch.ones(2, 3)}
    assert models.same_steps("x", moved, moved, start, ["linear"]) == 0
    with pytest.raises(GateError, match="cell.linear"):
        models.same_steps("x", moved, moved, start)
    with pytest.raises(GateError, match="cell.linear"):
        models.same_steps("x", moved | {"cell.linear": torch.full((2, 3), 1e-9)}, moved, start, ["linear"])
