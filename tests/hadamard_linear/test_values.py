"""`hadamard_linear` on every backend against float64, and the mistakes that the bounds must see."""

import pytest
import torch

from tests.hadamard_linear.cases import ACTIVATIONS, CASES, Case, Mistakes, build, exact, excesses
from tests.lowrank_linear.backends import each_runner

each_case = pytest.mark.parametrize("case", CASES, ids=str)


@each_runner
@each_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients(runner, case, dtype):
    case = case.with_(dtype=dtype, adapter_dtype=torch.float32 if case.seed % 2 else None)
    call = build(case)
    with runner.active():
        found = call.gradients(runner.backend)
    assert found["y"].dtype == dtype
    assert {name: value.dtype for name, value in found.items() if name != "y"} == {
        name: tensor.dtype for name, tensor in call.tensors.items()
    }
    wrong = {name: ratio for name, ratio in excesses(found, call, runner.on_a_gpu).items() if not ratio <= 1}
    assert wrong == {}


def mistakes(case: Case):
    """(name, what is done differently, the results that must be seen to be wrong)."""
    yield "no factor", Mistakes(activation=torch.ones_like), ("y", "x", "weight")
    yield "a constant factor", Mistakes(detached=True), ("P", "Q")
    other = "softplus" if case.activation == "centred_softplus" else "centred_softplus"
    yield "another activation", Mistakes(activation=ACTIVATIONS[other]), ("y", "x", "weight")
    if case.segments is not None:
        yield "the neighbour's factor", Mistakes(neighbour=True), ("y", "x", "P")
    if case.blocks > 1:
        yield "blocks in another order", Mistakes(reversed_blocks=True), ("y", "x", "Q")


@pytest.mark.parametrize("case", [case for case in CASES if build(case).dy.numel() > 10], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tensor_cores", [False, True])
def test_no_bound_lets_a_mistake_pass(case, dtype, tensor_cores):
    """On tensor cores without the additive half, whose roundings of a product of two long sums would cover them."""
    assert mistakes_that_pass(case.with_(dtype=dtype, rank=0 if tensor_cores else case.rank), tensor_cores) == []


def mistakes_that_pass(case: Case, tensor_cores: bool) -> list[str]:
    call = build(case)
    passed = []
    for name, wrong, results in mistakes(case):
        ratios = excesses(exact(call, wrong), call, tensor_cores)
        passed += [f"{name}: {result}" for result in results if not ratios[result] > 1]
    zeros = excesses({name: torch.zeros_like(value) for name, value in exact(call).items()}, call, tensor_cores)
    passed += [f"zeros: {name}" for name in ("y", "x", "weight", "P", "Q") if not zeros[name] > 1]
    return passed


@each_runner
@pytest.mark.parametrize("name", ["x", "weight", "P", "Q", "V"])
def test_one_gradient_alone_has_the_bits_of_all_together(runner, name):
    call = build(Case(segments=(5, 0, 12)))
    with runner.active():
        alone, together = call.gradients(runner.backend, (name,)), call.gradients(runner.backend)
    assert alone.keys() == {"y", name} and torch.equal(alone[name], together[name])


@each_runner
@pytest.mark.parametrize("segments", [None, (120, 3)])
def test_the_same_bits_on_every_call_and_at_every_thread_count(runner, segments):
    """Of what the kernels compute; the gradients of W and the bias are PyTorch's own products."""
    call = build(Case(shape=(123, 600, 300), segments=segments, factor_rank=6))
    names = ("x", "P", "Q", "V", "U", "w1")
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 2, 3):
            torch.set_num_threads(threads)
            with runner.active():
                results.append(call.gradients(runner.backend, names))
    finally:
        torch.set_num_threads(before)
    first = results[1] if runner.backend == "reference" else results[0]
    for found in results[1:3] if runner.backend == "reference" else results:
        assert all(torch.equal(found[name], first[name]) for name in first)


def test_at_zero_the_centred_factor_is_the_base_layer():
    case = Case(rank=0, dtype=torch.float32)
    call = build(case)
    call.tensors["P"].zero_()
    base = torch.nn.functional.linear(*(call.tensors[name] for name in ("x", "weight", "bias")))
    torch.testing.assert_close(call.run(None), base, rtol=1e-6, atol=1e-6)
    published = call._replace(options=call.options | {"activation": "softplus"})
    shrunk = torch.nn.functional.linear(call.tensors["x"], 0.6931472 * call.tensors["weight"], call.tensors["bias"])
    torch.testing.assert_close(published.run(None), shrunk, rtol=1e-6, atol=1e-5)
