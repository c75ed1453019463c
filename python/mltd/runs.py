"""What the commands train, adapt and eval do, in a run's folder:

config.yaml                 all settings; `tarp train --config` with it is the same run
log.jsonl, iteration-*      of `MetaTrainer`
start/, result.json         the trained start, and how training went
eval-<tasks>.json           the curve of `tarp eval`

`tarp adapt` writes config.yaml, curve.json and what is adapted into a folder of its own, which is a start as well.
"""

import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from mltd.baselines import METHODS, prepare, training_tasks
from mltd.checkpoint import checkpoints, plain, write_json
from mltd.config_file import as_yaml, write_config
from mltd.controller import chosen
from mltd.data.episodes import Episodes, left_out_of
from mltd.evaluation import Curve, evaluate
from mltd.inner_loop import adapt
from mltd.loggers import LOGGERS, Logger
from mltd.measures import Measure
from mltd.memory import estimate_memory
from mltd.meta_trainer import MetaTrainer
from mltd.pretrained import load_model, load_tokenizer
from mltd.run_config import RunConfig
from mltd.run_metrics import measures_for
from mltd.run_starts import CONFIG, START, begun_model
from mltd.starts import BESIDE, Start, save_start
from mltd.task_sources import Source, read_examples, read_tasks, read_text
from mltd.tasks import Task, TaskSet
from tarp_kernels import set_architecture, tarp_report
from tarp_kernels.models import is_adapted

RESULT, CURVE = "result.json", "curve.json"
RESUME = ("auto", "never", "must")

Say = Callable[[str], None]


# --- train ------------------------------------------------------------------------------------------------------------


def run_train(config: RunConfig, resume: str, dry_run: bool, say: Say) -> None:
    """Meta-train, or go on with the run in config.out, and save the start.

    resume   "auto": go on where there is a checkpoint; "never": refuse a folder that has one; "must": one without
    dry_run  everything up to the first step is done and said; nothing is written

    Under torchrun the processes share the tasks, see `mltd.distributed`.

    Raises ValueError or OSError that names the setting, the file or the task; DivergedError and Terminated as of
    `MetaTrainer.train`.
    """
    method, out = METHODS[config.method], Path(config.out)
    if not method.trains:
        raise ValueError(f"method: {config.method!r} trains nothing beforehand; use tarp adapt or tarp eval at once")
    _check_folder(out, resume)
    tokenizer = load_tokenizer(config.model)
    source, config = _read(config, tokenizer)
    if method.text == "domains":
        source = source._replace(text=read_text(config, tokenizer, source))
    if not dry_run:
        _refuse_leaks(source)
    model, random = load_model(config.model, config.seed, source.classes, source.labels)
    prepare(method, model, config.tarp, config.seed)
    train, validation, test = (episodes.tasks for episodes in source.episodes())
    tasks = training_tasks(method, train, (validation, test), source.text)
    if not tasks:
        raise ValueError("data: no task is left to train on; with small_tasks='drop' all were too small")
    if dry_run:
        _describe(config, model, source, tasks, say)
        _refuse_leaks(source)
    if config.meta.validate_every and not validation:
        raise ValueError("data.validation_tasks: got 0 with meta.validate_every > 0, expected some to be held out")
    loggers: list[Logger] = [_KeepConfig(out / CONFIG, config)]
    loggers += [LOGGERS[name](out, plain(asdict(config))) for name in config.log_to]
    judge = validation if config.meta.validate_every else None
    meta = replace(config.meta, trains=(*config.meta.trains, *map(re.escape, random)))
    trainer = MetaTrainer(model, tasks, meta, out, judge, loggers=loggers)
    first = trainer.processes.first
    found = trainer.found()
    if random and first:
        say(f"model: {config.model.name} lacks {', '.join(random)}: random at first, and trained as well")
    begins = "begins anew" if found is None else f"goes on from {found.path}"
    if dry_run:
        say(f"run: {begins}; stopped before the first step")
        return
    if first:
        say(f"{out}: {begins}")
    result = trainer.train(progress=sys.stderr.isatty())
    if not first:  # it holds what the first process writes down
        return
    save_start(model, out / START, Start(trainer.controller, result.rates), result.parameters)
    write_json(
        out / RESULT,
        {
            "iteration": result.iteration,
            "iterations": result.iterations,
            "stopped_early": result.stopped_early,
            "seconds": result.seconds,
            "tokens": result.tokens,
            "validation": {str(iteration): score for iteration, score in result.validation.items()},
        },
    )
    best = f", validation score {result.validation[result.iteration]:.3f}" if result.validation else ""
    say(f"{out / START}: the start of iteration {result.iteration} of {result.iterations}{best}")


class _KeepConfig:
    """Writes the settings once the run is known to be this one's."""

    def __init__(self, path: Path, config: RunConfig) -> None:
        self.path, self.config = path, config

    def begin(self, iteration: int) -> None:
        write_config(self.path, self.config)

    def log(self, record: Mapping[str, Any]) -> None:
        pass


def _check_folder(out: Path, resume: str) -> None:
    if resume not in RESUME:
        raise ValueError(f"resume: got {resume!r}, expected one of {', '.join(RESUME)}")
    has_one = bool(checkpoints(out))
    if resume == "never" and has_one:
        raise ValueError(f"{out}: has a checkpoint, which --resume never refuses; choose another --out")
    if resume == "must" and not has_one:
        raise ValueError(f"{out}: has no checkpoint, which --resume must needs; name the folder of an earlier run")
    if (out / BESIDE).exists():
        raise ValueError(f"{out}: holds an adapted model; choose another --out")
    _require_writable(out)


def _read(config: RunConfig, tokenizer: Any) -> tuple[Source, RunConfig]:
    """The tasks, and the settings with the names of classes that were found: other examples are to have the same."""
    source = read_tasks(config, tokenizer)
    return source, replace(config, data=replace(config.data, labels=source.labels))


def _refuse_leaks(source: Source) -> None:
    leaks = source.leaks()
    if leaks:
        raise ValueError(
            f"data: what is held out is not unseen: {leaks[0]} ({len(leaks)} in all); remove one of them, or set "
            "data.duplicates=drop"
        )


def _describe(config: RunConfig, model: Any, source: Source, training: TaskSet, say: Say) -> None:
    say(as_yaml(config).rstrip())
    size = sum(parameter.numel() for parameter in model.parameters())
    say(f"model: {type(model).__name__}, {size:,} parameters, {model.dtype}, on {model.device}")
    if is_adapted(model):
        say(str(tarp_report(model)))
    say(f"memory: {estimate_memory(model, training, config.meta.inner, config.meta.tasks_per_batch)}, estimated")
    sets = [episodes.tasks for episodes in source.episodes()]
    for tasks in sets if training in sets else [*sets, training]:
        support, query = (sum(len(getattr(task, part)) for task in tasks) for part in ("support", "query"))
        say(f"{tasks.name}: {len(tasks)} tasks, {support} support and {query} query examples")
        for task in tasks:
            tokens = sum(task.kind.length(example) for example in (*task.support, *task.query))
            say(f"  {task.name}: {len(task.support)} support, {len(task.query)} query, {tokens} tokens")
    leaks = source.leaks()
    say(f"leaks: {len(leaks) or 'none'}")
    for leak in leaks:
        say(f"  {leak}")


# --- adapt and eval ---------------------------------------------------------------------------------------------------


def run_eval(
    config: RunConfig, start: Path | None, part: str, metrics: Sequence[str], out: Path | None, say: Say
) -> Curve:
    """Adapt to every task that is held out as `part`, "validation" or "test"; say the curve and write it as JSON.

    start    a run's folder, or one that holds a start; None: the method's initial state
    metrics  further ones beside perplexity, see `mltd.run_metrics`
    out      default: eval-<part>.json in the run's folder
    """
    if part not in ("validation", "test"):
        raise ValueError(f"tasks: got {part!r}, expected 'validation' or 'test'")
    tokenizer = load_tokenizer(config.model)
    source, config = _read(config, tokenizer)
    episodes: Episodes = getattr(source, part)
    tasks = episodes.tasks
    if not tasks:
        raise ValueError(f"data.{part}_tasks: got none, expected some; hold out some tasks")
    measures = measures_for(config, metrics, episodes, tokenizer)
    _refuse_leaks(source)
    model, begun, _ = begun_model(config, start, source.classes, source.labels)
    steps = config.steps if METHODS[config.method].adapts else (0,)
    curve = _curve(config, model, begun, tasks, steps, measures)
    path = (Path(config.out) if start is None else start) / f"eval-{part}.json" if out is None else out
    write_json(path, {"method": config.method, "tasks": part, **curve.to_json()})
    group = left_out_of if config.data.leave_one_out else None
    _show(curve, f"{config.method}: perplexity on the query sets of {len(tasks)} {part} tasks", say, group)
    say(f"written to {path}")
    return curve


def run_adapt(config: RunConfig, start: Path | None, examples: Path, query: Path | None, out: Path, say: Say) -> Curve:
    """Adapt to the examples of a file and save what is adapted, with the curve, in the folder `out`.

    query  a file of examples to measure the curve on; None: those that were adapted to
    """
    if not METHODS[config.method].adapts:
        raise ValueError(f"method: {config.method!r} adapts nothing; choose another one, or use tarp eval")
    if checkpoints(out):
        raise ValueError(f"{out}: is the folder of a training run; choose another --out")
    _require_writable(out)
    tokenizer = load_tokenizer(config.model)
    support = read_examples(config, tokenizer, examples)
    judged = support if query is None else read_examples(config, tokenizer, query)
    task = Task(examples.stem, support, judged, config.model.kind)
    classes = None if config.data.labels is None else len(config.data.labels)
    model, begun, random = begun_model(config, start, classes, config.data.labels)
    curve = _curve(config, model, begun, TaskSet([task]), range(config.meta.inner.steps + 1))
    alpha = None if begun.controller is None else chosen(begun.controller, model, [task])
    with torch.random.fork_rng():
        torch.manual_seed(config.meta.seed)
        ends = adapt(model, [task], config.meta.inner, alpha=alpha, rates=begun.rates)
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, values in ends.items():
            own[name].copy_(values[0])
    if alpha is not None:
        set_architecture(model, alpha.squeeze(-3))
    save_start(model, out, Start(), {name: own[name] for name in (*ends, *random)})
    write_config(out / CONFIG, replace(config, out=str(out)))
    write_json(out / CURVE, {"method": config.method, "examples": str(examples), **curve.to_json()})
    on = "the examples adapted to" if query is None else f"{query}"
    _show(curve, f"{config.method}: perplexity on {on}", say)
    say(f"adapted to {len(support)} examples; saved in {out}")
    return curve


def _require_writable(out: Path) -> None:
    existing = next(place for place in (out, *out.absolute().parents) if place.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ValueError(f"{out}: {existing} is no folder that can be written; choose another --out")


def _curve(
    config: RunConfig, model: Any, start: Start, tasks: TaskSet, steps: Iterable[int], measures: Sequence[Measure] = ()
) -> Curve:
    with torch.random.fork_rng():
        torch.manual_seed(config.meta.seed)
        return evaluate(
            model,
            tasks,
            config.meta.inner,
            tuple(steps),
            controller=start.controller,
            rates=start.rates,
            measures=measures,
        )


def _show(curve: Curve, what: str, say: Say, group: Callable[[str], str] | None = None) -> None:
    """Perplexity by token over all tasks; every other metric as the mean over the tasks.

    group  of a task's name: then it is the mean over the groups of the means over their tasks, which are no strangers
    """
    rows = {"perplexity": curve.perplexity_by_step}
    for metric, of_task in curve.metrics.items():
        table = pd.DataFrame.from_dict(of_task, orient="index")  # [tasks, steps]
        table = table if group is None else table.groupby(group).mean()
        rows[metric] = table.mean().to_dict()
    say(what)
    say("step        " + "".join(f"{step:>10}" for step in curve.steps))
    for name, values in rows.items():
        say(f"{name:<12}" + "".join(f"{values[step]:>10.3f}" for step in curve.steps))
