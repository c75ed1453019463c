"""What an outer step descends on: the objectives of meta-training by name, each from tasks to one gradient.

    first_order   the query gradient at the adapted parameters, applied to the initial ones
    second_order  the query gradient through the inner steps, exact
    reptile       the way from where adaptation ends back to where it began
    multitask     no adaptation: the tasks' mean loss on support and query together

Sources: method.md §4; Finn, Abbeel, Levine 2017 (MAML, first order); Nichol, Achiam, Schulman 2018 (Reptile); Li, Zhou,
Chen, Li 2017 (Meta-SGD).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mltd.inner_loop import (
    Health,
    InnerConfig,
    Supports,
    clip_factors,
    filled,
    mean_losses,
    scaled,
    task_gradients,
    trajectory,
)
from mltd.inner_rules import Rule
from mltd.learner import Learner, mode, refuse_reentrant, requiring
from mltd.packing import Packed, pack
from mltd.sharded import whole
from mltd.tasks import Task


@dataclass(frozen=True)
class Problem:
    """What is differentiated: a model, how its tasks are adapted, and what the outer loop trains.

    trained      name -> tensor: parameters of the model by their names, and whatever `rates` has
    rates        inner learning rates by the names of the parameters that are adapted (Meta-SGD); None: config.lr
    query_steps  inner steps at which query losses are taken and averaged
    """

    learner: Learner
    inner: InnerConfig
    trained: Mapping[str, Tensor]
    query_steps: tuple[int, ...]
    rates: Mapping[str, Tensor] | None = None

    def packed(self, tasks: Sequence[Task], *, support: bool = False, query: bool = True) -> Packed:
        groups = [(*task.support * support, *task.query * query) for task in tasks]
        return pack(groups, self.inner.max_tokens, self.learner.device, tasks[0].kind)


class MetaGradient(NamedTuple):
    """The sum over some tasks of the gradients for what is trained, and what it cost."""

    losses: Tensor  # [B] loss of each task that was descended on
    gradients: dict[str, Tensor]  # by the names of Problem.trained; rates as "rates/<name>"
    alpha: Tensor | None  # for the tasks' architectures, where they were given
    tokens: int  # through forward and backward, padding not counted
    examples: int  # distinct ones


def rate_name(parameter: str) -> str:
    """The name, among what is trained, of the learning rate of a parameter."""
    return f"rates/{parameter}"


def first_order(problem: Problem, tasks: Sequence[Task], alpha: Tensor | None) -> MetaGradient:
    """The query gradient at the adapted parameters, averaged over `query_steps`.

    With one query step, the last inner step, this is first-order MAML. Several ask for a good model all along the
    adaptation, step 0 included, and not at one step only. A learned rate moved the adapted parameters by minus the sum
    of the directions that it was multiplied by.
    """
    learner, inner = problem.learner, replace(problem.inner, steps=max(problem.query_steps))
    query, health = problem.packed(tasks), Health([task.name for task in tasks])
    direct = {name: value for name, value in problem.trained.items() if name not in learner.shared}
    sought = [value for name, value in direct.items() if not name.startswith("rates/")]
    choices = [] if alpha is None else [alpha]
    sums: dict[str, Tensor] = {}
    alpha_gradient: Tensor | None = None
    losses: list[Tensor] = []
    for reached in trajectory(learner, tasks, inner, alpha=alpha, rates=problem.rates):
        if reached.step not in problem.query_steps:
            continue
        leaves = list(reached.parameters.values())
        with mode(learner.model, inner.train_mode), requiring(sought):
            now, found = task_gradients(
                learner, query, reached.parameters, alpha, inner.autocast, also=sought + choices
            )
        of_tasks, of_all = found[: len(leaves)], found[len(leaves) :]
        health.note(now, of_tasks, f"query loss after inner step {reached.step}")
        losses.append(now)
        for i, (name, gradient) in enumerate(zip(reached.parameters, filled(of_tasks, leaves), strict=True)):
            if name in problem.trained:
                _add(sums, name, gradient.sum(dim=0))
            if rate_name(name) in problem.trained:
                _add(sums, rate_name(name), -(gradient * reached.moved[i]).sum(dim=0))
        shared = filled(of_all, sought + choices)
        for name, gradient in zip((n for n in direct if not n.startswith("rates/")), shared, strict=False):
            _add(sums, name, gradient)
        if alpha is not None:
            alpha_gradient = shared[-1] if alpha_gradient is None else alpha_gradient + shared[-1]
    health.check()
    count = len(problem.query_steps)
    gradients = {name: sums[name].div_(count) for name in problem.trained}
    support = problem.packed(tasks, support=True, query=False)
    tokens = max(problem.query_steps) * support.tokens + count * query.tokens
    mean = torch.stack(losses).mean(dim=0)
    choice = None if alpha_gradient is None else alpha_gradient / count
    return MetaGradient(mean, gradients, choice, tokens, support.examples + query.examples)


def second_order(problem: Problem, tasks: Sequence[Task], alpha: Tensor | None) -> MetaGradient:
    """The query losses, averaged over `query_steps`, differentiated by what adaptation began with: exact MAML."""
    learner, inner, last = problem.learner, problem.inner, max(problem.query_steps)
    require_double_backward(learner.model, inner)
    query, supports = problem.packed(tasks), Supports(tasks, inner, learner.device)
    health, rule = Health([task.name for task in tasks]), Rule(inner.optimizer, inner.weight_decay)
    sought = list(problem.trained.values())
    choices = [] if alpha is None else [alpha]
    tokens, examples, losses = len(problem.query_steps) * query.tokens, query.examples, list[Tensor]()
    with requiring(sought), mode(learner.model, inner.train_mode):
        current = _begun(problem, len(tasks))
        for step in range(last + 1):
            if step:
                support = supports.at(step)
                tokens, examples = tokens + support.tokens, query.examples + support.examples
                found, gradients = task_gradients(learner, support, current, alpha, inner.autocast, create_graph=True)
                health.note(found, gradients, f"support loss of inner step {step}")
                current = _stepped(problem, rule, step, current, gradients)
            if step in problem.query_steps:
                losses.append(mean_losses(learner, query, current, alpha, inner.autocast))
                health.note(losses[-1], [], f"query loss after inner step {step}")
        mean = torch.stack(losses).mean(dim=0)
        wanted = [*sought, *choices]
        parts = filled(torch.autograd.grad(mean.sum(), wanted, allow_unused=True), wanted)
    health.check()
    named = dict(zip(problem.trained, parts, strict=False))
    return MetaGradient(mean.detach(), named, parts[-1] if choices else None, tokens, examples)


def _begun(problem: Problem, tasks: int) -> dict[str, Tensor]:
    """The shared start for each task, in the graph of what is trained and a leaf where it is not."""
    begun = {}
    for name, value in problem.learner.start().items():
        spread = value.expand(tasks, *value.shape)
        begun[name] = spread.clone() if name in problem.trained else spread.detach().clone().requires_grad_()
    return begun


def _stepped(
    problem: Problem, rule: Rule, step: int, current: Mapping[str, Tensor], gradients: Sequence[Tensor | None]
) -> dict[str, Tensor]:
    """The tasks' values after an inner step, in the graph."""
    values = list(current.values())
    along = filled(gradients, values)
    if problem.inner.clip is not None:
        factors = clip_factors(along, problem.inner.clip)
        along = [scaled(gradient, factors) for gradient in along]
    directions = rule.directions(step, values, along)
    return {
        name: value - _rate(problem, name, step) * direction
        for (name, value), direction in zip(current.items(), directions, strict=True)
    }


def reptile(problem: Problem, tasks: Sequence[Task], alpha: Tensor | None) -> MetaGradient:
    """φ - φ_i, where φ_i is reached by adapting to support and query together: an outer SGD step of rate ε moves φ by
    ε towards the mean of the φ_i."""
    learner, inner = problem.learner, problem.inner
    strange = [name for name in problem.trained if name not in learner.shared]
    if strange or alpha is not None:
        what = strange[0] if strange else "the controller"
        raise ValueError(
            f"trains: reptile moves only what is adapted, and has no gradient for {what!r}; train what inner.adapts "
            "names, or use 'first_order'"
        )
    joined = [Task(task.name, (*task.support, *task.query), task.query, task.kind) for task in tasks]
    *_, last = trajectory(learner, joined, inner)
    begun = learner.start()
    gradients = {name: (begun[name] - last.parameters[name]).detach().sum(dim=0) for name in problem.trained}
    packed = problem.packed(tasks, support=True)
    losses = last.losses if last.losses is not None else torch.zeros(len(tasks))
    return MetaGradient(losses, gradients, None, inner.steps * packed.tokens, packed.examples)


def multitask(problem: Problem, tasks: Sequence[Task], alpha: Tensor | None) -> MetaGradient:
    """Joint training: the gradient of the tasks' mean losses on support and query together, nothing adapted first."""
    learner, inner = problem.learner, problem.inner
    if inner.train_mode:
        refuse_reentrant(learner.model)
    packed, sought = problem.packed(tasks, support=True), list(problem.trained.values())
    choices = [] if alpha is None else [alpha]
    with mode(learner.model, inner.train_mode), requiring(sought):
        losses, found = task_gradients(learner, packed, {}, alpha, inner.autocast, also=sought + choices)
    gradients = filled(found, sought + choices)
    health = Health([task.name for task in tasks])
    health.note(losses, [], "loss of joint training")
    health.check()
    together = Health([" + ".join(task.name for task in tasks)])
    sums = [whole(gradient.sum()).reshape(1, 1) for gradient in gradients]
    together.note(losses.sum().unsqueeze(0), sums, "loss of joint training")
    together.check()
    named = dict(zip(problem.trained, gradients, strict=False))
    return MetaGradient(losses, named, gradients[-1] if choices else None, packed.tokens, packed.examples)


Objective = Callable[[Problem, Sequence[Task], Tensor | None], MetaGradient]
OBJECTIVES: dict[str, Objective] = {
    "first_order": first_order,
    "second_order": second_order,
    "reptile": reptile,
    "multitask": multitask,
}


def require_double_backward(model: Any, inner: InnerConfig) -> None:
    """Raise ValueError, with what to do, for a model that cannot be differentiated twice."""
    attention = getattr(getattr(model, "config", None), "_attn_implementation", None) or "eager"
    if attention != "eager":
        raise ValueError(
            f"model: its attention is {attention!r}, which has no double backward in PyTorch; for second order load it "
            'with attn_implementation="eager" or call model.set_attn_implementation("eager")'
        )
    if inner.train_mode and getattr(model, "is_gradient_checkpointing", False):
        raise ValueError(
            "model: recomputes its activations, which cannot be differentiated twice; call "
            "model.gradient_checkpointing_disable() for second order, or use first order"
        )


def _rate(problem: Problem, name: str, step: int) -> Tensor | float:
    if problem.rates is None:
        return problem.inner.lr_at(step)
    return problem.rates[name] * problem.inner.lr_decay ** (step - 1)


def _add(sums: dict[str, Tensor], name: str, gradient: Tensor) -> None:
    sums[name] = sums[name] + gradient if name in sums else gradient.clone()
