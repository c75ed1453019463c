"""Perplexities by hand, curves over steps, and the same curve from the loop that adapts one task after another."""

import json
import math
from dataclasses import replace

import pytest
import torch

from mltd import Curve, DivergedError, InnerConfig, evaluate
from mltd.evaluation import evaluate_unadapted
from mltd.learner import Learner
from tarp_kernels import tarp_parameters
from tests.mltd.conftest import bare_model, loss_by_hand, random_tasks, tarp_model
from tests.mltd.test_inner_loop import adapt_alone

INNER = InnerConfig(lr=1e-2, clip=0.5, lr_decay=0.8)


@pytest.mark.parametrize("together", [None, 2])
def test_the_curve_is_the_perplexity_by_token_of_the_adapted_models(together):
    model, tasks = tarp_model("gpt2", torch.float64), random_tasks(3)
    curve = evaluate(model, tasks, INNER, (0, 3, 1), tasks_at_once=together)
    assert curve.steps == (0, 1, 3) and set(curve.per_task) == set(tasks.names)
    own = tarp_parameters(model)
    start = {name: parameter.detach().clone() for name, parameter in own.items()}
    for step in (0, 1, 3):
        total, count = 0.0, 0
        for task in tasks:
            adapted = adapt_alone(model, task, InnerConfig(**{**vars(INNER), "steps": step}))
            with torch.no_grad():
                for name, parameter in own.items():
                    parameter.copy_(adapted[name])
                loss, tokens = loss_by_hand(model, task.query).item(), sum(example.scored for example in task.query)
                for name, parameter in own.items():
                    parameter.copy_(start[name])
            assert curve.per_task[task.name][step] == pytest.approx(math.exp(loss), rel=1e-9)
            assert curve.tokens[task.name] == tokens
            total, count = total + loss * tokens, count + tokens
        assert curve.perplexity_by_step[step] == pytest.approx(math.exp(total / count), rel=1e-9)
    assert curve.perplexity_by_step[3] != pytest.approx(curve.perplexity_by_step[0], rel=1e-3)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_adapters_one_by_one_give_the_same_curve_and_the_model_is_as_it_was(family, monkeypatch):
    model, tasks = tarp_model(family), random_tasks(3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    together = evaluate(model, tasks, INNER, (0, 2, 4))
    with monkeypatch.context() as patch:
        patch.setattr(Learner, "__init__", one_by_one(Learner.__init__))
        alone = evaluate(model, tasks, INNER, (0, 2, 4))
    for step in (0, 2, 4):
        assert alone.perplexity_by_step[step] == pytest.approx(together.perplexity_by_step[step], rel=1e-4)
    assert alone.perplexity_by_step[4] != pytest.approx(alone.perplexity_by_step[0], rel=1e-2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def one_by_one(real):
    def init(self, *args):
        real(self, *args)
        self.parallel = False

    return init


def test_all_weights_are_adapted_from_the_pretrained_ones():
    model, tasks = bare_model(), random_tasks(2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    curve = evaluate(model, tasks, InnerConfig(lr=1e-3, adapts=("all",)), (0, 1, 3))
    assert curve.perplexity_by_step[0] == pytest.approx(
        evaluate_unadapted(model, tasks).perplexity_by_step[0], rel=1e-6
    )
    assert curve.perplexity_by_step[3] != pytest.approx(curve.perplexity_by_step[0], rel=1e-3)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_every_step_is_announced():
    model, tasks = tarp_model(), random_tasks(4)
    for adapts, rounds in (("adapter", 1), ("all", 4)):
        called = []
        evaluate(model, tasks, replace(INNER, adapts=(adapts,)), (0, 2), on_step=lambda called=called: called.append(1))
        assert len(called) == 3 * rounds


def test_divergence_is_named_or_infinite():
    model, tasks = tarp_model(), random_tasks(2)
    for adapts in ("adapter", "all"):
        with pytest.raises(DivergedError, match="task 'tasks-0': support loss of inner step"):
            evaluate(model, tasks, InnerConfig(optimizer="sgd", lr=1e25, adapts=(adapts,)), (0, 9))
    with torch.no_grad():
        next(iter(tarp_parameters(model).values())).fill_(torch.nan)
    curve = evaluate_unadapted(model, tasks)
    assert curve.perplexity_by_step == {0: math.inf}
    assert Curve.from_json(json.loads(json.dumps(curve.to_json(), allow_nan=False))) == curve


def test_curves_pool_by_token_and_survive_json():
    losses = {0: {"a": math.log(2), "b": math.log(32)}, 3: {"a": 0.0, "b": 1e4}, 1: {"a": 0.0, "b": 0.0}}
    curve = Curve.from_losses(losses, {"a": 3, "b": 1}, 1.5)
    assert curve.perplexity_by_step[0] == pytest.approx(4)  # (3·1 + 1·5) / 4 bits
    assert curve.per_task["b"][0] == pytest.approx(32) and curve.per_task["b"][3] == math.inf
    assert curve.best_step() == 1 and curve.geometric_mean([0, 1]) == pytest.approx(2)
    assert Curve.from_json(json.loads(json.dumps(curve.to_json()))) == curve


@pytest.mark.parametrize("steps", [(), (-1, 2)])
def test_wrong_steps_are_named(steps):
    with pytest.raises(ValueError, match="steps: got"):
        evaluate(tarp_model(), random_tasks(1), INNER, steps)
