"""Who watches the oracle: three evaluations that share no code agree in float64."""

import numpy as np
import pytest
import torch

from tarp_kernels.ops.lowrank_linear import reference
from tarp_kernels.ops.lowrank_linear.contract import Operands
from tests.lowrank_linear.cases import (
    ACTIVATIONS,
    HIDDEN_ACTIVATIONS,
    Case,
    build,
    cotangent,
    forms,
    run_with_gradients,
)
from tests.lowrank_linear.oracle import Arithmetic, Oracle, exact, excess, rowwise

SMALL = (6, 7, 5)


def small_forms() -> list[Case]:
    """Every form in float64, with segments, dropout, scaling and bias in turn."""
    found = []
    for i, form in enumerate(forms()):
        varied = {
            "segments": ("none", "ragged", "one")[i % 3],
            "dropout": (0.0, 0.4)[i % 2],
            "scaling": (1.0, 1.5, -0.25)[i % 3],
            "bias": i % 5 > 0,
        }
        found.append(Case(**form, **varied, shape=SMALL, rank=(1, 3, 4)[i % 3], dtype=torch.float64, seed=i))
    return found


@pytest.mark.parametrize("case", small_forms(), ids=str)
def test_reference_equals_the_equation_row_by_row(case):
    call = build(case)
    expected = rowwise(call)
    found = call.run("reference").reshape(expected.shape).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)
    assert np.abs(expected).max() > 0.1


@pytest.mark.parametrize("case", small_forms(), ids=str)
def test_oracle_equals_the_reference_and_its_derivative(case):
    """The oracle's gradients are written out by hand, the reference's come from autograd."""
    call, dy = build(case), cotangent(case)
    expected = run_with_gradients(call, dy, "reference")
    found = Oracle(call, dy).run()
    assert found.keys() == expected.keys()
    for name, bounded in found.items():
        torch.testing.assert_close(
            bounded.value, expected[name], rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
        )
        assert (bounded.error <= 1e-10 * (1 + bounded.value.abs())).all(), name


@pytest.mark.parametrize("case", small_forms(), ids=str)
def test_the_references_written_out_gradients_equal_autograd(case):
    """`reference.lowrank_linear_backward` is what compiled code runs on the reference backend."""
    call, dy = build(case), cotangent(case)
    expected = run_with_gradients(call, dy, "reference")
    factor = {"P": None, "Q": None, "multiplicative": "one_plus"}
    gradients = reference.lowrank_linear_backward(dy, *call[:6], **call.options, **factor)
    found = dict(zip(Operands._fields, gradients, strict=True))
    assert {name for name, grad in found.items() if grad is not None} == expected.keys() - {"y"}
    for name in expected.keys() - {"y"}:
        torch.testing.assert_close(
            found[name], expected[name], rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("name", sorted({*ACTIVATIONS, *HIDDEN_ACTIVATIONS}))
def test_slopes_and_bounds_of_activations(name):
    a = Arithmetic(2.0**-24)
    v = torch.linspace(-6, 6, 400, dtype=torch.float64)  # 0, where relu has no slope, is not among them
    step = 1e-6
    by_differences = (a.activated(name, exact(v + step)).value - a.activated(name, exact(v - step)).value) / (2 * step)
    torch.testing.assert_close(a.slope(name, exact(v)).value, by_differences, rtol=1e-8, atol=1e-8)
    assert by_differences.abs().max() < 1.13
    known = {**reference.HIDDEN_ACTIVATIONS, **reference.OUTPUT_ACTIVATIONS}[name]
    single = known(v.float())
    assert excess(single, a.activated(name, exact(v.float()))) <= 1


@pytest.mark.parametrize("length", [1, 10, 1000])
def test_the_bound_of_a_product_holds_and_is_of_the_right_size(length):
    """In float32 it holds; a sum in bfloat16 breaks it."""
    generator = torch.Generator().manual_seed(length)
    x, y = torch.randn(20, length, generator=generator), torch.randn(length, 30, generator=generator)
    bounded = Arithmetic(2.0**-24).product(exact(x), exact(y))
    assert excess(x @ y, bounded) <= 1
    running = torch.zeros(20, 30)
    for k in range(length):
        running = (running + x[:, k : k + 1] * y[k]).bfloat16().float()
    assert excess(running, bounded) > 1


def test_nan_and_a_wrong_shape_never_pass():
    wanted = exact(torch.ones(2, 3))
    assert excess(torch.ones(2, 3), wanted) == 0
    assert excess(torch.tensor([[1.0, 1.0, float("nan")]] * 2), wanted) == float("inf")
    with pytest.raises(AssertionError, match="shape"):
        excess(torch.ones(3, 2), wanted)
