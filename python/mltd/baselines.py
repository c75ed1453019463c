"""The methods by name, each a recipe of one code path: what is added to the model, adapted, and trained before.

    zero-shot       the pretrained model as it is
    finetune        all weights, for each task from the pretrained ones
    lora            PEFT's LoRA with as many parameters as TARP, from its initial state
    tarp-nometa     TARP from its initial state
    tarp-multitask  TARP trained jointly on the training tasks, then adapted like the others
    tarp            TARP meta-trained on the training tasks
    mltd            the same, with the search cells that the TarpConfig asks for and a controller that chooses theirs
    maml            all weights meta-trained and adapted
    reptile         all weights moved towards where adaptation ends
    dapt            all weights trained further on unlabelled text of the domains, then adapted
    tapt            the same on what the tasks' own support sets say, unlabelled

Every method chooses its learning rates and its stopping step on the validation tasks and meets the test tasks once.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from mltd.checkpoint import CheckpointError, model_fingerprint, plain, read_json, write_json
from mltd.distributed import Processes
from mltd.evaluation import STEPS, Curve, check_steps, evaluate, evaluate_unadapted
from mltd.inner_loop import InnerConfig
from mltd.kinds import Example
from mltd.learner import Learner, choose
from mltd.lora import apply_lora
from mltd.meta_config import MetaConfig
from mltd.meta_trainer import MetaResult, MetaTrainer
from mltd.selection import select
from mltd.starts import ADAPTER, Start, save_start
from mltd.tasks import Task, TaskSet, check_fits
from tarp_kernels import TarpConfig, apply_tarp


@dataclass(frozen=True)
class Method:
    """What makes a method.

    adds        what is added to the pretrained model: "tarp", "cells" (TARP with search cells), "lora", None
    adapts      parts of the model that a task adapts, see `mltd.learner`; none: nothing is adapted
    trains      parts that are trained before; none: nothing is
    objectives  of that training, the first unless a MetaConfig asks for another of them
    text        what it trains on instead of the training tasks: "domains" or "support", as text
    """

    adds: str | None = None
    adapts: tuple[str, ...] = ()
    trains: tuple[str, ...] = ()
    objectives: tuple[str, ...] = ()
    text: str | None = None


META = ("first_order", "second_order")
METHODS: dict[str, Method] = {
    "zero-shot": Method(),
    "finetune": Method(adapts=("all",)),
    "lora": Method("lora", ("lora",)),
    "tarp-nometa": Method("tarp", ("adapter",)),
    "tarp-multitask": Method("tarp", ("adapter",), ("adapter",), ("multitask",)),
    "tarp": Method("tarp", ("adapter",), ("adapter",), META),
    "mltd": Method("cells", ("adapter",), ("adapter",), META),
    "maml": Method(None, ("all",), ("all",), META),
    "reptile": Method(None, ("all",), ("all",), ("reptile",)),
    "dapt": Method(None, ("all",), ("all",), ("multitask",), "domains"),
    "tapt": Method(None, ("all",), ("all",), ("multitask",), "support"),
}


@dataclass(frozen=True)
class Comparison:
    """What the methods share, and what each may choose from.

    make_model  gives the pretrained model anew on every call, frozen or not
    train, validation, test  task sets that share no task and no example
    tarp        the adapter of the three TARP methods; LoRA gets as many parameters on the same layers
    inner       method -> candidates of how to adapt. Methods that train may be left out: they adapt as their chosen
                MetaConfig.inner says. What is adapted is set from the method
    meta        method that trains -> candidates of how; all with the same iterations and tasks_per_batch. What is
                trained is set from the method; the objective too unless it is one that the method allows
    text        unlabelled text of the domains, for "dapt": a task for each, all of its tokens scored
    steps       adaptation steps to report
    criterion   of `mltd.selection.select`
    seed        of the adapters' initial values
    run_dir     where each method keeps its state and result; a finished one is read back, an interrupted one goes on
    """

    make_model: Callable[[], Any]
    train: TaskSet
    validation: TaskSet
    test: TaskSet
    tarp: TarpConfig = field(default_factory=TarpConfig)
    inner: Mapping[str, Sequence[InnerConfig]] = field(default_factory=dict)
    meta: Mapping[str, Sequence[MetaConfig]] = field(default_factory=dict)
    steps: tuple[int, ...] = STEPS
    criterion: str = "best"
    seed: int = 0
    run_dir: Path | None = None
    text: TaskSet | None = None

    def __post_init__(self) -> None:
        check_steps(self.steps)
        for first, second in ((self.train, self.validation), (self.train, self.test), (self.validation, self.test)):
            leaks = first.check_leaks(second)
            if leaks:
                raise ValueError(
                    f"{second.name}: shares data with {first.name}: {leaks[0]} ({len(leaks)} in all); drop it"
                )
        for tasks in (self.train, self.validation, self.test):
            leaks = tasks.check_leaks()
            if leaks:
                raise ValueError(
                    f"{tasks.name}: a query set is not held out: {leaks[0]} ({len(leaks)} in all); drop it"
                )
        budgets = {(c.iterations, c.tasks_per_batch) for candidates in self.meta.values() for c in candidates}
        if len(budgets) > 1:
            raise ValueError(
                f"meta: got candidates of (iterations, tasks_per_batch) {sorted(budgets)}, expected one budget for all"
            )


@dataclass(frozen=True)
class MethodResult:
    """How one method did on the test tasks.

    parameters        trained numbers: of the adapter, or of the whole model for finetune
    stop_step         the step at which validation says to stop
    inner, meta       the chosen settings, as JSON; None where the method has none
    validation        the perplexities on the validation tasks under these settings
    train_tokens      through forward and backward of the chosen outer training, each time that they went
    train_seconds     of the chosen outer training; adapt_seconds of adapting to and evaluating the test tasks;
                      select_seconds of everything that was tried on validation tasks
    adapter           where save_tarp put the trained start; None for the methods without one, or without a run_dir.
                      The folder that it lies in is one for `mltd.starts.load_start`
    """

    name: str
    curve: Curve
    parameters: int
    stop_step: int
    inner: dict[str, Any] | None
    meta: dict[str, Any] | None
    validation: dict[int, float]
    train_tokens: int
    train_seconds: float
    adapt_seconds: float
    select_seconds: float
    adapter: str | None

    @property
    def seconds(self) -> float:
        """Training and adaptation, without the search for settings."""
        return self.train_seconds + self.adapt_seconds

    def to_json(self) -> dict[str, Any]:
        validation = {str(step): perplexity for step, perplexity in self.validation.items()}
        return {**vars(self), "curve": self.curve.to_json(), "validation": validation}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "MethodResult":
        validation = {int(step): perplexity for step, perplexity in values["validation"].items()}
        return cls(**{**values, "curve": Curve.from_json(values["curve"]), "validation": validation})


def run_method(name: str, comparison: Comparison, progress: bool = True) -> MethodResult:
    """Run one of METHODS, or read its result back where run_dir has it.

    Under torchrun every process calls this, and the first one alone writes to run_dir.

    Raises ValueError for an unknown name, missing candidates or a task that does not fit the model, CheckpointError
    when run_dir holds the result of another comparison.
    """
    if name not in METHODS:
        raise ValueError(f"name: got {name!r}, expected one of {', '.join(METHODS)}")
    method = METHODS[name]
    needs = {"meta": bool(method.trains), "inner": bool(method.adapts) and not method.trains}
    for part, needed in needs.items():
        if needed and not getattr(comparison, part).get(name):
            raise ValueError(f"{part}: got no candidate for {name!r}, expected at least one; set {part}[{name!r}]")
    if method.text == "domains" and comparison.text is None:
        raise ValueError(f"text: got None, expected a TaskSet of unlabelled text for {name!r}; set Comparison.text")
    directory = None if comparison.run_dir is None else Path(comparison.run_dir) / name
    model = comparison.make_model()
    for tasks in (comparison.train, comparison.validation, comparison.test):
        check_fits(tasks, model)
    identity = _identity(name, comparison, model)
    processes = Processes.join()
    if directory is not None:
        known = processes.from_first(partial(_claimed, directory, identity))
        if known is not None:
            return known
    result = (
        _run(name, model, comparison, directory, progress) if method.adapts else _unadapted(name, model, comparison)
    )
    if directory is not None and processes.first:
        write_json(directory / "result.json", {"identity": identity, "result": result.to_json()})
    return result


def _unadapted(name: str, model: Any, comparison: Comparison) -> MethodResult:
    validation = evaluate_unadapted(model, comparison.validation)
    curve = evaluate_unadapted(model, comparison.test)
    scores = validation.perplexity_by_step
    return MethodResult(name, curve, 0, 0, None, None, scores, 0, 0.0, curve.seconds, validation.seconds, None)


def _run(name: str, model: Any, comparison: Comparison, directory: Path | None, progress: bool) -> MethodResult:
    """Prepare the parameters, train their start if the method has one, choose how to adapt, adapt to the test tasks."""
    method = METHODS[name]
    parameters = prepare(method, model, comparison.tarp, comparison.seed)
    trained, meta, searched, start, adapter = None, None, 0.0, Start(), None
    if method.trains:
        trained, meta, searched, start = _train(name, model, comparison, directory, progress)
        if directory is not None:
            if Processes.join().first:
                save_start(model, directory, start, trained.parameters)
            adapter = str(directory / ADAPTER) if method.adds is not None else None
    candidates = tuple(comparison.inner.get(name, ())) or ((meta.inner,) if meta is not None else ())
    candidates = tuple(replace(candidate, adapts=method.adapts) for candidate in candidates)

    def curve_on(tasks: TaskSet, inner: InnerConfig) -> Curve:
        total = (max(comparison.steps) + 1) * len(Learner(model, inner.adapts).groups(tasks))
        with tqdm(total=total, desc=f"{name}: adapting to {tasks.name}", disable=not progress, leave=False) as bar:
            return _curve(model, tasks, inner, comparison.steps, start, lambda: bar.update())

    record = None if directory is None else directory / "inner.json"
    chosen = select(candidates, lambda c: curve_on(comparison.validation, c), comparison.criterion, record)
    curve = curve_on(comparison.test, chosen.candidate)
    return MethodResult(
        name,
        curve,
        parameters,
        chosen.stop_step,
        plain(asdict(chosen.candidate)),
        None if meta is None else plain(asdict(meta)),
        chosen.curve.perplexity_by_step,
        0 if trained is None else trained.tokens,
        0.0 if trained is None else trained.seconds,
        curve.seconds,
        searched + chosen.seconds,
        adapter,
    )


def _curve(
    model: Any,
    tasks: TaskSet,
    inner: InnerConfig,
    steps: tuple[int, ...],
    start: Start,
    on_step: Callable[[], None] = lambda: None,
) -> Curve:
    return evaluate(model, tasks, inner, steps, controller=start.controller, rates=start.rates, on_step=on_step)


def prepare(method: Method, model: Any, tarp: TarpConfig, seed: int) -> int:
    """Add to the model what the method adds, in the initial state that `seed` gives; returns how many numbers it
    adapts."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if method.adds == "lora":
            return apply_lora(model, replace(tarp, search_cell=None))
        if method.adds is not None:
            apply_tarp(model, tarp if method.adds == "cells" else replace(tarp, search_cell=None))
    return sum(parameter.numel() for parameter in choose(model, method.adapts).values())


def _train(
    name: str, model: Any, comparison: Comparison, directory: Path | None, progress: bool
) -> tuple[MetaResult, MetaConfig, float, Start]:
    """Train a start for every candidate and leave the best one, by its curve on the validation tasks, in the model."""
    method = METHODS[name]
    candidates = [filled_in(config, method, comparison.tarp) for config in comparison.meta[name]]
    begun = {key: value.detach().clone() for key, value in choose(model, method.trains).items()}
    tasks = training_tasks(method, comparison.train, (comparison.validation, comparison.test), comparison.text)
    trainers: dict[int, MetaTrainer] = {}
    results: dict[int, MetaResult] = {}

    def train(index: int) -> MetaResult:
        _set(model, begun)
        where = None if directory is None else directory / f"train-{index}"
        validation = comparison.validation if candidates[index].validate_every else None
        trainers[index] = MetaTrainer(model, tasks, candidates[index], where, validation)
        results[index] = trainers[index].train(progress)
        return results[index]

    def start(index: int) -> Start:
        return Start(trainers[index].controller, results[index].rates)

    def validate(config: MetaConfig) -> Curve:
        index = candidates.index(config)
        trained = train(index)
        curve = _curve(model, comparison.validation, config.inner, comparison.steps, start(index))
        return replace(curve, seconds=curve.seconds + trained.seconds)

    if len(candidates) == 1:
        return train(0), candidates[0], 0.0, start(0)
    record = None if directory is None else directory / "meta.json"
    chosen = select(candidates, validate, comparison.criterion, record)
    # not among the results when an earlier part of this run validated it: then its run directory has it
    result = results[chosen.index] if chosen.index in results else train(chosen.index)
    _set(model, result.parameters)
    return result, chosen.candidate, chosen.seconds - result.seconds, start(chosen.index)


def filled_in(config: MetaConfig, method: Method, tarp: TarpConfig) -> MetaConfig:
    """The settings with what the method decides; of one that does not train, what it decides of adaptation."""
    inner = replace(config.inner, adapts=method.adapts, steps=config.inner.steps if method.adapts else 0)
    if not method.trains:
        return replace(config, inner=inner)
    cells = method.adds == "cells" and tarp.search_cell is not None
    return replace(
        config,
        inner=inner,
        trains=(*method.trains, "controller") if cells else method.trains,
        objective=config.objective if config.objective in method.objectives else method.objectives[0],
        # text is no task to validate a start on
        validate_every=config.validate_every if method.text is None else 0,
    )


def training_tasks(method: Method, train: TaskSet, held_out: Iterable[TaskSet], text: TaskSet | None) -> TaskSet:
    """What the method trains on: the training tasks, text of the domains, or what held-out support sets say."""
    if method.text == "domains":
        assert text is not None
        return text
    if method.text == "support":
        return TaskSet((_as_text(task) for tasks in held_out for task in tasks), "support text")
    return train


def _as_text(task: Task) -> Task:
    """What a task's support set says, every token scored; the query set stays unseen."""
    if task.kind.name != "causal":
        raise ValueError(
            f"task {task.name!r}: is of kind {task.kind.name!r}, expected 'causal' to be trained on as text"
        )
    text = [Example(example.input_ids, example.input_ids) for example in task.support]
    return Task(task.name, text[:-1] or text, text[-1:])


@torch.no_grad()
def _set(model: Any, values: Mapping[str, Tensor]) -> None:
    own = dict(model.named_parameters())
    for name, value in values.items():
        own[name].copy_(value)


def _identity(name: str, comparison: Comparison, model: Any) -> str:
    """A digest of everything that decides a method's result."""
    inner = [asdict(config) for config in comparison.inner.get(name, ())]
    meta = [asdict(config) for config in comparison.meta.get(name, ())]
    sets = (comparison.train, comparison.validation, comparison.test, comparison.text)
    data = [None if tasks is None else tasks.fingerprint() for tasks in sets]
    settings = (name, asdict(comparison.tarp), inner, meta, comparison.steps, comparison.criterion, comparison.seed)
    return hashlib.sha256(repr((settings, data, model_fingerprint(model, {}))).encode()).hexdigest()


def _claimed(directory: Path, identity: str) -> MethodResult | None:
    """The result that the directory has; None where it has none yet, and is now this comparison's."""
    if (directory / "result.json").exists():
        return _read_back(directory / "result.json", identity)
    path = directory / "identity.json"
    if path.exists() and read_json(path) != identity:
        raise CheckpointError(f"{directory}: holds the beginning of another comparison; give this one its own run_dir")
    write_json(path, identity)
    return None


def _read_back(path: Path, identity: str) -> MethodResult:
    stored = read_json(path)
    if not isinstance(stored, dict) or "result" not in stored or stored.get("identity") != identity:
        raise CheckpointError(f"{path}: is the result of another comparison; give this one its own run_dir")
    return MethodResult.from_json(stored["result"])
