"""kill -9 at any moment, start again, and the run ends on the same bits, whatever is adapted and trained.

A process that imports and then only forks: each run is a child of it, and no child has to import again.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CASES = ("adapter", "all weights", "cells with a controller", "learned rates", "second order")

RUNS = """
import json, os, random, signal, sys, time
from dataclasses import replace
from pathlib import Path
import torch
from tests.mltd.conftest import bare_model, random_tasks, tarp_model
from mltd import InnerConfig, MetaConfig, MetaTrainer
from mltd.checkpoint import JsonLines, checkpoints, load_checkpoint
from tarp_kernels import SearchCellConfig

root, draw = Path(sys.argv[1]), random.Random()
inner = InnerConfig(steps=2, train_mode=True)
config = MetaConfig(inner, iterations=8, tasks_per_batch=2, validate_every=3, validation_steps=(0, 2))
cells = {"search_cell": SearchCellConfig(width=4)}
cases = {
    "adapter": ({}, config),
    "all weights": (None, replace(config, inner=replace(inner, adapts=("all",)), trains=("all",))),
    "cells with a controller": (cells, replace(config, trains=("adapter", "controller"), entropy_weight=0.1)),
    "learned rates": ({}, replace(config, learn_rates=True, rates_lr=1e-4)),
    "second order": ({}, replace(config, objective="second_order", accumulate=2)),
}

def child(name, directory):
    pid = os.fork()
    if pid:
        return pid
    try:
        torch.set_num_threads(1)
        torch.manual_seed(draw.randrange(1000))  # must not matter
        adapter, config = cases[name]
        model = bare_model() if adapter is None else tarp_model(dropout=0.3, **adapter)
        model.set_attn_implementation("eager")
        trainer = MetaTrainer(model, random_tasks(5), config, directory, random_tasks(2, 9, "validation"))
        trainer.train(progress=False)
        os._exit(0)
    except BaseException as error:
        print(name, repr(error), file=sys.stderr)
        os._exit(1)

def succeed(pid):
    assert os.waitpid(pid, 0)[1] == 0

def reached(directory):
    found = checkpoints(directory)
    return load_checkpoint(found[-1]).iteration if found else -1

def kill(name, directory, whole):
    # early, or after some checkpoint, so that a busy machine cannot end the run first
    wanted = draw.choice([-1, -1, 0, 1, 2, 4])
    pid = child(name, directory)
    while reached(directory) < wanted:
        time.sleep(0.002)
    time.sleep(draw.uniform(0, whole / 8))
    os.kill(pid, signal.SIGKILL)
    killed = os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    logged = JsonLines(directory / "log.jsonl").read()
    return [killed, reached(directory), logged[-1]["iteration"] if logged else -1]

kills = {}
for name in cases:
    began = time.perf_counter()
    succeed(child(name, root / name / "whole"))
    whole = time.perf_counter() - began
    kills[name] = [kill(name, root / name / "killed", whole) for _ in range(3)]
    succeed(child(name, root / name / "killed"))
print(json.dumps(kills))
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of the runs, and for every case [killed, last checkpoint, last line of the log] of each kill."""
    folder = tmp_path_factory.mktemp("runs")
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")])
    }
    run = subprocess.run(
        [sys.executable, "-c", RUNS, str(folder)], env=env, capture_output=True, text=True, timeout=400
    )
    assert run.returncode == 0, run.stderr
    return folder, json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", CASES)
def test_a_run_killed_at_random_moments_ends_on_the_same_bits(runs, case):
    folder, kills = runs[0] / case, runs[1][case]
    assert any(killed for killed, *_ in kills), f"every run ended before it was killed: {kills}"
    assert all(logged - kept <= 1 for _, kept, logged in kills), f"more than the current step was lost: {kills}"

    whole, killed = (sorted((folder / name).glob("iteration-*")) for name in ("whole", "killed"))
    assert [path.name for path in killed] == [path.name for path in whole], kills
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(whole, killed, strict=True)), kills

    logs = [
        [json.loads(line) for line in (folder / name / "log.jsonl").read_text().splitlines()]
        for name in ("whole", "killed")
    ]
    for line in logs[0] + logs[1]:
        del line["seconds"]
    assert logs[0] == logs[1] and [line["iteration"] for line in logs[0]] == list(range(9))
