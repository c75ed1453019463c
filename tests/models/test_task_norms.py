"""`task_parallel` with train_layernorm: whole models give what each task gives alone with norms of its own."""

import pytest
import torch

from tarp_kernels import disable_tarp, tarp_parameters, task_parallel
from tests.models.test_training import NO_DROPOUT
from tests.models.tiny import FAMILIES, inputs, tarp_model

OFFSETS = [0, 1, 1, 3]


def stacks(model) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(4)
    return {
        name: (p.detach() + 0.2 * torch.randn(3, *p.shape, generator=draw, dtype=p.dtype)).requires_grad_()
        for name, p in tarp_parameters(model).items()
    }


def norms_of(stack) -> list[str]:
    return [name for name in stack if name.rpartition(".")[2] in ("weight", "bias")]


def alone(model, stack, batch) -> torch.Tensor:
    pieces = []
    for task in (0, 2):
        own = {name: tensor[task] for name, tensor in stack.items()}
        rows = {name: value[OFFSETS[task] : OFFSETS[task + 1]] for name, value in batch.items()}
        pieces.append(torch.func.functional_call(model, own, kwargs=rows).logits)
    return torch.cat(pieces)


@pytest.mark.parametrize("family", FAMILIES)
def test_values_and_gradients_are_those_of_each_task_alone(family):
    model, batch = tarp_model(family, dtype=torch.float64, train_layernorm=True), inputs(family)
    stack = stacks(model)
    names, before = norms_of(stack), {name: p.detach().clone() for name, p in model.named_parameters()}
    assert names
    with task_parallel(model, stack, torch.tensor(OFFSETS)):
        together = model(**batch).logits
        found = torch.autograd.grad(together.sin().sum(), list(stack.values()))
        with disable_tarp(model):
            off = model(**batch).logits
    wanted = alone(model, stack, batch)
    # to float32: the norms of Llama and T5 work in it
    torch.testing.assert_close(together, wanted, rtol=1e-5, atol=1e-5)
    expected = torch.autograd.grad(wanted.sin().sum(), list(stack.values()))
    for name, got, want in zip(stack, found, expected, strict=True):
        assert not got[1].any(), "a task without rows"
        assert (got - want).norm() <= 1e-5 * (want.norm() + 1e-3), name
    for name in names:
        swapped = stack | {name: stack[name].flip(0)}
        with task_parallel(model, swapped, torch.tensor(OFFSETS)):
            assert (model(**batch).logits - wanted).abs().max() > 1e-4, f"another task's {name} would go unnoticed"
    with disable_tarp(model):
        assert torch.equal(model(**batch).logits, off)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_activations_use_the_same_norms(family, reentrant):
    model = tarp_model(family, dtype=torch.float64, train_layernorm=True, changes=NO_DROPOUT[family]).train()
    batch = inputs(family)
    stack, offsets = stacks(model), torch.tensor(OFFSETS)

    def gradients():
        for tensor in stack.values():
            tensor.grad = None
        with task_parallel(model, stack, offsets):
            model(**batch).loss.backward()
        return {name: tensor.grad for name, tensor in stack.items() if tensor.grad is not None}

    wanted = gradients()
    model.enable_input_require_grads()  # what a re-entrant checkpoint needs to have a backward pass at all
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    found = gradients()
    for name in norms_of(stack):
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-6, atol=1e-9)
    assert all(wanted[name].any() for name in norms_of(stack))
