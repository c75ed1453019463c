"""tarp train, adapt and eval on a tiny model: the same numbers as by hand, resuming, and errors in one line."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from mltd import MetaTrainer, Task, adapt, cli, evaluate
from mltd.baselines import METHODS, prepare, training_tasks
from mltd.checkpoint import checkpoints
from mltd.config_file import load_config
from mltd.controller import chosen
from mltd.pretrained import load_model, load_tokenizer
from mltd.run_starts import find_start
from mltd.starts import load_start
from mltd.task_sources import read_examples, read_tasks, read_text
from tarp_kernels import load_tarp, tarp_parameters
from tarp_kernels.models_cells import search_cells
from tests.mltd.run_parts import settings, task_lines, write_all, write_lines, write_model, write_settings

run = CliRunner()
CELLS = {"method": "mltd", "tarp": {"r": 2, "search_cell": {"width": 4}}}


def call(*arguments: object, status: int = 0):
    result = run.invoke(cli.app, [str(argument) for argument in arguments])
    assert result.exit_code == status, (result.output, result.exception)
    return result


def refused(*arguments: object) -> str:
    """The one line in which a command refuses."""
    result = call(*arguments, status=1)
    lines = [line for line in result.stderr.splitlines() if line]
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    return lines[0]


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    """A folder with a model, tasks and settings, and a finished run of TARP with search cells."""
    folder = tmp_path_factory.mktemp("parts")
    write_all(folder)
    call("train", "--config", write_settings(folder, "cells.yaml", **CELLS))
    return folder


@pytest.fixture
def folder(tmp_path, parts) -> Path:
    """A folder for a run of its own on the same model and tasks."""
    for name in ("model", "tasks.jsonl"):
        (tmp_path / name).symlink_to(parts / name)
    write_settings(tmp_path)
    return tmp_path


def start_bits(run_folder: Path) -> dict[str, torch.Tensor]:
    model = load_model(load_config(run_folder / "config.yaml").model, 0).model
    load_start(model, find_start(run_folder))
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# --- train ------------------------------------------------------------------------------------------------------------


def test_training_gives_what_the_meta_trainer_gives_by_hand(parts):
    config = load_config(parts / "cells.yaml")
    model = load_model(config.model, config.seed).model
    prepare(METHODS["mltd"], model, config.tarp, config.seed)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    tasks = read_tasks(config, load_tokenizer(config.model)).train.tasks
    trainer = MetaTrainer(model, tasks, config.meta)
    trainer.train(progress=False)
    expected = dict(model.named_parameters())
    found = start_bits(parts / "run")
    assert same(found, expected) and not same(found, before)
    controller = load_start(load_model(config.model, 0).model, parts / "run/start").controller
    assert controller is not None and trainer.controller is not None
    assert same(dict(controller.named_parameters()), dict(trainer.controller.named_parameters()))


def test_the_saved_settings_are_the_resolved_ones_and_run_the_same_again(parts, tmp_path):
    saved = parts / "run/config.yaml"
    assert load_config(saved) == load_config(parts / "cells.yaml")
    call("train", "--config", saved, "--out", tmp_path / "again")
    assert same(start_bits(tmp_path / "again"), start_bits(parts / "run"))
    other = tmp_path / "other"
    call("train", "--config", saved, "--out", other, "--set", "seed=1")
    assert not same(start_bits(other), start_bits(parts / "run"))


def test_a_finished_run_stays_and_a_longer_one_goes_on_from_it(folder):
    longer = ("--set", "meta.iterations=5", "--out", folder / "whole")
    call("train", "--config", folder / "settings.yaml", *longer)
    call("train", "--config", folder / "settings.yaml")
    logged = (folder / "run/log.jsonl").read_text()
    shown = call("train", "--config", folder / "settings.yaml", "--resume", "must").output
    assert "goes on from" in shown and (folder / "run/log.jsonl").read_text() == logged
    call("train", "--config", folder / "settings.yaml", "--set", "meta.iterations=5")
    assert json.loads((folder / "run/result.json").read_text())["iterations"] == 5
    assert load_config(folder / "run/config.yaml").meta.iterations == 5
    assert same(start_bits(folder / "run"), start_bits(folder / "whole"))


def test_resuming_is_refused_or_demanded(folder):
    settings_file = folder / "settings.yaml"
    assert "has no checkpoint, which --resume must needs" in refused(
        "train", "--config", settings_file, "--resume", "must"
    )
    call("train", "--config", settings_file, "--resume", "never")
    assert "has a checkpoint, which --resume never refuses" in refused(
        "train", "--config", settings_file, "--resume", "never"
    )
    assert "resume: got 'maybe'" in refused("train", "--config", settings_file, "--resume", "maybe")


def test_the_folder_of_another_run_is_refused_and_left_as_it_was(folder):
    call("train", "--config", folder / "settings.yaml")
    before = {path: path.read_bytes() for path in (folder / "run").rglob("*") if path.is_file()}
    says = refused("train", "--config", folder / "settings.yaml", "--set", "meta.outer_lr=1e-4")
    assert "outer_lr was 0.02 and is now 0.0001" in says
    assert {path: path.read_bytes() for path in (folder / "run").rglob("*") if path.is_file()} == before


def test_a_dry_run_shows_everything_and_writes_nothing(folder):
    shown = call("train", "--config", folder / "settings.yaml", "--dry-run").output
    config = load_config(folder / "settings.yaml")
    assert yaml.safe_load(shown.split("\nmodel: Llama")[0])["meta"]["outer_lr"] == config.meta.outer_lr
    for text in (
        "LlamaForCausalLM",
        "trained 2,176 of",
        "train: 3 tasks, 6 support and 6 query examples",
        "memory: base model",
        "validation: 1 tasks",
        "test: 2 tasks",
        "leaks: none",
        "begins anew; stopped before the first step",
    ):
        assert text in shown, text
    assert not (folder / "run").exists()


def test_leaks_are_listed_by_a_dry_run_and_refused(folder):
    lines = task_lines()
    (folder / "tasks.jsonl").unlink()
    copies = [{**line, "task": "topic5"} for line in lines[:4]]
    write_lines(folder / "tasks.jsonl", lines + copies)
    result = run.invoke(cli.app, ["train", "--config", str(folder / "settings.yaml"), "--dry-run"])
    assert result.exit_code == 1 and "leaks: " in result.output and "the same tokens in" in result.stdout
    assert "what is held out is not unseen" in refused("train", "--config", folder / "settings.yaml")


@pytest.mark.parametrize("method", ["tarp-multitask", "maml", "reptile", "tapt"])
def test_every_method_that_trains_trains_and_is_evaluated(method, folder):
    call("train", "--config", write_settings(folder, method=method, tarp={"r": 2}))
    config = load_config(folder / "run/config.yaml")
    model = load_model(config.model, 0).model
    prepare(METHODS[method], model, config.tarp, config.seed)
    assert not same(start_bits(folder / "run"), dict(model.named_parameters()))
    call("eval", folder / "run")
    assert json.loads((folder / "run/eval-test.json").read_text())["method"] == method


def test_dapt_trains_on_the_text_what_joint_training_on_it_gives_by_hand(folder):
    text = folder / "text.txt"
    text.write_text("abc dad. fee jig? " * 20)
    data = {**settings(folder)["data"], "text": str(text), "text_window": 16}
    file = write_settings(folder, method="dapt", data=data)
    shown = call("train", "--config", file, "--dry-run").output
    assert "text: 7 tasks, 14 support and 7 query examples" in shown and "train: 3 tasks" in shown
    call("train", "--config", file)
    config = load_config(file)
    source, letters = read_tasks(config, load_tokenizer(config.model)), load_tokenizer(config.model)
    tasks = read_text(config, letters, source)
    model = load_model(config.model, config.seed).model
    assert training_tasks(METHODS["dapt"], source.train.tasks, (), tasks) is tasks
    MetaTrainer(model, tasks, config.meta).train(progress=False)
    assert config.meta.objective == "multitask" and same(start_bits(folder / "run"), dict(model.named_parameters()))
    text.unlink()  # trained once, it is not needed again
    call("eval", folder / "run")
    assert json.loads((folder / "run/eval-test.json").read_text())["method"] == "dapt"


def test_text_that_has_what_is_held_out_is_refused(folder):
    (folder / "wiki.txt").write_text("".join(f"\n = {name} = \n\n {name * 200}\n" for name in ("ab", "cd", "ef")))
    data = {"reader": "wikitext", "path": str(folder / "wiki.txt"), "window": 8, "support": 1, "query": 1}
    (folder / "text.txt").write_text("cd" * 100 + "dc" * 100)
    data |= {"test_tasks": ["cd"], "text": str(folder / "text.txt"), "text_window": 8}
    assert "what is held out is not unseen: the same tokens in text/" in refused(
        "train", "--config", write_settings(folder, method="dapt", data=data)
    )


def test_validation_keeps_the_best_start(folder):
    meta = {**settings(folder)["meta"], "validate_every": 1}
    call("train", "--config", write_settings(folder, meta=meta))
    result = json.loads((folder / "run/result.json").read_text())
    scores = result["validation"]
    assert list(scores) == ["0", "1", "2", "3"]
    assert scores[str(result["iteration"])] == min(scores.values())


# --- eval and adapt ---------------------------------------------------------------------------------------------------


def test_eval_measures_what_evaluate_measures_by_hand(parts, tmp_path):
    call("eval", parts / "run", "--out", tmp_path / "curve.json")
    config = load_config(parts / "run/config.yaml")
    model = load_model(config.model, 0).model
    start = load_start(model, parts / "run/start")
    tasks = read_tasks(config, load_tokenizer(config.model)).test.tasks
    expected = evaluate(model, tasks, config.meta.inner, (0, 1, 2), controller=start.controller).to_json()
    found = json.loads((tmp_path / "curve.json").read_text())
    assert found["perplexity_by_step"] == expected["perplexity_by_step"]
    assert found["per_task"] == expected["per_task"] and len(found["per_task"]) == 2
    untrained = evaluate(load_model(config.model, 0).model, tasks, replace(config.meta.inner, adapts=("all",)), (0,))
    assert found["perplexity_by_step"]["0"] != untrained.to_json()["perplexity_by_step"]["0"]


def test_learned_rates_are_used_in_eval_and_adapt(folder):
    meta = {**settings(folder)["meta"], "learn_rates": True, "rates_lr": 0.01}
    call("train", "--config", write_settings(folder, meta=meta))
    call("eval", folder / "run")
    config = load_config(folder / "run/config.yaml")
    model = load_model(config.model, 0).model
    start = load_start(model, folder / "run/start")
    tasks = read_tasks(config, load_tokenizer(config.model)).test.tasks
    with_rates, without = (evaluate(model, tasks, config.meta.inner, (0, 1, 2), rates=r) for r in (start.rates, None))
    found = json.loads((folder / "run/eval-test.json").read_text())["perplexity_by_step"]
    assert found == with_rates.to_json()["perplexity_by_step"] != without.to_json()["perplexity_by_step"]

    examples = write_lines(folder / "new.jsonl", [{"source": "abc?", "target": "dad."}])
    call("adapt", folder / "run", "--examples", examples, "--out", folder / "adapted")
    support = read_examples(config, load_tokenizer(config.model), examples)
    expected = adapt(model, [Task("new", support, support)], config.meta.inner, rates=start.rates)
    found = tarp_parameters(load_tarp(load_model(config.model, 0).model, folder / "adapted/adapter"))
    assert same({name: value[0] for name, value in expected.items()}, dict(found))


def test_adapting_with_dropout_gives_the_same_bits_again(folder):
    inner = {**settings(folder)["meta"]["inner"], "train_mode": True}
    file = write_settings(folder, method="tarp-nometa", tarp={"r": 2, "dropout": 0.5}, meta={"inner": inner})
    examples = write_lines(folder / "new.jsonl", [{"source": "abc?", "target": "dad."}])
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        torch.manual_seed(ord(name[1]))  # must not matter
        more = ("--set", f"meta.seed={seed}", "--out", folder / name)
        call("adapt", "--config", file, "--examples", examples, *more)
    assert same(start_bits(folder / "one"), start_bits(folder / "two"))
    assert not same(start_bits(folder / "one"), start_bits(folder / "three"))


def test_eval_can_take_the_validation_tasks_and_other_steps(parts, tmp_path):
    out = tmp_path / "v.json"
    shown = call("eval", parts / "run", "--tasks", "validation", "--set", "steps=[0, 4]", "--out", out).output
    found = json.loads(out.read_text())
    assert list(found["perplexity_by_step"]) == ["0", "4"] and len(found["per_task"]) == 1
    assert "of 1 validation tasks" in shown and f"{found['perplexity_by_step']['4']:.3f}" in shown


@pytest.mark.parametrize("method", ["zero-shot", "finetune", "lora", "tarp-nometa"])
def test_methods_without_training_are_evaluated_from_their_settings(method, folder):
    call("eval", "--config", write_settings(folder, method=method))
    found = json.loads((folder / "run/eval-test.json").read_text())
    steps = ["0"] if method == "zero-shot" else ["0", "1", "2"]
    assert list(found["perplexity_by_step"]) == steps
    config = load_config(folder / "settings.yaml", [f"method={method}"])
    tasks = read_tasks(config, load_tokenizer(config.model)).test.tasks
    bare = evaluate(load_model(config.model, 0).model, tasks, replace(config.meta.inner, adapts=("all",)), (0,))
    assert found["perplexity_by_step"]["0"] == pytest.approx(bare.perplexity_by_step[0], rel=1e-5)


def test_adapt_saves_the_adapter_that_adapting_by_hand_gives(parts, tmp_path):
    lines = [{"source": s, "target": t} for s, t in (("abc?", "dad."), ("bad?", "fee."), ("cab?", "dab."))]
    examples = write_lines(tmp_path / "new.jsonl", lines)
    shown = call("adapt", parts / "run", "--examples", examples, "--out", tmp_path / "adapted").output
    config = load_config(parts / "run/config.yaml")
    model = load_model(config.model, 0).model
    start = load_start(model, parts / "run/start")
    support = read_examples(config, load_tokenizer(config.model), examples)
    task = Task("new", support, support)
    alpha = chosen(start.controller, model, [task])
    expected = adapt(model, [task], config.meta.inner, alpha=alpha)

    loaded = load_tarp(load_model(config.model, 0).model, tmp_path / "adapted/adapter")
    found = tarp_parameters(loaded)
    assert same({name: value[0] for name, value in expected.items()}, dict(found))
    assert not same(dict(tarp_parameters(model)), dict(found))
    assert all(torch.equal(cell.alpha, alpha[0]) for cell in search_cells(loaded).values())

    curve = json.loads((tmp_path / "adapted/curve.json").read_text())["perplexity_by_step"]
    own = evaluate(model, [task], config.meta.inner, (0, 1, 2), controller=start.controller)
    assert curve == own.to_json()["perplexity_by_step"]
    assert "perplexity on the examples adapted to" in shown
    # what was adapted is what the curve ends with
    after = evaluate(loaded, [task], config.meta.inner, (0,))
    assert after.perplexity_by_step[0] == pytest.approx(own.perplexity_by_step[2], rel=1e-5)


def test_adapt_measures_on_other_examples_where_they_are_given(parts, tmp_path):
    examples = write_lines(tmp_path / "new.jsonl", [{"source": "abc?", "target": "dad."}])
    query = write_lines(tmp_path / "query.jsonl", [{"source": "bad?", "target": "jig."}])
    call("adapt", parts / "run", "--examples", examples, "--out", tmp_path / "one")
    shown = call("adapt", parts / "run", "--examples", examples, "--query", query, "--out", tmp_path / "two").output
    one, two = (json.loads((tmp_path / name / "curve.json").read_text()) for name in ("one", "two"))
    assert one["perplexity_by_step"] != two["perplexity_by_step"] and f"perplexity on {query}" in shown
    assert same(start_bits(tmp_path / "one"), start_bits(tmp_path / "two"))


@pytest.mark.parametrize("method", ["finetune", "lora", "tarp-nometa"])
def test_adapt_needs_no_start_for_methods_without_training_and_its_result_is_a_start(method, folder):
    examples = write_lines(folder / "new.jsonl", [{"source": "abc?", "target": "dad."}])
    file = write_settings(folder, method=method)
    call("adapt", "--config", file, "--examples", examples, "--out", folder / "adapted")
    assert (folder / "adapted/adapter/tarp.json").exists() == (method == "tarp-nometa")
    first = json.loads((folder / "adapted/curve.json").read_text())["perplexity_by_step"]
    call("adapt", folder / "adapted", "--examples", examples, "--out", folder / "more")
    more = json.loads((folder / "more/curve.json").read_text())["perplexity_by_step"]
    assert more["0"] == pytest.approx(first["2"], rel=1e-5) and more["0"] != pytest.approx(first["0"], rel=1e-3)


# --- what a user can get wrong ----------------------------------------------------------------------------------------


def test_mistakes_in_settings_are_one_line(folder):
    file = folder / "settings.yaml"
    assert "No such file" in refused("train", "--config", folder / "none.yaml")
    assert "meta.outr_lr: no such setting; did you mean outer_lr?" in refused(
        "train", "--config", file, "--set", "meta.outr_lr=1"
    )
    assert "model.name: is missing" in refused("train")
    (folder / "broken.yaml").write_text("model: [\n")
    assert "broken.yaml:2: is not YAML" in refused("train", "--config", folder / "broken.yaml")
    assert "log_to" in refused("train", "--config", file, "--log-to", "paper")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": {"name": "nowhere"}}, "'nowhere' is no Hugging Face directory"),
        ({"method": "lora"}, "'lora' trains nothing beforehand"),
        ({"method": "dapt"}, "data.text: is missing"),
        ({"data": {"path": "nowhere.jsonl"}}, "No such file"),
    ],
)
def test_what_is_not_there_is_named_before_anything_is_written(changes, says, folder):
    assert says in refused("train", "--config", write_settings(folder, **changes))
    assert not (folder / "run").exists()


def test_settings_that_do_not_fit_the_tasks_are_named(folder):
    file = folder / "settings.yaml"
    assert "expected at least one left to train on" in refused("train", "--config", file, "--set", "data.test_tasks=5")
    assert "tasks_per_batch: got 9 for 3 tasks" in refused("train", "--config", file, "--set", "meta.tasks_per_batch=9")
    assert "data.validation_tasks: got 0 with meta.validate_every" in refused(
        "train", "--config", file, "--set", "data.validation_tasks=0", "--set", "meta.validate_every=1"
    )
    assert 'attn_implementation="eager"' in refused("train", "--config", file, "--set", "meta.objective=second_order")
    assert "model.device: 'abacus' cannot be used" in refused("train", "--config", file, "--set", "model.device=abacus")
    says = refused("train", "--config", file, "--set", "model.kind=seq2seq")
    assert "the seq2seq model in" in says and "LlamaConfig" in says and len(says) < 400


def test_a_damaged_model_is_named(folder):
    (folder / "model").unlink()
    model = write_model(folder / "model")
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert f"the causal model in {model} cannot be loaded" in refused("train", "--config", folder / "settings.yaml")
    (model / "tokenizer.json").write_text("{")
    assert f"the tokenizer in {model} cannot be loaded" in refused("train", "--config", folder / "settings.yaml")


def test_a_truncated_checkpoint_is_named(folder):
    call("train", "--config", folder / "settings.yaml")
    last = checkpoints(folder / "run")[-1]
    last.write_bytes(last.read_bytes()[:-10])
    assert f"{last}: cannot be read" in refused("train", "--config", folder / "settings.yaml")


def test_a_diverging_run_says_what_was_kept(folder):
    says = refused("train", "--config", folder / "settings.yaml", "--set", "meta.inner.lr=1e30")
    assert "lower the learning rate" in says and "the last good state, iteration 0" in says


def test_eval_and_adapt_refuse_what_is_no_start(parts, folder):
    file = folder / "settings.yaml"
    examples = write_lines(folder / "new.jsonl", [{"source": "abc?", "target": "dad."}])
    assert "begins at a trained start" in refused("eval", "--config", file)
    assert "config.yaml: does not exist" in refused("eval", folder)
    assert "holds no trained start" in refused("eval", folder, "--config", file)
    assert "is no folder" in refused("eval", folder / "nowhere", "--config", file)
    assert "tasks: got 'train'" in refused("eval", parts / "run", "--tasks", "train")
    assert "data.test_tasks: got none" in refused("eval", parts / "run", "--set", "data.test_tasks=0")
    assert "is the folder of a training run" in refused(
        "adapt", parts / "run", "--examples", examples, "--out", parts / "run"
    )
    assert "adapts nothing" in refused(
        "adapt", "--config", file, "--set", "method=zero-shot", "--examples", examples, "--out", folder / "x"
    )
    (folder / "other").mkdir()
    call("adapt", parts / "run", "--examples", examples, "--out", folder / "other")
    assert "holds an adapted model" in refused("train", "--config", file, "--out", folder / "other")


def test_a_start_of_another_model_is_refused(parts, folder):
    (folder / "model").unlink()
    model = write_model(folder / "model")
    other = load_model(load_config(folder / "settings.yaml").model, 0).model
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.add_(1)
    other.save_pretrained(model)
    assert "same shapes, other weights" in refused("eval", parts / "run", "--set", f"model.name={model}")


def test_a_read_only_folder_is_refused(folder, monkeypatch):
    (folder / "locked").mkdir(mode=0o500)
    if os.geteuid() == 0:  # who may write everywhere
        allowed = os.access
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "locked" and allowed(path, mode))
    says = refused("train", "--config", folder / "settings.yaml", "--out", folder / "locked/run")
    assert "is no folder that can be written" in says


def test_a_file_in_the_place_of_the_folder_is_refused(folder):
    (folder / "file").write_text("")
    for out in (folder / "file", folder / "file/run"):
        says = refused("train", "--config", folder / "settings.yaml", "--out", out)
        assert "is no folder that can be written" in says
