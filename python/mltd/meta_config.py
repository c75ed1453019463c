"""The settings of meta-training."""

import math
from dataclasses import dataclass, field

from mltd.controller import Temperature
from mltd.evaluation import check_steps
from mltd.inner_loop import OPTIMIZERS, InnerConfig
from mltd.meta_gradient import OBJECTIVES

SCHEDULES = ("constant", "linear", "cosine")


@dataclass(frozen=True)
class MetaConfig:
    """How the shared start is trained.

    inner             what of the model a task adapts and how, in training and afterwards
    trains            what the outer loop updates: parts of the model as `mltd.learner` names them, and "controller",
                      which chooses the tasks' architectures of search cells
    learn_rates       whether every adapted number's inner learning rate is trained too (Meta-SGD), from inner.lr on
    iterations        outer steps; with a constant schedule a finished run can be resumed with more of them
    tasks_per_batch   tasks of a meta-batch
    accumulate        meta-batches whose gradients one outer step averages
    outer_lr, outer_optimizer ("adam" | "adamw" | "sgd"), outer_weight_decay
    controller_lr, rates_lr   outer learning rates of the controller and of inner learning rates; None: outer_lr
    outer_clip        largest norm of the outer gradient; None: no clipping
    outer_schedule    "constant" | "linear" | "cosine" decay of outer_lr to 0 over the iterations
    seed              of the sampler, and of dropout where inner.train_mode uses it
    objective         "first_order" | "second_order" | "reptile" | "multitask", see `mltd.meta_gradient`
    gumbel            whether the controller's architectures are samples, at `temperature`; else the likeliest ones
    entropy_weight    of the bonus for a controller that has not settled yet
    query_steps       inner steps at which query gradients are taken and averaged; None: the last one, (inner.steps,).
                      Several steps, as (0, 1, 3), give a curve that is good all along instead of at one step
    validate_every    iterations between validations; 0: none. The start with the best validation score is kept
    validation_steps  adaptation steps whose perplexities' geometric mean is that score; None: (inner.steps,)
    patience          validations in a row without a better score after which training stops; None: never
    checkpoint_every  iterations between checkpoints
    """

    inner: InnerConfig = field(default_factory=InnerConfig)
    iterations: int = 20
    tasks_per_batch: int = 4
    outer_lr: float = 1e-3
    outer_optimizer: str = "adam"
    outer_weight_decay: float = 0.0
    outer_clip: float | None = None
    outer_schedule: str = "constant"
    seed: int = 0
    objective: str = "first_order"
    query_steps: tuple[int, ...] | None = None
    validate_every: int = 0
    validation_steps: tuple[int, ...] | None = None
    patience: int | None = None
    checkpoint_every: int = 1
    trains: tuple[str, ...] = ("adapter",)
    learn_rates: bool = False
    accumulate: int = 1
    controller_lr: float | None = None
    rates_lr: float | None = None
    gumbel: bool = True
    temperature: Temperature = field(default_factory=Temperature)
    entropy_weight: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "trains", tuple(self.trains))  # JSON and YAML give lists
        choices = {"outer_optimizer": OPTIMIZERS, "outer_schedule": SCHEDULES, "objective": OBJECTIVES}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected one of {', '.join(known)}")
        for name in ("iterations", "tasks_per_batch", "checkpoint_every", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 1")
        for name in ("outer_lr", "controller_lr", "rates_lr", "outer_clip", "patience"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected more than 0")
        if not self.trains:
            raise ValueError("trains: got nothing, expected at least one part of the model, such as 'adapter'")
        if self.learn_rates and self.objective not in ("first_order", "second_order"):
            raise ValueError(
                f"learn_rates: {self.objective!r} has no gradient for them; use first_order or second_order"
            )
        if self.inner.cuda_graph and (self.learn_rates or self.objective == "second_order"):
            what = "learn_rates" if self.learn_rates else "objective='second_order'"
            raise ValueError(f"cuda_graph: {what} cannot be captured, its steps differ; set inner.cuda_graph to False")
        if max(check_steps(self.query_at)) > self.inner.steps:
            raise ValueError(
                f"query_steps: got {self.query_steps}, expected none beyond inner.steps = "
                f"{self.inner.steps}; raise inner.steps"
            )

    @property
    def query_at(self) -> tuple[int, ...]:
        return (self.inner.steps,) if self.query_steps is None else tuple(self.query_steps)

    @property
    def validate_at(self) -> tuple[int, ...]:
        return (self.inner.steps,) if self.validation_steps is None else tuple(self.validation_steps)

    def outer_lr_at(self, iteration: int) -> float:
        """The outer learning rate of iteration 1, 2, …"""
        done = (iteration - 1) / self.iterations
        factors = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
        return self.outer_lr * factors[self.outer_schedule]
