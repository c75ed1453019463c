"""The demo in miniature: what it writes, what it reads back, and what it refuses."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console

from mltd import demo, report
from mltd.demo_recipe import METHODS
from mltd.inner_loop import InnerConfig
from tests.mltd.demo_parts import tiny_ingredients, tiny_model, tiny_recipe

ROOT = Path(__file__).resolve().parents[2]


def quiet() -> Console:
    return Console(record=True, width=140, file=open(os.devnull, "w"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished miniature run: its folder, its report, and what it printed."""
    out, console, recipe = tmp_path_factory.mktemp("demo"), quiet(), tiny_recipe()
    made = demo.run(out, recipe, tiny_ingredients(out / "corpus", recipe), console)
    return out, made, console.export_text()


def test_the_report_has_every_method_at_every_step(finished):
    out, made, _ = finished
    assert json.loads((out / "report.json").read_text()) == json.loads(json.dumps(made))
    assert set(made["methods"]) == set(METHODS)
    assert made["model"] == "a tiny random model"
    for name, method in made["methods"].items():
        assert list(method["perplexity_by_step"]) == ["0", "1", "2"], name
        assert all(value > 1 for value in method["perplexity_by_step"].values())
        assert method["seconds"] > 0
        assert method["perplexity_at_stop"] == method["perplexity_by_step"][str(method["stop_step"])]
    parameters = {name: method["parameters"] for name, method in made["methods"].items()}
    assert parameters["zero-shot"] == 0
    assert parameters["finetune"] == sum(p.numel() for p in tiny_model().parameters())
    assert parameters["mltd"] == parameters["tarp-nometa"] == parameters["tarp-multitask"]
    assert abs(parameters["lora"] - parameters["mltd"]) <= 0.05 * parameters["mltd"]


def test_topics_are_named_and_apart(finished):
    _, made, _ = finished
    parts = [set(made[part]) for part in ("train_tasks", "validation_tasks", "held_out_tasks")]
    assert [len(part) for part in parts] == [3, 1, 2]
    assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]
    assert all(set(method["per_task"]) == parts[2] for method in made["methods"].values())


def test_methods_that_begin_as_the_pretrained_model_have_its_perplexity(finished):
    methods = finished[1]["methods"]
    start = methods["zero-shot"]["perplexity_by_step"]["0"]
    for name in ("finetune", "lora", "tarp-nometa"):
        assert methods[name]["perplexity_by_step"]["0"] == pytest.approx(start, rel=1e-4), name
    assert methods["mltd"]["perplexity_by_step"]["0"] != pytest.approx(start, rel=1e-4)


def test_speed_is_measured_on_the_models_own_shapes_behind_a_gate(finished):
    rows = finished[1]["speed"]["rows"]
    shapes = {row["shape"].split("x", 1)[1] for row in rows}
    assert shapes == {"24x24x2", "24x12x2", "24x40x2", "40x24x2"}
    assert {row["kind"] for row in rows} == {"forward", "forward+backward", "decode"}
    assert {row["contender"] for row in rows} >= {"linear", "tarp", "unfused"}
    assert all(0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"] for row in rows)
    means = finished[1]["speed"]["geometric_means"]
    assert all(ratios["linear"] == pytest.approx(1) for ratios in means.values())


def test_replies_are_shown_before_and_after(finished):
    (reply,) = finished[1]["replies"]
    assert reply["topic"] in finished[1]["held_out_tasks"]
    assert reply["prompt"].replace(" ", "").endswith("?")
    assert set(reply) == {"topic", "prompt", "reference", "before", "after"}


def test_csvs_and_pictures_belong_to_the_report(finished):
    out, made, _ = finished
    curves = pd.read_csv(out / "curves.csv")
    assert len(curves) == len(METHODS) * 3
    for row in curves.itertuples():
        assert row.perplexity == pytest.approx(
            made["methods"][row.method]["perplexity_by_step"][str(row.step)], rel=1e-4
        )
    assert set(pd.read_csv(out / "topics.csv")["topic"]) == set(made["held_out_tasks"])
    training = pd.read_csv(out / "training.csv")
    assert training.groupby("method")["iteration"].max().to_dict() == {"mltd": 4, "tarp-multitask": 4}
    assert training["score"].notna().sum() == 6  # at iterations 0, 2 and 4 of both
    for name in report.PICTURES:
        assert (out / name).read_bytes().startswith(b"\x89PNG") and (out / name).stat().st_size > 5000, name


def test_the_screen_shows_what_the_report_holds(finished):
    _, made, text = finished
    for name, method in made["methods"].items():
        (line,) = [line for line in text.splitlines() if f" {name} " in line and f"{method['parameters']:,}" in line]
        assert all(f"{value:.1f}" in line for value in method["perplexity_by_step"].values())
    assert made["verdict"][0].split(":")[0] in text


def test_a_finished_run_is_printed_again_and_nothing_is_run(finished, monkeypatch):
    out, made, _ = finished
    monkeypatch.setattr(demo, "run", None)
    monkeypatch.setattr(demo, "smollm2_ingredients", None)
    console = quiet()
    assert demo.run_demo(out, tiny_recipe(), False, console) == json.loads(json.dumps(made))
    assert "`--fresh` starts anew" in console.export_text()


def test_a_folder_of_another_recipe_is_refused(finished):
    with pytest.raises(FileExistsError, match="--fresh"):
        demo.run_demo(finished[0], tiny_recipe(steps=(0, 2)), False, quiet())


def test_a_fresh_start_deletes_what_the_run_made_and_nothing_else(tmp_path):
    for name in ("report.json", "curves.png", "run.json", "mine.txt"):
        (tmp_path / name).write_text("{}")
    for name in ("methods/mltd", "parts", "my folder"):
        (tmp_path / name).mkdir(parents=True)
    demo.clear(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.txt", "my folder"]


def test_what_is_done_is_not_done_again(finished, monkeypatch):
    out, made, _ = finished
    for name in ("train", "replies", "measure_speed"):
        monkeypatch.setattr(demo, name, None, raising=False)
    monkeypatch.setattr("mltd.baselines._run", None)
    recipe = tiny_recipe()
    again = demo.run(out, recipe, tiny_ingredients(out / "corpus", recipe), quiet())
    assert again["methods"] == made["methods"] and again["speed"] == made["speed"]


def test_a_red_gate_is_reported_and_its_times_are_not(finished, tmp_path, monkeypatch):
    from mltd.bench import contenders

    forward = contenders.UnfusedTarp.forward
    monkeypatch.setattr(contenders.UnfusedTarp, "forward", lambda self, x: forward(self, x) * 1.01)
    recipe = tiny_recipe()
    rows = demo.measure_speed(tiny_ingredients(tmp_path, recipe), recipe)
    assert rows and all("red" in row and "p50_ms" not in row for row in rows)
    console = quiet()
    report._show_speed({"geometric_means": {}, "rows": rows}, console)
    assert "its gate is red" in console.export_text()


RUN = """
import sys
from pathlib import Path
import torch
from rich.console import Console
from mltd import demo
from tests.mltd.demo_parts import tiny_ingredients, tiny_recipe
torch.set_num_threads(1)
out, recipe = Path(sys.argv[1]), tiny_recipe()
print("imported", flush=True)
demo.run(out, recipe, tiny_ingredients(out / "corpus", recipe), Console())
"""


def test_a_killed_run_goes_on_and_ends_as_if_nothing_had_happened(finished, tmp_path):
    """kill -9 once while the methods train and once later; the numbers are those of the run that was left alone."""
    for seconds in (0.6, 2.0):
        process = subprocess.Popen([sys.executable, "-c", RUN, tmp_path], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "imported\n"
        time.sleep(seconds)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    subprocess.run([sys.executable, "-c", RUN, tmp_path], cwd=ROOT, check=True, capture_output=True)
    resumed = json.loads((tmp_path / "report.json").read_text())
    for name, method in finished[1]["methods"].items():
        assert resumed["methods"][name]["perplexity_by_step"] == method["perplexity_by_step"], name
    assert resumed["replies"] == finished[1]["replies"]


def test_the_shipped_recipe_gives_every_method_its_candidates():
    from mltd.demo_recipe import RECIPE

    assert set(RECIPE.inner) >= {"finetune", "lora", "tarp-nometa"} and set(RECIPE.meta) == {"mltd", "tarp-multitask"}
    assert RECIPE.steps == (0, 1, 3, 5, 10)
    assert RECIPE.fingerprint() == RECIPE.fingerprint() != tiny_recipe().fingerprint()
    assert tiny_recipe().fingerprint() != tiny_recipe(inner={"lora": [InnerConfig(lr=1e-4)]}).fingerprint()
