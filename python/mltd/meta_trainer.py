"""The outer loop: learn a start of the adapter from which a few inner steps suit an unseen task (method.md §1).

The base model stays frozen. Each iteration draws a meta-batch, takes the objective's gradient and one outer step;
then comes a line in the log, then a checkpoint, in this order, so that a run killed at any moment goes on to the same
bits (at the same number of threads).
"""

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from mltd.checkpoint import (
    Checkpoint,
    CheckpointError,
    JsonLines,
    latest_checkpoint,
    model_fingerprint,
    plain,
    rng_state,
    save_checkpoint,
    set_rng_state,
)
from mltd.evaluation import check_steps, evaluate
from mltd.inner_loop import OPTIMIZERS, DivergedError, InnerConfig, clip_per_task, make_optimizer, take_step
from mltd.meta_gradient import OBJECTIVES
from mltd.tasks import Task, TaskSampler, TaskSet, check_fits
from tarp_kernels import tarp_parameters

SCHEDULES = ("constant", "linear", "cosine")


@dataclass(frozen=True)
class MetaConfig:
    """How the shared start is trained.

    inner             how a task is adapted, in training and afterwards
    iterations        outer steps; with a constant schedule a finished run can be resumed with more of them
    tasks_per_batch   tasks of a meta-batch
    outer_lr, outer_optimizer ("adam" | "adamw" | "sgd"), outer_weight_decay
    outer_clip        largest norm of the outer gradient; None: no clipping
    outer_schedule    "constant" | "linear" | "cosine" decay of outer_lr to 0 over the iterations
    seed              of the sampler, and of dropout where inner.train_mode uses it
    objective         "first_order" | "multitask" (joint training, the baseline)
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

    def __post_init__(self) -> None:
        choices = {"outer_optimizer": OPTIMIZERS, "outer_schedule": SCHEDULES, "objective": OBJECTIVES}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected one of {', '.join(known)}")
        for name in ("iterations", "tasks_per_batch", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 1")
        for name, least in (("outer_lr", 0), ("outer_clip", 0), ("patience", 0)):
            if getattr(self, name) is not None and not getattr(self, name) > least:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected more than {least}")
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


class MetaResult(NamedTuple):
    """The trained start, name -> tensor, from iteration `iteration` of the `iterations` that ran."""

    parameters: dict[str, Tensor]
    iteration: int
    iterations: int
    stopped_early: bool
    seconds: float  # interruptions left out
    tokens: int  # through forward and backward, each time that they went
    validation: dict[int, float]  # iteration -> score


class MetaTrainer:
    """Meta-trains the adapter of `model` on `tasks`.

    model       a causal language model whose layers `apply_tarp` adapted
    tasks       the training tasks
    run_dir     where checkpoints and log.jsonl go; a run found there is resumed. None: nothing is kept
    validation  tasks for `validate_every`; never trained on

    Raises ValueError that names a task that does not fit the model, or one shared with the validation tasks.
    """

    def __init__(
        self,
        model: Any,
        tasks: TaskSet,
        config: MetaConfig,
        run_dir: str | Path | None = None,
        validation: TaskSet | None = None,
    ) -> None:
        if config.validate_every and validation is None:
            raise ValueError(
                "validation: got None with validate_every > 0, expected a TaskSet; hold out some training tasks"
            )
        check_fits(tasks, model)
        if validation is not None:
            check_fits(validation, model)
            leaks = tasks.check_leaks(validation)
            if leaks:
                raise ValueError(f"validation: shares data with the training tasks: {leaks[0]} ({len(leaks)} in all)")
        self.model, self.tasks, self.config, self.validation = model, tasks, config, validation
        self.own = tarp_parameters(model)
        self.sampler = TaskSampler(tasks, config.tasks_per_batch, config.seed)
        self.optimizer = make_optimizer(
            config.outer_optimizer, list(self.own.values()), config.outer_lr, config.outer_weight_decay
        )
        self.directory = None if run_dir is None else Path(run_dir)
        self.log = None if self.directory is None else JsonLines(self.directory / "log.jsonl")
        self.fingerprints = {
            "model": model_fingerprint(model, self.own),
            "tasks": tasks.fingerprint(),
            "validation": None if validation is None else validation.fingerprint(),
        }
        self.iteration, self.stopped_early, self.seconds, self.tokens = 0, False, 0.0, 0
        self.scores: dict[int, float] = {}
        self.best: dict[str, Tensor] = {}

    def train(self, progress: bool = True) -> MetaResult:
        """Train, or go on with an interrupted run; afterwards the model's own adapter is the trained start.

        Raises DivergedError, which names the task and the last good checkpoint, when a loss is not finite;
        CheckpointError when run_dir holds a damaged checkpoint or another run's.
        """
        with torch.random.fork_rng():
            self._resume_or_begin()
            with self._bar(progress) as bar:
                while self.iteration < self.config.iterations and not self.stopped_early:
                    record = self._iterate()
                    bar.update()
                    bar.set_postfix(loss=f"{_mean(record['losses'].values()):.3f}", **self._shown_score())
        parameters = self.best if self.best else self._snapshot()
        with torch.no_grad():
            for name, value in parameters.items():
                self.own[name].copy_(value)
        return MetaResult(
            {name: value.clone() for name, value in parameters.items()},
            self.best_iteration,
            self.iteration,
            self.stopped_early,
            self.seconds,
            self.tokens,
            dict(self.scores),
        )

    @property
    def best_iteration(self) -> int:
        """The iteration of the best validation score; where nothing is validated, the last one."""
        return min(self.scores, key=lambda i: (self.scores[i], i), default=self.iteration)

    def _resume_or_begin(self) -> None:
        found = None if self.directory is None else latest_checkpoint(self.directory)
        if found is not None:
            self._restore(found)
            return
        torch.manual_seed(self.config.seed)
        if self.log is not None:
            self.log.keep(lambda _: False)
        began = time.perf_counter()
        record: dict[str, Any] = {"iteration": 0, **self._validate()}
        self._finish(record, began, always_save=True)

    def _iterate(self) -> dict[str, Any]:
        began, config = time.perf_counter(), self.config
        before = (self.sampler.state_dict(), rng_state())
        tasks: list[Task] = next(self.sampler)
        try:
            step = OBJECTIVES[config.objective](self.model, tasks, config.inner, config.query_at)
        except DivergedError as error:
            raise DivergedError(f"iteration {self.iteration + 1}: {error}; {self._keep_last_good(*before)}") from None
        norm = torch.stack([gradient.norm() for gradient in step.gradients]).norm().item()
        clip_per_task([gradient.unsqueeze(0) for gradient in step.gradients], config.outer_clip)  # all as one
        lr = config.outer_lr_at(self.iteration + 1)
        take_step(self.optimizer, list(self.own.values()), step.gradients, lr)
        self.iteration += 1
        record = {
            "iteration": self.iteration,
            "losses": dict(zip((task.name for task in tasks), step.losses.tolist(), strict=True)),
            "gradient_norm": norm,
            "outer_lr": lr,
            "tokens": step.tokens,
            "examples": step.examples,
            **self._validate(),
        }
        self._finish(record, began)
        return record

    def _validate(self) -> dict[str, Any]:
        config = self.config
        if not config.validate_every or self.validation is None or self.iteration % config.validate_every:
            return {}
        try:
            curve = evaluate(self.model, self.validation, config.inner, config.validate_at)
            perplexity, score = curve.perplexity_by_step, curve.geometric_mean(config.validate_at)
        except DivergedError:  # a start from which adaptation diverges is a bad one, not the end of the run
            perplexity, score = {}, math.inf
        if not self.scores or score < min(self.scores.values()):
            self.best = self._snapshot()
        self.scores[self.iteration] = score
        since_best = sum(iteration > self.best_iteration for iteration in self.scores)
        self.stopped_early = config.patience is not None and since_best >= config.patience
        return {"validation": perplexity, "validation_score": score if math.isfinite(score) else None}

    def _finish(self, record: dict[str, Any], began: float, always_save: bool = False) -> None:
        """Log, then save: resuming drops a line without its checkpoint, and could not make up for the reverse."""
        record["seconds"] = time.perf_counter() - began
        self.seconds += record["seconds"]
        self.tokens += record.get("tokens", 0)
        if self.log is None:
            return
        self.log.append(record)
        last = self.iteration >= self.config.iterations or self.stopped_early
        if always_save or last or self.iteration % self.config.checkpoint_every == 0:
            self._save(self.sampler.state_dict(), rng_state())

    def _keep_last_good(self, sampler: dict[str, Any], rng: dict[str, Tensor]) -> str:
        """Nothing of a failed iteration has reached the parameters, so the state before it can still be saved."""
        if self.directory is None:
            return "nothing was kept, as there is no run_dir"
        return f"the last good state, iteration {self.iteration}, is {self._save(sampler, rng)}"

    def _save(self, sampler: dict[str, Any], rng: dict[str, Tensor]) -> Path:
        tensors: dict[str, Tensor] = {f"parameters/{name}": value for name, value in self.own.items()}
        tensors |= {f"best/{name}": value for name, value in self.best.items()}
        tensors |= {f"rng/{name}": value for name, value in rng.items()}
        for name, parameter in self.own.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if value is not None:  # SGD without momentum keeps a None
                    tensors[f"optimizer/{name}/{key}"] = value
        state = {
            "run": self._run(),
            "sampler": sampler,
            "scores": [[iteration, score] for iteration, score in self.scores.items()],
            "stopped_early": self.stopped_early,
        }
        assert self.directory is not None
        return save_checkpoint(self.directory, self.iteration, tensors, state)

    def _restore(self, found: Checkpoint) -> None:
        """Put a checkpoint's state back: the adapter, outer optimiser, sampler, generators, validation and log."""
        self._require_same_run(found)
        groups: dict[str, dict[str, Tensor]] = {"parameters": {}, "best": {}, "rng": {}, "optimizer": {}}
        for key, value in found.tensors.items():
            kind, _, name = key.partition("/")
            groups[kind][name] = value
        with torch.no_grad():
            for name, parameter in self.own.items():
                parameter.copy_(groups["parameters"][name])
        self.best = {name: value.to(self.own[name].device) for name, value in groups["best"].items()}
        state: dict[int, dict[str, Tensor]] = {}
        for index, name in enumerate(self.own):
            prefix = f"{name}/"
            mine = {k[len(prefix) :]: v for k, v in groups["optimizer"].items() if k.startswith(prefix)}
            if mine:
                state[index] = mine
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        self.sampler.load_state_dict(found.state["sampler"])
        self.scores = {int(iteration): score for iteration, score in found.state["scores"]}
        self.iteration, self.stopped_early = found.iteration, found.state["stopped_early"]
        assert self.log is not None
        self.log.keep(lambda record: record["iteration"] <= found.iteration)
        records = self.log.read()
        self.seconds = sum(record["seconds"] for record in records)
        self.tokens = sum(record.get("tokens", 0) for record in records)
        set_rng_state(groups["rng"])

    def _require_same_run(self, found: Checkpoint) -> None:
        if found.iteration > self.config.iterations:
            raise CheckpointError(
                f"{found.path}: is at iteration {found.iteration}, expected at most iterations = "
                f"{self.config.iterations}; give this run a directory of its own"
            )
        wanted, got = self._run(), found.state["run"]
        for part in wanted:
            if wanted[part] == got.get(part):
                continue
            detail = ""
            if part == "config":
                ours, theirs = wanted[part], got[part]
                name = next(name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name))
                detail = f": {name} was {theirs.get(name)!r} and is now {ours.get(name)!r}"
            raise CheckpointError(
                f"{found.path}: belongs to a run with another {part}{detail}; give this run a directory of its own, "
                "or go on with what that one used"
            )

    def _run(self) -> dict[str, Any]:
        """What must not change between the parts of one run, as JSON."""
        config = plain(asdict(self.config))
        if self.config.outer_schedule == "constant":
            del config["iterations"]  # a longer run begins exactly like a shorter one
        return {
            "config": config,
            **self.fingerprints,
        }

    def _snapshot(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.own.items()}

    def _shown_score(self) -> dict[str, str]:
        return {"validation": f"{min(self.scores.values()):.2f}"} if self.scores else {}

    @contextlib.contextmanager
    def _bar(self, progress: bool) -> Iterator[tqdm]:
        label = {"first_order": "meta-training", "multitask": "joint training"}[self.config.objective]
        with tqdm(total=self.config.iterations, initial=self.iteration, desc=label, disable=not progress) as bar:
            yield bar


def _mean(values: Sequence[float] | Any) -> float:
    listed = list(values)
    return sum(listed) / len(listed)
