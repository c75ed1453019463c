"""The methods that MLtD is measured against, by name, at one budget: the same tasks, steps, examples and outer updates.

    zero-shot       the pretrained model as it is
    finetune        all weights, for each task from the pretrained ones
    lora            PEFT's LoRA with as many parameters as TARP, from its initial state
    tarp-nometa     TARP from its initial state
    tarp-multitask  TARP trained jointly on the training tasks, then adapted like the others
    mltd            TARP meta-trained on the training tasks, first order

Every method chooses its learning rates and its stopping step on the validation tasks and meets the test tasks once.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from mltd.checkpoint import CheckpointError, model_fingerprint, plain, read_json, write_json
from mltd.evaluation import STEPS, Curve, check_steps, evaluate, evaluate_one_by_one, evaluate_unadapted
from mltd.inner_loop import InnerConfig
from mltd.lora import apply_lora
from mltd.meta_trainer import MetaConfig, MetaResult, MetaTrainer
from mltd.selection import select
from mltd.tasks import TaskSet, check_fits
from tarp_kernels import TarpConfig, apply_tarp, save_tarp, tarp_parameters

METHODS = ("zero-shot", "finetune", "lora", "tarp-nometa", "tarp-multitask", "mltd")
TRAINED = {"tarp-multitask": "multitask", "mltd": "first_order"}


@dataclass(frozen=True)
class Comparison:
    """What the methods share, and what each may choose from.

    make_model  gives the pretrained model anew on every call, frozen or not
    train, validation, test  task sets that share no task and no example
    tarp        the adapter of the three TARP methods; LoRA gets as many parameters on the same layers
    inner       method -> candidates of how to adapt. `mltd` and `tarp-multitask` may be left out: they adapt as their
                chosen MetaConfig.inner says
    meta        "mltd" and "tarp-multitask" -> candidates of how to train; all with the same iterations
                and tasks_per_batch. The objective is set from the method's name
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
    adapter           where save_tarp put the trained start; None for the methods without one, or without a run_dir
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
    """Run one of METHODS ("tarp" is another name of "mltd"), or read its result back where run_dir has it.

    Raises ValueError for an unknown name, missing candidates or a task that does not fit the model, CheckpointError
    when run_dir holds the result of another comparison.
    """
    name = "mltd" if name == "tarp" else name
    if name not in METHODS:
        raise ValueError(f"name: got {name!r}, expected one of {', '.join(METHODS)}")
    needs = {"meta": name in TRAINED, "inner": name not in TRAINED and name != "zero-shot"}
    for part, needed in needs.items():
        if needed and not getattr(comparison, part).get(name):
            raise ValueError(f"{part}: got no candidate for {name!r}, expected at least one; set {part}[{name!r}]")
    directory = None if comparison.run_dir is None else Path(comparison.run_dir) / name
    model = comparison.make_model()
    for tasks in (comparison.train, comparison.validation, comparison.test):
        check_fits(tasks, model)
    identity = _identity(name, comparison, model)
    if directory is not None and (directory / "result.json").exists():
        return _read_back(directory / "result.json", identity)
    if directory is not None:
        _claim(directory / "identity.json", identity)
    result = (
        _zero_shot(model, comparison) if name == "zero-shot" else _run(name, model, comparison, directory, progress)
    )
    if directory is not None:
        write_json(directory / "result.json", {"identity": identity, "result": result.to_json()})
    return result


def _zero_shot(model: Any, comparison: Comparison) -> MethodResult:
    validation = evaluate_unadapted(model, comparison.validation)
    curve = evaluate_unadapted(model, comparison.test)
    return MethodResult(
        "zero-shot",
        curve,
        0,
        0,
        None,
        None,
        validation.perplexity_by_step,
        0,
        0.0,
        curve.seconds,
        validation.seconds,
        None,
    )


def _run(name: str, model: Any, comparison: Comparison, directory: Path | None, progress: bool) -> MethodResult:
    """Prepare the parameters, train their start if the method has one, choose how to adapt, adapt to the test tasks."""
    with torch.random.fork_rng():
        torch.manual_seed(comparison.seed)
        parameters = _prepare(name, model, comparison.tarp)
    trained, meta, searched, adapter = None, None, 0.0, None
    if name in TRAINED:
        trained, meta, searched = _train(name, model, comparison, directory, progress)
        if directory is not None:
            adapter = str(directory / "adapter")
            save_tarp(model, adapter)
    candidates = tuple(comparison.inner.get(name, ())) or ((meta.inner,) if meta is not None else ())
    measure = evaluate_one_by_one if name in ("finetune", "lora") else evaluate

    def curve_on(tasks: TaskSet, inner: InnerConfig) -> Curve:
        rounds = len(tasks) if measure is evaluate_one_by_one else 1
        total = (max(comparison.steps) + 1) * rounds
        with tqdm(total=total, desc=f"{name}: adapting to {tasks.name}", disable=not progress, leave=False) as bar:
            return measure(model, tasks, inner, comparison.steps, on_step=lambda: bar.update())

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


def _prepare(name: str, model: Any, tarp: TarpConfig) -> int:
    """Give the model the parameters that the method trains; returns how many numbers they are."""
    if name == "finetune":
        model.requires_grad_(True)
        return sum(parameter.numel() for parameter in model.parameters())
    if name == "lora":
        return apply_lora(model, tarp)
    apply_tarp(model, tarp)
    return sum(parameter.numel() for parameter in tarp_parameters(model).values())


def _train(
    name: str, model: Any, comparison: Comparison, directory: Path | None, progress: bool
) -> tuple[MetaResult, MetaConfig, float]:
    """Train a start for every candidate and leave the best one, by its curve on the validation tasks, in the model."""
    start = {key: parameter.detach().clone() for key, parameter in tarp_parameters(model).items()}
    candidates = [replace(config, objective=TRAINED[name]) for config in comparison.meta[name]]
    results: dict[int, MetaResult] = {}

    def train(index: int) -> MetaResult:
        _set(model, start)
        where = None if directory is None else directory / f"train-{index}"
        trainer = MetaTrainer(model, comparison.train, candidates[index], where, comparison.validation)
        results[index] = trainer.train(progress)
        return results[index]

    def validate(config: MetaConfig) -> Curve:
        trained = train(candidates.index(config))
        curve = evaluate(model, comparison.validation, config.inner, comparison.steps)
        return replace(curve, seconds=curve.seconds + trained.seconds)

    if len(candidates) == 1:
        return train(0), candidates[0], 0.0
    record = None if directory is None else directory / "meta.json"
    chosen = select(candidates, validate, comparison.criterion, record)
    # not among the results when an earlier part of this run validated it: then its run directory has it
    result = results[chosen.index] if chosen.index in results else train(chosen.index)
    _set(model, result.parameters)
    return result, chosen.candidate, chosen.seconds - result.seconds


@torch.no_grad()
def _set(model: Any, parameters: Mapping[str, torch.Tensor]) -> None:
    for name, parameter in tarp_parameters(model).items():
        parameter.copy_(parameters[name])


def _identity(name: str, comparison: Comparison, model: Any) -> str:
    """A digest of everything that decides a method's result."""
    inner = [asdict(config) for config in comparison.inner.get(name, ())]
    meta = [asdict(config) for config in comparison.meta.get(name, ())]
    data = [tasks.fingerprint() for tasks in (comparison.train, comparison.validation, comparison.test)]
    settings = (name, asdict(comparison.tarp), inner, meta, comparison.steps, comparison.criterion, comparison.seed)
    return hashlib.sha256(repr((settings, data, model_fingerprint(model, {}))).encode()).hexdigest()


def _claim(path: Path, identity: str) -> None:
    if path.exists() and read_json(path) != identity:
        raise CheckpointError(
            f"{path.parent}: holds the beginning of another comparison; give this one its own run_dir"
        )
    write_json(path, identity)


def _read_back(path: Path, identity: str) -> MethodResult:
    stored = read_json(path)
    if not isinstance(stored, dict) or "result" not in stored or stored.get("identity") != identity:
        raise CheckpointError(f"{path}: is the result of another comparison; give this one its own run_dir")
    return MethodResult.from_json(stored["result"])
