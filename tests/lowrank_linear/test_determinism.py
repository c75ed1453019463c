"""The same inputs give the same bits, and no row feels another."""

import pytest
import torch

from tests.lowrank_linear.backends import each_backend, each_fast_backend
from tests.lowrank_linear.cases import Case, build, cotangent, run_with_gradients
from tests.lowrank_linear.oracle import bounds, excess

CASES = [
    Case(shape=(203, 97, 131), rank=7),
    Case(shape=(203, 97, 131), rank=7, generator="mlp", sigma="full", b1=True, dropout=0.3),
    Case(shape=(0, 97, 131), rank=7, segments="long", weight_layout="conv1d"),
    Case(shape=(7, 97, 131), rank=7, dtype=torch.bfloat16, adapter_dtype=torch.float32),
    Case(shape=(203, 97, 131), rank=7, dtype=torch.bfloat16),
]


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@each_backend
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_same_bits_on_every_call(backend, case, threads):
    dy = cotangent(case)
    first = run_with_gradients(build(case), dy, backend)
    for _ in range(4):
        disturb = torch.randn(1 << 18)  # other memory, other addresses
        again = run_with_gradients(build(case), dy.clone(), backend)
        assert all(torch.equal(again[name], value) for name, value in first.items())
        del disturb


@each_fast_backend
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_number_of_threads_moves_no_bit_of_the_kernels(backend, case):
    """No sum is split between threads. The gradients of weight and bias come from PyTorch, which promises less."""
    found = []
    before = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(run_with_gradients(build(case), cotangent(case), backend))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        for name in found[0].keys() - {"weight", "bias"}:
            assert torch.equal(other[name], found[0][name]), name


@each_backend
@pytest.mark.parametrize("case", CASES[:2] + CASES[3:], ids=str)
def test_other_rows_may_hold_anything(backend, case):
    """NaN and infinity in all rows but one leave that row's value and gradient as they were, to the bit."""
    call, dy = build(case), cotangent(case)
    expected = run_with_gradients(call, dy, backend, ("x",))
    for row in {0, case.rows // 2, case.rows - 1}:
        x, other_dy = call.x.clone(), dy.clone()
        elsewhere = torch.arange(case.rows) != row
        x[elsewhere] = float("nan")
        x[elsewhere & (torch.arange(case.rows) % 2 == 0)] = float("inf")
        other_dy[elsewhere] = float("nan")
        found = run_with_gradients(call._replace(x=x), other_dy, backend, ("x",))
        assert torch.equal(found["y"][row], expected["y"][row])
        assert torch.equal(found["x"][row], expected["x"][row])


@each_backend
@pytest.mark.parametrize("case", [c.with_(dropout=0.0) for c in CASES[:2] + CASES[3:]], ids=str)
def test_adding_and_removing_rows_moves_no_row_beyond_rounding(backend, case):
    """Another number of rows may block the dense product differently, and nothing else."""
    call, dy = build(case), cotangent(case)
    wanted = bounds(call, dy)
    whole = run_with_gradients(call, dy, backend, ("x",))
    for start, end in ((0, 1), (2, 3), (0, case.rows - 1), (3, case.rows)):
        part = call._replace(x=call.x[start:end])
        found = run_with_gradients(part, dy[start:end], backend, ("x",))
        for name in ("y", "x"):
            assert excess(found[name], wanted[name][start:end]) <= 1
            assert (found[name] - whole[name][start:end]).abs().max() <= 2 * wanted[name].error.max()
            wrong = found[name] + 1e-2 * whole[name].mean(0)  # a row that feels the others' mean
            assert excess(wrong, wanted[name][start:end]) > 1


@each_backend
def test_appended_rows_keep_the_dropout_of_the_earlier_ones(backend):
    """Dropout counts row · K + column, so a longer batch drops the same elements of its first rows."""
    case = Case(shape=(60, 33, 65), dropout=0.5)
    call = build(case)
    wanted = bounds(call, cotangent(case))["y"]
    part = call._replace(x=call.x[:20]).run(backend)
    assert excess(part, wanted[:20]) <= 1
    assert excess(call._replace(x=call.x[20:40]).run(backend), wanted[20:40]) > 1, "the mask ignores the row"


@each_backend
def test_equal_rows_get_equal_results_wherever_they_lie(backend):
    case = Case(shape=(131, 97, 133))
    call = build(case)
    same = call._replace(x=call.x[:1].expand(131, -1))
    y = same.run(backend)
    wanted = bounds(same, torch.ones_like(y))["y"]
    assert excess(y, wanted) <= 1
    assert (y - y[0]).abs().max() <= 2 * wanted.error.max()
