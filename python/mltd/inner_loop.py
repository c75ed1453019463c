"""The inner loop: adapt to the support sets of many tasks (method.md §1 and §4).

Where the adapter alone is adapted, the adapters of B tasks are stacked, [B, *shape], and every task's rows go through
one forward and one backward pass. Each task's loss is the mean over its own scored tokens, and the sum over tasks is
differentiated: as no task touches another's adapter, each gets exactly the gradient of a run of its own.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mltd.captured import CapturedStep, host_architecture, require_capturable
from mltd.inner_rules import Rule, root
from mltd.learner import Learner, mode, refuse_reentrant
from mltd.packing import Packed, pack
from mltd.sharded import differentiated
from mltd.tasks import Task, check_fits

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
}
AUTOCAST = {"bf16": torch.bfloat16}


class DivergedError(FloatingPointError):
    """A loss or a gradient that is not finite; the message names the task and the step."""


@dataclass(frozen=True)
class InnerConfig:
    """How a task is adapted: `steps` gradient steps on its support set.

    adapts        which parts of the model, see `mltd.learner`: ("adapter",), ("tarp",), ("cells",), ("all",), …
    optimizer     "adam" | "adamw" | "sgd", with a state of its own for each task
    lr            learning rate of the first step
    clip          largest norm of a task's gradient, over all that it adapts; None: no clipping
    weight_decay  as torch's optimiser of that name understands it
    lr_decay      factor on the learning rate from step to step: below 1, late steps move less and over-fit less
    batch_size    support examples of a step, taken in turn; None: all of them
    train_mode    adapt in training mode: dropout, and activation checkpointing where the model has it on
    max_tokens    most tokens, padding included, of one forward pass; more are split and their gradients added
    autocast      "bf16": products in bfloat16, weights and sums as they are; None: everything in its own dtype
    cuda_graph    on a CUDA device: the second step is recorded and replayed from then on, see `mltd.captured`; all
                  support examples at every step, no TARP dropout, no activation checkpointing, no learned rates
    """

    steps: int = 3
    optimizer: str = "adam"
    lr: float = 2e-3
    clip: float | None = None
    weight_decay: float = 0.0
    lr_decay: float = 1.0
    train_mode: bool = False
    max_tokens: int = 1024
    adapts: tuple[str, ...] = ("adapter",)
    batch_size: int | None = None
    autocast: str | None = None
    cuda_graph: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "adapts", tuple(self.adapts))  # JSON and YAML give lists
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer: got {self.optimizer!r}, expected one of {', '.join(OPTIMIZERS)}")
        if self.steps < 0:
            raise ValueError(f"steps: got {self.steps}, expected 0 or more")
        if self.steps and not self.adapts:
            raise ValueError(f"adapts: got no part for {self.steps} steps, expected at least one, such as 'adapter'")
        for name in ("lr", "lr_decay", "max_tokens"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected more than 0")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip: got {self.clip}, expected more than 0, or None for no clipping")
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay: got {self.weight_decay}, expected 0 or more")
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"batch_size: got {self.batch_size}, expected at least 1, or None for all examples")
        if self.autocast not in (None, *AUTOCAST):
            raise ValueError(f"autocast: got {self.autocast!r}, expected one of {', '.join(AUTOCAST)}, or None")
        if self.cuda_graph and self.batch_size is not None:
            raise ValueError(
                f"cuda_graph: got batch_size = {self.batch_size}, so every step reads other examples than the recorded "
                "one; set batch_size to None, or leave cuda_graph out"
            )

    def lr_at(self, step: int) -> float:
        """The learning rate of step 1, 2, …"""
        return self.lr * self.lr_decay ** (step - 1)


class Descent:
    """The inner optimiser. Adam, AdamW and SGD are elementwise, so stacked tensors have a state for each task.

    `at` says which step comes, 1, 2, …; `take` then goes along these gradients, at that step's learning rate. A
    gradient that is None is zero, which moves nothing but by weight decay: otherwise the optimiser is spared it.
    """

    def __init__(self, parameters: Sequence[Tensor], config: InnerConfig) -> None:
        self.parameters, self.config = list(parameters), config
        lr: float | Tensor = config.lr
        if config.cuda_graph:  # a number would be the recorded step's at every replay
            lr = torch.tensor(config.lr, device=self.parameters[0].device)
        self.optimizer = make_optimizer(config.optimizer, self.parameters, lr, config.weight_decay)

    def at(self, step: int) -> None:
        set_rate(self.optimizer, self.config.lr_at(step))

    def take(self, gradients: Sequence[Tensor | None]) -> None:
        if self.config.weight_decay > 0:
            gradients = filled(gradients, self.parameters)
        take_step(self.optimizer, self.parameters, gradients)


class RatedDescent:
    """The inner optimiser where every parameter has a learning rate of its own (Meta-SGD).

    rates  in the order of the parameters, each of the shape of one task's parameter; `moved` is the sum over the steps
           of what a rate was multiplied by: minus the derivative of the adapted parameters by it, to first order
    """

    def __init__(self, parameters: Sequence[Tensor], config: InnerConfig, rates: Sequence[Tensor]) -> None:
        self.parameters, self.config, self.rates = list(parameters), config, [rate.detach() for rate in rates]
        self.rule, self.step = Rule(config.optimizer, config.weight_decay), 0
        self.moved = [torch.zeros_like(parameter) for parameter in parameters]

    def at(self, step: int) -> None:
        self.step = step

    @torch.no_grad()
    def take(self, gradients: Sequence[Tensor | None]) -> None:
        decay = self.config.lr_decay ** (self.step - 1)
        along = self.rule.directions(self.step, self.parameters, filled(gradients, self.parameters))
        for parameter, rate, moved, direction in zip(self.parameters, self.rates, self.moved, along, strict=True):
            parameter.sub_(rate * direction, alpha=decay)
            moved.add_(direction, alpha=decay)


def make_optimizer(
    name: str, parameters: list[Tensor], lr: float | Tensor, weight_decay: float
) -> torch.optim.Optimizer:
    """Torch's optimiser of that name, fused: one pass over memory, 2.9 times as fast for Adam on a CPU.

    lr  as a tensor beside the parameters, steps can be captured as a CUDA graph
    """
    options: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay, "fused": True}
    if name != "sgd" and isinstance(lr, Tensor) and lr.device.type == "cuda":
        options["capturable"] = True
    return OPTIMIZERS[name](parameters, **options)


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The learning rate of every group of parameters, times the group's "scale" where it has one."""
    for group in optimizer.param_groups:
        value = lr * group.get("scale", 1.0)
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(value)
        else:
            group["lr"] = value


def take_step(
    optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]
) -> None:
    """One step of `optimizer` along `gradients`; no gradient is left on the parameters."""
    for parameter, gradient in zip(parameters, gradients, strict=True):
        # torch's fused CPU kernels misread other strides, without a word
        parameter.grad = None if gradient is None else gradient.contiguous()
    optimizer.step()
    optimizer.zero_grad()


class Step(NamedTuple):
    """Where a trajectory stands after `step` inner steps. The tensors are live: the next step moves them in place."""

    step: int
    parameters: dict[str, Tensor]  # [B, *shape]
    losses: Tensor | None  # [B] mean support losses that this step descended on; None at step 0
    moved: list[Tensor]  # of RatedDescent, in the order of the parameters; else empty


def trajectory(
    learner: Learner,
    tasks: Sequence[Task],
    config: InnerConfig,
    parameters: Mapping[str, Tensor] | None = None,
    *,
    alpha: Tensor | None = None,
    rates: Mapping[str, Tensor] | None = None,
) -> Iterator[Step]:
    """Adapt one of the learner's groups of tasks and yield steps 0, 1, …, config.steps on the way.

    parameters  the shared start, name -> tensor; default: the model's own values
    alpha       the tasks' architectures where the model has search cells, see `Learner.running`; None: the model's own
    rates       learning rates, name -> tensor of the parameter's shape, in the place of config.lr

    ValueError for config.cuda_graph where steps cannot be captured.
    After the last step: raises DivergedError that names the task and the step when a support loss or an adapted value
    was not finite. Not earlier, because that would wait for a device at every step.
    """
    if config.cuda_graph:
        require_capturable(learner, config.train_mode)
        if rates is not None:
            raise ValueError(
                "cuda_graph: learned rates take the number of the step from the host, so every replay would be of the "
                "same step; leave it out"
            )
    if config.train_mode:
        refuse_reentrant(learner.model)
    stacked = stack(learner, parameters, len(tasks))
    leaves, moved = list(stacked.values()), list[Tensor]()
    descent: Descent | RatedDescent | None = None
    if rates is not None:
        descent = RatedDescent(leaves, config, [rates[name] for name in stacked])
        moved = descent.moved
    elif config.steps:
        descent = Descent(leaves, config)
    fixed = host_architecture(learner, alpha)
    health = Health([task.name for task in tasks])
    supports = Supports(tasks, config, learner.device)
    yield Step(0, stacked, None, moved)
    if descent is None or not config.steps:
        return
    packed = supports.at(1)

    def one() -> Tensor:
        with mode(learner.model, config.train_mode):
            losses, gradients = task_gradients(learner, packed, stacked, fixed, config.autocast)
        clip_per_task(gradients, config.clip)
        descent.take(gradients)
        return losses

    take = CapturedStep(one, packed, learner.device) if config.cuda_graph else one
    for step in range(1, config.steps + 1):
        packed = supports.at(step)
        descent.at(step)
        losses = take()
        # a gradient that is not finite leaves values that are not, and then losses: values are looked at once
        health.note(losses, leaves if step == config.steps else [], f"support loss of inner step {step}")
        yield Step(step, stacked, losses, moved)
    health.check()


class Supports:
    """The tasks' support examples of each step, packed."""

    def __init__(self, tasks: Sequence[Task], config: InnerConfig, device: torch.device) -> None:
        self.tasks, self.config, self.device = tasks, config, device
        self._all = self._pack([task.support for task in tasks]) if config.batch_size is None else None

    def at(self, step: int) -> Packed:
        """Of step 1, 2, …: all, or each task's next batch_size ones, from the front again at the end."""
        if self._all is not None:
            return self._all
        size = self.config.batch_size or 0
        picked = []
        for task in self.tasks:
            usable = [example for example in task.support if task.kind.scored(example)]
            first = (step - 1) * size
            picked.append([usable[(first + i) % len(usable)] for i in range(min(size, len(usable)))])
        return self._pack(picked)

    def _pack(self, groups: Sequence[Sequence[Any]]) -> Packed:
        return pack(groups, self.config.max_tokens, self.device, self.tasks[0].kind)


def adapt(
    model: Any,
    tasks: Sequence[Task],
    config: InnerConfig,
    parameters: Mapping[str, Tensor] | None = None,
    *,
    alpha: Tensor | None = None,
    rates: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Adapt to every task; returns name -> [B, *shape], the values of tasks[i] at index i.

    model       a Hugging Face model; neither its base nor its own adapter moves
    parameters, alpha, rates  as `trajectory` has them; alpha for all B tasks

    Tasks run side by side where config.adapts is the adapter or parts of it, else one by one: then B tasks make B
    copies of what is adapted. ValueError when a task does not fit the model, DivergedError as of `trajectory`.
    """
    if not tasks:
        raise ValueError("tasks: got none, expected at least one")
    learner = Learner(model, config.adapts)
    check_fits(tasks, model)
    ends, first = [], 0
    for group in learner.groups(tasks):
        own = None if alpha is None else of_tasks(alpha, first, len(group))
        *_, last = trajectory(learner, group, config, parameters, alpha=own, rates=rates)
        ends.append(last.parameters)
        first += len(group)
    if len(ends) == 1:
        return {name: value.detach() for name, value in ends[0].items()}
    return {name: torch.cat([end[name].detach() for end in ends]) for name in learner.shared}


def of_tasks(alpha: Tensor, first: int, count: int) -> Tensor:
    """The architectures of some tasks out of [B, 9, operations] or [cells, B, 9, operations]."""
    return alpha.narrow(-3, first, count)


def stack(learner: Learner, parameters: Mapping[str, Tensor] | None, tasks: int) -> dict[str, Tensor]:
    """`tasks` copies of the shared start, [B, *shape], as leaves that ask for gradients."""
    start = learner.start(parameters)
    return {n: value.detach().expand(tasks, *value.shape).clone().requires_grad_() for n, value in start.items()}


def task_gradients(
    learner: Learner,
    packed: Packed,
    stacked: Mapping[str, Tensor],
    alpha: Tensor | None = None,
    autocast: str | None = None,
    *,
    also: Sequence[Tensor] = (),
    create_graph: bool = False,
) -> tuple[Tensor, list[Tensor | None]]:
    """Mean losses [B], and the gradient of each task's own loss for each tensor in `stacked`.

    also          tensors that all tasks share, whose gradients, summed over the tasks, follow
    create_graph  losses and gradients can be differentiated again

    None for what no task used, as for the operations of a search cell that nobody selected.
    """
    wanted = [*stacked.values(), *also]
    total: Tensor | None = None
    gradients: list[Tensor | None] = [None] * len(wanted)
    for one in packed.passes:
        # open until after backward: recomputation under checkpointing needs it
        with learner.running(stacked, one.offsets, alpha):
            with casting(learner.device, autocast):
                sums = packed.loss_sums(learner.model, one)
            means = sums / packed.counts
            parts = differentiated(learner.model, means.sum(), wanted, create_graph)
        means = means if create_graph else means.detach()
        total = means if total is None else total + means
        for i, gradient in enumerate(parts):
            if gradient is not None:
                previous = gradients[i]
                if previous is None:
                    gradients[i] = gradient
                else:
                    gradients[i] = previous + gradient if create_graph else previous.add_(gradient)
    assert total is not None  # a task has at least one scored token, so there is at least one pass
    return total, gradients


def filled(gradients: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> list[Tensor]:
    """Zeros in the place of gradients that are missing."""
    return [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, parameters, strict=True)]


def mean_losses(
    learner: Learner,
    packed: Packed,
    stacked: Mapping[str, Tensor],
    alpha: Tensor | None = None,
    autocast: str | None = None,
) -> Tensor:
    """Mean losses [B], differentiable where no activation is recomputed."""
    total: Tensor | None = None
    for one in packed.passes:
        with learner.running(stacked, one.offsets, alpha), casting(learner.device, autocast):
            sums = packed.loss_sums(learner.model, one)
        total = sums if total is None else total + sums
    assert total is not None
    return total / packed.counts


@torch.no_grad()
def task_losses(
    learner: Learner,
    packed: Packed,
    stacked: Mapping[str, Tensor],
    alpha: Tensor | None = None,
    autocast: str | None = None,
) -> Tensor:
    """Mean losses [B] without gradients, in evaluation mode."""
    with mode(learner.model, False):
        return mean_losses(learner, packed, stacked, alpha, autocast)


def casting(device: torch.device, autocast: str | None) -> contextlib.AbstractContextManager[Any]:
    """Torch's autocast of that name, or nothing."""
    if autocast is None:
        return contextlib.nullcontext()
    return torch.autocast(device.type, AUTOCAST[autocast])


def clip_factors(gradients: Sequence[Tensor], clip: float) -> Tensor:
    """[B] by which each task's share of gradients [B, *shape] is scaled to a norm of at most `clip`."""
    squares = torch.stack([gradient.flatten(1).square().sum(dim=1) for gradient in gradients]).sum(dim=0)
    return (clip / (root(squares) + 1e-6)).clamp(max=1)  # 1e-6 as in torch's clip_grad_norm_


def scaled(gradient: Tensor, factors: Tensor) -> Tensor:
    """gradient [B, *shape] times a number for each task."""
    return gradient * factors.view(-1, *(1,) * (gradient.dim() - 1)).to(gradient.dtype)


@torch.no_grad()
def clip_per_task(gradients: Sequence[Tensor | None], clip: float | None) -> None:
    """Scale each task's share of stacked gradients [B, *shape], in place, to a norm of at most `clip`."""
    present = [gradient for gradient in gradients if gradient is not None]
    if clip is None or not present:
        return
    factors = clip_factors(present, clip)
    for gradient in present:
        gradient.copy_(scaled(gradient, factors))


class Health:
    """Whether losses, and what came of them, have been finite, found out without waiting for a device until `check`."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names, self.notes = list(names), list[tuple[str, Tensor, Tensor]]()

    @torch.no_grad()
    def note(self, losses: Tensor, results: Sequence[Tensor | None], what: str) -> None:
        """Losses [B] and, of each task, gradients or adapted values [B, *shape]; `what` names the loss in a message."""
        # finite numbers of half precision have sums that are not
        sums = [result.flatten(1).sum(dim=1, dtype=losses.dtype) for result in results if result is not None]
        good = torch.isfinite(torch.stack([losses, *sums])).all(dim=0)
        self.notes.append((what, losses.detach(), good))

    def check(self) -> None:
        """Raise DivergedError for the first step, and there the first task, that was not finite."""
        if not self.notes or bool(torch.stack([good.all() for _, _, good in self.notes]).all()):
            return
        for what, losses, good in self.notes:
            for name, fine, loss in zip(self.names, good.tolist(), losses.tolist(), strict=True):
                if not fine:
                    lost = loss != loss or abs(loss) == float("inf")
                    trouble = f"is {loss}" if lost else "leads to gradients or values that are not finite"
                    raise DivergedError(f"task {name!r}: {what} {trouble}; lower the learning rate or set clip")
