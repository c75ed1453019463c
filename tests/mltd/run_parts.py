"""A tiny model with its tokenizer, a file of tasks and settings on disk, for `tarp train` and the others."""

import json
from pathlib import Path

import yaml
from transformers.utils import logging

from tests.mltd.demo_parts import letter_tokenizer, made_up_topics, tiny_model


def write_model(folder: Path) -> Path:
    logging.disable_progress_bar()
    tiny_model().save_pretrained(folder)
    letter_tokenizer().save_pretrained(folder)
    return folder


def write_lines(path: Path, lines: list[dict]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def task_lines(count: int = 6, pairs: int = 4) -> list[dict]:
    topics = made_up_topics(count, pairs).items()
    return [{"task": name, "source": s, "target": t} for name, own in topics for s, t in own]


def settings(folder: Path, **changes) -> dict:
    """Settings of a run of seconds in `folder`, which holds the model and tasks.jsonl."""
    values = {
        "model": {"name": str(folder / "model")},
        "data": {"path": str(folder / "tasks.jsonl"), "support": 2, "validation_tasks": 1, "test_tasks": 2},
        "method": "tarp",
        "tarp": {"r": 2},
        "meta": {"iterations": 3, "tasks_per_batch": 2, "outer_lr": 0.02, "inner": {"steps": 2, "lr": 0.02}},
        "steps": [0, 1, 2],
        "out": str(folder / "run"),
    }
    return {**values, **changes}


def write_settings(folder: Path, name: str = "settings.yaml", **changes) -> Path:
    path = folder / name
    path.write_text(yaml.safe_dump(settings(folder, **changes)))
    return path


def write_all(folder: Path) -> Path:
    """Everything that a run needs; returns the settings' file."""
    write_model(folder / "model")
    write_lines(folder / "tasks.jsonl", task_lines())
    return write_settings(folder)
