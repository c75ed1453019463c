"""Checkpoints: whole or not there, bit for bit, and a clear word about anything else."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from mltd import checkpoint
from mltd.checkpoint import CheckpointError, JsonLines, checkpoints, latest_checkpoint, load_checkpoint, save_checkpoint

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(3, dtype=torch.int64), "c": torch.ones(3).bfloat16()}
STATE = {"names": ["é", None], "score": 1.5, "nested": {"x": [1, 2]}}


def test_what_is_saved_comes_back_and_equal_states_give_equal_bytes(tmp_path):
    path = save_checkpoint(tmp_path / "new" / "directory", 12, TENSORS, STATE)
    found = latest_checkpoint(path.parent)
    assert found.iteration == 12 and found.state == STATE and found.path == path
    assert all(torch.equal(found.tensors[name], value) for name, value in TENSORS.items())
    assert all(found.tensors[name].dtype == value.dtype for name, value in TENSORS.items())
    other = save_checkpoint(tmp_path, 12, dict(reversed(TENSORS.items())), dict(reversed(STATE.items())))
    assert other.read_bytes() == path.read_bytes()
    assert latest_checkpoint(tmp_path / "nothing") is None


def test_the_previous_checkpoint_stays_until_the_new_one_is_safe(tmp_path, monkeypatch):
    for iteration in range(1, 5):
        save_checkpoint(tmp_path, iteration, TENSORS, STATE)
    assert [path.name for path in checkpoints(tmp_path)] == [f"iteration-{i:08d}.safetensors" for i in (3, 4)]

    synchronised = []
    real_fsync, real_replace = os.fsync, os.replace

    def fails(*args):
        raise OSError("the disk is full")

    for call in ("fsync", "replace"):
        monkeypatch.setattr(os, call, fails)
        with pytest.raises(OSError, match="the disk is full"):
            save_checkpoint(tmp_path, 5, TENSORS, STATE)
        monkeypatch.undo()
        assert latest_checkpoint(tmp_path).iteration == 4 and len(checkpoints(tmp_path)) == 2

    monkeypatch.setattr(os, "fsync", lambda fd: (synchronised.append("fsync"), real_fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda *a: (synchronised.append("replace"), real_replace(*a)))
    save_checkpoint(tmp_path, 5, TENSORS, STATE)
    assert synchronised == ["fsync", "replace", "fsync"]  # the data, its name, the directory
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".tmp"] == []


@pytest.mark.parametrize("left", [0, 5, 100, -1])
def test_a_truncated_file_is_a_clear_error(tmp_path, left):
    save_checkpoint(tmp_path, 1, TENSORS, STATE)
    path = save_checkpoint(tmp_path, 2, TENSORS, STATE)
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(CheckpointError, match=r"iteration-00000002.*truncated.*delete it to go on from .*00000001"):
        latest_checkpoint(tmp_path)


def test_a_foreign_file_is_a_clear_error(tmp_path):
    path = tmp_path / "iteration-00000003.safetensors"
    path.write_bytes(b"PK\x03\x04" + os.urandom(500))
    with pytest.raises(CheckpointError, match="no safetensors file .*delete it to start this run anew"):
        latest_checkpoint(tmp_path)
    for metadata in (None, {"mltd": "{}"}, {"mltd": "[1]"}, {"mltd": "{"}, {"format": "pt"}):
        save_file({"a": torch.ones(2)}, path, metadata=metadata)
        with pytest.raises(CheckpointError, match="a safetensors file, but not a checkpoint of mltd"):
            load_checkpoint(path)


def test_another_version_is_a_clear_error(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "VERSION", 2)
    save_checkpoint(tmp_path, 1, TENSORS, STATE)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="has format version 2, expected 1"):
        latest_checkpoint(tmp_path)


def test_a_log_drops_what_a_crash_cut_short(tmp_path):
    log = JsonLines(tmp_path / "log.jsonl")
    assert log.read() == []
    for i in range(4):
        log.append({"iteration": i})
    with open(log.path, "a") as file:
        file.write('{"iteration": 4, "lo')
    assert [record["iteration"] for record in log.read()] == [0, 1, 2, 3]
    log.keep(lambda record: record["iteration"] <= 2)
    assert [json.loads(line)["iteration"] for line in log.path.read_text().splitlines()] == [0, 1, 2]
