"""Dialogue topics as tasks: what is read, what is dropped, and what must never be on both sides of a split."""

import importlib.util

import pytest

from mltd.data.chatterbot import find_corpus, read_topics, split_topics
from tests.mltd.data_parts import pairs
from tests.mltd.demo_parts import LETTERS, letter_tokenizer, made_up_topics, write_corpus

needs_corpus = pytest.mark.skipif(
    importlib.util.find_spec("chatterbot_corpus") is None, reason="the package chatterbot-corpus is not installed"
)
SPLIT = {
    "support": 2,
    "query": 3,
    "train_query": 3,
    "test_topics": 2,
    "validation_topics": 1,
    "episodes": 2,
    "max_length": 40,
}


def test_turns_of_a_conversation_become_pairs_and_a_last_line_without_an_answer_is_dropped(tmp_path):
    corpus = write_corpus(tmp_path, {"talk": [["a", "b", "c", "d", "e"], ["f"], ["g", "h"]]})
    assert [record[:2] for record in read_topics(corpus)["talk"]] == [("a", ("b",)), ("c", ("d",)), ("g", ("h",))]


def test_alternative_answers_all_belong_to_the_first_line(tmp_path):
    corpus = write_corpus(tmp_path, {"emotion": [["q", "a", "b"], ["p", "c"]]})
    assert [record[:2] for record in read_topics(corpus)["emotion"]] == [("q", ("a",)), ("q", ("b",)), ("p", ("c",))]


def test_lines_that_yaml_reads_as_numbers_or_truth_values_are_text(tmp_path):
    (tmp_path / "maths.yml").write_text("conversations:\n- - what is six times seven\n  - 42\n- - is it so\n  - yes\n")
    assert [record.target for record in read_topics(tmp_path)["maths"]] == ["42", "True"]


@pytest.mark.parametrize("text", ["conversations: 3", "just words", "talks: []", "conversations: [1, 2]", "a: [b"])
def test_a_malformed_file_is_named(tmp_path, text):
    (tmp_path / "broken.yml").write_text(text)
    with pytest.raises(ValueError, match=r"broken\.yml: expected YAML"):
        read_topics(tmp_path)


def test_a_folder_without_topics_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no topic"):
        read_topics(tmp_path)


def tasks_of(split):
    return {part: {task.name: task for task in tasks} for part, tasks in split._asdict().items()}


def test_the_split_is_disjoint_sized_and_the_same_every_time(tmp_path):
    topics = read_topics(write_corpus(tmp_path, made_up_topics(6, 10)))
    tokenizer = letter_tokenizer()
    split = split_topics(topics, tokenizer, **SPLIT)
    assert [len(split.test), len(split.validation), len(split.train)] == [2, 1, 6]  # 3 topics of 2 tasks each
    assert len({name.partition("#")[0] for part in split for name in part.names}) == 6
    for part in split:
        assert {(len(task.support), len(task.query)) for task in part} == {(2, 3)}
        assert part.check_leaks() == []
        assert all(part.check_leaks(other) == [] for other in split if other is not part)
    backwards = dict(reversed(topics.items()))
    assert tasks_of(split_topics(backwards, tokenizer, **SPLIT)) == tasks_of(split)
    assert tasks_of(split_topics(topics, tokenizer, **SPLIT, seed=1)) != tasks_of(split)


def test_pairs_in_several_topics_stay_with_the_held_out_one(tmp_path):
    made = made_up_topics(6, 10)
    common = [[f"ask {i}", f"the same answer {'abcdefgh'[i]}"] for i in range(8)]
    topics = read_topics(write_corpus(tmp_path, {name: pairs + common for name, pairs in made.items()}))
    split = split_topics(topics, letter_tokenizer(), **SPLIT)
    replies = [
        {
            tuple(label for label in example.labels if label != -100)
            for task in part
            for example in (*task.support, *task.query)
        }
        for part in split
    ]
    assert not replies[0] & replies[1] and not replies[0] & replies[2] and not replies[1] & replies[2]


def test_long_pairs_are_left_out_and_small_topics_give_small_tasks(tmp_path):
    made = made_up_topics(4, 10)
    made["small"] = [[f"ask {letter}", f"say {letter}"] for letter in "abc"] + [["why", "x" * 60]]
    made["tiny"] = [["ping", "pong"], ["ding", "dong"]]
    split = split_topics(read_topics(write_corpus(tmp_path, made)), letter_tokenizer(), **SPLIT)
    by_name = {task.name: task for part in split for task in part}
    assert (len(by_name["small"].support), len(by_name["small"].query)) == (1, 2)
    assert "tiny" not in by_name
    assert max(len(e.input_ids) for task in by_name.values() for e in (*task.support, *task.query)) <= 40


def test_lines_without_a_word_are_left_out(tmp_path):
    made = made_up_topics(4, 5)
    made["signs"] = [[f"ask {letter}", f"say {letter}"] for letter in "abc"] + [["what?", "..."], ["?", "that."]]
    split = split_topics(read_topics(write_corpus(tmp_path, made)), letter_tokenizer(), **SPLIT)
    (task,) = (task for part in split for task in part if task.name == "signs")
    assert len(task.support) + len(task.query) == 3


def test_too_few_large_topics_are_an_error(tmp_path):
    topics = read_topics(write_corpus(tmp_path, made_up_topics(3, 10)))
    with pytest.raises(ValueError, match="ask for fewer topics or fewer pairs"):
        split_topics(topics, letter_tokenizer(), **SPLIT)
    with pytest.raises(ValueError, match="ask for fewer topics or fewer pairs"):
        split_topics(topics, letter_tokenizer(), **{**SPLIT, "query": 30})


def in_letters(text):
    return "".join(sign for sign in text.lower() if sign in LETTERS)


@needs_corpus
def test_the_real_corpus_gives_six_unseen_topics_and_no_leak():
    tokenizer = letter_tokenizer()
    topics = {
        name: pairs(*((in_letters(record.source), in_letters(record.target)) for record in records))
        for name, records in read_topics().items()
    }
    assert len(topics) > 15
    split = split_topics(topics, tokenizer, max_length=200)
    assert len(split.test) == 6 and len(split.validation) == 3
    assert len({name.partition("#")[0] for name in split.train.names}) >= 8
    assert {(len(task.support), len(task.query)) for task in (*split.test, *split.validation)} == {(5, 10)}
    for part in split:
        assert part.check_leaks() == []
        assert all(part.check_leaks(other) == [] for other in split if other is not part)


@needs_corpus
def test_the_real_corpus_is_found_without_importing_it():
    assert (find_corpus() / "science.yml").is_file()


def test_a_missing_corpus_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps chatterbot-corpus"):
        find_corpus()
