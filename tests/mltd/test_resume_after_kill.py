"""kill -9 at any moment, start again, and the run ends on the same bits.

A process that imports and then only forks: each run is a child of it, and no child has to import again.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

RUNS = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch
from tests.mltd.conftest import random_tasks, tarp_model
from mltd import InnerConfig, MetaConfig, MetaTrainer

root = Path(sys.argv[1])
config = MetaConfig(
    InnerConfig(steps=2, train_mode=True), iterations=12, tasks_per_batch=2, validate_every=3, validation_steps=(0, 2)
)

def child(directory, seed):
    pid = os.fork()
    if pid:
        return pid
    try:
        torch.set_num_threads(1)
        torch.manual_seed(seed)  # must not matter
        model = tarp_model(dropout=0.3)
        trainer = MetaTrainer(model, random_tasks(5), config, directory, random_tasks(2, 9, "validation"))
        trainer.train(progress=False)
        os._exit(0)
    except BaseException as error:
        print(repr(error), file=sys.stderr)
        os._exit(1)

def succeed(pid):
    assert os.waitpid(pid, 0)[1] == 0

began = time.perf_counter()
succeed(child(root / "whole", 1))
whole = time.perf_counter() - began
kills, draw = [], random.Random()
while len(kills) < 4:
    pid = child(root / "killed", draw.randrange(1000))
    time.sleep(draw.uniform(0.1, 0.7) * whole)
    os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    at = sorted(path.name for path in (root / "killed").glob("iteration-*"))
    kills.append([os.WIFSIGNALED(status), at[-1] if at else None])
succeed(child(root / "killed", 2))
print(json.dumps(kills))
"""


def test_a_run_killed_at_random_moments_ends_on_the_same_bits(tmp_path):
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")])
    }
    run = subprocess.run(
        [sys.executable, "-c", RUNS, str(tmp_path)], env=env, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    kills = json.loads(run.stdout.splitlines()[-1])
    assert any(killed for killed, _ in kills), f"every run ended before it was killed: {kills}"

    whole, killed = (sorted((tmp_path / name).glob("iteration-*")) for name in ("whole", "killed"))
    assert [path.name for path in killed] == [path.name for path in whole], kills
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(whole, killed, strict=True)), kills

    logs = [
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("whole", "killed")
    ]
    for line in logs[0] + logs[1]:
        del line["seconds"]
    assert logs[0] == logs[1] and [line["iteration"] for line in logs[0]] == list(range(13))
