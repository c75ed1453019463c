"""tarp eval --metrics: the same numbers as by hand, for every kind of model that a run can have."""

import json
from pathlib import Path
from statistics import mean

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration
from typer.testing import CliRunner

from mltd import cli
from mltd.config_file import load_config
from mltd.measures import Written
from mltd.metrics import bleu
from mltd.pretrained import load_model, load_tokenizer
from mltd.run_metrics import measures_for
from mltd.starts import load_start
from mltd.task_sources import read_tasks
from tests.mltd.demo_parts import LETTERS, letter_tokenizer, tiny_model
from tests.mltd.run_parts import settings, task_lines, write_lines, write_model, write_settings

run = CliRunner()
ANSWERS = ("yes", "no way")


def call(*arguments: object) -> None:
    result = run.invoke(cli.app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, (result.output, result.exception)


def two_answers(lines: list[dict]) -> list[dict]:
    return [{**line, "target": ANSWERS[i % 2]} for i, line in enumerate(lines)]


@pytest.fixture
def folder(tmp_path) -> Path:
    write_model(tmp_path / "model")
    return tmp_path


def evaluated(folder: Path, *metrics: str) -> dict:
    """Metrics at step 0 of a zero-shot evaluation, task -> value."""
    asked = [part for name in metrics for part in ("--metrics", name)]
    call("eval", "--config", write_settings(folder, method="zero-shot"), *asked)
    found = json.loads((folder / "run/eval-test.json").read_text())["metrics"]
    return {metric: {task: own["0"] for task, own in of_task.items()} for metric, of_task in found.items()}


def parts(folder: Path):
    config = load_config(folder / "settings.yaml", ["method=zero-shot"])
    letters = load_tokenizer(config.model)
    return load_model(config.model, 0).model, letters, read_tasks(config, letters).test


@torch.no_grad()
def said(model, letters, source: str) -> str:
    """The likeliest continuation, token by token, up to a line break, the end token or 40 tokens."""
    ids = letters(source + "\n", add_special_tokens=False).input_ids
    start = len(ids)
    while len(ids) - start < 40 and "\n" not in letters.decode(ids[start:], skip_special_tokens=True):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == model.config.eos_token_id:
            break
    return letters.decode(ids[start:], skip_special_tokens=True).split("\n")[0]


def test_bleu_is_that_of_what_the_model_says_by_hand(folder):
    model = tiny_model()
    with torch.no_grad():  # the usual start predicts every token alike
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(5)
    model.save_pretrained(folder / "model")
    letters = letter_tokenizer()
    texts = {f"{a}{b}": said(model, letters, f"{a}{b}") for a in "abcdef" for b in "ghijkl"}
    # what is wanted begins like what is said
    lines = [{"task": s[0], "source": s, "target": f"{text[:30]} q q q q"} for s, text in texts.items()]
    write_lines(folder / "tasks.jsonl", lines)
    found = evaluated(folder, "bleu", "rouge1")
    assert set(found) == {"bleu", "rouge1"} and any(0 < value < 100 for value in found["bleu"].values())
    for name, records in parts(folder)[2].query.items():
        own = {record.id: texts[record.source] for record in records}
        expected = bleu(own, {record.id: record.target for record in records})
        assert found["bleu"][name] == pytest.approx(expected)


def test_what_is_said_is_judged_without_special_tokens(folder):
    write_lines(folder / "tasks.jsonl", task_lines())
    config = load_config(write_settings(folder, method="zero-shot"))
    (written,) = measures_for(config, ["bleu"], read_tasks(config, letter_tokenizer()).test, letter_tokenizer())
    assert isinstance(written, Written) and written.decode([0, 2, 1]) == "a"


@torch.no_grad()
def test_accuracy_of_a_language_model_is_that_of_the_likelier_answer(folder):
    write_lines(folder / "tasks.jsonl", two_answers(task_lines(6, 9)))
    found = evaluated(folder, "accuracy")["accuracy"]
    model, letters, episodes = parts(folder)

    def nats(source: str, answer: str) -> float:
        read, said = (letters(text, add_special_tokens=False).input_ids for text in (source + "\n", answer + "\n"))
        logs = model(input_ids=torch.tensor([read + said])).logits[0].log_softmax(-1)
        return -float(sum(logs[len(read) + i - 1, token] for i, token in enumerate(said)))

    for task in episodes.tasks:
        right = [
            min(ANSWERS, key=lambda answer, source=record.source: nats(source, answer)) == record.target
            for record in episodes.query[task.name]
        ]
        assert found[task.name] == sum(right) / len(right)


def test_the_mean_over_dialogues_left_out_is_that_over_personas(folder):
    lines = two_answers(task_lines(6, 9))[:-3]
    for i, line in enumerate(lines):
        line["unit"] = f"{line['task']} {i % 9 // (2 if line['task'] == 'topic0' else 3)}"
    write_lines(folder / "tasks.jsonl", lines)
    data = settings(folder)["data"] | {"columns": {"unit": "unit"}, "leave_one_out": True, "support": 1}
    data |= {"test_tasks": ["topic0", "topic5"], "validation_tasks": 0}
    file = write_settings(folder, method="zero-shot", data=data)
    shown = run.invoke(cli.app, ["eval", "--config", str(file), "--metrics", "accuracy"]).output
    found = json.loads((folder / "run/eval-test.json").read_text())["metrics"]["accuracy"]
    of = {name: [own["0"] for task, own in found.items() if task.startswith(f"{name}#")] for name in data["test_tasks"]}
    assert [len(values) for values in of.values()] == [5, 2]
    by_persona, by_task = (sum(map(mean, of.values())) / 2), mean(own["0"] for own in found.values())
    assert f"accuracy    {by_persona:10.3f}" in shown and f"{by_persona:.3f}" != f"{by_task:.3f}"


def test_a_classifier_is_trained_and_judged_by_its_head(folder):
    model = tiny_model()
    model.config.pad_token_id = 1
    model.save_pretrained(folder / "model")
    write_lines(folder / "tasks.jsonl", two_answers(task_lines(6, 9)))
    values = settings(folder)["model"] | {"kind": "classification"}
    call("train", "--config", write_settings(folder, model=values))
    call("eval", folder / "run", "--metrics", "accuracy")
    config = load_config(folder / "run/config.yaml")
    assert config.data.labels == ("no way", "yes")
    classifier = load_model(config.model, 0, 2, config.data.labels).model
    assert classifier.config.id2label == {0: "no way", 1: "yes"}
    load_start(classifier, folder / "run/start")
    found = json.loads((folder / "run/eval-test.json").read_text())["metrics"]["accuracy"]
    for task in read_tasks(config, letter_tokenizer()).test.tasks:
        with torch.no_grad():
            logits = [classifier(input_ids=torch.tensor([ids])).logits[0] for ids, _ in task.query]
        right = [int(row.argmax()) == labels[0] for row, (_, labels) in zip(logits, task.query, strict=True)]
        assert found[task.name]["0"] == sum(right) / len(right)
    examples = write_lines(folder / "new.jsonl", [{"source": "ab?", "target": "yes"}])
    call("adapt", folder / "run", "--examples", examples, "--out", folder / "adapted")
    assert load_config(folder / "adapted/config.yaml").data.labels == config.data.labels


def test_an_encoder_decoder_is_trained_evaluated_and_adapted(folder):
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    tokens = {"decoder_start_token_id": 1, "eos_token_id": 1, "pad_token_id": 1}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        T5ForConditionalGeneration(T5Config(vocab_size=2 + len(LETTERS), **sizes, **tokens)).save_pretrained(
            folder / "model"
        )
    write_lines(folder / "tasks.jsonl", task_lines())
    values = settings(folder)["model"] | {"kind": "seq2seq"}
    call("train", "--config", write_settings(folder, model=values))
    call("eval", folder / "run", "--metrics", "rougeL", "--set", "decoding.max_new_tokens=5")
    found = json.loads((folder / "run/eval-test.json").read_text())
    assert set(found["metrics"]) == {"rougeL"} and len(found["metrics"]["rougeL"]) == 2
    assert found["perplexity_by_step"]["2"] < found["perplexity_by_step"]["0"]
    examples = write_lines(folder / "new.jsonl", [{"source": "ab?", "target": "cd."}])
    call("adapt", folder / "run", "--examples", examples, "--out", folder / "adapted")


@pytest.mark.parametrize(("kind", "name"), [("causal", "pearson"), ("causal", "beauty"), ("regression", "bleu")])
def test_a_metric_that_this_kind_of_task_does_not_have_is_refused(folder, kind, name):
    lines = task_lines()
    write_lines(folder / "tasks.jsonl", [{**line, "target": 1.5} for line in lines] if kind != "causal" else lines)
    values = settings(folder)["model"] | {"kind": kind}
    file = write_settings(folder, method="zero-shot", model=values)
    result = run.invoke(cli.app, ["eval", "--config", str(file), "--metrics", name])
    assert result.exit_code == 1 and f"metrics: got '{name}', expected some of" in result.stderr
