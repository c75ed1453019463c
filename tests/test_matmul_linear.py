"""`matmul_linear`, (I + P Q) W, against the product written out, in values and derivatives."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

from tarp_kernels import Generator, lowrank_linear
from tarp_kernels.ops.matmul_linear import matmul_linear
from tests.hadamard_linear.test_derivatives import allocations
from tests.threads import one_thread

NAMES = ("x", "weight", "bias", "P", "Q", "V", "U", "w1")
OFFSETS = torch.tensor([0, 3, 3, 7])


def build(additive=True, tasks=False, dtype=torch.float64, shape=(7, 6, 5), r=2):
    draw = torch.Generator().manual_seed(0)
    (T, K, N), lead = shape, (3,) if tasks else ()
    shapes = {"x": (T, K), "weight": (N, K), "bias": (N,), "P": (*lead, N, r), "Q": (*lead, r, N)}
    if additive:
        shapes |= {"V": (*lead, r, K), "U": (*lead, N, r), "w1": (*lead, r, K)}
    return {n: torch.randn(s, generator=draw, dtype=torch.float64).mul(0.5).to(dtype) for n, s in shapes.items()}


def run(tensors):
    arguments = (tensors.get(name) for name in NAMES[:-1])
    segments = OFFSETS if tensors["P"].dim() == 3 else None
    generator = Generator(tensors["w1"], activation="one_plus") if "w1" in tensors else None
    return matmul_linear(*arguments, generator, sigma="diag", scaling=0.5, segments=segments, dropout=None)


def equation(tensors, mistake=""):
    tasks = tensors["P"].dim() == 3
    rows = []
    ends = OFFSETS.tolist() if tasks else [0, tensors["x"].shape[0]]
    for i, (start, end) in enumerate(zip(ends[:-1], ends[1:], strict=True)):
        at = ... if not tasks else (i + 1) % 3 if mistake == "neighbour" else i
        P, Q, weight = tensors["P"][at], tensors["Q"][at], tensors["weight"]
        update = Q.mT @ P.mT if mistake == "transposed" else P @ Q
        if mistake == "dropped":
            update = update * 0
        x = tensors["x"][start:end]
        y = F.linear(x, weight + update @ weight, tensors["bias"])
        if "V" in tensors:
            s = 1 + F.linear(x, tensors["w1"][at])
            y = y + 0.5 * F.linear(s * F.linear(x, tensors["V"][at]), tensors["U"][at])
        rows.append(y)
    return torch.cat(rows)


def results(function, tensors):
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    y = function(leaves)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)
    found = torch.autograd.grad(y, list(leaves.values()), dy, allow_unused=True)
    zeros = (torch.zeros_like(t) if g is None else g for g, t in zip(found, leaves.values(), strict=True))
    return {"y": y.detach()} | dict(zip(leaves, zeros, strict=True))


TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


@pytest.mark.parametrize("additive", [True, False])
@pytest.mark.parametrize("tasks", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_values_and_gradients(dtype, tasks, additive):
    tensors = build(additive, tasks, dtype)
    found, double = results(run, tensors), {name: tensor.double() for name, tensor in tensors.items()}
    wanted = results(equation, double)

    def error(got, want):
        return float((got.double() - want).norm() / want.norm())

    for name, want in wanted.items():
        assert found[name].dtype == dtype and error(found[name], want) <= TOLERANCES[dtype], name
    for mistake in ("transposed", "dropped", *(("neighbour",) if tasks else ())):
        wrong = results(lambda given, m=mistake: equation(given, m), double)
        for name in ("y", "x", "weight", "P", "Q"):
            assert error(wrong[name], wanted[name]) > TOLERANCES[torch.bfloat16], (mistake, name)


@pytest.mark.parametrize("additive", [True, False])
@pytest.mark.parametrize("tasks", [True, False])
def test_derivatives(tasks, additive):
    tensors = build(additive, tasks)

    def function(*values):
        return run(dict(zip(tensors, values, strict=True)))

    leaves = tuple(tensor.requires_grad_() for tensor in tensors.values())
    with one_thread():
        assert gradcheck(function, leaves) and gradgradcheck(function, leaves)


def test_nothing_of_the_weights_size_is_made():
    tensors = build(dtype=torch.float32, shape=(8, 512, 640))
    weight = tensors.pop("weight")

    def forward_and_backward():
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
        run(leaves | {"weight": weight}).sum().backward()

    assert allocations(forward_and_backward) < weight.numel() * 4 / 10


def test_under_autocast():
    tensors = build(dtype=torch.float32)
    wanted = equation(tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = run(tensors)
    plain = lowrank_linear(*(tensors[n] for n in NAMES[:3]), tensors["V"], tensors["U"], Generator(tensors["w1"]))
    assert y.dtype == torch.bfloat16 and (y - wanted).norm() < 0.02 * wanted.norm() < (plain - wanted).norm()
