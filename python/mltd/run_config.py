"""The settings of the commands train, adapt and eval, and what the method that is named decides of them."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from pydantic import ConfigDict

from mltd.baselines import METHODS, filled_in
from mltd.data.encoding import END
from mltd.evaluation import STEPS, check_steps
from mltd.generation import Decoding
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
class ColumnsConfig:
    """Which columns of a table are what, as `mltd.data.tables.Columns` has it.

    source  what is read: a column, or several; None for text that is only continued
    target  what is to be predicted; several are several references
    task    whose value names the task
    unit    whose value says what must stay together, as the number of a dialogue; None: every row alone
    """

    source: str | tuple[str, ...] | None = "source"
    target: str | tuple[str, ...] = "target"
    task: str | None = "task"
    unit: str | None = None


@dataclass(frozen=True)
class DataConfig:
    """The tasks, as one of `mltd.readers.READERS` reads them.

    part              which part of a corpus that has several, see `mltd.readers.PARTED`
    history           most utterances that are read before a reply, of dialogues of `mltd.readers.DIALOGUES`; None: all
    support, query    units of each task to adapt on and to judge by; query None: all that are left
    episodes          most tasks to draw from one group of the training part; needs `query`
    validation_tasks, test_tasks
                      how many tasks to hold out, drawn by `seed`, or their names
    leave_one_out     hold out every unit of a validation or test task in turn, in the place of `support` and `query`:
                      each becomes a task "name#n" whose query is the n-th unit, and whose support is all others. Those
                      of one name are not independent: average them first, as `tarp eval` does, before an interval
    labels            names of the classes in the order of their numbers; None: those in the data, sorted
    window            tokens of an example, for text that is only continued; None: sources and targets
    max_length, max_target_length, too_long
                      as `mltd.data.encoding.encode` takes them
    duplicates        "drop": a text in several parts stays in the test tasks, or else in the validation tasks
    small_tasks       "drop": tasks with fewer units than `support` and `query` ask for are left out
    text              a text file or a folder of them (.txt, .txt.gz), unlabelled, that the method "dapt" trains on; see
                      to it that nothing of the query sets is quoted there
    text_window       tokens of a piece of it
    """

    path: str | None = None
    reader: str = "jsonl"
    part: str | None = None
    history: int | None = None
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    support: int = 5
    query: int | None = None
    episodes: int = 1
    validation_tasks: int | tuple[str, ...] = 0
    test_tasks: int | tuple[str, ...] = 0
    leave_one_out: bool = False
    labels: tuple[str, ...] | None = None
    window: int | None = None
    max_length: int | None = None
    max_target_length: int | None = None
    too_long: Literal["error", "drop", "cut_start", "cut_end"] = "error"
    duplicates: Literal["error", "drop"] = "error"
    small_tasks: Literal["error", "drop"] = "error"
    seed: int = 0
    text: str | None = None
    text_window: int = 128

    def __post_init__(self) -> None:
        if self.leave_one_out and self.window is not None:
            raise ValueError(
                "leave_one_out: got true with window, which makes units of windows, a task for each of thousands; "
                "leave one of them out"
            )
        if self.text_window < 2:
            raise ValueError(f"text_window: got {self.text_window}, expected at least 2 tokens")


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run.

    method  a name of `mltd.METHODS`. It decides what is adapted and trained and by which objective: these need not be
            given, and cannot be given otherwise
    meta    how to train, and as meta.inner how a task is adapted
    steps   adaptation steps that `tarp eval` reports
    decoding  how `tarp eval` generates for BLEU and ROUGE
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
    decoding: Decoding = field(default_factory=lambda: Decoding(40, stop=(END,)))
    seed: int = 0
    out: str = "runs/train"
    log_to: tuple[Literal["tensorboard", "wandb"], ...] = ()

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method: got {self.method!r}, expected one of {', '.join(METHODS)}")
        if METHODS[self.method].text == "support" and self.data.leave_one_out:
            raise ValueError(
                f"data.leave_one_out: got true with the method {self.method!r}, which trains on every held-out support "
                "set, and so on every query set in turn; leave it out"
            )
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
