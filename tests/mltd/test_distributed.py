"""One run in several processes: the result of one process, the same decisions in all, and an end that can be gone on
from when one of them dies or is told to end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mltd.checkpoint import JsonLines, checkpoints, latest_checkpoint, load_checkpoint
from tests.mltd.ranks import CASES, PLAYED, SIZES, STOPPED

ROOT = Path(__file__).resolve().parents[2]
ENV = os.environ | {
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]),
}
SEVERAL = [size for size in SIZES if size > 1]


def torchrun(directory: Path, stop) -> int:
    """Two processes of a run that does not end by itself; `stop` ends it once it is under way. Returns the status."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    directory.mkdir()
    with open(directory / "output", "w") as output:
        run = subprocess.Popen(
            [*command, "-m", "tests.mltd.ranks", "endless", str(directory)], env=ENV, stdout=output, stderr=output
        )
        try:
            give_up = time.monotonic() + 240
            while len(JsonLines(directory / "run" / "log.jsonl").read()) < 3:
                assert run.poll() is None and time.monotonic() < give_up, (directory / "output").read_text()
                time.sleep(0.05)
            stop(run)
            return run.wait(timeout=120)
        finally:
            if run.poll() is None:
                run.terminate()
                run.wait(timeout=120)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """Where two runs were stopped, one by the death of its second process, one by SIGTERM to torchrun."""
    folder = tmp_path_factory.mktemp("stopped")
    ends = {
        "killed": lambda run: os.kill(int((folder / "killed" / "pid-1").read_text()), signal.SIGKILL),
        "told": lambda run: run.send_signal(signal.SIGTERM),
    }
    return folder, {name: torchrun(folder / name, ends[name]) for name in STOPPED}


@pytest.fixture(scope="module")
def seen(stopped, tmp_path_factory):
    """(act, size, rank) -> what that process saw."""
    folder = tmp_path_factory.mktemp("ranks")
    for name in STOPPED:
        (stopped[0] / name / "run").rename(folder / name)
    command = [sys.executable, "-m", "tests.mltd.ranks", str(folder)]
    run = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=400)
    assert run.returncode == 0, run.stderr
    wanted = [(act, size, rank) for act in ("play", "resume") for size in SIZES for rank in range(size)]
    return folder, {(act, s, r): torch.load(folder / f"{act}-{s}-{r}.pt", weights_only=True) for act, s, r in wanted}


def apart(got, expected):
    """Relative to how far training moved."""
    far = sum((expected["ended"][name] - value).square().sum() for name, value in expected["began"].items())
    off = sum((got["ended"][name] - value).square().sum() for name, value in expected["ended"].items())
    assert far > 0
    return (off / far).sqrt().item()


# --- the result -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "case"), [(size, case) for size in SEVERAL for case in PLAYED[size]])
def test_several_processes_train_what_one_does(seen, case, size):
    alone = seen[1]["play", 1, 0][case]
    for rank in range(size):
        got = seen[1]["play", size, rank][case]
        assert apart(got, alone) < 1e-8
        first = seen[1]["play", size, 0][case]
        assert all(torch.equal(value, first["ended"][name]) for name, value in got["ended"].items())
        for same in ("tokens", "iterations", "iteration", "stopped_early"):
            assert got[same] == alone[same], same
        assert got["validation"] == pytest.approx(alone["validation"], rel=1e-9)


def test_the_case_that_stops_early_does(seen):
    alone = seen[1]["play", 1, 0]["validated"]
    assert alone["stopped_early"] and alone["iteration"] < alone["iterations"] < CASES["validated"].config.iterations


@pytest.mark.parametrize("size", SIZES)
def test_with_dropout_a_resumed_run_ends_on_the_same_bits(seen, size):
    whole, parts = (checkpoints(seen[0] / f"{name}-{size}") for name in ("whole", "parts"))
    assert [path.name for path in whole] == [path.name for path in parts] and len(whole) == 2
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(whole, parts, strict=True))
    earlier, later = (load_checkpoint(path).tensors for path in whole)
    assert any(not torch.equal(value, later[name]) for name, value in earlier.items() if name.startswith("parameters/"))


@pytest.mark.parametrize("size", SEVERAL)
def test_the_tasks_are_shared_out_and_each_process_has_dropout_of_its_own(seen, size):
    alone = seen[1]["play", 1, 0]["share"]
    shares = [seen[1]["play", size, rank]["share"] for rank in range(size)]
    for what in ("tasks", "validation"):
        assert sorted(name for share in shares for name in share[what]) == sorted(alone[what])
    assert [len(share["tasks"]) for share in shares] == [12 // size] * size  # 2 iterations of 2 meta-batches of 3
    assert len({tuple(share["drawn"][:2]) for share in shares}) == size
    assert all(len(set(share["drawn"])) == len(share["drawn"]) for share in shares)


def test_a_sharded_run_keeps_what_one_process_keeps_and_goes_on_whole(seen):
    alone, moved = (load_checkpoint(checkpoints(seen[0] / f"moved-{size}")[-1]) for size in (1, 2))
    assert moved.iteration == alone.iteration == 3 and moved.tensors.keys() == alone.tensors.keys()
    assert moved.state["scores"] == [pytest.approx(pair) for pair in alone.state["scores"]]
    for name, value in alone.tensors.items():
        torch.testing.assert_close(moved.tensors[name], value, rtol=1e-6, atol=1e-9)
    kinds = {name.partition("/")[0] for name in alone.tensors}
    assert kinds == {"parameters", "optimizer", "best", "rng"}


def test_what_cannot_be_done_with_a_sharded_model_is_named(seen):
    starts = [
        "ValueError: adapts: 'transformer.wte.weight' is sharded, and each task has its own values of it",
        "ValueError: objective: 'second_order' needs the weights again",
        "ValueError: controller: reads the embeddings outside of the model's forward",
    ]
    for rank in range(2):
        said = seen[1]["play", 2, rank]["moved"]
        assert [message[: len(start)] for message, start in zip(said, starts, strict=True)] == starts


# --- decisions and files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_only_the_first_process_writes(seen, size):
    written = [seen[1]["play", size, rank]["logged"]["writes"] for rank in range(size)]
    assert written == [True] + [False] * (size - 1)
    names = sorted(path.name for path in (seen[0] / f"logged-{size}").iterdir())
    ended = seen[1]["play", size, 0]["logged"]["iterations"]
    assert names == [f"iteration-{i:08d}.safetensors" for i in (ended - 1, ended)] + ["log.jsonl"]
    assert len((seen[0] / f"logged-{size}" / "log.jsonl").read_text().splitlines()) == ended + 1


@pytest.mark.parametrize("size", SIZES)
def test_a_method_is_run_by_all_and_written_down_by_the_first(seen, size):
    alone = seen[1]["play", 1, 0]["compared"]
    found = [seen[1]["play", size, rank]["compared"] for rank in range(size)]
    assert {"result.json", "identity.json", "inner.json", "meta.json", "start.safetensors"} <= set(found[0]["wrote"])
    assert all(own["wrote"] == [] for own in found[1:])
    assert found[0]["wrote"].count("result.json") == 1
    for own in found:
        assert (own["inner"], own["meta"]) == (alone["inner"], alone["meta"])
        assert (
            own["perplexity"] == pytest.approx(alone["perplexity"], rel=1e-4) and own["again"] == found[0]["perplexity"]
        )
        assert own["other"].startswith("CheckpointError: ") and "is the result of another comparison" in own["other"]


@pytest.mark.parametrize("size", SIZES)
def test_divergence_in_one_process_stops_all_with_the_same_words(seen, size):
    said = {seen[1]["play", size, rank]["diverged"] for rank in range(size)}
    assert len(said) == 1
    path = seen[0] / f"diverged-{size}" / "iteration-00000001.safetensors"
    message = said.pop()
    assert message.startswith("DivergedError: iteration 2: task 'tasks-")
    assert message.endswith(f"the last good state, iteration 1, is {path}")
    assert load_checkpoint(path).iteration == 1


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["told", "told, sharded"])
def test_when_one_process_is_told_to_end_all_do_after_the_same_iteration(seen, kind, size):
    said = [seen[1]["play", size, rank][kind] for rank in range(size)]
    assert said == ["Terminated: terminated at iteration 2; nothing was kept, as there is no run_dir"] * size


@pytest.mark.parametrize("size", SEVERAL)
def test_processes_that_disagree_about_the_run_say_so(seen, size):
    for rank in range(size):
        assert seen[1]["play", size, rank]["other tasks"].startswith(
            "ValueError: tasks: differs between processes 0 and 1 of this run, expected the same"
        )


@pytest.mark.parametrize("size", SEVERAL)
def test_a_damaged_checkpoint_is_an_error_in_every_process(seen, size):
    for rank in range(size):
        assert "CheckpointError: " in seen[1]["play", size, rank]["damaged"]
        assert "no safetensors file" in seen[1]["play", size, rank]["damaged"]


# --- the end of a process ---------------------------------------------------------------------------------------------


def test_when_a_process_dies_the_others_stop_and_say_where_it_goes_on(stopped):
    folder, statuses = stopped
    assert statuses["killed"] != 0 and not (folder / "killed" / "error-1").exists()
    message = (folder / "killed" / "error-0").read_text()
    assert "LostProcessError: after iteration " in message
    assert "another process of this run has ended or did not answer" in message
    assert "the same command goes on from " in message


def test_sigterm_to_torchrun_stops_every_process_after_the_same_iteration(stopped):
    folder, statuses = stopped
    said = [(folder / "told" / f"error-{rank}").read_text() for rank in range(2)]
    assert statuses["told"] != 0 and said[0] == said[1]
    assert said[0].startswith("Terminated: terminated at iteration ")


@pytest.mark.parametrize("name", STOPPED)
def test_a_stopped_run_has_lost_nothing_of_what_it_had_logged(seen, name):
    kept, logged = latest_checkpoint(seen[0] / name), JsonLines(seen[0] / name / "log.jsonl").read()
    assert kept.iteration == logged[-1]["iteration"] > 0


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", STOPPED)
def test_a_stopped_run_goes_on_in_any_number_of_processes(seen, name, size):
    whole = seen[1]["resume", 1, 0][f"{name}, whole"]
    for rank in range(size):
        got = seen[1]["resume", size, rank][name]
        assert apart(got, whole) < 1e-8 and got["tokens"] == whole["tokens"]
