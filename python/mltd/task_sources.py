"""Where a run's tasks come from: READERS by the names that `data.reader` has, each from settings to three task sets."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mltd.data.chatterbot import Split, read_topics, split_topics
from mltd.data.dialogue import stable_order
from mltd.data.json_lines import Line, class_names, encode, read_lines
from mltd.kinds import Example
from mltd.run_config import DataConfig, RunConfig
from mltd.tasks import Leak, Task, TaskSet


class Source(NamedTuple):
    """The tasks to train on, to validate on and to test on, and the names of the classes where there are any."""

    tasks: Split
    classes: tuple[str, ...] | None = None

    def leaks(self) -> list[Leak]:
        """Examples or names that the three sets share, or support and query sets inside them."""
        train, validation, test = self.tasks
        across = [*train.check_leaks(validation), *train.check_leaks(test), *validation.check_leaks(test)]
        return [*across, *(leak for tasks in self.tasks for leak in tasks.check_leaks())]


def read_tasks(config: RunConfig, tokenizer: Any) -> Source:
    """The tasks of a run; ValueError or OSError that names the file or the setting."""
    if config.data.reader not in READERS:
        raise ValueError(f"data.reader: got {config.data.reader!r}, expected one of {', '.join(READERS)}")
    return READERS[config.data.reader](config, tokenizer)


def read_examples(config: RunConfig, tokenizer: Any, path: Path) -> list[Example]:
    """The examples of one task from a JSON-lines file, with the classes of the run."""
    kind = config.model.kind
    lines = read_lines(path, kind, task=path.stem)
    classes = config.data.classes or class_names(lines)
    return [encode(line, kind, tokenizer, classes) for line in lines]


def _jsonl(config: RunConfig, tokenizer: Any) -> Source:
    data, kind = config.data, config.model.kind
    if data.path is None:
        raise ValueError("data.path: is missing; set it in the file or with --set data.path=...")
    lines = read_lines(Path(data.path), kind)
    classes = None
    if kind == "classification":
        classes = data.classes or class_names(lines) or None
    of_task: dict[str, list[Line]] = {}
    for line in lines:
        of_task.setdefault(line.task, []).append(line)
    held_out = _held_out(data, list(of_task))
    sets: dict[str, list[Task]] = {"train": [], "validation": [], "test": []}
    for name, own in of_task.items():
        if len(own) <= data.support:
            raise ValueError(
                f"{data.path}: the task {name!r} has {len(own)} lines, expected more than data.support = "
                f"{data.support}; leave the task out or lower data.support"
            )
        ordered = sorted(own, key=lambda line: stable_order(str(data.seed), line.task, line.source, str(line.target)))
        examples = [encode(line, kind, tokenizer, classes) for line in ordered]
        end = None if data.query is None else data.support + data.query
        task = Task(name, examples[: data.support], examples[data.support : end], kind)
        sets[held_out.get(name, "train")].append(task)
    return Source(Split(**{part: TaskSet(tasks, part) for part, tasks in sets.items()}), classes)


def _held_out(data: DataConfig, names: Sequence[str]) -> dict[str, str]:
    """{task: "validation" or "test"}."""
    drawn = sorted(names, key=lambda name: stable_order(str(data.seed), name))
    found: dict[str, str] = {}
    for part, wanted in (("test", data.test_tasks), ("validation", data.validation_tasks)):
        left = [name for name in drawn if name not in found]
        if isinstance(wanted, int):
            if wanted > len(left):
                raise ValueError(
                    f"data.{part}_tasks: got {wanted}, expected at most {len(left)}, the tasks that are left of the "
                    f"{len(names)} in {data.path}"
                )
            wanted = tuple(left[:wanted])
        strange = [name for name in wanted if name not in left]
        if strange:
            raise ValueError(
                f"data.{part}_tasks: {strange[0]!r} is no task in {data.path}, or one that is held out already; "
                f"expected some of {', '.join(left)}"
            )
        found |= dict.fromkeys(wanted, part)
    return found


def _chatterbot(config: RunConfig, tokenizer: Any) -> Source:
    data = config.data
    if config.model.kind != "causal":
        raise ValueError(f"model.kind: got {config.model.kind!r}, expected 'causal' for the reader 'chatterbot'")
    if not isinstance(data.test_tasks, int) or not isinstance(data.validation_tasks, int):
        raise ValueError("data.test_tasks, data.validation_tasks: expected numbers for the reader 'chatterbot'")
    topics = read_topics(None if data.path is None else Path(data.path))
    query = {} if data.query is None else {"query": data.query}
    return Source(
        split_topics(
            topics,
            tokenizer,
            support=data.support,
            test_topics=data.test_tasks,
            validation_topics=data.validation_tasks,
            seed=data.seed,
            **query,
        )
    )


READERS: dict[str, Callable[[RunConfig, Any], Source]] = {"jsonl": _jsonl, "chatterbot": _chatterbot}
"""jsonl: a file, see `mltd.data.json_lines`; chatterbot: the package chatterbot-corpus, or a folder of such."""
