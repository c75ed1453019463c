"""The kernels run what alpha selects and nothing else, counted in C × C products of a token as they run."""

import pytest
import torch

from tarp_kernels import _C
from tests.search_cell.cases import ALPHAS, Case, build, one_hot

pytestmark = pytest.mark.native
PRODUCTS = (0, 0, 1, 2, 3, 5)
# Edges that read n0 or n1 where nothing reaches it: the input is zero, and so is the product.
DEAD = {
    "dead n0": (4, 7),
    "dead n1": (8,),
    "from nothing": (4, 7),
    "only n2": (4, 7, 8),
    "none": (4, 7, 8),
}


@pytest.fixture
def counted(monkeypatch):
    """Products of each kernel call."""
    counts = {"forward": [], "backward": []}
    for direction, kept in counts.items():
        kernel = getattr(_C, f"search_cell_{direction}")

        def counting(*arguments, kernel=kernel, kept=kept):
            kept.append(kernel(*arguments))

        monkeypatch.setattr(_C, f"search_cell_{direction}", counting)
    return counts


def selected(name: str) -> int:
    """Products of what alpha selects, without edges out of nodes that are zero."""
    return sum(PRODUCTS[m] for edge, m in enumerate(ALPHAS[name]) if edge not in DEAD.get(name, ()))


@pytest.mark.parametrize("isa", _C.cpu_features()["usable"])
@pytest.mark.parametrize("name", ALPHAS)
def test_forward_runs_what_is_selected(name, isa, counted):
    before = _C.cpu_features()["active"]
    _C.set_isa(isa)
    try:
        build(Case(alpha=name, batch=(3, 50), d=70, width=64)).run("cpu")
    finally:
        _C.set_isa(before)
    assert counted["forward"] == [150 * selected(name)]


@pytest.mark.parametrize("name", ALPHAS)
def test_backward_runs_the_others_only_for_alpha(name, counted):
    call = build(Case(alpha=name, batch=(3, 11)))
    glu = 2 * sum(m == 3 for edge, m in enumerate(ALPHAS[name]) if edge not in DEAD.get(name, ()))  # runs again
    call.gradients("cpu", ("h",))
    assert counted["backward"].pop() == 33 * (selected(name) + glu)
    call.gradients("cpu")
    values = sum(PRODUCTS) * (9 - len(DEAD.get(name, ())))
    assert counted["backward"].pop() == 33 * (sum(PRODUCTS[m] for m in ALPHAS[name]) + values)
    assert counted["forward"] == [33 * selected(name)] * 2


def test_each_task_runs_its_own(counted):
    call = build(Case(batch=(2, 10), tasks=(10, 10)))
    alpha = torch.stack([one_hot((5,) * 9), one_hot((2, 1) + (0,) * 7)]).float()
    for own in (call, call._replace(tensors={n: t if n == "h" else t[0] for n, t in call.tensors.items()})):
        own.run("cpu", alpha=alpha)
    assert counted["forward"] == [10 * 45 + 10 * 1] * 2


@pytest.mark.parametrize("with_alpha", [True, False])
def test_weights_of_no_selected_operation_get_no_gradient(with_alpha):
    call = build(Case(alpha="published"))
    leaves = {name: t.detach().requires_grad_(with_alpha or name != "alpha") for name, t in call.tensors.items()}
    call.run("cpu", **leaves).sum().backward()
    without = {"linear", "linear_bias", "glu", "glu_bias", *(() if with_alpha else ("alpha",))}
    assert {name for name, leaf in leaves.items() if leaf.grad is None} == without
    for edge, m in enumerate(ALPHAS["published"]):
        assert (leaves["conv5"].grad[edge] != 0).any() == (m == 5)
        assert (leaves["conv3"].grad[edge] != 0).any() == (m == 4)


def test_unselected_weights_may_hold_anything():
    """NaN in them touches neither values nor gradients."""
    call = build(Case(alpha="mixed"))
    names = tuple(name for name in call.tensors if name != "alpha")
    wanted = call.gradients("cpu", names)
    for name, m in (("linear", 2), ("glu", 3), ("conv3", 4), ("conv5", 5)):
        for edge, own in enumerate(ALPHAS["mixed"]):
            if own != m:
                call.tensors[name][edge] = float("nan")
                call.tensors[f"{name}_bias"][edge] = float("nan")
    found = call.gradients("cpu", names)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
