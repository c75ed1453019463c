"""How well adapted models predict the query sets: perplexity by token, as a curve over the adaptation steps."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from mltd.controller import Controller, chosen
from mltd.inner_loop import InnerConfig, task_losses, trajectory
from mltd.learner import Learner
from mltd.measures import Measure
from mltd.packing import pack
from mltd.tasks import Task, check_fits

STEPS = (0, 1, 3, 5, 10)


@dataclass(frozen=True)
class Curve:
    """Query perplexity after each of some numbers of adaptation steps.

    perplexity_by_step  step -> exp of the mean loss over the scored query tokens of all tasks together
    per_task            task name -> step -> perplexity of that task's query set
    tokens              task name -> scored query tokens
    seconds             wall-clock time of adaptation and evaluation
    metrics             metric -> task name -> step -> value, of what `mltd.measures` measured beside
    """

    perplexity_by_step: dict[int, float]
    per_task: dict[str, dict[int, float]]
    tokens: dict[str, int]
    seconds: float
    metrics: dict[str, dict[str, dict[int, float]]] = field(default_factory=dict)

    @classmethod
    def from_losses(
        cls, losses: Mapping[int, Mapping[str, float]], tokens: Mapping[str, int], seconds: float
    ) -> "Curve":
        """From step -> task name -> mean loss per token in nats."""
        total = sum(tokens.values())
        pooled = {step: sum(of[name] * tokens[name] for name in of) / total for step, of in losses.items()}
        return cls(
            {step: _exp(loss) for step, loss in pooled.items()},
            {name: {step: _exp(of[name]) for step, of in losses.items()} for name in tokens},
            dict(tokens),
            seconds,
        )

    @classmethod
    def joined(cls, curves: "Sequence[Curve]") -> "Curve":
        """The curve of all the tasks of curves over the same steps, as one process of several has each."""
        if len(curves) == 1:
            return curves[0]
        tasks = {name: by_step for curve in curves for name, by_step in curve.per_task.items()}
        tokens = {name: count for curve in curves for name, count in curve.tokens.items()}
        losses = {step: {name: math.log(by[step]) for name, by in tasks.items()} for step in curves[0].steps}
        return cls.from_losses(losses, tokens, max(curve.seconds for curve in curves))

    @property
    def steps(self) -> tuple[int, ...]:
        return tuple(self.perplexity_by_step)

    def best_step(self) -> int:
        """The step of the lowest pooled perplexity; the earliest when several share it."""
        return min(self.perplexity_by_step, key=lambda step: (self.perplexity_by_step[step], step))

    def geometric_mean(self, steps: Sequence[int]) -> float:
        """The geometric mean of the pooled perplexities at these steps."""
        return _exp(sum(math.log(self.perplexity_by_step[step]) for step in steps) / len(steps))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON: steps are strings there, and an infinite perplexity is null."""

        def by_step(curve: dict[int, float]) -> dict[str, float | None]:
            return {str(step): ppl if math.isfinite(ppl) else None for step, ppl in curve.items()}

        per_task = {name: by_step(curve) for name, curve in self.per_task.items()}
        pooled = by_step(self.perplexity_by_step)
        made = {"perplexity_by_step": pooled, "per_task": per_task, "tokens": self.tokens, "seconds": self.seconds}
        if self.metrics:
            made["metrics"] = {
                metric: {name: by_step(curve) for name, curve in of.items()} for metric, of in self.metrics.items()
            }
        return made

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Curve":
        """The curve that `to_json` wrote."""

        def by_step(curve: Mapping[str, float | None]) -> dict[int, float]:
            return {int(step): math.inf if ppl is None else ppl for step, ppl in curve.items()}

        per_task = {name: by_step(curve) for name, curve in values["per_task"].items()}
        metrics = {
            metric: {name: by_step(curve) for name, curve in of.items()}
            for metric, of in values.get("metrics", {}).items()
        }
        pooled = by_step(values["perplexity_by_step"])
        return cls(pooled, per_task, dict(values["tokens"]), values["seconds"], metrics)


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def evaluate(
    model: Any,
    tasks: Sequence[Task],
    inner_config: InnerConfig,
    steps: Sequence[int] = STEPS,
    parameters: Mapping[str, Tensor] | None = None,
    *,
    controller: Controller | None = None,
    rates: Mapping[str, Tensor] | None = None,
    measures: Sequence[Measure] = (),
    tasks_at_once: int | None = None,
    on_step: Callable[[], None] = lambda: None,
) -> Curve:
    """Adapt to every task's support set and measure its query set after each of `steps` steps.

    inner_config   what to adapt and how; its `steps` is replaced by the largest of `steps`
    parameters     the shared start of what is adapted; default: the model's own values
    controller     chooses each task's architecture from its support set; None: the model's own
    rates          inner learning rates by name (Meta-SGD), in the place of inner_config.lr
    measures       what to measure beside the loss, see `mltd.measures`
    tasks_at_once  how many tasks to stack, where memory does not allow all of them (None); tasks that adapt the base
                   model run one by one
    on_step        called after every step of every group, for a progress bar

    Raises ValueError for a task that does not fit the model, DivergedError that names the task whose support loss is
    not finite. A query loss that is not finite is an infinite perplexity.
    """
    steps = check_steps(steps)
    check_fits(tasks, model)
    config = replace(inner_config, steps=steps[-1])
    learner = Learner(model, config.adapts)
    began = time.perf_counter()
    losses: dict[int, dict[str, float]] = {step: {} for step in steps}
    metrics: dict[str, dict[str, dict[int, float]]] = {}
    for group in learner.groups(tasks, tasks_at_once):
        query = pack([task.query for task in group], config.max_tokens, learner.device, group[0].kind)
        alpha = None if controller is None else chosen(controller, model, group)
        for reached in trajectory(learner, group, config, parameters, alpha=alpha, rates=rates):
            if reached.step in losses:
                for measure in measures:
                    for name, own in measure(model, group, reached.parameters, alpha).items():
                        for metric, value in own.items():
                            metrics.setdefault(metric, {}).setdefault(name, {})[reached.step] = value
                values = task_losses(learner, query, reached.parameters, alpha, config.autocast).tolist()
                losses[reached.step].update((task.name, v) for task, v in zip(group, values, strict=True))
            on_step()
    return replace(_curve(losses, tasks, began), metrics=metrics)


def evaluate_unadapted(model: Any, tasks: Sequence[Task], max_tokens: int = 1024) -> Curve:
    """The model as it stands, whatever it is, on the query sets: a curve of step 0 alone."""
    return evaluate(model, tasks, InnerConfig(steps=0, adapts=(), max_tokens=max_tokens), (0,))


def check_steps(steps: Sequence[int]) -> tuple[int, ...]:
    """The distinct steps in ascending order; ValueError when there are none or one is negative."""
    ordered = tuple(sorted(set(steps)))
    if not ordered or ordered[0] < 0:
        raise ValueError(f"steps: got {tuple(steps)}, expected at least one number of adaptation steps, each 0 or more")
    return ordered


def _curve(losses: dict[int, dict[str, float]], tasks: Sequence[Task], began: float) -> Curve:
    tokens = {task.name: sum(task.kind.scored(example) for example in task.query) for task in tasks}
    losses = {
        step: {name: v if math.isfinite(v) else math.inf for name, v in of.items()} for step, of in losses.items()
    }
    return Curve.from_losses(losses, tokens, time.perf_counter() - began)
