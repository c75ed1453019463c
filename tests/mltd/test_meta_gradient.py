"""The objectives against gradients by hand, closed forms and finite differences."""

import pytest
import torch

from mltd import InnerConfig
from mltd.learner import Learner, choose
from mltd.meta_gradient import OBJECTIVES, Problem
from tarp_kernels import tarp_parameters
from tests.mltd.conftest import loss_by_hand, random_tasks, tarp_model
from tests.mltd.test_inner_loop import adapt_alone


def gradient_of(objective, model, tasks, inner, query_steps, trains=("adapter",), alpha=None, rates=None):
    trained = dict(choose(model, trains))
    if rates is not None:
        trained |= {f"rates/{name}": rate for name, rate in rates.items()}
    problem = Problem(Learner(model, inner.adapts), inner, trained, query_steps, rates)
    return OBJECTIVES[objective](problem, tasks, alpha)


def mean(result, tasks):
    return [gradient / tasks for gradient in result.gradients.values()]


def by_hand(model, tasks, inner, query_steps):
    """First order: for each task and query step, adapt alone, take the query gradient there, and average them all."""
    own, total = tarp_parameters(model), None
    for task in tasks:
        for step in query_steps:
            start = {name: parameter.detach().clone() for name, parameter in own.items()}
            adapted = adapt_alone(model, task, InnerConfig(**{**vars(inner), "steps": step}))
            with torch.no_grad():
                for name, parameter in own.items():
                    parameter.copy_(adapted[name])
            gradients = torch.autograd.grad(loss_by_hand(model, task.query), list(own.values()))
            with torch.no_grad():
                for name, parameter in own.items():
                    parameter.copy_(start[name])
            total = gradients if total is None else [a + b for a, b in zip(total, gradients, strict=True)]
    return [gradient / (len(tasks) * len(query_steps)) for gradient in total]


def apart(got, expected):
    def flat(tensors):
        return torch.cat([tensor.flatten() for tensor in tensors])

    return ((flat(got) - flat(expected)).norm() / flat(expected).norm()).item()


@pytest.mark.parametrize("query_steps", [(2,), (0, 1, 3)])
@pytest.mark.parametrize(("family", "norms"), [("llama", False), ("gpt2", False), ("gpt2", True)])
def test_the_first_order_gradient_is_the_query_gradient_at_the_adapted_parameters(family, norms, query_steps):
    model, tasks = tarp_model(family, torch.float64, train_layernorm=norms), list(random_tasks(3))
    inner = InnerConfig(steps=3, lr=2e-2, clip=1.0)
    result = gradient_of("first_order", model, tasks, inner, query_steps)
    expected = by_hand(model, tasks, inner, query_steps)
    assert apart(mean(result, 3), expected) < 1e-9
    assert apart(by_hand(model, tasks, inner, (0,)), expected) > 1e-2, "unadapted gradients would pass as well"
    assert apart(by_hand(model, tasks[:2], inner, query_steps), expected) > 1e-2, "a lost task would pass as well"
    examples = sum(len(task.support) + len(task.query) for task in tasks)
    lengths = [
        sum(len(e.input_ids) for t in tasks for e in part(t)) for part in (lambda t: t.support, lambda t: t.query)
    ]
    assert result.examples == examples
    assert result.tokens == max(query_steps) * lengths[0] + len(query_steps) * lengths[1]


def test_the_multitask_gradient_is_that_of_all_examples_with_nothing_adapted():
    model, tasks = tarp_model(dtype=torch.float64), list(random_tasks(3))
    result = gradient_of("multitask", model, tasks, InnerConfig(max_tokens=50), (3,))
    losses = torch.stack([loss_by_hand(model, task.support + task.query) for task in tasks])
    # not of the mean: Llama's norms compute in float32 always, where a factor of 1/3 rounds
    summed = torch.autograd.grad(losses.sum(), list(tarp_parameters(model).values()))
    assert apart(mean(result, 3), [gradient / 3 for gradient in summed]) < 1e-9
    torch.testing.assert_close(result.losses, losses.detach(), rtol=1e-12, atol=0)
