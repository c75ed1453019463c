"""What the meta-trainer tells its loggers, and what TensorBoard and Weights & Biases get of it."""

import json
import sys
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from typer.testing import CliRunner

from mltd import InnerConfig, MetaConfig, MetaTrainer, cli
from mltd.loggers import LOGGERS, TensorBoard, WeightsAndBiases, scalars
from tests.mltd.conftest import random_tasks, tarp_model
from tests.mltd.run_parts import write_all

INNER = InnerConfig(steps=1)


class Notes:
    def __init__(self) -> None:
        self.told: list = []

    def begin(self, iteration: int) -> None:
        self.told.append(f"begin {iteration}")

    def log(self, record) -> None:
        self.told.append(record["iteration"])


def trained(directory, iterations, *loggers):
    config = MetaConfig(INNER, iterations=iterations, tasks_per_batch=2, validate_every=2, checkpoint_every=2)
    trainer = MetaTrainer(
        tarp_model(), random_tasks(3), config, directory, random_tasks(1, 5, "validation"), loggers=loggers
    )
    trainer.train(progress=False)


def test_a_logger_hears_of_the_beginning_and_of_every_iteration_once(tmp_path):
    notes = Notes()
    trained(tmp_path, 2, notes)
    assert notes.told == ["begin 0", 0, 1, 2]
    trained(tmp_path, 4, notes)
    assert notes.told[4:] == ["begin 2", 3, 4]


def test_a_logger_is_told_without_a_folder_too():
    notes = Notes()
    trained(None, 1, notes)
    assert notes.told == ["begin 0", 0, 1]


def test_a_record_as_numbers():
    record = {"iteration": 4, "losses": {"a": 1.0, "b": 3.0}, "outer_lr": 0.1, "validation": {0: 9.0}, "other": None}
    assert scalars(record) == {"loss": 2.0, "outer_lr": 0.1, "validation/step 0": 9.0}
    assert scalars({"iteration": 0, "seconds": 1.5}) == {"seconds": 1.5}


def read_events(folder):
    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_has_the_numbers_of_the_log_without_what_was_undone(tmp_path):
    trained(tmp_path, 3, TensorBoard(tmp_path, {}))
    # as if killed between checkpoints: iterations 3 onwards come again
    for path in tmp_path.glob("iteration-00000003*"):
        path.unlink()
    trained(tmp_path, 4, TensorBoard(tmp_path, {}))
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    events = read_events(tmp_path / "tensorboard")
    expected = [(line["iteration"], sum(line["losses"].values()) / 2) for line in log[1:]]
    assert events["loss"] == [(step, pytest.approx(value, rel=1e-6)) for step, value in expected]
    assert [step for step, _ in events["validation_score"]] == [0, 2, 4]


def test_weights_and_biases_goes_on_with_the_run_of_the_folder(tmp_path, monkeypatch):
    begun, told = [], []

    def init(**settings):
        begun.append(settings)
        return SimpleNamespace(log=lambda values, step: told.append((step, sorted(values))))

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    trained(tmp_path, 2, WeightsAndBiases(tmp_path, {"method": "tarp"}))
    trained(tmp_path, 3, WeightsAndBiases(tmp_path, {"method": "tarp"}))
    first, again = (settings["id"] for settings in begun)
    assert first == again
    assert begun[0]["resume"] == "allow" and begun[0]["config"] == {"method": "tarp"}
    assert [step for step, _ in told] == [0, 1, 2, 3]
    assert "loss" in told[1][1] and "loss" not in told[0][1]
    for path in tmp_path.glob("iteration-*"):
        path.unlink()
    trained(tmp_path, 1, WeightsAndBiases(tmp_path, {}))
    assert begun[-1]["id"] != first  # a run that begins anew is another run


@pytest.mark.parametrize(("name", "module"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")])
def test_a_missing_package_says_what_to_install(name, module, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=f"log_to: '{name}' needs the package .* `pip install {name}`"):
        LOGGERS[name](tmp_path, {})


def test_the_command_reports_where_it_is_asked_to(tmp_path, monkeypatch):
    settings = write_all(tmp_path)
    run = CliRunner()
    done = run.invoke(cli.app, ["train", "--config", str(settings), "--log-to", "tensorboard"])
    assert done.exit_code == 0, done.output
    assert [step for step, _ in read_events(tmp_path / "run/tensorboard")["loss"]] == [1, 2, 3]
    monkeypatch.setitem(sys.modules, "wandb", None)
    out = str(tmp_path / "other")
    refused = run.invoke(cli.app, ["train", "--config", str(settings), "--log-to", "wandb", "--out", out])
    assert refused.exit_code == 1 and "pip install wandb" in refused.stderr and refused.stderr.count("\n") == 1
