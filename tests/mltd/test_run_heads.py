"""Classification on a checkpoint without a head: what is random at first is trained, saved, loaded and adapted with."""

import json
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM
from typer.testing import CliRunner

from mltd import MetaTrainer, adapt, cli, evaluate
from mltd.baselines import METHODS, prepare
from mltd.config_file import load_config
from mltd.pretrained import load_model, load_tokenizer
from mltd.starts import load_start, read_beside
from mltd.task_sources import read_tasks
from tests.mltd.demo_parts import LETTERS, letter_tokenizer
from tests.mltd.run_parts import settings, write_lines, write_settings

run = CliRunner()
HEAD = ("classifier.weight", "classifier.bias")
FRESH = ("bert.pooler.dense.weight", "bert.pooler.dense.bias", *HEAD)


def call(*arguments: object, status: int = 0) -> str:
    result = run.invoke(cli.app, [str(argument) for argument in arguments])
    assert result.exit_code == status, (result.output, result.exception)
    return result.output


@pytest.fixture
def folder(tmp_path) -> Path:
    """A BERT as pretraining leaves it, and tasks that tell by the first letter which of two intents it is."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = BertConfig(vocab_size=2 + len(LETTERS), max_position_embeddings=32, pad_token_id=1, **sizes)
        model = BertForMaskedLM(config)
    with torch.no_grad():  # the usual start makes all letters alike
        model.get_input_embeddings().weight.mul_(20)
    model.save_pretrained(tmp_path / "model")
    letter_tokenizer().save_pretrained(tmp_path / "model")
    lines = [
        {"task": f"t{t}", "source": first + second + third, "target": "yes" if first == "a" else "no"}
        for t, third in enumerate("ghijkl")
        for first in "ab"
        for second in "cdef"
    ]
    write_lines(tmp_path / "tasks.jsonl", lines)
    write(tmp_path)
    return tmp_path


def write(folder: Path, **changes) -> Path:
    values = {"model": settings(folder)["model"] | {"kind": "classification"}, "method": "tarp", **changes}
    values["meta"] = {**settings(folder)["meta"], "outer_lr": 0.02, "iterations": 40, **changes.get("meta", {})}
    return write_settings(folder, **values)


def test_a_new_head_is_trained_saved_and_adapted_with(folder):
    shown = call("train", "--config", folder / "settings.yaml")
    assert f"lacks {', '.join(FRESH)}: random at first, and trained as well" in shown
    config = load_config(folder / "run/config.yaml")
    model, random = load_model(config.model, config.seed, 2, config.data.labels)
    assert random == FRESH
    begun = {name: value.detach().clone() for name, value in model.named_parameters()}
    held = read_tasks(config, load_tokenizer(config.model)).test.tasks
    start = load_start(model, folder / "run/start")
    own = dict(model.named_parameters())
    for name, value in begun.items():
        moved = not torch.equal(own[name], value)
        assert moved == (name in FRESH), name

    call("eval", folder / "run", "--metrics", "accuracy")
    found = json.loads((folder / "run/eval-test.json").read_text())
    expected = evaluate(model, held, config.meta.inner, (0, 1, 2), rates=start.rates)
    assert found["perplexity_by_step"] == expected.to_json()["perplexity_by_step"]
    assert all(by_step["2"] == 1 for by_step in found["metrics"]["accuracy"].values())

    examples = write_lines(
        folder / "new.jsonl", [{"source": "acg", "target": "yes"}, {"source": "bcg", "target": "no"}]
    )
    call("adapt", folder / "run", "--examples", examples, "--out", folder / "adapted")
    kept = read_beside(folder / "adapted")[1]["model"]
    assert set(kept) == set(FRESH) and all(torch.equal(kept[name], own[name]) for name in FRESH)
    call("adapt", folder / "adapted", "--examples", examples, "--out", folder / "more")
    first, more = (json.loads((folder / name / "curve.json").read_text()) for name in ("adapted", "more"))
    assert more["perplexity_by_step"]["0"] == pytest.approx(first["perplexity_by_step"]["2"], rel=1e-5)


def test_the_head_is_trained_as_the_meta_trainer_trains_it_by_hand(folder):
    call("train", "--config", write(folder, meta={"iterations": 3}))
    config = load_config(folder / "run/config.yaml")
    model = load_model(config.model, config.seed, 2, config.data.labels).model
    prepare(METHODS["tarp"], model, config.tarp, config.seed)
    tasks = read_tasks(config, load_tokenizer(config.model)).train.tasks
    trains = ("adapter", *FRESH)
    MetaTrainer(model, tasks, type(config.meta)(**{**vars(config.meta), "trains": trains})).train(progress=False)
    loaded = load_model(config.model, config.seed, 2, config.data.labels).model
    load_start(loaded, folder / "run/start")
    expected, found = dict(model.named_parameters()), dict(loaded.named_parameters())
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    ends = adapt(model, tasks[:1], config.meta.inner)
    assert not set(ends) & set(FRESH), "shared by all tasks"


def test_a_run_with_a_new_head_goes_on_to_the_same_bits(folder):
    call("train", "--config", write(folder, meta={"iterations": 2}))
    call("train", "--config", write(folder, meta={"iterations": 4}))
    call("train", "--config", write(folder, meta={"iterations": 4}), "--out", folder / "whole")
    parts, whole = (read_beside(folder / name / "start")[1]["model"] for name in ("run", "whole"))
    assert set(parts) == set(FRESH) and all(torch.equal(parts[name], whole[name]) for name in FRESH)


@pytest.mark.parametrize("method", ["zero-shot", "lora", "tarp-nometa"])
def test_a_method_that_would_leave_the_head_random_is_refused(method, folder):
    file = write(folder, method=method)
    says = call("eval", "--config", file, status=1)
    assert "lacks bert.pooler" in says and f"the method '{method}' would leave it random" in says


def test_fine_tuning_trains_the_head_of_every_task(folder):
    call("eval", "--config", write(folder, method="finetune"))
    curve = json.loads((folder / "run/eval-test.json").read_text())["perplexity_by_step"]
    assert curve["2"] < curve["0"]


def test_a_start_without_the_head_is_refused(folder):
    config = load_config(folder / "settings.yaml")
    model = load_model(config.model, 5, 2).model  # another head than the run's seed would give
    model.save_pretrained(folder / "headed")
    letter_tokenizer().save_pretrained(folder / "headed")
    call("train", "--config", folder / "settings.yaml", "--set", f"model.name={folder / 'headed'}")
    assert not read_beside(folder / "run/start")[1]["model"]
    says = call("eval", folder / "run", "--set", f"model.name={folder / 'model'}", status=1)
    assert "start: lacks bert.pooler" in says and "name the model that the start was trained on" in says
