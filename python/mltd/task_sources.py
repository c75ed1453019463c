"""Where a run's tasks come from: from what `data.reader` reads to three sets of tasks, and text to train on."""

from pathlib import Path
from typing import Any, NamedTuple

from mltd.data.encoding import Encoded, encode, windows
from mltd.data.episodes import Episodes, draw, leave_one_out
from mltd.data.records import Groups, at_least
from mltd.data.splits import split_groups
from mltd.data.texts import read_texts
from mltd.kinds import Example
from mltd.readers import TABLES, columns_of, read_groups
from mltd.run_config import DataConfig, RunConfig
from mltd.tasks import Leak, TaskSet


class Source(NamedTuple):
    """The tasks to train on, to validate on and to test on, with their records.

    classes  how many a classification has, None for other kinds; labels: their names, where all tasks have the same
    text     unlabelled text, for a method that trains on it
    """

    train: Episodes
    validation: Episodes
    test: Episodes
    classes: int | None
    labels: tuple[str, ...] | None
    text: TaskSet | None = None

    def episodes(self) -> tuple[Episodes, Episodes, Episodes]:
        return self.train, self.validation, self.test

    def leaks(self) -> list[Leak]:
        """Names and examples that the three sets share, or the text with what is held out, and that support and query
        of a task do."""
        train, validation, test = (episodes.tasks for episodes in self.episodes())
        across = [*train.check_leaks(validation), *train.check_leaks(test), *validation.check_leaks(test)]
        if self.text is not None:
            across += [*self.text.check_leaks(validation), *self.text.check_leaks(test)]
        return [*across, *(leak for tasks in (train, validation, test) for leak in tasks.check_leaks())]


def read_tasks(config: RunConfig, tokenizer: Any) -> Source:
    """The tasks of a run; ValueError or OSError that names the file, the place in it or the setting."""
    data = config.data
    least = _least(data)
    groups = read_groups(data)
    if data.small_tasks == "drop" and data.window is None:  # a text has many windows
        groups = at_least(groups, least)
    split = split_groups(groups, validation=data.validation_tasks, test=data.test_tasks, seed=data.seed)
    if data.duplicates == "drop":
        split = split.without_duplicates()
    # encoded together, because all tasks must agree on how many classes there are
    encoded = _encoded(config, {name: records for part in split for name, records in part.items()}, tokenizer)
    parts = []
    for name, part in zip(split._fields, split, strict=True):
        own = encoded._replace(items={group: encoded.items[group] for group in part})
        if data.small_tasks == "drop":
            own = own.at_least(least)
        parts.append(_drawn(own, name, data))
    names = set(encoded.labels.values())
    return Source(
        parts[0],
        parts[1],
        parts[2],
        max((len(own) for own in names), default=None),
        next(iter(names)) if len(names) == 1 else None,
    )


def read_text(config: RunConfig, tokenizer: Any, source: Source) -> TaskSet:
    """data.text in windows, shuffled, as tasks of as many windows as the others have units: a step takes as much of it.

    With data.duplicates "drop" without those that stand in a task which is held out. ValueError or OSError that names
    the file or the setting.
    """
    data = config.data
    if data.text is None:
        raise ValueError(
            f"data.text: is missing, and the method {config.method!r} trains on unlabelled text; set it to a text file "
            "or to a folder of them"
        )
    if config.model.kind != "causal":
        raise ValueError(
            f"model.kind: got {config.model.kind!r}, expected 'causal', a language model, to train on data.text"
        )
    encoded = windows(read_texts(data.text), tokenizer, data.text_window)
    if data.duplicates == "drop":
        held = {e.input_ids for part in source[1:3] for task in part.tasks for e in (*task.support, *task.query)}
        encoded = encoded._replace(
            items={
                name: tuple(i for i in own if i.example.input_ids not in held) for name, own in encoded.items.items()
            }
        )
    found, least = len(encoded.items["text"]), _least(data)
    if found < least:
        raise ValueError(
            f"data.text: {data.text} has {found} windows of data.text_window = {data.text_window} tokens, expected at "
            f"least {least}, as many as a task has support and query; lower text_window, or give more text"
        )
    return draw(encoded, "text", support=data.support, query=least - data.support, episodes=found // least).tasks


def read_examples(config: RunConfig, tokenizer: Any, path: Path) -> list[Example]:
    """The examples of one task from a file with columns, by its ending, encoded as those of the run."""
    reader = {".csv": "csv", ".tsv": "csv"}.get(Path(path.name.removesuffix(".gz")).suffix, "jsonl")
    records = TABLES[reader](path, columns_of(config.data)._replace(group=None))
    encoded = _encoded(config, records, tokenizer)
    return [item.example for items in encoded.items.values() for item in items]


def _least(data: DataConfig) -> int:
    """Units that a task has at least."""
    return data.support + (1 if data.query is None else data.query)


def _encoded(config: RunConfig, groups: Groups, tokenizer: Any) -> Encoded:
    data = config.data
    if data.window is not None:
        return windows(groups, tokenizer, data.window)
    return encode(
        groups,
        tokenizer,
        config.model.kind,
        max_length=data.max_length,
        max_target_length=data.max_target_length,
        too_long=data.too_long,
        labels=data.labels,
    )


def _drawn(encoded: Encoded, name: str, data: DataConfig) -> Episodes:
    if not encoded.items:
        return Episodes(TaskSet((), name), {}, {})
    if data.leave_one_out and name != "train":
        return leave_one_out(encoded, name)
    episodes = data.episodes if name == "train" else 1
    return draw(encoded, name, support=data.support, query=data.query, episodes=episodes, seed=data.seed)
