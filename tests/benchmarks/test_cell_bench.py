"""Search cells in the benchmarks: gates that are green for the cell as it is and red for wrong or idle ones."""

import pytest
import torch

from mltd.bench import cells, contenders, table
from mltd.bench.cases import GateError, Timing
from mltd.bench.run import draw_speed
from mltd.bench.unfused_cell import UnfusedCell, unfused_cell
from tarp_kernels import SearchCell
from tests.benchmarks.wrong_cells import GRADIENTS, VALUES, spoil_cells

SMALL = {"batch": 2, "length": 7, "d": 12, "width": 4}


@pytest.mark.parametrize("kind", cells.KINDS)
def test_a_cells_gate_is_green_for_the_cell_as_it_is(kind):
    case = cells.cell_case(kind, **SMALL)
    assert list(case.calls) == ["mixture", "skipping", "masked"] and case.baseline == "mixture"
    assert case.gate() < 1e-4


BOTH = [(kind, spoil) for kind in cells.KINDS for spoil in VALUES] + [(cells.KINDS[1], spoil) for spoil in GRADIENTS]


@pytest.mark.parametrize(("kind", "spoil"), BOTH)
def test_a_cells_gate_is_red_for_a_wrong_or_idle_cell(kind, spoil, monkeypatch):
    case = cells.cell_case(kind, **SMALL)
    spoil_cells(monkeypatch, spoil)
    with pytest.raises(GateError):
        case.gate()


@pytest.mark.parametrize("stem", ["identity", "layernorm"])
@pytest.mark.parametrize("causal", [True, False])
def test_the_unfused_cell_is_the_cell_for_every_architecture(stem, causal):
    cell = SearchCell(12, 4, stem, causal)
    contenders.stir_cells(cell)
    h = torch.randn(2, 7, 12)
    for alpha in (cells.architecture(), torch.rand(9, 6)):
        expected = cell(h, alpha)
        torch.testing.assert_close(UnfusedCell(cell, skipping=False)(h, alpha), expected)
        torch.testing.assert_close(unfused_cell(h, cell.weights(), alpha, causal, skipping=True), expected)


def test_a_goal_names_the_contender_that_it_holds_for():
    def row(contender, ratio):
        return Timing("search cell", "8x256 tokens", contender, "mixture", ratio, 1.0, ratio, 2.0, 5, 1e-6)

    for masked, ok in ((0.17, True), (0.19, False)):
        frame = table.speed_frame([row("mixture", 1.0), row("skipping", 0.1), row("masked", masked)])
        (found,) = table.verdicts(frame)
        assert found["measured"] == pytest.approx(masked) and found["ok"] is ok


def test_every_part_has_a_picture_of_its_own(tmp_path):
    kinds = {"forward": ("linear", "tarp"), "search cell": ("mixture", "masked"), "whole model": ("base", "tarp")}
    rows = [
        Timing(kind, "1x2", name, baseline, ratio, 1.0, ratio, 2.0, 5, 1e-6)
        for kind, (baseline, other) in kinds.items()
        for name, ratio in ((baseline, 1.0), (other, 0.2))
    ]
    draw_speed(table.speed_frame(rows), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"layers.png", "cells.png", "models.png"}
