"""tarp inspect: what is said of runs, checkpoints, starts and adapters, and that damage is named."""

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mltd import cli
from mltd.checkpoint import checkpoints
from tests.mltd.run_parts import write_all, write_lines, write_settings

run = CliRunner()


def inspected(path: Path, status: int = 0) -> dict:
    result = run.invoke(cli.app, ["inspect", str(path), "--json"])
    assert result.exit_code == status, (result.output, result.exception)
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A folder with a run, its evaluation and what was adapted from it."""
    folder = tmp_path_factory.mktemp("finished")
    write_all(folder)
    meta = {"iterations": 3, "tasks_per_batch": 2, "validate_every": 1, "inner": {"steps": 1}}
    settings = write_settings(folder, method="mltd", tarp={"r": 2, "search_cell": {"width": 4}}, meta=meta)
    examples = write_lines(folder / "new.jsonl", [{"source": "ab?", "target": "cd."}])
    for arguments in (
        ["train", "--config", settings],
        ["eval", folder / "run"],
        ["adapt", folder / "run", "--examples", examples, "--out", folder / "adapted"],
    ):
        assert run.invoke(cli.app, [str(argument) for argument in arguments]).exit_code == 0
    return folder


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    shutil.copytree(finished, tmp_path / "copy")
    return tmp_path / "copy"


def test_a_run_is_described_by_its_parts(finished):
    found = inspected(finished / "run")
    assert (found["kind"], found["method"], found["iteration"], found["iterations"]) == ("run", "mltd", 3, 3)
    assert [each["iteration"] for each in found["checkpoints"]] == [2, 3]
    newest = found["checkpoints"][-1]
    log = [json.loads(line) for line in (finished / "run/log.jsonl").read_text().splitlines()]
    assert found["log"]["records"] == len(log) == 4
    scores = {str(record["iteration"]): record["validation_score"] for record in log}
    assert found["log"]["validation"] == newest["validation"] == scores
    assert found["log"]["tokens"] == sum(record.get("tokens", 0) for record in log) > 0
    assert newest["settings"]["inner"]["steps"] == 1
    assert newest["bytes"] == checkpoints(finished / "run")[-1].stat().st_size
    assert found["results"]["eval-test.json"] == json.loads((finished / "run/eval-test.json").read_text())
    assert found["damaged"] == []


def test_a_start_and_its_adapter_count_their_numbers(finished):
    start = inspected(finished / "run/start")
    adapter = inspected(finished / "run/start/adapter")
    assert start["kind"] == "start" and adapter["kind"] == "adapter"
    assert start["adapter"]["numbers"] == adapter["numbers"] > 0
    assert adapter["settings"]["r"] == 2 and adapter["base"]["class"] == "LlamaForCausalLM"
    assert start["controller"]["operations"] and start["numbers"]["controller"] > 0
    newest = inspected(checkpoints(finished / "run")[-1])
    assert newest["kind"] == "checkpoint" and newest["iteration"] == 3
    # the adapter has the cells' architecture beside its parameters, 2 x 9 x 6 numbers
    assert newest["numbers"]["parameters"] == adapter["numbers"] - 108 + start["numbers"]["controller"]


def test_what_was_adapted_is_a_start_with_settings_and_a_curve(finished):
    found = inspected(finished / "adapted")
    assert (found["kind"], found["method"]) == ("adapted", "mltd")
    assert list(found["results"]["curve.json"]["perplexity_by_step"]) == ["0", "1"]
    assert found["adapter"]["numbers"] == inspected(finished / "run/start/adapter")["numbers"]
    assert inspected(finished / "adapted/start.safetensors")["kind"] == "adapted"


def test_for_a_reader_the_same_is_lines(finished):
    shown = run.invoke(cli.app, ["inspect", str(finished / "run")]).output
    for text in ("kind             run", "iteration        3", "eval-test.json", "method           mltd"):
        assert text in shown


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


@pytest.mark.parametrize(
    ("name", "damage", "says"),
    [
        pytest.param("iteration-00000003.safetensors", truncate, "cannot be read, it is truncated", id="checkpoint"),
        pytest.param("start/start.safetensors", truncate, "cannot be read as a trained start", id="start"),
        pytest.param("start/adapter/tarp.json", truncate, "is no whole JSON file", id="description"),
        pytest.param("config.yaml", lambda path: path.write_text("["), "is not YAML", id="settings"),
        pytest.param("result.json", truncate, "is not JSON", id="result"),
        pytest.param("log.jsonl", truncate, "line 4 of 4 is not JSON", id="log"),
        pytest.param("log.jsonl", Path.unlink, "is missing", id="no log"),
    ],
)
def test_what_is_damaged_is_named_and_the_rest_still_shown(copy, name, damage, says):
    damage(copy / "run" / name)
    found = inspected(copy / "run", status=1)
    assert len(found["damaged"]) == 1
    assert name in found["damaged"][0] and says in found["damaged"][0]
    assert found["checkpoints"][0]["iteration"] == 2
    shown = run.invoke(cli.app, ["inspect", str(copy / "run")])
    assert shown.exit_code == 1 and shown.stderr == f"damaged: {found['damaged'][0]}\n"


def test_a_changed_adapter_file_is_named(copy):
    (tensors,) = (copy / "adapted/adapter").glob("tarp-*.safetensors")
    raw = bytearray(tensors.read_bytes())
    raw[-1] ^= 1
    tensors.write_bytes(raw)
    for path in (copy / "adapted", copy / "adapted/adapter"):
        assert tensors.name in inspected(path, status=1)["damaged"][0]


@pytest.mark.parametrize(
    ("name", "says"),
    [("nowhere", "does not exist"), ("model", "holds no run, checkpoint, start or adapter"), ("tasks.jsonl", "is no")],
)
def test_what_is_nothing_of_a_run_is_refused(finished, name, says):
    result = run.invoke(cli.app, ["inspect", str(finished / name)])
    assert result.exit_code == 1 and result.stderr.count("\n") == 1
    assert result.stderr.startswith(f"error: {finished / name}") and says in result.stderr
