"""The tasks of a run: readers by name, held-out tasks, labels, and examples for `tarp adapt`."""

import gzip
import random
from collections import Counter
from dataclasses import replace

import pytest

from mltd.readers import CORPORA, READERS
from mltd.run_config import ColumnsConfig, DataConfig, ModelConfig, RunConfig
from mltd.task_sources import read_examples, read_tasks, read_text
from tests.mltd.demo_parts import letter_tokenizer, made_up_topics, write_corpus
from tests.mltd.run_parts import task_lines, write_lines


def config(path, kind="causal", **data) -> RunConfig:
    return RunConfig(ModelConfig("none", kind), DataConfig(str(path), **{"support": 2, **data}))


def read(path, kind="causal", **data):
    return read_tasks(config(path, kind, **data), letter_tokenizer())


@pytest.fixture
def path(tmp_path):
    return write_lines(tmp_path / "tasks.jsonl", task_lines())


def names(source) -> list[set[str]]:
    return [set(episodes.tasks.names) for episodes in source.episodes()]


def test_lines_are_split_by_task_and_every_line_is_used_once(path):
    source = read(path, validation_tasks=1, test_tasks=2)
    assert [len(part) for part in names(source)] == [3, 1, 2]
    assert set.union(*names(source)) == {f"topic{i}" for i in range(6)}
    assert source.leaks() == [] and (source.classes, source.labels) == (None, None)
    tasks = [task for episodes in source.episodes() for task in episodes.tasks]
    assert all((len(task.support), len(task.query)) == (2, 2) for task in tasks)
    assert len({example for task in tasks for example in (*task.support, *task.query)}) == 24


def test_the_split_depends_on_the_seed_alone(path, tmp_path):
    mixed = write_lines(tmp_path / "mixed.jsonl", task_lines()[::-1])
    drawn = [names(read(where, test_tasks=2, seed=seed)) for where, seed in ((path, 0), (mixed, 0), (path, 1))]
    assert drawn[0] == drawn[1] != drawn[2]


def test_tasks_can_be_held_out_by_name_and_drawn_several_to_a_group(path):
    source = read(path, validation_tasks=("topic4",), test_tasks=("topic1",), support=1, query=1, episodes=2)
    assert names(source)[1:] == [{"topic4"}, {"topic1"}]
    assert names(source)[0] == {f"topic{i}{again}" for i in (0, 2, 3, 5) for again in ("", "#2")}


def test_columns_have_the_names_that_the_settings_say(tmp_path):
    lines = [{"who": line["task"], "asks": line["source"], "says": line["target"]} for line in task_lines(3, 4)]
    path = write_lines(tmp_path / "other.jsonl", lines)
    found = read(path, columns=ColumnsConfig("asks", "says", "who"))
    other = read(write_lines(tmp_path / "tasks.jsonl", task_lines(3, 4)))
    assert found.train.tasks.fingerprint() == other.train.tasks.fingerprint()
    with pytest.raises(ValueError, match="no column 'source'.*the columns are"):
        read(path)


def test_csv_and_a_packaged_corpus_are_readers_too(tmp_path):
    rows = ["task,source,target", *(f"{line['task']},{line['source']},{line['target']}" for line in task_lines(3, 4))]
    (tmp_path / "tasks.csv").write_text("\n".join(rows) + "\n")
    lines = read(write_lines(tmp_path / "tasks.jsonl", task_lines(3, 4)))
    assert read(tmp_path / "tasks.csv", reader="csv").train.tasks.fingerprint() == lines.train.tasks.fingerprint()
    topics = made_up_topics(4, 10)
    topics["topic0"].append(["?!", "..."])  # nothing that could be learnt
    corpus = write_corpus(tmp_path / "corpus", topics)
    source = read(corpus, reader="chatterbot", test_tasks=2)
    assert [len(part) for part in names(source)] == [2, 0, 2]
    tasks = [task for episodes in source.episodes() for task in episodes.tasks]
    assert {len(task.support) + len(task.query) for task in tasks} == {10}


def test_text_that_is_only_continued_is_cut_into_windows(tmp_path):
    folder = tmp_path / "wiki.txt"
    folder.write_text("".join(f"\n = {name} = \n\n {'abc de. ' * 12}\n" for name in "abcd"))
    source = read(folder, reader="wikitext", window=16, query=2, test_tasks=1, small_tasks="drop")
    assert {len(example.input_ids) for task in source.train.tasks for example in task.query} == {16}


def test_what_is_twice_is_a_leak_or_dropped(tmp_path):
    lines = task_lines(4, 5)
    path = write_lines(tmp_path / "tasks.jsonl", [*lines, {**lines[0], "task": "topic3"}])
    leaks = [str(leak) for leak in read(path, test_tasks=("topic3",)).leaks()]
    assert len(leaks) == 1 and "train/topic0" in leaks[0] and "test/topic3" in leaks[0]
    source = read(path, test_tasks=("topic3",), duplicates="drop")
    assert source.leaks() == []
    (kept,) = source.test.tasks
    assert len(kept.support) + len(kept.query) == 6


def test_small_tasks_are_an_error_or_dropped(tmp_path):
    path = write_lines(tmp_path / "tasks.jsonl", task_lines(4, 4)[:-2])
    with pytest.raises(ValueError, match="1 groups of 4 have fewer units, as {'topic3': 2}"):
        read(path)
    assert names(read(path, small_tasks="drop"))[0] == {"topic0", "topic1", "topic2"}


def units(records) -> set[str]:
    return {record.piece for record in records}


def test_each_dialogue_of_a_held_out_persona_is_left_out_once(tmp_path):
    lines = [
        {"task": f"p{p}", "source": f"{a}{b}", "target": a + b, "unit": a}
        for p in range(4)
        for a in "abcd"[: 2 + p]
        for b in "efg"[: 1 + p]
    ]
    path = write_lines(tmp_path / "tasks.jsonl", lines)
    asked = {"columns": ColumnsConfig(unit="unit"), "support": 1, "query": 1, "duplicates": "error"}
    source = read(path, **asked, leave_one_out=True, validation_tasks=("p1",), test_tasks=("p2",))
    assert names(source) == [{"p0", "p3"}, {"p1#1", "p1#2", "p1#3"}, {f"p2#{i}" for i in range(1, 5)}]
    assert all(len(units(source.train.support[name])) == 1 for name in ("p0", "p3")), "support is for training tasks"
    for i, unit in enumerate("abcd", 1):
        name = f"p2#{i}"
        assert units(source.test.query[name]) == {unit} and units(source.test.support[name]) == set("abcd") - {unit}
        assert len(source.test.tasks.select([name])[0].query) == 3
    assert names(read(path, **asked, test_tasks=("p2",)))[2] == {"p2"}
    with pytest.raises(ValueError, match="leave_one_out: got true with window"):
        config(path, leave_one_out=True, window=8)
    with pytest.raises(ValueError, match="data.leave_one_out: got true with the method 'tapt'"):
        replace(config(path, leave_one_out=True), method="tapt")


# --- text -------------------------------------------------------------------------------------------------------------


def text_tasks(where, path, **data):
    asked = config(path, **{"text": str(where), "text_window": 8, "test_tasks": 2, **data})
    return read_text(asked, letter_tokenizer(), read_tasks(asked, letter_tokenizer()))


def letters_of(example) -> str:
    return "".join(letter_tokenizer().convert_ids_to_tokens(example.input_ids))


def test_text_is_cut_into_windows_of_which_each_is_in_one_task(path, tmp_path):
    folder = tmp_path / "texts"
    (folder / "more").mkdir(parents=True)
    for name, text in (("a.txt", "abcdefgh" * 3), ("more/b.txt", "ijklmnop" * 4), ("c.md", "q" * 80), ("d.txt", " \n")):
        (folder / name).write_text(text)
    with gzip.open(folder / "e.txt.gz", "wt") as file:
        file.write("qrstuvwx" * 2 + "y")  # what is less than a window is left
    tasks = text_tasks(folder, path, query=1)
    assert [(len(task.support), len(task.query)) for task in tasks] == [(2, 1)] * 3
    found = [example for task in tasks for example in (*task.support, *task.query)]
    assert all(example.labels == example.input_ids for example in found)
    assert Counter(map(letters_of, found)) == {"abcdefgh": 3, "ijklmnop": 4, "qrstuvwx": 2}
    (alone,) = text_tasks(folder / "a.txt", path)
    assert {letters_of(example) for example in (*alone.support, *alone.query)} == {"abcdefgh"}


def test_text_that_stands_in_a_held_out_task_is_a_leak_or_dropped(tmp_path):
    wiki = tmp_path / "wiki.txt"
    texts = [" ".join(random.Random(name).choices("abcdefghijk", k=60)) for name in "abc"]
    wiki.write_text("".join(f"\n = {name} = \n\n {text}\n" for name, text in zip("abc", texts, strict=True)))
    letters = letter_tokenizer()
    data = {"reader": "wikitext", "window": 8, "query": 2, "test_tasks": ("b",)}
    held = read(wiki, **data).test.tasks
    window = letters_of(held[0].query[0])
    (tmp_path / "text.txt").write_text(window + "abcdefgh" * 7)  # all are drawn: two tasks

    def source(**more):
        asked = config(wiki, text=str(tmp_path / "text.txt"), text_window=8, **data, **more)
        tasks = read_tasks(asked, letters)
        return tasks._replace(text=read_text(asked, letters, tasks))

    (leak,) = source().leaks()
    assert "text/" in str(leak) and "test/b/query[0]" in str(leak)
    clean = source(duplicates="drop")
    assert clean.leaks() == [] and clean.text is not None
    assert all(letters_of(e) == "abcdefgh" for task in clean.text for e in (*task.support, *task.query))


@pytest.mark.parametrize(
    ("text", "data", "says"),
    [
        pytest.param(
            "abcdefgh" * 2, {}, "has 2 windows of data.text_window = 8 tokens, expected at least 3", id="short"
        ),
        pytest.param(" \n", {}, "text.txt: has no text", id="empty"),
        pytest.param("abc", {"text": None}, "data.text: is missing", id="missing"),
        pytest.param("abc", {"text": "nowhere.txt"}, "nowhere.txt", id="nowhere"),
    ],
)
def test_text_that_cannot_be_trained_on_is_named(path, tmp_path, text, data, says):
    (tmp_path / "text.txt").write_text(text)
    with pytest.raises((ValueError, OSError)) as caught:
        text_tasks(tmp_path / "text.txt", path, query=1, **data)
    assert says in str(caught.value)


def test_only_a_language_model_trains_on_text(tmp_path):
    path = labelled(tmp_path, ["yes", "yes", "no", "no", "yes", "yes", "no", "no"])
    asked = config(path, "classification", text="unread")
    with pytest.raises(ValueError, match="model.kind: got 'classification', expected 'causal'"):
        read_text(asked, letter_tokenizer(), read_tasks(asked, letter_tokenizer()))
    with pytest.raises(ValueError, match="text_window: got 1, expected at least 2"):
        config(path, text_window=1)


# --- labels -----------------------------------------------------------------------------------------------------------


def labelled(tmp_path, targets, name="labels.jsonl"):
    return write_lines(
        tmp_path / name,
        [{"task": f"t{i % 2}", "source": f"x {chr(97 + i)}", "target": target} for i, target in enumerate(targets)],
    )


def test_labels_are_those_of_the_data_or_the_given_ones(tmp_path):
    path = labelled(tmp_path, ["yes", "yes", "no", "no", "yes", "yes", "no", "no"])
    found, given = read(path, "classification"), read(path, "classification", labels=("yes", "no", "maybe"))
    assert (found.classes, found.labels) == (2, ("no", "yes"))
    assert (given.classes, given.labels) == (3, ("yes", "no", "maybe"))

    def classes(source):
        return {e.input_ids: e.labels[0] for task in source.train.tasks for e in (*task.support, *task.query)}

    assert classes(given) == {ids: 1 - label for ids, label in classes(found).items()}


def test_tasks_with_labels_of_their_own_share_a_number_of_classes(tmp_path):
    found = read(labelled(tmp_path, ["yes", "up", "no", "down"] * 2), "classification")
    assert (found.classes, found.labels) == (2, None)


def test_examples_of_one_task_are_encoded_as_those_of_the_run(tmp_path):
    path = write_lines(tmp_path / "new.jsonl", [{"source": "ab", "target": "yes"}, {"source": "e", "target": "yes"}])
    letters, classes = letter_tokenizer(), config("unused", "classification", labels=("no", "yes"))
    assert [example.labels for example in read_examples(classes, letters, path)] == [(1,), (1,)]
    (tmp_path / "new.csv").write_text("source,target\nab,yes\ne,yes\n")
    for run in (classes, config("unused")):
        assert read_examples(run, letters, tmp_path / "new.csv") == read_examples(run, letters, path)


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "says"),
    [
        pytest.param({"support": 4}, "have fewer units", id="support"),
        pytest.param({"support": 0}, "got 0", id="no support"),
        pytest.param({"test_tasks": 7}, "test: got 7 of 6 groups", id="count"),
        pytest.param({"test_tasks": ("x",)}, "test: got ['x'], expected names out of", id="name"),
        pytest.param({"test_tasks": 6}, "expected at least one left to train on", id="all"),
        pytest.param({"reader": "csvv"}, "data.reader: got 'csvv', expected one of jsonl, csv, dataset", id="reader"),
        pytest.param({"window": 8}, "has a source", id="window"),
    ],
)
def test_settings_that_the_data_do_not_allow_are_named(path, data, says):
    with pytest.raises(ValueError) as caught:
        read(path, **data)
    assert says in str(caught.value)


@pytest.mark.parametrize("reader", ["jsonl", *CORPORA])
def test_a_path_is_needed_and_must_be_there(reader, tmp_path):
    assert reader in READERS
    with pytest.raises(ValueError, match="data.path: is missing"):
        read_tasks(RunConfig(ModelConfig("none"), DataConfig(reader=reader)), letter_tokenizer())
    with pytest.raises((OSError, ValueError), match="nowhere"):
        read(tmp_path / "nowhere", reader=reader)
