"""How well adapted models predict the query sets: perplexity by token, as a curve over the adaptation steps."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from mltd.inner_loop import Descent, InnerConfig, accumulate, clip_per_task, require_finite, task_losses, trajectory
from mltd.inner_loop import mode as model_mode
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
    """

    perplexity_by_step: dict[int, float]
    per_task: dict[str, dict[int, float]]
    tokens: dict[str, int]
    seconds: float

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
        return {"perplexity_by_step": pooled, "per_task": per_task, "tokens": self.tokens, "seconds": self.seconds}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Curve":
        """The curve that `to_json` wrote."""

        def by_step(curve: Mapping[str, float | None]) -> dict[int, float]:
            return {int(step): math.inf if ppl is None else ppl for step, ppl in curve.items()}

        per_task = {name: by_step(curve) for name, curve in values["per_task"].items()}
        return cls(by_step(values["perplexity_by_step"]), per_task, dict(values["tokens"]), values["seconds"])


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def evaluate(
    model: Any,
    tasks: Sequence[Task],
    inner_config: InnerConfig,
    steps: Sequence[int] = STEPS,
    parameters: Mapping[str, Tensor] | None = None,
    *,
    tasks_at_once: int | None = None,
    on_step: Callable[[], None] = lambda: None,
) -> Curve:
    """Adapt to every task's support set, all tasks at once, and measure its query set after each of `steps` steps.

    inner_config   how to adapt; its `steps` is replaced by the largest of `steps`
    parameters     the shared start of the adapters; default: the model's own
    tasks_at_once  how many tasks to stack, where memory does not allow all of them (None)
    on_step        called after every step of every group, for a progress bar

    Raises ValueError for a task that does not fit the model, DivergedError that names the task whose support loss is
    not finite. A query loss that is not finite is an infinite perplexity.
    """
    steps = check_steps(steps)
    check_fits(tasks, model)
    config = InnerConfig(**{**asdict(inner_config), "steps": steps[-1]})
    began = time.perf_counter()
    losses: dict[int, dict[str, float]] = {step: {} for step in steps}
    size = len(tasks) if tasks_at_once is None else tasks_at_once
    for first in range(0, len(tasks), size):
        group = tasks[first : first + size]
        query = pack([task.query for task in group], config.max_tokens, model.device)
        for reached in trajectory(model, group, config, parameters):
            if reached.step in losses:
                values = task_losses(model, query, reached.parameters).tolist()
                losses[reached.step].update((task.name, v) for task, v in zip(group, values, strict=True))
            on_step()
    return _curve(losses, tasks, began)


def evaluate_unadapted(model: Any, tasks: Sequence[Task], max_tokens: int = 1024) -> Curve:
    """The model as it stands, whatever it is, on the query sets: a curve of step 0 alone."""
    check_fits(tasks, model)
    began = time.perf_counter()
    query = pack([task.query for task in tasks], max_tokens, model.device)
    values = task_losses(model, query, None).tolist()
    return _curve({0: dict(zip((task.name for task in tasks), values, strict=True))}, tasks, began)


def evaluate_one_by_one(
    model: Any,
    tasks: Sequence[Task],
    inner_config: InnerConfig,
    steps: Sequence[int] = STEPS,
    *,
    on_step: Callable[[], None] = lambda: None,
) -> Curve:
    """As `evaluate`, for any model: each task trains whatever parameters require gradients, then puts them back.

    The same losses, optimisers and steps as the task-parallel loop; for full fine-tuning and other people's adapters.
    """
    steps = check_steps(steps)
    check_fits(tasks, model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise ValueError("model: no parameter requires a gradient, expected some to train; call requires_grad_(True)")
    config = InnerConfig(**{**asdict(inner_config), "steps": steps[-1]})
    began = time.perf_counter()
    losses: dict[int, dict[str, float]] = {step: {} for step in steps}
    start = [parameter.detach().clone() for parameter in trained]
    try:
        for task in tasks:
            query = pack([task.query], config.max_tokens, model.device)
            for step in _descend(model, task, config, trained):
                if step in losses:
                    losses[step][task.name] = task_losses(model, query, None).item()
                on_step()
            _restore(trained, start)
    finally:
        _restore(trained, start)
    return _curve(losses, tasks, began)


def _descend(model: Any, task: Task, config: InnerConfig, trained: list[torch.nn.Parameter]) -> Iterator[int]:
    descent = Descent(trained, config)
    support = pack([task.support], config.max_tokens, model.device)
    yield 0
    for step in range(1, config.steps + 1):
        with model_mode(model, config.train_mode):
            loss, gradients = accumulate(model, support, list(trained))
        shares = [
            None if gradient is None else gradient.unsqueeze(0) for gradient in gradients
        ]  # views: one task owns them all
        require_finite(loss, shares, [task.name], f"support loss of inner step {step}")
        clip_per_task(shares, config.clip)
        descent.take(step, gradients)
        yield step


@torch.no_grad()
def _restore(trained: list[torch.nn.Parameter], start: list[Tensor]) -> None:
    for parameter, value in zip(trained, start, strict=True):
        parameter.copy_(value)
        parameter.grad = None


def check_steps(steps: Sequence[int]) -> tuple[int, ...]:
    """The distinct steps in ascending order; ValueError when there are none or one is negative."""
    ordered = tuple(sorted(set(steps)))
    if not ordered or ordered[0] < 0:
        raise ValueError(f"steps: got {tuple(steps)}, expected at least one number of adaptation steps, each 0 or more")
    return ordered


def _curve(losses: dict[int, dict[str, float]], tasks: Sequence[Task], began: float) -> Curve:
    tokens = {task.name: sum(example.scored for example in task.query) for task in tasks}
    losses = {
        step: {name: v if math.isfinite(v) else math.inf for name, v in of.items()} for step, of in losses.items()
    }
    return Curve.from_losses(losses, tokens, time.perf_counter() - began)
