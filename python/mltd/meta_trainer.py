"""The outer loop: learn a start from which a few inner steps suit an unseen task (method.md §1).

Each iteration draws a meta-batch, takes the objective's gradient for all that is trained and one outer step; then comes
a line in the log, then a checkpoint, in this order, so that a run killed at any moment goes on to the same bits (at the
same number of threads and of processes).
"""

import contextlib
import math
import random
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from mltd.checkpoint import (
    Checkpoint,
    JsonLines,
    checkpoint_path,
    checkpoints,
    latest_checkpoint,
    model_fingerprint,
    rng_state,
    save_checkpoint,
    set_rng_state,
)
from mltd.controller import Controller
from mltd.distributed import LostProcessError, Processes, unwrapped
from mltd.evaluation import Curve, evaluate
from mltd.inner_loop import DivergedError
from mltd.learner import Learner
from mltd.loggers import Logger
from mltd.meta_config import MetaConfig
from mltd.meta_gradient import Problem, require_double_backward
from mltd.outer_gradient import OuterGradient
from mltd.outer_state import OuterState
from mltd.run_identity import identity, require_agreement, require_same_run
from mltd.sharded import is_sharded, require_possible, whole
from mltd.tasks import TaskSampler, TaskSet, check_fits
from mltd.termination import Terminated, termination


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


class MetaTrainer:
    """Meta-trains a model on `tasks`.

    model       a Hugging Face model; `apply_tarp` first where the adapter is adapted or trained. It may be wrapped in
                DistributedDataParallel, which changes nothing, or be spread by fully_shard, see `mltd.sharded`
    tasks       the training tasks
    run_dir     where checkpoints and log.jsonl go; a run found there is resumed. None: nothing is kept
    validation  tasks for `validate_every`; never trained on
    controller  chooses the tasks' architectures. Where config.trains has "controller" and none is given, it is made
    loggers     are told of every iteration, in the first process, see `mltd.loggers`

    Several processes, under torchrun say, share one run: see `mltd.distributed`.

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
        model = unwrapped(model)
        if config.validate_every and not validation:
            got = "None" if validation is None else "no task"
            raise ValueError(
                f"validation: got {got} with validate_every > 0, expected a TaskSet; hold out some training tasks"
            )
        check_fits(tasks, model)
        if validation is not None:
            check_fits(validation, model)
            leaks = tasks.check_leaks(validation)
            if leaks:
                raise ValueError(f"validation: shares data with the training tasks: {leaks[0]} ({len(leaks)} in all)")
        if config.objective == "second_order":
            require_double_backward(model, config.inner)
        self.processes = Processes.join()
        self.model, self.tasks, self.config, self.validation = model, tasks, config, validation
        self.controller = _controller(model, config, controller)
        self.learner = Learner(model, config.inner.adapts)
        cells_are_chosen = self.controller is not None
        if require_possible(model, self.learner.shared, config.objective, cells_are_chosen):
            self.processes = replace(self.processes, take_turns=False)
        self.outer = OuterState(self.learner, config, self.controller)
        self.problem = Problem(self.learner, config.inner, self.outer.of_model, config.query_at, self.outer.rates)
        self.gradient = OuterGradient(config, self.problem, self.outer, self.controller, self.processes)
        self.sampler = TaskSampler(tasks, config.tasks_per_batch, config.seed)
        self.directory = None if run_dir is None else Path(run_dir)
        self.log = None
        if self.directory is not None and self.processes.first:
            self.log = JsonLines(self.directory / "log.jsonl")
        self.loggers = tuple(loggers) if self.processes.first else ()
        self.identity = identity(config, model_fingerprint(model, self.outer.of_model), tasks, validation)
        self.iteration, self.stopped_early, self.seconds, self.tokens = 0, False, 0.0, 0
        self.told, self.all_told = threading.Event(), False
        self.scores: dict[int, float] = {}
        self.best: dict[str, Tensor] = {}

    def train(self, progress: bool = True) -> MetaResult:
        """Train, or go on with an interrupted run; afterwards the model and its controller hold the trained start.

        Raises, in every process of the run: DivergedError, which names the task and the last good checkpoint, when a
        loss is not finite; CheckpointError when run_dir holds a damaged checkpoint or another run's; Terminated after
        SIGTERM to any of them; LostProcessError when one of the others has died; ValueError when they disagree about
        the run. OSError in the first process, which alone writes, when run_dir cannot be written to.
        """
        with torch.random.fork_rng(), termination() as self.told, self._saying_where_it_goes_on():
            self._resume_or_begin()
            with self._bar(progress and self.processes.first) as bar:
                while self.iteration < self.config.iterations and not self.stopped_early:
                    record = self._iterate()
                    bar.update()
                    bar.set_postfix(loss=f"{_mean(record['losses'].values()):.3f}", **self._shown_score())
                    # several stop after the step in which they all learnt of it; one alone needs no agreement
                    if self.all_told if self.processes.size > 1 else self.told.is_set():
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
        """The checkpoint that `train` goes on from; CheckpointError where it is damaged or none of this run."""
        found = None if self.directory is None else latest_checkpoint(self.directory)
        if found is not None:
            require_same_run(found, self.identity, self.config.iterations)
        return found

    def _resume_or_begin(self) -> None:
        require_agreement(self.processes.gather(self.identity))
        chooser = [] if self.controller is None else list(self.controller.parameters())
        started = [*self.outer.all.values(), *chooser]
        self.processes.copy_from_first([value for value in started if not is_sharded(value)])
        found = self.processes.from_first(self.found)
        if found is not None:
            self._restore(found)
        for logger in self.loggers:
            logger.begin(self.iteration)
        if found is not None:
            return
        torch.manual_seed(self.config.seed)
        self._reseed()
        if self.log is not None:
            self.log.keep(lambda _: False)
        began = time.perf_counter()
        record: dict[str, Any] = {"iteration": 0, **self._validate()}
        self._finish(record, began, always_save=True)

    def _iterate(self) -> dict[str, Any]:
        began, config = time.perf_counter(), self.config
        before = (self.sampler.state_dict(), rng_state())
        batches = [next(self.sampler) for _ in range(config.accumulate)]
        self._reseed()
        try:
            summed = self.gradient.of(batches, self.iteration, self.told.is_set)
        except DivergedError as error:
            raise DivergedError(f"iteration {self.iteration + 1}: {error}; {self._keep_last_good(*before)}") from None
        except LostProcessError:
            if self.processes.take_turns:  # else the lost one had a part of it
                self._keep_last_good(*before)
            raise
        names = [task.name for tasks in batches for task in tasks]
        mean = {name: gradient.div_(len(names)) for name, gradient in summed.gradients.items()}
        try:
            norm, lr = self.outer.descend(mean, self.iteration + 1)
        except DivergedError as error:
            where = f"iteration {self.iteration + 1}: tasks {', '.join(map(repr, names))}"
            raise DivergedError(f"{where}: {error}; {self._keep_last_good(*before)}") from None
        self.iteration += 1
        record = {
            "iteration": self.iteration,
            "losses": dict(zip(names, summed.losses, strict=True)),
            "gradient_norm": norm,
            "outer_lr": lr,
            "tokens": summed.tokens,
            "examples": summed.examples,
            **self._validate(),
        }
        self._finish(record, began)
        self.all_told = summed.told
        return record

    def _reseed(self) -> None:
        """What dropout draws. The first process draws as one alone would, and its generator is what a checkpoint holds;
        the others begin anew in every iteration, so that nothing of theirs need be kept."""
        if self.processes.take_turns and not self.processes.first:
            own = random.Random(f"{self.config.seed}/{self.iteration}/{self.processes.rank}")
            torch.manual_seed(own.getrandbits(63))

    def _validate(self) -> dict[str, Any]:
        config = self.config
        if not config.validate_every or self.validation is None or self.iteration % config.validate_every:
            return {}
        curve = self._curve(self.validation)
        perplexity = {} if curve is None else curve.perplexity_by_step
        score = math.inf if curve is None else curve.geometric_mean(config.validate_at)
        if not self.scores or score < min(self.scores.values()):
            self.best = self.outer.copy()
        self.scores[self.iteration] = score
        since_best = sum(iteration > self.best_iteration for iteration in self.scores)
        self.stopped_early = config.patience is not None and since_best >= config.patience
        return {"validation": perplexity, "validation_score": score if math.isfinite(score) else None}

    def _curve(self, validation: TaskSet) -> Curve | None:
        """Of the validation tasks, the processes taking turns; None where adaptation diverges: that start is a bad one,
        and not the end of the run."""
        inner, steps = self.config.inner, self.config.validate_at
        own = [task for place, task in enumerate(validation) if self.processes.owns(place)]
        curves: list[Curve] = []
        diverged = False
        try:
            if own:
                rates = self.outer.rates
                curves = [evaluate(self.model, own, inner, steps, controller=self.controller, rates=rates)]
        except DivergedError:
            diverged = True
        shares = self.processes.gather((curves, diverged))
        if any(diverged for _, diverged in shares):
            return None
        return Curve.joined([curve for curves, _ in shares for curve in curves])

    def _finish(self, record: dict[str, Any], began: float, always_save: bool = False) -> None:
        """Log, then save: resuming drops a line without its checkpoint, and could not make up for the reverse."""
        record["seconds"] = time.perf_counter() - began
        self.seconds += record["seconds"]
        self.tokens += record.get("tokens", 0)
        for logger in self.loggers:
            logger.log(record)
        if self.log is not None:
            self.log.append(record)
        last = self.iteration >= self.config.iterations or self.stopped_early
        if always_save or last or self.iteration % self.config.checkpoint_every == 0:
            self._save(self.sampler.state_dict(), rng_state())

    def _keep_last_good(self, sampler: dict[str, Any], rng: dict[str, Tensor]) -> str:
        """Nothing of a failed iteration has reached the parameters, so the state before it can still be saved."""
        if self.directory is None:
            return "nothing was kept, as there is no run_dir"
        try:
            return f"the last good state, iteration {self.iteration}, is {self._save(sampler, rng)}"
        except OSError as error:
            return f"the state before it cannot be saved ({error}), and {self._goes_on()}"

    def _ended(self) -> str:
        if self.directory is None:
            return f"terminated at iteration {self.iteration}; nothing was kept, as there is no run_dir"
        path = self._save(self.sampler.state_dict(), rng_state())
        return f"terminated at iteration {self.iteration}; the same command goes on from {path}"

    @contextlib.contextmanager
    def _saying_where_it_goes_on(self) -> Iterator[None]:
        try:
            yield
        except LostProcessError as error:
            raise LostProcessError(f"after iteration {self.iteration}: {error}; {self._goes_on()}") from None
        except OSError as error:
            raise OSError(
                f"run_dir: iteration {self.iteration} cannot be kept ({error}); make room there or let this user write "
                f"to it, then {self._goes_on()}"
            ) from error

    def _goes_on(self) -> str:
        kept = checkpoints(self.directory) if self.directory is not None else []
        return f"the same command goes on from {kept[-1]}" if kept else "start the same command again"

    def _save(self, sampler: dict[str, Any], rng: dict[str, Tensor]) -> Path | None:
        """Write a checkpoint, in the first process alone; returns where it is, None without a run_dir."""
        if self.directory is None:
            return None
        tensors = self.outer.tensors()
        tensors |= {f"best/{name}": whole(value) for name, value in self.best.items()}
        if not self.processes.first:
            return checkpoint_path(self.directory, self.iteration)
        tensors |= {f"rng/{name}": value for name, value in rng.items()}
        state = {
            "run": self.identity,
            "sampler": sampler,
            "scores": [[iteration, score] for iteration, score in self.scores.items()],
            "stopped_early": self.stopped_early,
        }
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
        self.seconds, self.tokens = self.processes.from_first(self._spent)
        set_rng_state(groups["rng"])

    def _spent(self) -> tuple[float, int]:
        """Seconds and tokens so far, by the log, which loses what it has beyond the checkpoint."""
        assert self.log is not None
        self.log.keep(lambda record: record["iteration"] <= self.iteration)
        records = self.log.read()
        return sum(record["seconds"] for record in records), sum(record.get("tokens", 0) for record in records)

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
