"""Autocast, activation checkpointing, torch.func, dispatch modes, in-place changes: what PyTorch puts around a call."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from tests.lowrank_linear.backends import each_backend
from tests.lowrank_linear.cases import Call, Case, basic_forms, build, run_with_gradients

BFLOAT16 = torch.bfloat16


def cast(call: Call, names: tuple[str, ...], dtype) -> Call:
    return call.with_tensors({n: t.to(dtype) for n, t in call.tensors.items() if n in names})


# --- autocast ---------------------------------------------------------------------------------------------------------


@each_backend
@pytest.mark.parametrize("case", basic_forms(), ids=str)
def test_autocast_is_the_call_with_a_cast_input_and_weight(backend, case):
    """To the bit, gradients too: autocast must not reach inside the operator."""
    call = build(case.with_(shape=(max(case.shape[0], 9), 33, 17)))
    by_hand = cast(call, ("x", "weight", "bias"), BFLOAT16)
    dy = torch.randn(*call.x.shape[:-1], 17).to(BFLOAT16)
    wanted = run_with_gradients(by_hand, dy, backend)
    leaves = call.leaves()
    with torch.autocast("cpu", BFLOAT16):
        y = leaves.run(backend)
    assert y.dtype == BFLOAT16 and torch.equal(y, wanted["y"])
    gradients = torch.autograd.grad(y, list(leaves.tensors.values()), dy)
    for (name, tensor), gradient in zip(leaves.tensors.items(), gradients, strict=True):
        assert gradient.dtype == tensor.dtype == torch.float32, name
        assert torch.equal(gradient, wanted[name].float()), name
    assert not torch.equal(y.float(), call.run(backend)), "nothing was cast"


@each_backend
def test_backward_inside_autocast(backend):
    call = build(Case(shape=(9, 33, 17), generator="mlp")).leaves(("x", "V", "U", "w1", "w2"))
    wanted = list(call.with_tensors({}).tensors.values())
    wanted = [t for t in wanted if t.requires_grad]
    with torch.autocast("cpu", BFLOAT16):
        inside = torch.autograd.grad(call.run(backend).float().square().sum(), wanted)
        y = call.run(backend)
    outside = torch.autograd.grad(y.float().square().sum(), wanted)
    for got, want in zip(inside, outside, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2 * want.abs().max().item())


@each_backend
def test_second_order_inside_autocast(backend):
    call = build(Case(shape=(9, 33, 17), generator="mlp")).leaves(("V", "U", "w1"))

    def meta(call: Call) -> list[Tensor]:
        start = [call.V, call.U, call.generator.w1]
        (inner,) = torch.autograd.grad(call.run(backend).float().square().mean(), [call.V], create_graph=True)
        return list(torch.autograd.grad((inner * inner).sum(), start))

    wanted = meta(call)
    with torch.autocast("cpu", BFLOAT16):
        found = meta(call)
    for got, want in zip(found, wanted, strict=True):
        assert (got - want).norm() <= 0.05 * want.norm() and want.norm() > 0


@each_backend
def test_autocast_leaves_float64_and_bfloat16_adapters_alone(backend):
    call = build(Case(shape=(9, 33, 17)))
    half = cast(call, ("V", "U", "w1"), BFLOAT16)
    with torch.autocast("cpu", BFLOAT16):
        y = half.run(backend)
    assert torch.equal(y, cast(half, ("x", "weight", "bias"), BFLOAT16).run(backend))
    double = call.double()
    with torch.autocast("cpu", BFLOAT16):
        assert double.run().dtype == torch.float64


# --- checkpointing ----------------------------------------------------------------------------------------------------


@each_backend
@pytest.mark.parametrize("case", basic_forms(), ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_checkpointing_gives_the_same_bits(backend, case, autocast):
    plain, again = build(case).leaves(), build(case).leaves()
    with torch.autocast("cpu", BFLOAT16, enabled=autocast):
        expected = plain.run(backend)
        found = checkpoint(lambda *ts: again.with_tensors(dict(zip(again.tensors, ts, strict=True))).run(backend),
                           *again.tensors.values(), use_reentrant=False)  # fmt: skip
    assert torch.equal(found, expected)
    dy = torch.randn_like(expected)
    expected.backward(dy)
    found.backward(dy)
    for name, tensor in plain.tensors.items():
        assert torch.equal(again.tensors[name].grad, tensor.grad), name


@each_backend
def test_checkpointing_keeps_second_order(backend):
    call = build(Case(shape=(9, 8, 7), generator="mlp")).leaves(("V",))

    def meta(run) -> Tensor:
        (inner,) = torch.autograd.grad(run().square().mean(), call.V, create_graph=True)
        return torch.autograd.grad(inner.square().sum(), call.V)[0]

    expected = meta(lambda: call.run(backend))
    found = meta(lambda: checkpoint(lambda V: call._replace(V=V).run(backend), call.V, use_reentrant=False))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert expected.any()


# --- torch.func -------------------------------------------------------------------------------------------------------


def right_or_refused(transformed, wanted, message: str = "functorch") -> None:
    """torch.func serves registered operators only in part: refusing by name is fine, a wrong result is not."""
    try:
        found = transformed()
    except RuntimeError as error:
        assert message in str(error)
        return
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        assert want.any()


@each_backend
@pytest.mark.parametrize("case", basic_forms(), ids=str)
def test_func_grad(backend, case):
    call = build(case)
    dy = torch.randn(*call.x.shape[:-1], case.shape[2])
    wanted = run_with_gradients(call, dy, backend)

    def loss(tensors):
        return (call.with_tensors(tensors).run(backend) * dy).sum()

    right_or_refused(lambda: torch.func.grad(loss)(call.tensors).values(), [wanted[name] for name in call.tensors])


@each_backend
def test_func_grad_of_grad(backend):
    call = build(Case(shape=(9, 8, 7), generator="mlp"))

    def inner(V):
        return torch.func.grad(lambda v: call._replace(V=v).run(backend).square().mean())(V)

    leaves = call.leaves(("V",))
    (first,) = torch.autograd.grad(leaves.run(backend).square().mean(), leaves.V, create_graph=True)
    wanted = torch.autograd.grad(first.square().sum(), leaves.V)
    right_or_refused(lambda: [torch.func.grad(lambda V: inner(V).square().sum())(call.V)], wanted)


@each_backend
def test_func_vmap_over_adapters(backend):
    """Segments are the way to run many adapters; vmap may be refused, but not wrong."""
    call = build(Case(shape=(9, 8, 7)))
    many = torch.stack([call.V, 2 * call.V])
    wanted = torch.stack([call._replace(V=V).run(backend) for V in many])
    transformed = torch.func.vmap(lambda V: call._replace(V=V).run(backend))
    right_or_refused(lambda: [transformed(many)], [wanted], message="vmap")


@each_backend
def test_functional_call(backend):
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.V = torch.nn.Parameter(call.V.clone())

        def forward(self, x):
            return call._replace(x=x, V=self.V).run(backend)

    call = build(Case(shape=(9, 8, 7)))
    other = torch.randn_like(call.V).requires_grad_()
    y = torch.func.functional_call(Layer(), {"V": other}, (call.x,))
    assert torch.equal(y, call._replace(V=other).run(backend))
    assert torch.autograd.grad(y.sum(), other)[0].any()


# --- the rest ---------------------------------------------------------------------------------------------------------


class Seen(TorchDispatchMode):
    def __init__(self):
        self.operators: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operators.append(str(function))
        return function(*args, **(kwargs or {}))


@each_backend
def test_a_dispatch_mode_sees_one_operator_and_the_same_bits(backend):
    call = build(Case(shape=(9, 8, 7), generator="mlp")).leaves()
    dy = torch.randn(9, 7)
    wanted = run_with_gradients(call, dy, backend)
    with Seen() as seen:
        found = run_with_gradients(call, dy, backend)
    assert "tarp_kernels.lowrank_linear.default" in seen.operators
    assert "tarp_kernels.lowrank_linear_backward.default" in seen.operators
    for name, value in found.items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-5, atol=1e-5)


@each_backend
@pytest.mark.parametrize("name", ["x", "weight", "V", "U", "w1"])
def test_an_operand_changed_in_place_before_backward_is_an_error(backend, name):
    call = build(Case(shape=(9, 8, 7))).leaves()
    y = call.run(backend)
    with torch.no_grad():
        call.tensors[name].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@each_backend
def test_a_weight_changed_in_place_between_calls_counts(backend):
    """Whatever is packed or cached of a frozen weight must notice."""
    call = build(Case(shape=(9, 8, 7)))
    first = call.run(backend)
    for change in (lambda w: w.mul_(2), lambda w: w.data.mul_(2), lambda w: w.copy_(torch.randn_like(w))):
        change(call.weight)
        fresh = call._replace(weight=call.weight.clone()).run(backend)
        assert torch.equal(call.run(backend), fresh)
        assert not torch.equal(fresh, first)


@each_backend
def test_inference_mode_and_no_grad_give_the_same_bits(backend):
    call = build(Case(shape=(9, 8, 7))).leaves()
    y = call.run(backend)
    with torch.no_grad():
        plain = call.run(backend)
    with torch.inference_mode():
        inference = call.run(backend)
    assert torch.equal(y, plain) and torch.equal(y, inference)
    assert y.requires_grad and not plain.requires_grad


@each_backend
def test_a_lazily_negated_operand(backend):
    """The imaginary part of a conjugate is a view with a sign that nobody has applied yet."""
    call = build(Case(shape=(9, 8, 7)))
    for name, tensor in call.tensors.items():
        lazy = torch.complex(torch.zeros_like(tensor), -tensor).conj().imag
        assert lazy.is_neg() and torch.equal(lazy, tensor)
        found = call.with_tensors({name: lazy}).run(backend)
        torch.testing.assert_close(found, call.run(backend), rtol=1e-5, atol=1e-5)


@each_backend
def test_threads_of_the_host_language(backend):
    """Calls from many Python threads at once do not share scratch memory."""
    from concurrent.futures import ThreadPoolExecutor

    calls = [build(Case(shape=(40 + i, 33, 65), generator="mlp", seed=i)) for i in range(8)]
    expected = [call.run(backend) for call in calls]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for got, want in zip(pool.map(lambda call: call.run(backend), calls), expected, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
