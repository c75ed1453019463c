"""What makes two runs the same one: a run goes on only with what it began with, and in all of its processes alike."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from mltd.checkpoint import Checkpoint, CheckpointError, plain
from mltd.meta_config import MetaConfig
from mltd.tasks import TaskSet


def identity(config: MetaConfig, model: str, tasks: TaskSet, validation: TaskSet | None) -> dict[str, Any]:
    """What must not change between the parts of one run, as JSON; `model` is its fingerprint."""
    settings = plain(asdict(config))
    if config.outer_schedule == "constant":
        del settings["iterations"]  # a longer run begins exactly like a shorter one
    return {
        "config": settings,
        "model": model,
        "tasks": tasks.fingerprint(),
        "validation": None if validation is None else validation.fingerprint(),
    }


def require_same_run(found: Checkpoint, wanted: dict[str, Any], iterations: int) -> None:
    """Raise CheckpointError for a checkpoint of another run, or of one that is further than `iterations`."""
    if found.iteration > iterations:
        raise CheckpointError(
            f"{found.path}: is at iteration {found.iteration}, expected at most iterations = {iterations}; give this "
            "run a directory of its own"
        )
    got = found.state["run"]
    for part in wanted:
        if wanted[part] != got.get(part):
            detail = _difference(wanted[part], got[part]) if part == "config" else ""
            raise CheckpointError(
                f"{found.path}: belongs to a run with another {part}{detail}; give this run a directory of its own, "
                "or go on with what that one used"
            )


def require_agreement(said: Sequence[dict[str, Any]]) -> None:
    """Raise ValueError where the processes of a run, by rank, do not mean the same one."""
    first, *others = said
    for rank, other in enumerate(others, start=1):
        for part in first:
            if first[part] != other[part]:
                raise ValueError(
                    f"{part}: differs between processes 0 and {rank} of this run, expected the same in all; let each "
                    "make it from the same files and seeds"
                )


def _difference(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    name = next(name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name))
    return f": {name} was {theirs.get(name)!r} and is now {ours.get(name)!r}"
