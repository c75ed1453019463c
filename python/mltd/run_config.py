"""The settings of the commands train, adapt and eval, and what the method that is named decides of them."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from pydantic import ConfigDict

from mltd.baselines import METHODS, filled_in
from mltd.evaluation import STEPS, check_steps
from mltd.meta_config import MetaConfig
from tarp_kernels import TarpConfig


@dataclass(frozen=True)
class ModelConfig:
    """The pretrained model.

    name    a Hugging Face directory with its tokenizer, or "smollm2", see `mltd.data.smollm2`
    kind    of task, see `mltd.kinds`; decides which class of model is loaded
    attn_implementation  "eager", "sdpa", …; None: the model's default. Second order needs "eager"
    device  "auto": the GPU where there is one
    """

    name: str
    kind: Literal["causal", "seq2seq", "classification", "regression"] = "causal"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    attn_implementation: str | None = None
    device: str = "auto"


@dataclass(frozen=True)
class DataConfig:
    """The tasks, as one of `mltd.task_sources.READERS` reads them.

    support, query    examples of each task to adapt on and to judge by; query None: all that are left
    validation_tasks, test_tasks
                      how many tasks to hold out, drawn by `seed`, or their names
    classes           names of the classes, by number; None: those in the data, sorted
    """

    path: str | None = None
    reader: str = "jsonl"
    support: int = 5
    query: int | None = None
    validation_tasks: int | tuple[str, ...] = 0
    test_tasks: int | tuple[str, ...] = 0
    classes: tuple[str, ...] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.support < 1 or (self.query is not None and self.query < 1):
            raise ValueError(f"support, query: got {self.support}, {self.query}, expected at least 1 of each")
        for name in ("validation_tasks", "test_tasks"):
            value = getattr(self, name)
            if isinstance(value, int) and value < 0:
                raise ValueError(f"{name}: got {value}, expected 0 or more, or a list of names")


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run.

    method  a name of `mltd.METHODS`. It decides what is adapted and trained and by which objective: these need not be
            given, and cannot be given otherwise
    meta    how to train, and as meta.inner how a task is adapted
    steps   adaptation steps that `tarp eval` reports
    seed    of the adapter's initial values
    out     the run's folder
    log_to  where to report beside log.jsonl
    """

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    model: ModelConfig
    data: DataConfig = field(default_factory=DataConfig)
    method: str = "tarp"
    tarp: TarpConfig = field(default_factory=TarpConfig)
    meta: MetaConfig = field(default_factory=MetaConfig)
    steps: tuple[int, ...] = STEPS
    seed: int = 0
    out: str = "runs/train"
    log_to: tuple[Literal["tensorboard", "wandb"], ...] = ()

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method: got {self.method!r}, expected one of {', '.join(METHODS)}")
        check_steps(self.steps)


DECIDED = ("meta.inner.adapts", "meta.trains", "meta.objective", "meta.validate_every")
"""What a method may decide."""


def resolved(config: RunConfig, given: Mapping[str, Any]) -> RunConfig:
    """The settings with what the method decides; ValueError where `given`, as it was read, asks for something else."""
    method = METHODS[config.method]
    tarp = config.tarp if method.adds == "cells" else replace(config.tarp, search_cell=None)
    whole = replace(config, meta=filled_in(config.meta, method, tarp), tarp=tarp)
    for name in (*DECIDED, "tarp.search_cell"):
        wanted, got = _at(config, name), _at(whole, name)
        if wanted != got and _was_given(given, name):
            raise ValueError(
                f"{name}: got {wanted!r}, but the method {config.method!r} decides it: {got!r}; leave it out, or "
                "choose another method"
            )
    return whole


def _at(config: Any, name: str) -> Any:
    for part in name.split("."):
        config = getattr(config, part)
    return config


def _was_given(given: Any, name: str) -> bool:
    for part in name.split("."):
        if not isinstance(given, Mapping) or part not in given:
            return False
        given = given[part]
    return True
