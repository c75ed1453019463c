"""Bad input never reaches a kernel: the error names the argument, what came, what was expected."""

import numpy as np
import pytest
import torch

from tarp_kernels import available_backends, lowrank_linear
from tarp_kernels.ops.lowrank_linear import autograd
from tests.lowrank_linear.backends import cpu_backends, each_backend
from tests.lowrank_linear.bad_input import BAD, CPU_BAD, FULL, HALF, LINEAR, MLP, SEGMENTED, Arguments, good


@pytest.fixture
def no_kernel(monkeypatch):
    """From here on any kernel that runs fails the test."""

    def refuse(*_):
        raise AssertionError("a kernel ran on bad input")

    monkeypatch.setattr(autograd, "apply", refuse)


def check(arguments: Arguments, exception, parts: str) -> None:
    with pytest.raises(exception) as raised:
        lowrank_linear(**arguments)
    message, (name, *others) = str(raised.value), parts.split(" | ")
    missing = [part for part in others if part not in message]
    assert not missing, f"{message!r} lacks {missing}"
    assert message.startswith((name, f"generator.{name}")), f"{message!r} does not begin with the argument's name"


@pytest.mark.parametrize("backend", [None, *cpu_backends])
@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("seen", [False, True], ids=["fresh", "after a good call"])
def test_bad_input(name, backend, seen, monkeypatch):
    """Also right after the same call with good arguments, whose checks may be remembered."""
    form, mutate, exception, parts = BAD[name]
    arguments = good(**form)
    if seen:
        lowrank_linear(**arguments, backend=backend)
    monkeypatch.setattr(autograd, "apply", lambda *_: pytest.fail("a kernel ran on bad input"))
    check({"backend": backend} | mutate(arguments), exception, parts)


@pytest.mark.skipif("cpu" not in available_backends(), reason="no cpu backend")
@pytest.mark.parametrize("name", CPU_BAD)
def test_bad_input_of_the_cpu_backend(name, no_kernel):
    form, exception, parts = CPU_BAD[name]
    check(good(**form) | {"backend": "cpu"}, exception, parts)


@pytest.mark.parametrize("form", [LINEAR, MLP, SEGMENTED, FULL, HALF], ids=str)
@each_backend
def test_the_good_calls_are_good(form, backend):
    y = lowrank_linear(**good(**form), backend=backend)
    assert y.isfinite().all()


@each_backend
@pytest.mark.parametrize(
    "change",
    [
        {"scaling": 2},
        {"scaling": np.float64(1.5)},
        {"scaling": 0.0},
        {"dropout": (0, 1)},
        {"dropout": [0.5, 1]},
        {"dropout": (0.5, 2**63 - 1)},
        {"bias": None},
        {"generator": None},
        {"backend": None},
    ],
    ids=str,
)
def test_unusual_but_legal(change, backend):
    y = lowrank_linear(**({"backend": backend} | good() | change))
    assert y.isfinite().all() and y.shape == (6, 5)


@each_backend
@pytest.mark.parametrize(("K", "N"), [(0, 5), (7, 0), (0, 0)])
def test_layers_without_width(backend, K, N):
    """An empty sum is zero, as in torch.nn.functional.linear."""
    x, bias = torch.randn(4, K), torch.randn(N)
    y = lowrank_linear(x, torch.randn(N, K), bias, torch.randn(2, K), torch.randn(N, 2), None, backend=backend)
    expected = bias.expand(4, N)
    assert y.shape == (4, N)
    if K == 0:
        assert torch.equal(y, expected)


def test_a_good_call_reaches_the_kernel(no_kernel):
    """Or the table above would prove nothing."""
    with pytest.raises(AssertionError, match="a kernel ran"):
        lowrank_linear(**good())
