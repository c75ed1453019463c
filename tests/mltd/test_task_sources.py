"""Tasks from JSON-lines: how lines become examples, support and query, and held-out tasks."""

import json

import pytest
from transformers import T5Config, T5ForConditionalGeneration

from mltd.data.json_lines import class_names, encode, read_lines
from mltd.run_config import DataConfig, ModelConfig, RunConfig
from mltd.task_sources import read_examples, read_tasks
from mltd.tasks import check_fits
from tests.mltd.demo_parts import letter_tokenizer, made_up_topics, write_corpus
from tests.mltd.run_parts import task_lines, write_lines


def config(path, kind="causal", **data) -> RunConfig:
    return RunConfig(ModelConfig("none", kind), DataConfig(str(path), **{"support": 2, **data}))


@pytest.fixture
def path(tmp_path):
    return write_lines(tmp_path / "tasks.jsonl", task_lines())


def test_a_causal_example_is_a_prompt_that_is_read_and_an_answer_that_is_scored(tmp_path):
    path = write_lines(tmp_path / "one.jsonl", [{"task": "t", "source": "ab", "target": "cd"}])
    (line,) = read_lines(path, "causal")
    letters = letter_tokenizer()
    example = encode(line, "causal", letters)
    assert letters.decode(example.input_ids).replace(" ", "") == "ab\ncd\n"
    assert example.labels == (-100,) * 3 + example.input_ids[3:]


def test_seq2seq_lines_become_source_and_target_of_a_model_that_takes_them(tmp_path):
    path = write_lines(tmp_path / "tasks.jsonl", task_lines(3, 4))
    tasks = read_tasks(config(path, "seq2seq"), letter_tokenizer()).tasks.train
    assert {task.kind.name for task in tasks} == {"seq2seq"}
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 1}
    check_fits(tasks, T5ForConditionalGeneration(T5Config(vocab_size=40, **sizes)))
    first = next(line for line in read_lines(path, "seq2seq") if line.task == tasks[0].name)
    letters = letter_tokenizer()
    pairs = [(letters.decode(e.input_ids), letters.decode(e.labels)) for e in (*tasks[0].support, *tasks[0].query)]
    assert (letters.decode(letters(first.source).input_ids), letters.decode(letters(first.target).input_ids)) in pairs


def test_lines_are_split_by_task_and_every_line_is_used_once(path):
    source = read_tasks(config(path, validation_tasks=1, test_tasks=2), letter_tokenizer())
    train, validation, test = source.tasks
    assert (len(train), len(validation), len(test)) == (3, 1, 2)
    assert set(train.names) | set(validation.names) | set(test.names) == {f"topic{i}" for i in range(6)}
    assert source.leaks() == []
    examples = [example for tasks in source.tasks for task in tasks for example in (*task.support, *task.query)]
    assert len(set(examples)) == len(examples) == 24
    assert all((len(task.support), len(task.query)) == (2, 2) for tasks in source.tasks for task in tasks)


def test_the_split_does_not_depend_on_the_order_of_lines_but_on_the_seed(path, tmp_path):
    def drawn(where, seed):
        source = read_tasks(config(where, validation_tasks=1, test_tasks=2, seed=seed), letter_tokenizer())
        return [{task.name: task.support for task in tasks} for tasks in source.tasks]

    mixed = write_lines(tmp_path / "mixed.jsonl", task_lines()[::-1])
    assert drawn(path, 0) == drawn(mixed, 0)
    assert drawn(path, 0) != drawn(path, 1)


def test_held_out_tasks_can_be_named(path):
    source = read_tasks(
        config(path, validation_tasks=("topic4",), test_tasks=("topic1", "topic5"), query=1), letter_tokenizer()
    )
    assert source.tasks.validation.names == ("topic4",)
    assert source.tasks.test.names == ("topic1", "topic5")
    assert {len(task.query) for task in source.tasks.train} == {1}


@pytest.mark.parametrize(
    ("data", "says"),
    [
        pytest.param({"support": 4}, "has 4 lines, expected more than data.support = 4", id="support"),
        pytest.param({"test_tasks": 7}, "data.test_tasks: got 7, expected at most 6", id="count"),
        pytest.param({"test_tasks": 5, "validation_tasks": 2}, "data.validation_tasks: got 2, expected at", id="both"),
        pytest.param({"test_tasks": ("x",)}, "data.test_tasks: 'x' is no task in", id="name"),
        pytest.param(
            {"test_tasks": ("topic1",), "validation_tasks": ("topic1",)}, "held out already; expected some", id="twice"
        ),
        pytest.param({"reader": "csvv"}, "data.reader: got 'csvv', expected one of jsonl", id="reader"),
    ],
)
def test_a_split_that_the_data_do_not_allow_is_refused(path, data, says):
    with pytest.raises(ValueError) as caught:
        read_tasks(config(path, **data), letter_tokenizer())
    assert says in str(caught.value)


def test_a_path_is_needed():
    with pytest.raises(ValueError, match="data.path: is missing"):
        read_tasks(RunConfig(ModelConfig("none")), letter_tokenizer())


def test_leaks_between_sets_and_inside_tasks_are_found(tmp_path):
    lines = task_lines(4, 4)
    copied = [{**lines[0], "task": "topic3"}, lines[5]]
    path = write_lines(tmp_path / "tasks.jsonl", lines + copied)
    leaks = {str(leak) for leak in read_tasks(config(path, test_tasks=("topic3",)), letter_tokenizer()).leaks()}
    assert len(leaks) in (1, 2) and any("test/topic3" in leak and "train/topic0" in leak for leak in leaks)


# --- labels -----------------------------------------------------------------------------------------------------------


def labelled(tmp_path, targets):
    lines = [{"task": f"t{i % 2}", "source": f"x {chr(97 + i)}", "target": target} for i, target in enumerate(targets)]
    return write_lines(tmp_path / "labels.jsonl", lines)


def test_classes_are_the_names_in_the_data_or_the_given_ones(tmp_path):
    path = labelled(tmp_path, ["yes", "yes", "no", "no", "yes", "no", "maybe", "no"])
    source = read_tasks(config(path, "classification"), letter_tokenizer())
    assert source.classes == ("maybe", "no", "yes")
    assert {e.labels for task in source.tasks.train for e in (*task.support, *task.query)} == {(0,), (1,), (2,)}
    given = read_tasks(config(path, "classification", classes=("yes", "no", "maybe")), letter_tokenizer())
    one = {e.input_ids: e.labels[0] for task in source.tasks.train for e in (*task.support, *task.query)}
    other = {e.input_ids: e.labels[0] for task in given.tasks.train for e in (*task.support, *task.query)}
    assert other == {ids: {0: 2, 1: 1, 2: 0}[label] for ids, label in one.items()}


def test_numbers_of_classes_and_of_a_regression_are_taken_as_they_are(tmp_path):
    path = labelled(tmp_path, [1, 0, 2, 1, 0, 1])
    assert class_names(read_lines(path, "classification")) == ()
    lines = read_lines(path, "classification")
    assert [encode(line, "classification", letter_tokenizer()).labels for line in lines][:3] == [(1,), (0,), (2,)]
    numbers = [encode(line, "regression", letter_tokenizer()).labels[0] for line in read_lines(path, "regression")]
    assert numbers[:3] == [1.0, 0.0, 2.0] and all(isinstance(number, float) for number in numbers)


def test_a_class_that_is_not_among_the_given_ones_is_refused_with_its_line(tmp_path):
    path = labelled(tmp_path, ["yes", "no", "yes", "noo", "no", "yes"])
    with pytest.raises(ValueError, match=r"labels.jsonl:4: target is 'noo', expected one of yes, no"):
        read_tasks(config(path, "classification", classes=("yes", "no")), letter_tokenizer())


# --- files ------------------------------------------------------------------------------------------------------------


GOOD = json.dumps({"task": "a", "source": "b", "target": "c"})


@pytest.mark.parametrize(
    ("line", "kind", "says"),
    [
        pytest.param("{", "causal", "bad.jsonl:3: is not JSON", id="json"),
        pytest.param("[1]", "causal", "bad.jsonl:3: is a list, expected an object with task, source", id="list"),
        pytest.param('{"task": "a", "source": "b"}', "causal", ":3: has no column 'target' but task", id="column"),
        pytest.param('{"task": "a", "source": 1, "target": "c"}', "causal", "source is 1, expected text", id="source"),
        pytest.param('{"task": "a", "source": "b", "target": ""}', "causal", "target is '', expected text", id="empty"),
        pytest.param('{"task": null, "source": "b", "target": "c"}', "causal", "task is None, expected", id="task"),
        pytest.param(
            '{"task": "a", "source": "b", "target": 1.5}', "classification", "1.5, expected text or a whole", id="class"
        ),
        pytest.param('{"task": "a", "source": "b", "target": true}', "regression", "is True, expected a", id="number"),
    ],
)
def test_a_bad_line_is_named_by_file_and_line(line, kind, says, tmp_path):
    good = GOOD.replace('"c"', "1") if kind == "regression" else GOOD
    (tmp_path / "bad.jsonl").write_text(f"{good}\n\n{line}\n")
    with pytest.raises(ValueError) as caught:
        read_lines(tmp_path / "bad.jsonl", kind)
    assert says in str(caught.value)


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match="has no line"):
        read_lines(tmp_path / "empty.jsonl", "causal")


def test_a_line_separator_inside_a_text_does_not_end_the_line(tmp_path):
    text = {"task": "a", "source": "b\u2028c\x85d", "target": "e"}
    (tmp_path / "odd.jsonl").write_text(json.dumps(text, ensure_ascii=False) + "\n")
    (line,) = read_lines(tmp_path / "odd.jsonl", "causal")
    assert line.source == text["source"]


def test_examples_of_one_task_need_no_task_column(tmp_path):
    path = write_lines(tmp_path / "new.jsonl", [{"source": "ab", "target": "cd"}, {"source": "e", "target": "f"}])
    examples = read_examples(config("unused"), letter_tokenizer(), path)
    assert [len(example.input_ids) for example in examples] == [6, 4]


def test_the_corpus_of_topics_is_a_reader_too(tmp_path):
    folder = write_corpus(tmp_path / "corpus", made_up_topics(6, 10))
    data = {"reader": "chatterbot", "query": 3, "test_tasks": 2, "validation_tasks": 1}
    source = read_tasks(config(folder, **data), letter_tokenizer())
    assert [len(tasks) for tasks in source.tasks][1:] == [1, 2]
    assert len(source.tasks.test[0].query) == 3
    with pytest.raises(ValueError, match="expected numbers for the reader 'chatterbot'"):
        read_tasks(config(folder, **{**data, "test_tasks": ("a",)}), letter_tokenizer())
    with pytest.raises(ValueError, match="expected 'causal' for the reader 'chatterbot'"):
        read_tasks(config(folder, "seq2seq", **data), letter_tokenizer())
