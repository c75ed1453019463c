"""The Triton kernels in Triton's interpreter, started by test_triton.py."""

import re

import pytest
import torch

from tarp_kernels import lowrank_linear, tuning
from tarp_kernels.ops.lowrank_linear import selected
from tests.interpreting import make, triton_on_the_cpu  # noqa: F401
from tests.lowrank_linear.cases import NAMES, Case, build, cotangent, forms, of_form, pairwise, run_with_gradients
from tests.lowrank_linear.oracle import TensorCoreOracle, bounds, excess
from tests.lowrank_linear.selected import MODES, select
from tests.lowrank_linear.selected import check as check_rows
from tests.lowrank_linear.test_second_order import (
    directions_of,
    exact_and_bounds,
    excesses,
    second_order,
    second_order_cases,
)


def check(case: Case) -> None:
    call, dy = build(case), cotangent(case)
    wanted = bounds(call, dy, TensorCoreOracle)
    found = run_with_gradients(call, dy, "triton")
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        assert value.dtype == (call.x.dtype if name == "y" else call.tensors[name].dtype), name
        assert excess(value, wanted[name]) <= 1, f"{name} of {case}"
    for variant in tuning.VARIANTS:
        with tuning.forced(variant):
            alone, y = call.run("triton"), call.leaves().run("triton").detach()
        assert excess(y, wanted["y"]) <= 1, f"y of {case}, {variant}"
        assert torch.equal(alone, y), "the value depends on whether gradients are asked for"


@pytest.mark.parametrize("case", pairwise("triton"), ids=str)
def test_values_and_gradients(case):
    check(case)


ALONE = Case(generator="mlp", b1=True, b2=True, sigma="full", shape=(19, 23, 29), rank=3, hidden=7, dropout=0.3)


@pytest.mark.parametrize("name", NAMES)
def test_one_gradient_alone(name):
    """The bits of all gradients together, and nothing that only others need: what is not asked for is not stored."""
    call, dy = build(ALONE), cotangent(ALONE)
    together = run_with_gradients(call, dy, "triton")
    alone = run_with_gradients(call, dy, "triton", (name,))
    assert alone.keys() == {"y", name} and torch.equal(alone[name], together[name])


@pytest.mark.proof
@pytest.mark.parametrize("form", forms(), ids=lambda form: str(Case(**form)))
def test_values_and_gradients_of_every_form(form):
    for case in of_form(form, "triton", 1):
        check(case)


def check_second_order(case: Case) -> None:
    call, dy = build(case), cotangent(case)
    exact, most = exact_and_bounds(case)
    found = second_order(call, dy, directions_of(case, call), lambda c: c.run("triton"))
    wrong = {name: ratio for name, ratio in excesses(found, exact, most).items() if not ratio <= 1}
    assert wrong == {}, f"second order of {case}"


@pytest.mark.parametrize("case", second_order_cases()[::8], ids=str)
def test_second_order_gradients(case):
    check_second_order(case)


@pytest.mark.proof
@pytest.mark.parametrize("case", second_order_cases(), ids=str)
def test_second_order_gradients_of_every_form(case):
    check_second_order(case)


SEGMENTED = Case(shape=(0, 70, 40), segments="long", rank=3, b1=True, dropout=0.3)
MISTAKES = {
    "the last row of a task left out": ("here = (row < end)", "here = (row < end - 1)"),
    "no scaling in forward": ("found = number(scaling, SCALING_IN_MEMORY) * middle(", "found = middle("),
    "no scaling in backward": ("dz = scaling * skinny(", "dz = skinny("),
    "h and s swapped": ("middle, dh = s * h, s * dz", "middle, dh = s * h, h * dz"),
    "the neighbour's V": ("V += task.to(tl.int64) * r * width", "V += (2 - task).to(tl.int64) * r * width"),
    "tiles counted without the task's number": ("(tile - start // BT - low) * BT", "(tile - start // BT) * BT"),
    "columns past the last": ("if not EVEN:\n                in_a", "if False:\n                in_a"),
    "no dropout": ("a = tl.where(kept(row, feature, width, threshold, seed), a, 0.0)", "a = a"),
    "dx past dropout": ("tl.where(kept(row, column, outer, threshold, seed), low * inverse_keep, 0.0)", "low"),
    "the last chunk left out": ("range(0, end - start, CHUNK)", "range(CHUNK, end - start, CHUNK)"),
    "no bias": ("    if BIAS:\n", "    if False:\n"),
}
SECOND_ORDER_MISTAKES = {
    "no 1 / (1 - p) in contract": (
        "    if DROPOUT:\n        found *= inverse_keep",
        "    if False:\n        found *= 0",
    ),
    "the first task's matrix": ("q += task.to(tl.int64) * q_task", "q += 0 * q_task"),
    "sums from the first row on": ("for t in range(start, tl.minimum", "for t in range(start + 1, tl.minimum"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_the_kernels_is_seen(name, tmp_path, monkeypatch):
    make(MISTAKES[name], tmp_path, monkeypatch)
    with pytest.raises(AssertionError, match=re.escape(str(SEGMENTED))):
        check(SEGMENTED)


@pytest.mark.parametrize("name", SECOND_ORDER_MISTAKES)
def test_a_mistake_in_the_products_is_seen_in_second_order(name, tmp_path, monkeypatch):
    case = Case(shape=(0, 9, 7), segments=(5, 3), rank=3, b1=True, dropout=0.3)
    make(SECOND_ORDER_MISTAKES[name], tmp_path, monkeypatch)
    with pytest.raises(AssertionError, match="second order"):
        check_second_order(case)


# --- some rows only --------------------------------------------------------------------------------------------------

CHOSEN = [
    Case(shape=(17, 33, 20), b1=True, x_layout="padded"),
    Case(shape=(33, 25, 20), dtype=torch.float16, generator="mlp", sigma="full", seed=1),
    Case(shape=(0, 33, 20), segments="ragged", dropout=0.3, seed=2),
    Case(shape=(0, 8, 5)),
]


def check_selected(case: Case, pattern: str, mode: str) -> None:
    chosen = select(case, pattern, mode)
    for variant in tuning.VARIANTS:
        with tuning.forced(variant):
            check_rows(chosen, chosen.run("triton"), TensorCoreOracle)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("pattern", ["sparse", "runs"])
@pytest.mark.parametrize("case", CHOSEN, ids=str)
def test_selected_rows(case, pattern, mode):
    check_selected(case, pattern, mode)


IGNORED = {
    "x of the skinny product": ("line = lines(x_index, row, end, x_total)", "line = row"),
    "x of the dense product, dy of dx": ("line = lines(a_index, row, end, a_total)\n    acc", "line = row\n    acc"),
    "y, and dx": ("line = lines(c_index, row, end, c_total)", "line = row"),
    "y in one pass": ("lines(y_index, row, end, y_total)", "row"),
    "dy": ("line = lines(dy_index, row, end, dy_total)", "line = row"),
    "dy of dU": ("line = lines(a_index, row, end, a_total)\n        at", "line = row\n        at"),
    "x of dV": ("line = lines(b_index, row, end, b_total)", "line = row"),
}


@pytest.mark.parametrize("name", IGNORED)
def test_an_index_that_the_kernels_ignore_is_seen(name, tmp_path, monkeypatch):
    make(IGNORED[name], tmp_path, monkeypatch)
    with pytest.raises(AssertionError):
        check_selected(CHOSEN[0], "sparse", "both")


def test_numbers_of_rows_that_do_not_exist_are_clamped(monkeypatch):
    """On a device nobody looks at them."""
    monkeypatch.setattr(selected, "check_index", lambda *_: None)
    call, rows = build(CHOSEN[0]), torch.tensor([-(2**40), 3, 2**40])
    found = lowrank_linear(*call[:6], **call.options, rows=rows, backend="triton")
    wanted = lowrank_linear(*call[:6], **call.options, rows=torch.tensor([0, 3, 16]), backend="triton")
    assert torch.equal(found, wanted)
