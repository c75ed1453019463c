"""Topics of the PyPI package ``chatterbot-corpus`` (English) as few-shot tasks: one topic is one task.

The corpus is a folder of YAML files, one per topic, each a list of conversations. Most are turns of two speakers;
in two files the lines after the first are alternative answers to it.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import yaml

from mltd.data.duplicates import deduplicated
from mltd.data.encoding import causal_example
from mltd.data.episodes import stable_shuffle
from mltd.data.records import Groups, Record, stable_order
from mltd.tasks import Task, TaskSet

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PACKAGE = "chatterbot_corpus"
ALTERNATIVE_ANSWERS = {"computers", "emotion"}


class Split(NamedTuple):
    """Three disjoint sets of topics: to meta-train on, to choose rates and stopping on, and to report on."""

    train: TaskSet
    validation: TaskSet
    test: TaskSet


def find_corpus(language: str = "english") -> Path:
    """The folder of YAML files inside the installed package, which is located but not imported.

    Raises FileNotFoundError that says how to install it.
    """
    spec = importlib.util.find_spec(PACKAGE)
    for root in (spec.submodule_search_locations or []) if spec else []:
        folder = Path(root) / "data" / language
        if folder.is_dir():
            return folder
    raise FileNotFoundError(
        f"the Python package {PACKAGE!r} with data/{language} is not installed for {sys.executable}: "
        "install it with `pip install --no-deps chatterbot-corpus`, or run `make demo`, which does so"
    )


def read_topics(folder: Path | None = None) -> dict[str, tuple[Record, ...]]:
    """Every topic with its prompts and replies in file order, duplicates and all; ValueError on a malformed file."""
    folder = Path(folder) if folder is not None else find_corpus()
    topics = {}
    for file in sorted(folder.glob("*.yml")):
        try:
            conversations = yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"]
            lines = [[str(line).strip() for line in conversation] for conversation in conversations]
        except (yaml.YAMLError, KeyError, TypeError) as error:
            raise ValueError(f"{file}: expected YAML with a list of lists under 'conversations' ({error})") from error
        topics[file.stem] = tuple(_pairs(lines, alternatives=file.stem in ALTERNATIVE_ANSWERS))
    if not topics:
        raise ValueError(f"{folder}: no topic (*.yml) in this folder")
    return topics


def _pairs(conversations: list[list[str]], alternatives: bool) -> list[Record]:
    if alternatives:
        pairs = [(lines[0], reply) for lines in conversations for reply in lines[1:]]
    else:
        pairs = [(lines[i], lines[i + 1]) for lines in conversations for i in range(0, len(lines) - 1, 2)]
    return [Record(prompt, (reply,), str(number)) for number, (prompt, reply) in enumerate(pairs, 1)]


def split_topics(
    topics: Groups,
    tokenizer: PreTrainedTokenizerBase,
    *,
    support: int = 5,
    query: int = 10,
    train_query: int = 5,
    test_topics: int = 6,
    validation_topics: int = 3,
    episodes: int = 4,
    max_length: int = 40,
    seed: int = 0,
) -> Split:
    """Split ``topics`` into three task sets, the same on every machine: to train on, to choose on, and to test on.

    A held-out task has ``support`` + ``query`` pairs, a training task ``support`` + ``train_query``.

    Pairs of more than ``max_length`` tokens or without a word are left out, and so is a reply that stands in another
    topic too or twice in one: it would be known by heart. Test and validation topics are drawn by ``seed`` from those
    with enough distinct pairs left; the others are for training. A training topic with many pairs gives up to
    ``episodes`` tasks of distinct pairs (``name``, ``name#2``, …), a small one a task with fewer pairs in the same
    proportion, and one with less than half of the pairs none.
    Raises ValueError when too few topics have enough pairs.
    """
    wanted = support + query
    examples = {
        name: {pair: causal_example(tokenizer, pair) for pair in pairs if has_words(pair)}
        for name, pairs in topics.items()
    }
    short = {
        name: tuple(pair for pair, example in pairs.items() if len(example.input_ids) <= max_length)
        for name, pairs in examples.items()
    }
    draw = sorted(short, key=lambda name: stable_order(str(seed), name))
    held_out = _held_out(short, draw, test_topics + validation_topics, wanted)
    tasks: dict[str, list[Task]] = {"train": [], "validation": [], "test": []}
    # Held-out topics come first, so that a reply which also stands in a training topic is taken from the latter.
    keep_first = held_out + [name for name in draw if name not in held_out]
    for name, pairs in deduplicated(short, keep_first, by="target").items():
        part = "train"
        if name in held_out:
            part = "test" if held_out.index(name) < test_topics else "validation"
        order = [examples[name][pairs[i]] for i in stable_shuffle(name, [(pair,) for pair in pairs], seed)]
        size = wanted if name in held_out else support + train_query
        for episode in range(1 if name in held_out else episodes):
            chunk = order[episode * size : (episode + 1) * size]
            if episode and len(chunk) < size or 2 * len(chunk) < size:
                break
            cut = round(len(chunk) * support / size)
            label = name if episode == 0 else f"{name}#{episode + 1}"
            tasks[part].append(Task(label, chunk[:cut], chunk[cut:]))
    return Split(**{part: TaskSet(found, name=part) for part, found in tasks.items()})


def has_words(pair: Record) -> bool:
    return all(any(sign.isalnum() for sign in text) for text in (pair.source, pair.target))


def _held_out(topics: Groups, draw: list[str], count: int, wanted: int) -> list[str]:
    """The first ``count`` topics of ``draw`` with ``wanted`` pairs that none of the topics chosen before has."""
    held_out: list[str] = []
    for name in draw:
        if len(held_out) < count and len(deduplicated(topics, [*held_out, name], by="target")[name]) >= wanted:
            held_out.append(name)
    if len(held_out) < count or len(held_out) == len(topics):
        raise ValueError(
            f"got {count} held-out topics of {wanted} distinct pairs to draw, expected at most {len(held_out)}, "
            f"and one of the {len(topics)} topics left to train on: ask for fewer topics or fewer pairs"
        )
    return held_out
