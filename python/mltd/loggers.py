"""Where the outer loop reports each iteration beside its own log.jsonl: TensorBoard and Weights & Biases, by name."""

import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from mltd.checkpoint import read_json, write_json


class Logger(Protocol):
    """What `MetaTrainer` tells of a run."""

    def begin(self, iteration: int) -> None:
        """The run is at `iteration` and goes on from there: 0 where it begins. What came later never happened."""

    def log(self, record: Mapping[str, Any]) -> None:
        """A line of log.jsonl."""


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a record by name; the tasks' losses as their mean."""
    found = {name: value for name, value in record.items() if isinstance(value, int | float) and name != "iteration"}
    losses = record.get("losses")
    if losses:
        found["loss"] = sum(losses.values()) / len(losses)
    found |= {f"validation/step {step}": score for step, score in record.get("validation", {}).items()}
    return found


class TensorBoard:
    """Event files in the run's folder; of a run that goes on, TensorBoard hides what an interruption undid."""

    def __init__(self, directory: Path, settings: Mapping[str, Any]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ImportError(_missing("tensorboard")) from None
        self.directory, self.make = directory, SummaryWriter

    def begin(self, iteration: int) -> None:
        self.writer = self.make(str(self.directory / "tensorboard"), purge_step=iteration + (iteration > 0))

    def log(self, record: Mapping[str, Any]) -> None:
        for name, value in scalars(record).items():
            self.writer.add_scalar(name, value, record["iteration"])
        self.writer.flush()


class WeightsAndBiases:
    """One run there, named like the folder; a run that goes on here goes on there."""

    def __init__(self, directory: Path, settings: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError:
            raise ImportError(_missing("wandb")) from None
        self.wandb, self.directory, self.settings = wandb, directory, settings

    def begin(self, iteration: int) -> None:
        mark = self.directory / "wandb.json"
        if iteration == 0 or not mark.exists():
            write_json(mark, uuid.uuid4().hex[:8])
        self.run = self.wandb.init(
            project="tarp",
            name=self.directory.name,
            id=read_json(mark),
            resume="allow",
            dir=str(self.directory),
            config=dict(self.settings),
        )

    def log(self, record: Mapping[str, Any]) -> None:
        self.run.log(scalars(record), step=record["iteration"])


LOGGERS: dict[str, Callable[[Path, Mapping[str, Any]], Logger]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
}
"""Each from the run's folder and its settings; ImportError that says what to install."""


def _missing(package: str) -> str:
    return f"log_to: {package!r} needs the package {package}; install it with `pip install {package}`"
