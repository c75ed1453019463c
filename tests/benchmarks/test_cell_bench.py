"""Search cells in the benchmarks: gates that are green for the cell as it is and red for wrong or idle ones."""

import importlib

import pytest
import torch

from mltd.bench import cells, contenders, table
from mltd.bench.cases import GateError, Timing
from mltd.bench.run import draw_speed
from mltd.bench.unfused_cell import UnfusedCell, unfused_cell
from tarp_kernels import SearchCell
from tarp_kernels.ops.search_cell import search_cell as RIGHT

SMALL = {"batch": 2, "length": 7, "d": 12, "width": 4}


@pytest.mark.parametrize("kind", cells.KINDS)
def test_a_cells_gate_is_green_for_the_cell_as_it_is(kind):
    case = cells.cell_case(kind, **SMALL)
    assert list(case.calls) == ["mixture", "skipping", "masked"] and case.baseline == "mixture"
    assert case.gate() < 1e-4


def output_off(h, weights, alpha, **options):
    out = RIGHT(h, weights, alpha, **options)
    return h + (out - h) * 1.002


def idle(h, weights, alpha, **options):
    return h + 0 * RIGHT(h, weights, alpha, **options)


def acausal(h, weights, alpha, **options):
    return RIGHT(h, weights, alpha, **options | {"causal": False})


def another_operation(h, weights, alpha, **options):
    other = alpha.clone()
    other[..., 6, :] = other[..., 5, :]  # conv3 where conv5 was selected
    return RIGHT(h, weights, other, **options)


def edge_left_out(h, weights, alpha, **options):
    kept = torch.ones(9, 1)
    kept[3] = 0
    return RIGHT(h, weights, alpha * kept, **options)


def gradient_of_h_lost(h, weights, alpha, **options):
    return RIGHT(h.detach(), weights, alpha, **options) + h - h.detach()


def gradient_of_weights_lost(h, weights, alpha, **options):
    return RIGHT(h, weights._replace(conv5=weights.conv5.detach()), alpha, **options)


def gradient_where_none_belongs(h, weights, alpha, **options):
    return RIGHT(h, weights, alpha, **options) + 1e-7 * weights.linear.sum()


WRONG = [output_off, idle, acausal, another_operation, edge_left_out]
WRONG_GRADIENTS = [gradient_of_h_lost, gradient_of_weights_lost, gradient_where_none_belongs]
BOTH = [(cells.KINDS[0], spoil) for spoil in WRONG] + [(cells.KINDS[1], spoil) for spoil in WRONG + WRONG_GRADIENTS]


def spoil_cells(monkeypatch, spoil):
    for module in ("search_cell", "cell_beside"):
        monkeypatch.setattr(importlib.import_module(f"tarp_kernels.nn.{module}"), "search_cell", spoil)


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
