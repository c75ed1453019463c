"""What a run's folder, a checkpoint, a trained start or an adapter holds, and what of it is damaged."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from mltd.checkpoint import JsonLines, checkpoints, load_checkpoint, read_json
from mltd.config_file import load_config
from mltd.run_starts import CONFIG, START
from mltd.runs import CURVE, RESULT
from mltd.starts import ADAPTER, BESIDE, read_beside
from tarp_kernels.models_files import DESCRIPTION, read_description, read_tensors

LOG = "log.jsonl"
Found = TypeVar("Found")


def inspect(path: Path) -> dict[str, Any]:
    """All that can be said of a path, as JSON; `kind` is "run", "adapted", "checkpoint", "start" or "adapter".

    What is damaged is listed under "damaged", each as what its reader says. Raises FileNotFoundError for a path that
    does not exist, ValueError for one that is none of these.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: does not exist")
    damaged: list[str] = []
    found = _inspected(path, damaged)
    return {**found, "damaged": damaged}


def as_text(found: Mapping[str, Any], indent: str = "") -> str:
    """The same for a reader: a line for each value, indented below the name of its group; what is absent left out."""
    lines = []
    for name, value in found.items():
        if value is None or value == [] or value == {}:
            continue
        if isinstance(value, Mapping):
            lines += [f"{indent}{name}", as_text(value, indent + "  ")]
        elif isinstance(value, list) and isinstance(value[0], Mapping):
            for entry in value:
                lines += [f"{indent}{name}", as_text(entry, indent + "  ")]
        else:
            shown = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else value
            lines.append(f"{indent}{name:<16} {shown}")
    return "\n".join(line for line in lines if line)


def _inspected(path: Path, damaged: list[str]) -> dict[str, Any]:
    place: dict[str, Any] = {"path": str(path)}
    if path.is_file():
        if path.name == BESIDE:
            return _inspected(path.parent, damaged)
        if path.suffix != ".safetensors":
            raise ValueError(f"{path}: is no checkpoint; name a .safetensors file or a folder")
        return place | {"kind": "checkpoint"} | _checkpoint(path, damaged)
    if (path / DESCRIPTION).exists():
        return place | {"kind": "adapter"} | _adapter(path, damaged)
    if checkpoints(path) or (path / LOG).exists():
        return place | {"kind": "run"} | _run(path, damaged)
    if (path / CONFIG).exists() and (path / BESIDE).exists():
        return place | {"kind": "adapted"} | _settings(path, damaged) | _start(path, damaged) | _results(path, damaged)
    if (path / BESIDE).exists() or (path / ADAPTER).exists():
        return place | {"kind": "start"} | _start(path, damaged)
    raise ValueError(f"{path}: holds no run, checkpoint, start or adapter")


def _run(path: Path, damaged: list[str]) -> dict[str, Any]:
    found = _settings(path, damaged)
    files = checkpoints(path)
    found["checkpoints"] = [{"path": str(file), **_checkpoint(file, damaged)} for file in files]
    for each in found["checkpoints"][:-1]:  # the same in all of a run, or less than in the newest
        each.pop("settings", None)
        each.pop("validation", None)
    found["iteration"] = next((each["iteration"] for each in found["checkpoints"][::-1] if "iteration" in each), None)
    found["log"] = _log(path / LOG, damaged)
    if (path / START).exists():
        found["start"] = _start(path / START, damaged)
    return found | _results(path, damaged)


def _settings(path: Path, damaged: list[str]) -> dict[str, Any]:
    """Method and model of a run; None where its settings cannot be read."""
    file = path / CONFIG
    config = _tried(damaged, lambda: load_config(file)) if file.exists() else None
    if config is None:
        return {"method": None, "model": None}
    return {"method": config.method, "model": config.model.name, "iterations": config.meta.iterations}


def _log(path: Path, damaged: list[str]) -> dict[str, Any] | None:
    if not path.exists():
        damaged.append(f"{path}: is missing")
        return None
    records = JsonLines(path).read()
    lines = len([line for line in path.read_text(errors="replace").splitlines() if line.strip()])
    if lines != len(records):
        damaged.append(f"{path}: line {len(records) + 1} of {lines} is not JSON; training drops it and what follows")
    scores = {str(line["iteration"]): line["validation_score"] for line in records if "validation_score" in line}
    losses = records[-1].get("losses") if records else None
    return {
        "records": len(records),
        "last_loss": sum(losses.values()) / len(losses) if losses else None,
        "validation": scores,
        "seconds": sum(record.get("seconds", 0) for record in records),
        "tokens": sum(record.get("tokens", 0) for record in records),
    }


def _checkpoint(path: Path, damaged: list[str]) -> dict[str, Any]:
    size = path.stat().st_size
    found = _tried(damaged, lambda: load_checkpoint(path))
    if found is None:
        return {"bytes": size}
    groups: dict[str, dict[str, Tensor]] = {}
    for key, value in found.tensors.items():
        kind, _, name = key.partition("/")
        groups.setdefault(kind, {})[name] = value
    scores = {str(iteration): score for iteration, score in found.state.get("scores", [])}
    return {
        "bytes": size,
        "iteration": found.iteration,
        "numbers": {kind: _count(tensors.values()) for kind, tensors in groups.items()},
        "settings": found.state.get("run", {}).get("config"),
        "validation": scores,
        "stopped_early": found.state.get("stopped_early"),
    }


def _start(path: Path, damaged: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {"adapter": None}
    if (path / ADAPTER).exists():
        found["adapter"] = _adapter(path / ADAPTER, damaged)
    beside = _tried(damaged, lambda: read_beside(path))
    if beside is not None:
        form, parts = beside
        found |= {"controller": form["controller"]}
        found["numbers"] = {kind: _count(tensors.values()) for kind, tensors in parts.items()}
    return found


def _adapter(path: Path, damaged: list[str]) -> dict[str, Any]:
    description = _tried(damaged, lambda: read_description(path))
    if description is None:
        return {}
    tensors: Mapping[str, Tensor] | None = _tried(damaged, lambda: read_tensors(path, description["tensors"]))
    base = description["base"]
    return {
        "settings": description["config"],
        "base": {"class": base.get("class"), "name": base.get("name"), "model_type": base.get("model_type")},
        "library_version": description.get("library_version"),
        "bytes": description["tensors"].get("bytes"),
        "tensors": None if tensors is None else len(tensors),
        "numbers": None if tensors is None else _count(tensors.values()),
    }


def _results(path: Path, damaged: list[str]) -> dict[str, Any]:
    files = [file for file in (path / RESULT, path / CURVE, *sorted(path.glob("eval-*.json"))) if file.exists()]
    return {"results": {file.name: _tried(damaged, partial(read_json, file)) for file in files}}


def _count(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def _tried(damaged: list[str], read: Callable[[], Found]) -> Found | None:
    """What was read, or None where it is damaged, which is noted."""
    try:
        return read()
    except (ValueError, OSError) as error:
        damaged.append(" ".join(str(error).split()))
        return None
