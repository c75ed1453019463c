"""Real processes of `tarp train`: SIGTERM saves, says so, and the same command goes on; torchrun's share the tasks."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from typer.testing import CliRunner

from mltd import cli
from mltd.checkpoint import checkpoints, load_checkpoint
from tests.mltd.run_parts import settings, write_all, write_settings

ROOT = Path(__file__).resolve().parents[2]


def tarp(*arguments: object, processes: int = 1) -> subprocess.Popen:
    path = os.pathsep.join([str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")])
    several = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    command = [sys.executable, "-m", *(several if processes > 1 else []), "mltd.cli", *map(str, arguments)]
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_terminated_run_says_where_it_is_and_the_same_command_ends_it(tmp_path):
    write_all(tmp_path)
    meta = {**settings(tmp_path)["meta"], "iterations": 120, "validate_every": 40}
    file = write_settings(tmp_path, meta=meta)
    run = CliRunner()
    assert run.invoke(cli.app, ["train", "--config", str(file), "--out", str(tmp_path / "whole")]).exit_code == 0

    process = tarp("train", "--config", file)
    deadline = time.monotonic() + 60
    while not any(path.name >= "iteration-00000005" for path in checkpoints(tmp_path / "run")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, errors
    (last,) = checkpoints(tmp_path / "run")[-1:]
    iteration = int(last.stem.rpartition("-")[2])
    assert 5 <= iteration < 120
    assert errors.splitlines()[-1] == f"terminated at iteration {iteration}; the same command goes on from {last}"
    assert "Traceback" not in errors and not (tmp_path / "run/start").exists()
    unfinished = run.invoke(cli.app, ["eval", str(tmp_path / "run")]).stderr
    assert f"run tarp train --config {tmp_path / 'run/config.yaml'}" in unfinished

    again = tarp("train", "--config", file, "--resume", "must")
    shown, errors = again.communicate(timeout=120)
    assert again.returncode == 0, errors
    assert f"goes on from {last}" in shown
    ends = [checkpoints(tmp_path / name)[-1] for name in ("whole", "run")]
    assert ends[0].name == ends[1].name == "iteration-00000120.safetensors"
    assert ends[0].read_bytes() == ends[1].read_bytes()
    assert (tmp_path / "run/start/start.safetensors").exists()
    lines = (tmp_path / "run/log.jsonl").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in lines] == list(range(121))


def test_two_processes_of_torchrun_end_where_one_does(tmp_path):
    write_all(tmp_path)
    file = write_settings(tmp_path)
    assert CliRunner().invoke(cli.app, ["train", "--config", str(file), "--out", str(tmp_path / "one")]).exit_code == 0
    shown, errors = tarp("train", "--config", file, processes=2).communicate(timeout=120)
    one, two = (load_checkpoint(checkpoints(tmp_path / name)[-1]).tensors for name in ("one", "run"))
    for name, value in one.items():
        if name.startswith("parameters/"):
            torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-4)
    assert (tmp_path / "run/start/start.safetensors").exists()
    assert shown.count("begins anew") == 1, errors
    assert len((tmp_path / "run/log.jsonl").read_text().splitlines()) == 1 + settings(tmp_path)["meta"]["iterations"]
