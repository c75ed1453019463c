"""Where a run's tasks come from: READERS by the names that `data.reader` has, and from their records to three sets."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from mltd.data.books import read_books
from mltd.data.chatterbot import has_words, read_topics
from mltd.data.encoding import Encoded, encode, windows
from mltd.data.episodes import Episodes, draw
from mltd.data.intents import read_banking77
from mltd.data.masc import read_masc
from mltd.data.meaning import read_e2e
from mltd.data.records import Groups, at_least
from mltd.data.reviews import read_movie_reviews, read_product_reviews, read_sentences
from mltd.data.speeches import read_speeches
from mltd.data.splits import split_groups
from mltd.data.summaries import read_contracts, read_fewsum, read_scitldr
from mltd.data.tables import Columns, read_csv, read_dataset, read_jsonl
from mltd.data.triples import read_dart_json, read_dart_xml
from mltd.data.wikitext import read_wikitext
from mltd.kinds import Example
from mltd.run_config import ColumnsConfig, DataConfig, RunConfig
from mltd.tasks import Leak, TaskSet

TABLES: dict[str, Callable[[Path, Columns], Groups]] = {"jsonl": read_jsonl, "csv": read_csv, "dataset": read_dataset}
"""Formats with named columns: `data.columns` says which are what."""

CORPORA: dict[str, Callable[[Path], Groups]] = {
    "banking77": read_banking77,
    "books": read_books,
    "contracts": read_contracts,
    "dart-json": read_dart_json,
    "dart-xml": read_dart_xml,
    "e2e": read_e2e,
    "fewsum": read_fewsum,
    "masc": read_masc,
    "movie-reviews": read_movie_reviews,
    "product-reviews": read_product_reviews,
    "scitldr": read_scitldr,
    "sentences": read_sentences,
    "speeches": read_speeches,
    "wikitext": read_wikitext,
}
"""Published corpora, each at data.path as its reader says."""


def _topics(folder: Path | None) -> Groups:
    return {name: tuple(filter(has_words, records)) for name, records in read_topics(folder).items()}


PACKAGED: dict[str, Callable[[Path | None], Groups]] = {"chatterbot": _topics}
"""Corpora out of a Python package; data.path is not needed."""

READERS = (*TABLES, *CORPORA, *PACKAGED)


class Source(NamedTuple):
    """The tasks to train on, to validate on and to test on, with their records.

    classes  how many a classification has, None for other kinds; labels: their names, where all tasks have the same
    """

    train: Episodes
    validation: Episodes
    test: Episodes
    classes: int | None
    labels: tuple[str, ...] | None

    def episodes(self) -> tuple[Episodes, Episodes, Episodes]:
        return self.train, self.validation, self.test

    def leaks(self) -> list[Leak]:
        """Names and examples that the three sets share, and that support and query of a task do."""
        train, validation, test = (episodes.tasks for episodes in self.episodes())
        across = [*train.check_leaks(validation), *train.check_leaks(test), *validation.check_leaks(test)]
        return [*across, *(leak for tasks in (train, validation, test) for leak in tasks.check_leaks())]


def read_tasks(config: RunConfig, tokenizer: Any) -> Source:
    """The tasks of a run; ValueError or OSError that names the file, the place in it or the setting."""
    data = config.data
    least = data.support + (1 if data.query is None else data.query)
    groups = _read(data)
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


def read_examples(config: RunConfig, tokenizer: Any, path: Path) -> list[Example]:
    """The examples of one task from a file with columns, by its ending, encoded as those of the run."""
    reader = {".csv": "csv", ".tsv": "csv"}.get(Path(path.name.removesuffix(".gz")).suffix, "jsonl")
    columns = replace(config.data.columns, task=None)
    records = _read(replace(config.data, path=str(path), reader=reader, columns=columns))
    encoded = _encoded(config, records, tokenizer)
    return [item.example for items in encoded.items.values() for item in items]


def _read(data: DataConfig) -> Groups:
    if data.reader not in READERS:
        raise ValueError(f"data.reader: got {data.reader!r}, expected one of {', '.join(READERS)}")
    path = None if data.path is None else Path(data.path)
    if data.reader in PACKAGED:
        return PACKAGED[data.reader](path)
    if path is None:
        raise ValueError("data.path: is missing; set it in the file or with --set data.path=...")
    return TABLES[data.reader](path, _columns(data.columns)) if data.reader in TABLES else CORPORA[data.reader](path)


def _columns(columns: ColumnsConfig) -> Columns:
    return Columns(columns.source, columns.target, columns.task, columns.unit)


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
    episodes = data.episodes if name == "train" else 1
    return draw(encoded, name, support=data.support, query=data.query, episodes=episodes, seed=data.seed)
