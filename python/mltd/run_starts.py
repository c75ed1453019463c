"""The model of a run in the state that adaptation begins with: a method's initial state, or a start on disk."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mltd.baselines import METHODS, Method, prepare
from mltd.checkpoint import checkpoints
from mltd.pretrained import load_model
from mltd.run_config import RunConfig
from mltd.starts import BESIDE, Start, load_start, read_beside

CONFIG, START = "config.yaml", "start"


class Begun(NamedTuple):
    """random: names of the parameters that the model's directory lacks; the start, or adaptation, gives them values."""

    model: Any
    start: Start
    random: tuple[str, ...]


def begun_model(config: RunConfig, start: Path | None, classes: int | None, labels: Sequence[str] | None) -> Begun:
    """The model of `config` with what the method adds, or with what the folder `start` holds.

    Raises ValueError that names the setting or the folder: where the method needs a start, the folder holds none or one
    of another model, or something of the model would stay random.
    """
    method = METHODS[config.method]
    if start is None and method.trains:
        raise ValueError(f"method: {config.method!r} begins at a trained start; name the folder of `tarp train`")
    folder = None if start is None else find_start(start)
    model, random = load_model(config.model, config.seed, classes, labels)
    _require_values(config, random, folder)
    if folder is None or _brings_nothing(method):
        prepare(method, model, config.tarp, config.seed)
    return Begun(model, Start() if folder is None else load_start(model, folder), random)


def find_start(path: Path) -> Path:
    """The folder of a start: in a run's folder, or itself."""
    for folder in (path / START, path):
        if (folder / BESIDE).exists():
            return folder
    if not path.is_dir():
        raise ValueError(f"{path}: is no folder; name one that `tarp train` or `tarp adapt` wrote")
    unfinished = f"; its training is not finished, run tarp train --config {path / CONFIG}" if checkpoints(path) else ""
    raise ValueError(f"{path}: holds no trained start{unfinished}")


def _brings_nothing(method: Method) -> bool:
    """Whether a saved start of the method holds values alone: an adapter of TARP comes with its form."""
    return method.adds == "lora"


def _require_values(config: RunConfig, random: Sequence[str], folder: Path | None) -> None:
    """ValueError where random parameters, as those of a new classification head, would stay so."""
    brought = {} if folder is None else read_beside(folder)[1]["model"]
    lacking = ", ".join(name for name in random if name not in brought)
    if not lacking or "all" in METHODS[config.method].adapts:
        return
    if folder is None:
        raise ValueError(
            f"model.name: {config.model.name} lacks {lacking}, and the method {config.method!r} would leave it random; "
            "name a model that has it, or choose a method that trains it: 'finetune', or those of `tarp train`"
        )
    raise ValueError(
        f"{folder}: lacks {lacking}, and so does {config.model.name}; name the model that the start was trained on, or "
        "train one anew"
    )
