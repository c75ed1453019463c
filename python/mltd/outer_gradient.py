"""The gradient that an outer step descends on: over all meta-batches that it averages, and over all processes.

A task's share does not depend on the tasks beside it, so the processes of a run take turns at the tasks, and one
all-reduce adds up what they found. The result is that of one process, to rounding.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mltd.controller import Controller, entropy, sampled
from mltd.distributed import Processes
from mltd.inner_loop import DivergedError
from mltd.meta_config import MetaConfig
from mltd.meta_gradient import OBJECTIVES, MetaGradient, Problem
from mltd.outer_state import OuterState
from mltd.tasks import Task


class Summed(NamedTuple):
    """Of the tasks of all processes, the same in each."""

    losses: list[float]  # of every task that was drawn, in that order
    gradients: dict[str, Tensor]  # sums over the tasks, of all that is trained
    tokens: int
    examples: int
    told: bool  # whether any process was told to end


@dataclass(frozen=True)
class OuterGradient:
    """What is differentiated, for which outer state, by which of the run's processes."""

    config: MetaConfig
    problem: Problem
    outer: OuterState
    controller: Controller | None
    processes: Processes

    def of(self, batches: Sequence[Sequence[Task]], iteration: int, told: Callable[[], bool]) -> Summed:
        """The gradient of outer step `iteration`, counted from 0, each process having taken its share of the tasks.

        told  whether this process was told to end: asked last, and the others learn of it here

        Raises, in every process alike, DivergedError that names the task, or LostProcessError.
        """
        failure, first = "", 0
        device = self.problem.learner.device
        losses = torch.zeros(sum(len(tasks) for tasks in batches), dtype=torch.float64, device=device)
        found: dict[str, Tensor] = {}
        tokens = examples = 0
        try:
            for tasks in batches:
                own = [place for place in range(len(tasks)) if self.processes.owns(first + place)]
                if own:
                    step = self._of_own([tasks[place] for place in own], iteration)
                    losses[[first + place for place in own]] = step.losses.to(losses)
                    tokens, examples = tokens + step.tokens, examples + step.examples
                    _accumulate(found, step.gradients)
                first += len(tasks)
        except DivergedError as error:
            failure = str(error)  # told to the others after the sum, which they are waiting in
        return self._summed(losses, found, (tokens, examples, told()), failure)

    def _summed(self, losses: Tensor, found: dict[str, Tensor], counts: tuple[int, int, bool], failure: str) -> Summed:
        trained = self.outer.all
        gradients = [found[name] if name in found else torch.zeros_like(value) for name, value in trained.items()]
        numbers = torch.cat([losses, losses.new_tensor([*counts, bool(failure)])])
        if self.processes.take_turns:
            numbers, *gradients = self.processes.sum([numbers, *(gradient.detach() for gradient in gradients)])
        else:  # each has it all, except whether another was told to end
            numbers[-2] = self.processes.sum([numbers[-2:-1]])[0][0]
        *every, tokens, examples, told, failed = numbers.tolist()
        if failed:
            raise DivergedError(next(message for message in self.processes.gather(failure) if message))
        return Summed(every, dict(zip(trained, gradients, strict=True)), int(tokens), int(examples), told > 0)

    def _of_own(self, tasks: Sequence[Task], iteration: int) -> MetaGradient:
        """The sum over these tasks of the gradients for all that is trained, the controller's too."""
        objective, config, learner = OBJECTIVES[self.config.objective], self.config, self.problem.learner
        parts: list[MetaGradient] = []
        total: dict[str, Tensor] = {}
        for group in learner.groups(tasks) if config.objective != "multitask" else [tasks]:
            alpha = logits = None
            if self.controller is not None:
                temperature, seed = config.temperature.at(iteration), f"{config.seed}/{iteration}"
                alpha, logits = sampled(self.controller, learner.model, group, temperature, config.gumbel, seed)
            part = objective(self.problem, group, alpha)
            gradients = dict(part.gradients)
            if alpha is not None and logits is not None and self.outer.of_controller:
                # the bonus counts once a task, like the losses that it is beside
                assert part.alpha is not None
                pull = (alpha * part.alpha).sum() - config.entropy_weight * len(group) * entropy(logits)
                parameters = list(self.outer.of_controller.values())
                gradients |= zip(self.outer.of_controller, torch.autograd.grad(pull, parameters), strict=True)
            _accumulate(total, gradients)
            parts.append(part)
        losses = torch.cat([part.losses for part in parts])
        tokens, examples = sum(part.tokens for part in parts), sum(part.examples for part in parts)
        return MetaGradient(losses, total, None, tokens, examples)


def _accumulate(total: dict[str, Tensor], gradients: dict[str, Tensor]) -> None:
    for name, gradient in gradients.items():
        total[name] = total[name] + gradient if name in total else gradient
