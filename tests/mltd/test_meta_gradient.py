"""The objectives against gradients by hand, closed forms and finite differences."""

import contextlib
from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from mltd import InnerConfig, MetaConfig, MetaTrainer, TaskSet
from mltd.inner_rules import Rule
from mltd.learner import Learner, choose
from mltd.meta_gradient import OBJECTIVES, Problem
from tarp_kernels import SearchCellConfig, architecture, tarp_parameters
from tests.mltd.conftest import loss_by_hand, random_tasks, tarp_model
from tests.mltd.quadratic import CURVATURE, Vector, means, quadratic_tasks
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
        sum(len(e.input_ids) - 1 for t in tasks for e in part(t)) for part in (lambda t: t.support, lambda t: t.query)
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


# --- closed forms ----------------------------------------------------------------------------------------------------

LR, STEPS = 0.3, 3
SGD = InnerConfig(steps=STEPS, optimizer="sgd", lr=LR, adapts=("w",))


def summed(objective, inner=SGD, query_steps=(STEPS,), rates=None):
    """The objective's gradients of all quadratic tasks, task by task as the trainer has them."""
    model, tasks = Vector(), quadratic_tasks()
    results = [gradient_of(objective, model, [task], inner, query_steps, trains=("w",), rates=rates) for task in tasks]
    return {name: sum(result.gradients[name] for result in results) for name in results[0].gradients}


def closed_forms():
    """θ_T = s + (1 - ηc)^T (θ_0 - s), so that every gradient can be written down."""
    start, (support, query) = Vector().w.detach(), means(quadratic_tasks())
    shrunk = (1 - LR * CURVATURE) ** STEPS
    ends = support + shrunk * (start - support)
    at_end = CURVATURE * (ends - query)
    both = (support + query) / 2
    return {
        "first_order": at_end.sum(0),
        "second_order": (shrunk * at_end).sum(0),
        "reptile": ((1 - shrunk) * (start - both)).sum(0),
        "multitask": (CURVATURE * (start - both)).sum(0),
    }


@pytest.mark.parametrize("objective", ["first_order", "second_order", "reptile", "multitask"])
def test_closed_forms_on_quadratics(objective):
    forms = closed_forms()
    torch.testing.assert_close(summed(objective)["w"], forms[objective], rtol=1e-12, atol=1e-12)
    others = [form for name, form in forms.items() if name != objective]
    assert min((form - forms[objective]).norm() for form in others) > 0.1, "the forms are too alike"


def test_closed_forms_of_learned_rates():
    """dθ_T/dη: first order -Σ g_k; exact, by the chain of steps."""
    start, (support, query) = Vector().w.detach(), means(quadratic_tasks())
    rates = {"w": torch.tensor([0.3, 0.1, 0.2], dtype=torch.float64, requires_grad=True)}
    eta = rates["w"].detach()
    thetas = [support + (1 - eta * CURVATURE) ** k * (start - support) for k in range(STEPS + 1)]
    at_end = CURVATURE * (thetas[-1] - query)
    along = sum(CURVATURE * (theta - support) for theta in thetas[:-1])
    found = summed("first_order", rates=rates)
    torch.testing.assert_close(found["rates/w"], -(along * at_end).sum(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found["w"], at_end.sum(0), rtol=1e-12, atol=1e-12)
    slope = -STEPS * CURVATURE * (1 - eta * CURVATURE) ** (STEPS - 1) * (start - support)
    found = summed("second_order", rates=rates)
    torch.testing.assert_close(found["rates/w"], (slope * at_end).sum(0), rtol=1e-12, atol=1e-12)
    assert (slope + along).norm() > 0.1, "first order and exact are too alike"


def test_reptile_by_sgd_moves_towards_the_mean_of_the_ends():
    config = MetaConfig(SGD, iterations=1, tasks_per_batch=3, objective="reptile", trains=("w",), outer_lr=0.25)
    config = replace(config, outer_optimizer="sgd")
    model = Vector()
    start = model.w.detach().clone()
    MetaTrainer(model, TaskSet(quadratic_tasks()), config).train(progress=False)
    torch.testing.assert_close(model.w.detach(), start - 0.25 * closed_forms()["reptile"] / 3)


def test_what_has_no_gradient_is_refused_by_name():
    with pytest.raises(ValueError, match="trains: reptile moves only what is adapted"):
        gradient_of("reptile", tarp_model(), list(random_tasks(2)), InnerConfig(), (3,), trains=("base",))
    sdpa = tarp_model()
    sdpa.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match=r"attention is 'sdpa'.*attn_implementation=\"eager\""):
        gradient_of("second_order", sdpa, list(random_tasks(2)), InnerConfig(), (3,))
    with pytest.raises(ValueError, match="attention is 'sdpa'"):
        MetaTrainer(sdpa, random_tasks(2), MetaConfig(objective="second_order", tasks_per_batch=2))
    with pytest.raises(ValueError, match="learn_rates: 'reptile' has no gradient"):
        MetaConfig(objective="reptile", learn_rates=True)


# --- finite differences ----------------------------------------------------------------------------------------------

FORMS = {
    "diagonal": {},
    "full": {"sigma": "full"},
    "mlp": {"generator": "mlp", "r": 2},
    "static factor": {"multiplicative": "static"},
    "dynamic factor": {"multiplicative": "dynamic", "r": 2},
    "product from the left": {"multiplicative": "static", "product": "matmul"},
    "norms": {"train_layernorm": True},
    "cells": {"search_cell": SearchCellConfig(width=4)},
    "cells that are trained and not adapted": {"search_cell": SearchCellConfig(width=4)},
}


def eager(**form):
    model = tarp_model("gpt2", torch.float64, **form)
    model.set_attn_implementation("eager")
    return model


def query_loss(model, tasks, inner, alpha, rates=None):
    """The tasks' mean query loss after plain SGD on deep copies: torch's own autograd, first order only."""
    losses = []
    for i, task in enumerate(tasks):
        copy = deepcopy(model)
        own = choose(copy, inner.adapts)
        with contextlib.nullcontext() if alpha is None else architecture(copy, alpha[i]):
            for step in range(inner.steps):
                loss = loss_by_hand(copy, task.support)
                gradients = torch.autograd.grad(loss, list(own.values()), allow_unused=True)
                with torch.no_grad():
                    norm = torch.stack([g.norm() for g in gradients if g is not None]).norm()
                    factor = 1.0 if inner.clip is None else min(1.0, inner.clip / (norm.item() + 1e-6))
                    for (name, value), gradient in zip(own.items(), gradients, strict=True):
                        lr = inner.lr_at(step + 1) if rates is None else rates[name] * inner.lr_decay**step
                        if gradient is not None:
                            value.sub_(lr * factor * gradient)
            with torch.no_grad():
                losses.append(loss_by_hand(copy, task.query).item())
    return sum(losses)


def slope(model, tasks, inner, alpha, moves, rates=None, size=1e-6):
    """The derivative of `query_loss` along `moves` (tensor, direction), by central differences; a cell has kinks."""

    def move(by):
        with torch.no_grad():
            for tensor, direction in moves:
                tensor.add_(direction, alpha=by)

    ends = []
    for sign in (1, -1):
        move(sign * size)
        ends.append(query_loss(model, tasks, inner, alpha, rates))
        move(-sign * size)
    return (ends[0] - ends[1]) / (2 * size)


@pytest.mark.parametrize("form", FORMS)
def test_second_order_by_finite_differences(form):
    """Along one direction of the adapter, one of the base weights, and one of alpha where there are cells."""
    model, tasks = eager(**FORMS[form]), list(random_tasks(2, seed=3))
    inner = InnerConfig(steps=2, optimizer="sgd", lr=0.3, clip=0.5 if form == "diagonal" else None)
    draw = torch.Generator().manual_seed(1)
    alpha = None
    if "not adapted" in form:
        inner = replace(inner, adapts=("tarp",))
    if form.startswith("cells"):
        alpha = torch.rand(2, 9, 6, generator=draw, dtype=torch.float64).softmax(-1).requires_grad_()
    parts = {name: choose(model, (name,)) for name in ("adapter", "base")}
    exact = gradient_of("second_order", model, tasks, inner, (2,), trains=tuple(parts), alpha=alpha)
    rough = gradient_of("first_order", model, tasks, inner, (2,), trains=tuple(parts), alpha=alpha)
    sought = {part: ([(own[n], exact.gradients[n], rough.gradients[n]) for n in own]) for part, own in parts.items()}
    if alpha is not None:
        sought["alpha"] = [(alpha, exact.alpha, rough.alpha)]
    for part, entries in sought.items():
        moves = [(t, torch.randn(t.shape, generator=draw, dtype=t.dtype)) for t, _, _ in entries]
        found, first = (
            sum((entry[which] * d).sum().item() for entry, (_, d) in zip(entries, moves, strict=True))
            for which in (1, 2)
        )
        expected = slope(model, tasks, inner, alpha, moves)
        assert found == pytest.approx(expected, rel=2e-6), part
        assert first != pytest.approx(expected, rel=1e-3), f"{part}: first order would pass as well"


@pytest.mark.parametrize("objective", ["first_order", "second_order"])
def test_learned_rates_of_a_transformer_by_finite_differences(objective):
    """With one step first order is exact for the rates."""
    model, tasks = eager(), list(random_tasks(2, seed=3))
    inner = InnerConfig(steps=1 if objective == "first_order" else 2, optimizer="sgd", lr=1.0, lr_decay=0.5)
    draw = torch.Generator().manual_seed(1)
    rates = {
        name: (0.3 * torch.rand(value.shape, generator=draw, dtype=value.dtype)).requires_grad_()
        for name, value in choose(model, ("adapter",)).items()
    }
    result = gradient_of(objective, model, tasks, inner, (inner.steps,), rates=rates)
    moves = [(rate, torch.randn(rate.shape, generator=draw, dtype=rate.dtype)) for rate in rates.values()]
    found = sum(
        (result.gradients[f"rates/{name}"] * direction).sum().item()
        for name, (_, direction) in zip(rates, moves, strict=True)
    )
    expected = slope(model, tasks, inner, None, moves, rates)
    assert found == pytest.approx(expected, rel=2e-6) and abs(expected) > 1e-3


@pytest.mark.parametrize(("optimizer", "weight_decay"), [("sgd", 0.1), ("adam", 0.0), ("adam", 0.1), ("adamw", 0.1)])
def test_the_functional_optimisers_are_torchs(optimizer, weight_decay):
    draw = torch.Generator().manual_seed(0)
    mine = [torch.randn(3, 4, generator=draw, dtype=torch.float64)]
    theirs = [mine[0].clone().requires_grad_()]
    rule = Rule(optimizer, weight_decay)
    other = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[optimizer]
    stepper = other(theirs, lr=0.1, weight_decay=weight_decay)
    for step in range(1, 5):
        gradient = torch.randn(3, 4, generator=draw, dtype=torch.float64)
        gradient[0] = 0  # Adam divides by a root there whose own slope is infinite
        mine = [p - 0.1 * u for p, u in zip(mine, rule.directions(step, mine, [gradient]), strict=True)]
        theirs[0].grad = gradient
        stepper.step()
    torch.testing.assert_close(mine[0], theirs[0].detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_second_order_through_adam_by_finite_differences(optimizer):
    """On quadratics, one of whose gradients is exactly zero at the start."""
    inner = InnerConfig(steps=2, optimizer=optimizer, lr=0.1, weight_decay=0.05, adapts=("w",))
    model, (task, *_) = Vector(), quadratic_tasks()
    with torch.no_grad():
        model.w[1] = means([task])[0][0, 1]
    found = gradient_of("second_order", model, [task], inner, (2,), trains=("w",)).gradients["w"]
    assert torch.isfinite(found).all()

    def loss(start):
        with torch.no_grad():
            model.w.copy_(start)
        w = model.w.detach().clone().requires_grad_()
        support, query = (points[0] for points in means([task]))
        other = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[optimizer]([w], lr=0.1, weight_decay=0.05)
        for _ in range(2):
            w.grad = CURVATURE * (w.detach() - support)
            other.step()
        return (0.5 * CURVATURE * (w.detach() - query) ** 2).sum()

    start = model.w.detach().clone()
    for i in (0, 2):  # Adam itself jumps where a gradient is zero
        move = torch.zeros(3, dtype=torch.float64)
        move[i] = 1e-6
        expected = (loss(start + move) - loss(start - move)) / 2e-6
        torch.testing.assert_close(found[i], expected, rtol=1e-5, atol=1e-8)
