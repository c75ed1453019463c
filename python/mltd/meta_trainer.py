"""The outer loop: learn a start from which a few inner steps suit an unseen task (method.md §1).

Each iteration draws a meta-batch, takes the objective's gradient for all that is trained and one outer step; then comes
a line in the log, then a checkpoint, in this order, so that a run killed at any moment goes on to the same bits (at the
same number of threads).
"""

import contextlib
import math
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
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
from mltd.controller import Controller, entropy, sampled
from mltd.evaluation import evaluate
from mltd.inner_loop import DivergedError
from mltd.learner import Learner
from mltd.loggers import Logger
from mltd.meta_config import MetaConfig
from mltd.meta_gradient import OBJECTIVES, MetaGradient, Problem, require_double_backward
from mltd.outer_state import OuterState
from mltd.tasks import Task, TaskSampler, TaskSet, check_fits


class MetaResult(NamedTuple):
    """The trained start, from iteration `iteration` of the `iterations` that ran."""

    parameters: dict[str, Tensor]  # of the model, by name
    rates: dict[str, Tensor] | None  # learned inner learning rates, by the same names
    iteration: int
    iterations: int
    stopped_early: bool
    seconds: float  # interruptions left out
    tokens: int  # through forward and backward, each time that they went
    validation: dict[int, float]  # iteration -> score


class Terminated(SystemExit):
    """The process was told to end; what was done is saved. Uncaught, it ends the process with the status of SIGTERM."""

    def __init__(self, message: str) -> None:
        super().__init__(128 + signal.SIGTERM)
        self.message = message

    def __str__(self) -> str:
        return self.message


class MetaTrainer:
    """Meta-trains a model on `tasks`.

    model       a Hugging Face model; `apply_tarp` first where the adapter is adapted or trained
    tasks       the training tasks
    run_dir     where checkpoints and log.jsonl go; a run found there is resumed. None: nothing is kept
    validation  tasks for `validate_every`; never trained on
    controller  chooses the tasks' architectures. Where config.trains has "controller" and none is given, it is made
    loggers     are told of every iteration, see `mltd.loggers`

    Raises ValueError that names a task that does not fit the model, or one shared with the validation tasks.
    """

    def __init__(
        self,
        model: Any,
        tasks: TaskSet,
        config: MetaConfig,
        run_dir: str | Path | None = None,
        validation: TaskSet | None = None,
        controller: Controller | None = None,
        loggers: Sequence[Logger] = (),
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
        if config.objective == "second_order":
            require_double_backward(model, config.inner)
        self.model, self.tasks, self.config, self.validation = model, tasks, config, validation
        self.controller = _controller(model, config, controller)
        self.learner = Learner(model, config.inner.adapts)
        self.outer = OuterState(self.learner, config, self.controller)
        self.problem = Problem(self.learner, config.inner, self.outer.of_model, config.query_at, self.outer.rates)
        self.sampler = TaskSampler(tasks, config.tasks_per_batch, config.seed)
        self.directory = None if run_dir is None else Path(run_dir)
        self.log = None if self.directory is None else JsonLines(self.directory / "log.jsonl")
        self.loggers = tuple(loggers)
        self.fingerprints = {
            "model": model_fingerprint(model, self.outer.of_model),
            "tasks": tasks.fingerprint(),
            "validation": None if validation is None else validation.fingerprint(),
        }
        self.iteration, self.stopped_early, self.seconds, self.tokens = 0, False, 0.0, 0
        self.scores: dict[int, float] = {}
        self.best: dict[str, Tensor] = {}

    def train(self, progress: bool = True) -> MetaResult:
        """Train, or go on with an interrupted run; afterwards the model and its controller hold the trained start.

        Raises DivergedError, which names the task and the last good checkpoint, when a loss is not finite;
        CheckpointError when run_dir holds a damaged checkpoint or another run's; Terminated after SIGTERM.
        """
        with torch.random.fork_rng(), _termination() as told:
            self._resume_or_begin()
            with self._bar(progress) as bar:
                while self.iteration < self.config.iterations and not self.stopped_early:
                    record = self._iterate()
                    bar.update()
                    bar.set_postfix(loss=f"{_mean(record['losses'].values()):.3f}", **self._shown_score())
                    if told.is_set():
                        raise Terminated(self._ended())
        if self.best:
            self.outer.put(self.best)
        own, rates = self.outer.of_model, self.outer.rates
        return MetaResult(
            {name: own[name].detach().clone() for name in own if not name.startswith("rates/")},
            None if rates is None else {name: rate.detach().clone() for name, rate in rates.items()},
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

    def found(self) -> Checkpoint | None:
        """The checkpoint that `train` goes on from; CheckpointError for a damaged one or another run's."""
        found = None if self.directory is None else latest_checkpoint(self.directory)
        if found is not None:
            self._require_same_run(found)
        return found

    def _resume_or_begin(self) -> None:
        found = self.found()
        if found is not None:
            self._restore(found)
        for logger in self.loggers:
            logger.begin(self.iteration)
        if found is not None:
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
        losses: list[tuple[str, float]] = []
        total: dict[str, Tensor] = {}
        tokens = examples = 0
        try:
            for _ in range(config.accumulate):
                tasks: list[Task] = next(self.sampler)
                step, gradients = self._gradient(tasks)
                for name, gradient in gradients.items():
                    total[name] = total[name] + gradient if name in total else gradient
                losses += zip((task.name for task in tasks), step.losses.tolist(), strict=True)
                tokens, examples = tokens + step.tokens, examples + step.examples
        except DivergedError as error:
            raise DivergedError(f"iteration {self.iteration + 1}: {error}; {self._keep_last_good(*before)}") from None
        mean = {name: gradient.div_(len(losses)) for name, gradient in total.items()}
        norm, lr = self.outer.descend(mean, self.iteration + 1)
        self.iteration += 1
        record = {
            "iteration": self.iteration,
            "losses": dict(losses),
            "gradient_norm": norm,
            "outer_lr": lr,
            "tokens": tokens,
            "examples": examples,
            **self._validate(),
        }
        self._finish(record, began)
        return record

    def _gradient(self, tasks: Sequence[Task]) -> tuple[MetaGradient, dict[str, Tensor]]:
        """The sum over the tasks of the gradients for all that is trained, the controller's too."""
        objective, config = OBJECTIVES[self.config.objective], self.config
        parts: list[MetaGradient] = []
        total: dict[str, Tensor] = {}
        for group in self.learner.groups(tasks) if config.objective != "multitask" else [tasks]:
            alpha = logits = None
            if self.controller is not None:
                temperature, seed = config.temperature.at(self.iteration), f"{config.seed}/{self.iteration}"
                alpha, logits = sampled(self.controller, self.model, group, temperature, config.gumbel, seed)
            part = objective(self.problem, group, alpha)
            found = dict(part.gradients)
            if alpha is not None and logits is not None and self.outer.of_controller:
                # the bonus counts once a task, like the losses that it is beside
                assert part.alpha is not None
                pull = (alpha * part.alpha).sum() - config.entropy_weight * len(group) * entropy(logits)
                parameters = list(self.outer.of_controller.values())
                found |= zip(self.outer.of_controller, torch.autograd.grad(pull, parameters), strict=True)
            for name, gradient in found.items():
                total[name] = total[name] + gradient if name in total else gradient
            parts.append(part)
        losses = torch.cat([part.losses for part in parts])
        tokens, examples = sum(part.tokens for part in parts), sum(part.examples for part in parts)
        return MetaGradient(losses, total, None, tokens, examples), total

    def _validate(self) -> dict[str, Any]:
        config = self.config
        if not config.validate_every or self.validation is None or self.iteration % config.validate_every:
            return {}
        try:
            curve = evaluate(
                self.model,
                self.validation,
                config.inner,
                config.validate_at,
                controller=self.controller,
                rates=self.outer.rates,
            )
            perplexity, score = curve.perplexity_by_step, curve.geometric_mean(config.validate_at)
        except DivergedError:  # a start from which adaptation diverges is a bad one, not the end of the run
            perplexity, score = {}, math.inf
        if not self.scores or score < min(self.scores.values()):
            self.best = self.outer.copy()
        self.scores[self.iteration] = score
        since_best = sum(iteration > self.best_iteration for iteration in self.scores)
        self.stopped_early = config.patience is not None and since_best >= config.patience
        return {"validation": perplexity, "validation_score": score if math.isfinite(score) else None}

    def _finish(self, record: dict[str, Any], began: float, always_save: bool = False) -> None:
        """Log, then save: resuming drops a line without its checkpoint, and could not make up for the reverse."""
        record["seconds"] = time.perf_counter() - began
        self.seconds += record["seconds"]
        self.tokens += record.get("tokens", 0)
        for logger in self.loggers:
            logger.log(record)
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

    def _ended(self) -> str:
        if self.directory is None:
            return f"terminated at iteration {self.iteration}; nothing was kept, as there is no run_dir"
        path = self._save(self.sampler.state_dict(), rng_state())
        return f"terminated at iteration {self.iteration}; the same command goes on from {path}"

    def _save(self, sampler: dict[str, Any], rng: dict[str, Tensor]) -> Path:
        tensors = self.outer.tensors()
        tensors |= {f"best/{name}": value for name, value in self.best.items()}
        tensors |= {f"rng/{name}": value for name, value in rng.items()}
        state = {
            "run": self._run(),
            "sampler": sampler,
            "scores": [[iteration, score] for iteration, score in self.scores.items()],
            "stopped_early": self.stopped_early,
        }
        assert self.directory is not None
        return save_checkpoint(self.directory, self.iteration, tensors, state)

    def _restore(self, found: Checkpoint) -> None:
        """Put a checkpoint's state back: what is trained, outer optimiser, sampler, generators, validation and log."""
        self.outer.restore(found.tensors)
        groups: dict[str, dict[str, Tensor]] = {"best": {}, "rng": {}}
        for key, value in found.tensors.items():
            kind, _, name = key.partition("/")
            groups.setdefault(kind, {})[name] = value
        self.best = groups["best"]
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

    def _shown_score(self) -> dict[str, str]:
        return {"validation": f"{min(self.scores.values()):.2f}"} if self.scores else {}

    @contextlib.contextmanager
    def _bar(self, progress: bool) -> Iterator[tqdm]:
        label = "joint training" if self.config.objective == "multitask" else "meta-training"
        with tqdm(total=self.config.iterations, initial=self.iteration, desc=label, disable=not progress) as bar:
            yield bar


def _mean(values: Sequence[float] | Any) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


def _controller(model: Any, config: MetaConfig, given: Controller | None) -> Controller | None:
    """The controller that is used: the given one, or where it is trained one made from the run's seed."""
    if given is None and "controller" in config.trains:
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            given = Controller.for_model(model).to(next(model.parameters()).device)
    if given is not None:
        given.check_fits(model)
    return given


@contextlib.contextmanager
def _termination() -> Iterator[threading.Event]:
    """Set once the process is told to end. Only the main thread hears signals; elsewhere they do what they did."""
    told = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield told
        return
    before = signal.signal(signal.SIGTERM, lambda *_: told.set())
    try:
        yield told
    finally:
        signal.signal(signal.SIGTERM, before)
