"""The oracle of `search_cell` against an independent unfused mixture, and its derivatives, in float64."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tarp_kernels import CellWeights
from tarp_kernels.ops.search_cell import autograd
from tests.lowrank_linear.backends import each_backend
from tests.search_cell.cases import ALPHAS, CASES, PADDING, PUBLISHED, Case, build, one_hot
from tests.search_cell.dense import Mistakes, dense_cell


def test_the_parameter_count_of_the_paper():
    shapes = CellWeights.shapes(768, 64)
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 556_736


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(case):
    call = build(case.with_(dtype=torch.float64))
    found, wanted = call.gradients("reference"), call.exact()
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def test_all_none_leaves_h_and_the_final_bias():
    call = build(Case(alpha="none", norm=True))
    assert torch.equal(call.run("reference"), call.tensors["h"] + call.tensors["output_bias"])


def test_all_identity_is_seven_thirds_of_the_projections():
    call = build(Case(alpha="identity", dtype=torch.float64))
    h, t = call.tensors["h"], call.tensors
    s = [torch.relu(h @ t["project"][i].t() + t["project_bias"][i]) for i in range(2)]
    wanted = h + 7 / 3 * (s[0] + s[1]) @ t["output"].t() + t["output_bias"]
    torch.testing.assert_close(call.run("reference"), wanted, rtol=1e-12, atol=1e-12)


SMALL = Case(d=3, width=2, batch=(2, 4), dtype=torch.float64, padding=(("left", 1), ("right", 2)))
DERIVATIVES = [
    SMALL,
    SMALL.with_(causal=False, norm=True, alpha="mixed"),
    SMALL.with_(alpha="published"),
    SMALL.with_(alpha="from nothing", tasks=(4, 4)),
]


@pytest.mark.parametrize("case", DERIVATIVES, ids=str)
@pytest.mark.parametrize("with_alpha", [False, True])
def test_first_and_second_derivatives(case, with_alpha):
    call = build(case)
    names = [name for name in call.tensors if with_alpha or name != "alpha"]

    def function(*tensors):
        return call.run("reference", **dict(zip(names, tensors, strict=True)))

    leaves = [call.tensors[name].detach().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    if with_alpha and case.alpha != "soft":
        return  # numerically alpha = 0 is a border: beyond it an operation runs; see the test below
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


def second(call, evaluate) -> list[torch.Tensor]:
    """Derivatives of a random number made of all first derivatives, in float64."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in call.tensors.items()}
    out = evaluate(leaves)
    first = torch.autograd.grad(out.sin().sum(), list(leaves.values()), create_graph=True, allow_unused=True)
    random = torch.Generator().manual_seed(1)
    number = torch.zeros(())
    for tensor, gradient in zip(leaves.values(), first, strict=True):
        direction = torch.randn(tensor.shape, generator=random, dtype=torch.float64)
        if gradient is not None:
            number = number + (gradient * direction.to(gradient.dtype)).sum()
    found = torch.autograd.grad(number, list(leaves.values()), allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(leaves.values(), found, strict=True)]


@each_backend
@pytest.mark.parametrize("case", DERIVATIVES, ids=str)
def test_second_derivatives_are_those_of_the_unfused_mixture(case, backend):
    """Also where alpha = 0 masks an operation."""
    call = build(case)

    def dense(leaves):
        own = {name: tensor for name, tensor in leaves.items() if name not in ("h", "alpha")}
        out = dense_cell(leaves["h"].flatten(0, 1), own, leaves["alpha"], call.pieces, causal=case.causal)
        return out.reshape(leaves["h"].shape)

    wanted = second(call, dense)
    tolerance = 1e-10
    if backend == "cpu":  # in float32, some 100 roundings of numbers of this size; the smallest of these is 1
        call, tolerance = build(case.with_(dtype=torch.float32)), 1e-4
    for name, found, full in zip(call.tensors, second(call, lambda t: call.run(backend, **t)), wanted, strict=True):
        error = (found.double() - full).abs().max()
        assert error <= tolerance * (1 + full.abs().max()), name


def products(operations) -> int:
    return sum((0, 0, 1, 2, 3, 5)[m] for m in operations)


@pytest.mark.parametrize("name", ["published", "none", "identity", "mixed", "conv5", "dead n0", "from nothing"])
@pytest.mark.parametrize("with_alpha", [False, True])
def test_no_product_runs_for_an_unselected_operation(name, with_alpha, monkeypatch):
    """Counted by PyTorch itself: 2 T C² for each C × C product, 2 T d C for each of the projections."""
    # Its counter is a mode, to which the cell would be one node.
    monkeypatch.setattr(autograd, "needs_dispatcher", lambda h: False)
    case = Case(alpha=name, batch=(2, 16), d=16, width=8)
    call, T = build(case), 32
    dead = {"dead n0": (4, 7), "from nothing": (4, 7)}.get(name, ())  # edges out of a node that is zero
    own = [m for edge, m in enumerate(ALPHAS[name]) if with_alpha or edge not in dead]
    reached = with_alpha or name != "none"  # a gradient of alpha needs every node
    projection, ran = 2 * T * 16 * 8, 2 * T * 8 * 8 * products(own)
    forward = (2 + reached) * projection + ran
    leaves = {n: t.detach().requires_grad_(n != "alpha" or with_alpha) for n, t in call.tensors.items()}
    with FlopCounterMode(display=False) as counter:
        out = call.run("reference", **leaves)
    assert counter.get_total_flops() == forward
    with FlopCounterMode(display=False) as counter:
        out.backward(call.dout)
    for operation, m in {"linear": 2, "glu": 3, "conv3": 4, "conv5": 5}.items():
        assert (leaves[operation].grad is None) == (m not in own), operation
    missing = with_alpha * 2 * T * 8 * 8 * (9 * (1 + 2 + 3 + 5) - products(own))
    if name in ("none", "from nothing"):  # little or nothing of out depends on the projections
        assert counter.get_total_flops() <= 2 * forward + missing
    else:
        assert counter.get_total_flops() == 2 * forward + missing


def test_edges_that_did_not_select_an_operation_get_zero_gradients():
    case = Case(alpha="published")
    call = build(case)
    found = call.gradients("reference", tuple(n for n in call.tensors if n != "alpha"))
    for edge, m in enumerate(PUBLISHED):
        assert (found["conv5"][edge] == 0).all() == (m != 5)
        assert (found["conv3_bias"][edge] == 0).all() == (m != 4)


@pytest.mark.parametrize("alpha", ["soft", "published"])
def test_the_future_moves_nothing(alpha):
    call = build(Case(alpha=alpha, batch=(2, 20), norm=True))
    before = call.run("reference")
    for t in (0, 1, 7, 18):
        h = call.tensors["h"].clone()
        h[:, t + 1 :] += torch.randn_like(h[:, t + 1 :])
        after = call.run("reference", h=h)
        assert torch.equal(after[:, : t + 1], before[:, : t + 1])
        assert not torch.equal(after[:, t + 1], before[:, t + 1])


MISTAKES = {
    "causal and not swapped": Mistakes(other_side=True),
    "one tap off": Mistakes(tap=1),
    "one tap off, backwards": Mistakes(tap=-1),
    "taps flipped": Mistakes(flipped=True),
    "relu dropped": Mistakes(no_relu=True),
    "gate dropped": Mistakes(no_gate=True),
    "halo missing": Mistakes(halo_of=4),
    "another edge's alpha": Mistakes(shuffled=True),
    "mean forgotten": Mistakes(third=True),
    "boundary ignored": Mistakes(joined=True),
    "another task's cell": Mistakes(neighbour=True),
}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", MISTAKES)
def test_every_mistake_is_seen_by_the_oracle(name, causal):
    call = build(Case(dtype=torch.float64, tasks=(11, 22), causal=causal, padding=PADDING))
    wanted, wrong = call.exact(), call.exact(MISTAKES[name])
    assert (wrong["out"] - wanted["out"]).abs().max() > 1e-2


def test_soft_alpha_of_zero_is_no_constant():
    """Selecting with weight: twice the alpha is twice the edge."""
    call = build(Case(alpha="only n2", dtype=torch.float64))
    call.tensors["output_bias"].zero_()
    once = call.run("reference") - call.tensors["h"]
    twice = call.run("reference", alpha=2 * call.tensors["alpha"]) - call.tensors["h"]
    torch.testing.assert_close(twice, 2 * once)
    assert one_hot(ALPHAS["only n2"]).sum() == 9
