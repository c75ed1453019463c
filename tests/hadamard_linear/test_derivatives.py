"""Second order, torch.library, compilation, Kronecker arguments, memory and bad input of `hadamard_linear`."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import tarp_kernels
from tarp_kernels import Generator, hadamard_linear
from tarp_kernels.ops.factor import factor
from tarp_kernels.ops.hadamard_linear import kronecker
from tests.hadamard_linear.cases import ACTIVATIONS, Call, Case, build, evaluate
from tests.lowrank_linear.backends import each_backend, each_fast_backend, marked
from tests.threads import one_thread

FORMS = [
    Case(shape=(3, 4, 2), factor_rank=2),
    Case(shape=(3, 4, 2), factor_rank=2, blocks=2, activation="softplus", rank=0, bias=False),
    Case(shape=(0, 4, 2), factor_rank=1, segments=(2, 0, 1), activation="one_plus", dropout=0.3),
]


@pytest.mark.parametrize("case", FORMS, ids=str)
def test_derivatives_of_the_reference(case):
    call = build(case.with_(dtype=torch.float64))
    names = list(call.tensors)

    def run(*tensors):
        return call.run("reference", **dict(zip(names, tensors, strict=True)))

    leaves = tuple(tensor.detach().requires_grad_() for tensor in call.tensors.values())
    with one_thread():
        assert gradcheck(run, leaves) and gradgradcheck(run, leaves)


def second_order(call: Call, run) -> list[torch.Tensor]:
    """Gradients of a number made of all first-order gradients, for every tensor but the bias, and for dy."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in call.tensors.items()}
    dy = call.dy.detach().requires_grad_()
    first = torch.autograd.grad(run(leaves), list(leaves.values()), dy, create_graph=True)
    total = sum((gradient * 0.01 * (i + 1)).sin().sum() for i, gradient in enumerate(first))
    return list(torch.autograd.grad(total, [*(leaf for name, leaf in leaves.items() if name != "bias"), dy]))


@each_fast_backend
@pytest.mark.parametrize("case", [*FORMS, Case(factor_rank=5), Case(segments=(5, 12), blocks=3)], ids=str)
def test_second_order_gradients(backend, case):
    call = build(case)
    exact = call.double()
    wanted = second_order(exact, lambda leaves: evaluate(exact._replace(tensors=leaves)))
    found = second_order(call, lambda leaves: call.run(backend, **leaves))
    for got, want in zip(found, wanted, strict=True):
        assert (got - want).norm() <= 3e-4 * want.norm() and want.norm() > 0


@each_backend
@pytest.mark.parametrize("case", FORMS, ids=str)
def test_opcheck(backend, case):
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        operator = torch.ops.tarp_kernels.lowrank_linear.default
        call = build(case)
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in call.tensors.items()}

        def spy(*arguments):
            seen.append(arguments)
            return operator(*arguments)

        from tarp_kernels.ops.lowrank_linear import autograd

        patch.setattr(autograd, "_forward_op", spy)
        patch.setattr(autograd, "needs_dispatcher", lambda x: True)
        call.run(backend, **leaves)
    torch.library.opcheck(operator, seen[0])


@each_backend
def test_compiled_without_a_break(backend):
    call = build(Case(segments=(5, 12)))
    torch._dynamo.reset()
    compiled = torch.compile(lambda tensors: call.run(backend, **tensors), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(call.tensors), call.run(backend))
    torch._dynamo.reset()


# --- Kronecker -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lead", [(), (2,)])
def test_kronecker_products_are_blocks_of_columns(lead):
    terms, n, N, K, r = 3, 4, 20, 12, 2
    H, U, V = (
        torch.randn(*lead, terms, n, n),
        torch.randn(*lead, terms, N // n, r),
        torch.randn(*lead, terms, r, K // n),
    )
    P, Q = kronecker(H, U, V)
    assert P.shape == (*lead, n, N, terms * r) and Q.shape == (*lead, terms * r, K // n)
    for i in range(lead[0] if lead else 1):
        at = i if lead else ...
        wanted = sum(torch.kron(h, u @ v) for h, u, v in zip(H[at], U[at], V[at], strict=True))
        torch.testing.assert_close(factor(P[at], Q[at], "one_plus") - 1, wanted, rtol=1e-5, atol=1e-5)


# --- memory ----------------------------------------------------------------------------------------------------------


def allocations(run) -> int:
    """Bytes of the largest tensor that PyTorch allocates."""
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    return max((event.cpu_memory_usage for event in profile.events()), default=0)


@pytest.mark.native
@pytest.mark.skipif("cpu" not in tarp_kernels.available_backends(), reason="the native backend is not built")
def test_nothing_of_the_weights_size_is_allocated():
    call = build(Case(shape=(64, 1024, 1024), factor_rank=8, rank=4))
    names, W = ("x", "P", "Q", "V", "U", "w1"), 4 * 1024 * 1024
    share = W // 20 + 64 * 1024 * 4  # 5 % of W, and y or dx themselves
    assert allocations(lambda: call.run("cpu")) <= share
    assert allocations(lambda: call.gradients("cpu", names)) <= share
    assert allocations(lambda: call.run("reference")) >= W, "the profiler does not see what it looks for"


@pytest.mark.native
@pytest.mark.skipif("cpu" not in tarp_kernels.available_backends(), reason="the native backend is not built")
def test_second_order_takes_a_few_columns_of_the_weight_at_a_time():
    call = build(Case(shape=(8, 2048, 512), factor_rank=2, rank=0, bias=False))
    P = call.tensors["P"].detach().requires_grad_()

    def twice():
        (first,) = torch.autograd.grad(call.run("cpu", P=P), P, call.dy, create_graph=True)
        torch.autograd.grad(first.square().sum(), P)

    assert allocations(twice) <= 4 * 2048 * 512 // 4


# --- bad input -------------------------------------------------------------------------------------------------------

BAD = {
    "P: got shape": {"P": torch.zeros(22, 3)},
    "P: got shape .*R ≥ 1": {"P": torch.zeros(23, 0)},
    "leading task dimension need segments": {"P": torch.zeros(2, 2, 23, 3)},
    "P: got C = 5": {"P": torch.zeros(5, 23, 3)},
    "Q: got shape": {"Q": torch.zeros(4, 36)},
    "Q: got dtype": {"Q": torch.zeros(3, 36, dtype=torch.float64)},
    "P: lies on meta": {"P": torch.zeros(23, 3, device="meta")},
    "P: got NoneType": {"P": None},
    "weight: got shape": {"weight": torch.zeros(23, 35)},
    "U: got int": {"U": 3},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    call = build(Case())
    with pytest.raises((TypeError, ValueError), match=message):
        call.run("reference", **BAD[message])


def test_half_an_additive_part_and_unknown_names():
    call = build(Case())
    x, weight, bias, P, Q, V = (call.tensors[name] for name in ("x", "weight", "bias", "P", "Q", "V"))
    with pytest.raises(ValueError, match="U: got None beside a V"):
        hadamard_linear(x, weight, bias, P, Q, V, None)
    with pytest.raises(ValueError, match=f"activation: got 'exp', expected one of {', '.join(ACTIVATIONS)}"):
        hadamard_linear(x, weight, bias, P, Q, activation="exp")
    with pytest.raises(ValueError, match="segments: ends at 9"):
        hadamard_linear(x, weight, bias, P[None], Q[None], segments=torch.tensor([0, 9]))
    with pytest.raises(ValueError, match="generator: got one without V and U"):
        hadamard_linear(x, weight, bias, P, Q, generator=Generator(call.tensors["w1"]))


@pytest.mark.parametrize("backend", [marked("cpu", "cpu"), "reference"])
@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_the_factor_keeps_its_precision(backend, adapter_dtype):
    if backend not in tarp_kernels.available_backends():
        pytest.skip("the native backend is not built")
    call = build(Case(adapter_dtype=adapter_dtype))
    wanted = call.run(backend, **{name: tensor.float() for name, tensor in call.tensors.items()})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = call.run(backend)
    assert y.dtype == torch.bfloat16
    assert (y.float() - wanted).norm() <= 0.02 * wanted.norm()
