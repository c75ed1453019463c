"""Ends that are not kill -9: SIGTERM, a loss that is not finite, a disk that takes no more."""

import contextlib
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mltd import DivergedError, InnerConfig, MetaConfig, MetaTrainer
from mltd.checkpoint import checkpoints, latest_checkpoint, load_checkpoint
from mltd.meta_gradient import OBJECTIVES
from mltd.tasks import TaskSampler
from tests.mltd.conftest import bare_model, random_tasks, tarp_model

ROOT = Path(__file__).resolve().parents[2]
CONFIG = MetaConfig(InnerConfig(steps=1, train_mode=True), iterations=6, tasks_per_batch=2, checkpoint_every=100)

TERMINATED = """
import os, signal, sys
import torch
from mltd import MetaTrainer, Terminated
from mltd.meta_gradient import OBJECTIVES
from tests.mltd.conftest import random_tasks, tarp_model
from tests.mltd.test_stopping import CONFIG

torch.set_num_threads(1)
real = OBJECTIVES["first_order"]

def told_in_the_third(problem, tasks, alpha):
    if trainer.iteration == 2:
        os.kill(os.getpid(), signal.SIGTERM)
    return real(problem, tasks, alpha)

OBJECTIVES["first_order"] = told_in_the_third
trainer = MetaTrainer(tarp_model(dropout=0.3), random_tasks(5), CONFIG, sys.argv[1])
try:
    trainer.train(progress=False)
except Terminated as error:
    print(error)
    raise
"""


def test_sigterm_saves_and_the_resumed_run_ends_on_the_same_bits(tmp_path):
    env = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-c", TERMINATED, str(tmp_path / "told")]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    kept = checkpoints(tmp_path / "told")[-1]
    assert run.returncode == 143 and load_checkpoint(kept).iteration == 3
    assert run.stdout.strip() == f"terminated at iteration 3; the same command goes on from {kept}"
    assert "Traceback" not in run.stderr
    runs = [
        MetaTrainer(tarp_model(dropout=0.3), random_tasks(5), CONFIG, tmp_path / name) for name in ("told", "whole")
    ]
    require_equal_ends(runs)


# --- a loss that is not finite ----------------------------------------------------------------------------------------

KINDS = {
    "task by task": (bare_model, {"inner": InnerConfig(steps=1, adapts=("all",)), "trains": ("all",)}),
    "second order": (tarp_model, {"objective": "second_order"}),
    "second order, task by task": (
        bare_model,
        {"inner": InnerConfig(steps=1, adapts=("all",)), "trains": ("all",), "objective": "second_order"},
    ),
    "reptile": (tarp_model, {"objective": "reptile"}),
    "multitask": (tarp_model, {"objective": "multitask"}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_that_is_not_finite_stops_with_the_task_and_the_last_good_state(tmp_path, monkeypatch, kind):
    make, settings = KINDS[kind]
    config = MetaConfig(**{**vars(CONFIG), "inner": InnerConfig(steps=1), **settings})

    def trainer(name):
        model = make()
        model.set_attn_implementation("eager")
        return MetaTrainer(model, random_tasks(5), config, tmp_path / name)

    drawn = TaskSampler(random_tasks(5), config.tasks_per_batch, config.seed)
    batch = [task.name for task in [next(drawn) for _ in range(4)][-1]]
    breaking = trainer("broken")
    together = breaking.learner.parallel or config.objective == "multitask"
    real, broken = OBJECTIVES[config.objective], batch[0] if together else batch[1]

    def breaks(problem, group, alpha):
        if breaking.iteration < 3 or group[0].name != broken:
            return real(problem, group, alpha)
        weight = next(iter(problem.learner.shared.values()))
        good = weight.detach().clone()
        try:
            with torch.no_grad():
                weight.fill_(torch.nan)
            return real(problem, group, alpha)
        finally:
            with torch.no_grad():
                weight.copy_(good)

    monkeypatch.setitem(OBJECTIVES, config.objective, breaks)
    with pytest.raises(DivergedError) as raised:
        breaking.train(progress=False)
    monkeypatch.undo()
    kept = latest_checkpoint(tmp_path / "broken")
    assert kept.iteration == 3 and f"iteration 4: task {broken!r}: " in str(raised.value)
    assert str(raised.value).endswith(f"the last good state, iteration 3, is {kept.path}")
    require_equal_ends([trainer("broken"), trainer("whole")])


def require_equal_ends(trainers):
    for trainer in trainers:
        trainer.train(progress=False)
    ends = [checkpoints(trainer.directory)[-1] for trainer in trainers]
    assert ends[0].name == ends[1].name and ends[0].read_bytes() == ends[1].read_bytes()


# --- a disk that takes no more ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def no_file_larger_than(size):
    """The kernel refuses to write more, as on a full disk: part of the file is written, then an error."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_keeps_the_last_checkpoint_and_says_so(tmp_path):
    def trainer(name, iterations):
        config = MetaConfig(**{**vars(CONFIG), "iterations": iterations, "checkpoint_every": 1})
        return MetaTrainer(tarp_model(dropout=0.3), random_tasks(5), config, tmp_path / name)

    trainer("full", 2).train(progress=False)
    kept = checkpoints(tmp_path / "full")[-1]
    before = kept.read_bytes()
    assert len(before) > 8192
    with (
        no_file_larger_than(8192),
        pytest.raises(OSError, match="run_dir: iteration 3 cannot be kept .*make room") as e,
    ):
        trainer("full", 6).train(progress=False)
    assert str(e.value).endswith(f"then the same command goes on from {kept}")
    assert checkpoints(tmp_path / "full")[-1] == kept and kept.read_bytes() == before
    assert not list((tmp_path / "full").glob(".*")), "an unfinished file was left"
    require_equal_ends([trainer("full", 6), trainer("whole", 6)])


def test_a_loss_that_is_not_finite_keeps_its_name_on_a_full_disk(tmp_path):
    config = MetaConfig(**{**vars(CONFIG), "outer_lr": 1e30, "outer_optimizer": "sgd", "inner": InnerConfig(steps=1)})
    trainer = MetaTrainer(tarp_model(), random_tasks(5), config, tmp_path)
    save = trainer._save

    def save_the_first(*state):
        if not trainer.iteration:
            return save(*state)
        with no_file_larger_than(8192):
            return save(*state)

    trainer._save = save_the_first
    kept = "the state before it cannot be saved .* the same command goes on from .*00000000.safetensors"
    with pytest.raises(DivergedError, match=rf"iteration \d: task 'tasks-\d': .* {kept}"):
        trainer.train(progress=False)


def test_a_directory_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    trainer = MetaTrainer(tarp_model(), random_tasks(5), CONFIG, tmp_path / "file" / "run")
    with pytest.raises(
        OSError, match="run_dir: iteration 0 cannot be kept .*Not a directory: .*let this user write to it"
    ):
        trainer.train(progress=False)
