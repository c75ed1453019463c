"""The command ``tarp``: doctor, bench and what a user gets to read when something is wrong."""

import json
import os
import subprocess
import sys

import pandas as pd
import pytest
from typer.testing import CliRunner

from mltd import cli, demo, doctor
from tarp_kernels import backends
from tests.mltd.demo_parts import tiny_recipe

run = CliRunner()


def test_help_names_the_commands():
    shown = run.invoke(cli.app, ["--help"]).output
    assert all(name in shown for name in ("demo", "doctor", "bench"))


def test_doctor_tries_every_backend_and_says_why_one_is_off():
    result = run.invoke(cli.app, ["doctor", "--json"])
    assert result.exit_code == 0
    found = json.loads(result.output)
    assert set(found["backends"]) == set(backends.BACKENDS)
    for name, state in found["backends"].items():
        assert state == (backends.why_unavailable(name) or "works"), name
    assert found["backends"]["reference"] == "works"
    assert found["versions"]["torch"] != "not installed"
    assert found["threads"]["torch"] >= 1
    assert set(found["compilers"]) >= {"gcc", "nvcc", "cmake", "ninja"}
    assert found["gpu"]


def test_doctor_shows_everything_on_the_screen(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    result = run.invoke(cli.app, ["doctor"])
    assert result.exit_code == 0
    for text in ("processor", "backends", "reference", "native extension", "compilers", "versions", "GPU"):
        assert text in result.output


def test_doctor_notices_a_backend_that_computes_nonsense_or_fails(monkeypatch):
    right = doctor.lowrank_linear
    monkeypatch.setattr(doctor, "lowrank_linear", lambda *args, **options: right(*args, **options) * 1.01)
    assert doctor._try("reference").startswith("computes something wrong")

    def fail(*args, **options):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(doctor, "lowrank_linear", fail)
    assert doctor._try("reference") == "fails: RuntimeError: no such instruction"


def test_doctor_names_missing_data_and_a_cache_that_cannot_be_written(monkeypatch, tmp_path):
    def missing():
        raise FileNotFoundError("install it with pip")

    (tmp_path / "file").write_text("")
    monkeypatch.setattr(doctor, "find_gguf", missing)
    monkeypatch.setenv("TARP_CACHE", str(tmp_path / "file"))
    found = doctor._demo()
    assert found["model"] == "missing: install it with pip"
    assert "not writable" in found["cache"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["12x34"], "rows x in_features x out_features x rank"),
        (["0x4x4x1"], "rows x in_features x out_features x rank"),
        (["--only", "everything"], "expected all, layers, cells, models, inner, memory"),
    ],
)
def test_bench_refuses_what_it_does_not_know(arguments, says, tmp_path):
    result = run.invoke(cli.app, ["bench", *arguments, "--out", str(tmp_path)])
    assert result.exit_code != 0
    assert says in " ".join(result.output.replace("│", " ").split())
    assert "Traceback" not in result.output


def test_bench_measures_a_shape_and_keeps_csv_and_picture(tmp_path):
    result = run.invoke(cli.app, ["bench", "8x32x48x2", "--rounds", "3", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    speed = pd.read_csv(tmp_path / "speed.csv")
    assert set(speed["kind"]) == {"forward", "forward+backward", "multiplicative", "multiplicative cached"}
    assert set(speed["contender"]) >= {"linear", "tarp", "unfused"}
    assert (speed.loc[speed["contender"] == "linear", "ratio"] == 1).all()
    assert (speed["p20_ms"] <= speed["p80_ms"]).all() and (speed["deviation"] < 1e-3).all()
    assert {"cpu", "threads", "torch", "time"} <= set(speed)
    memory = pd.read_csv(tmp_path / "memory.csv")
    assert set(memory["contender"]) == set(speed["contender"])
    for name in ("layers.png", "memory.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_demo_refuses_a_folder_of_another_run_without_a_traceback(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "run", None)
    (tmp_path / "run.json").write_text(json.dumps({"fingerprint": tiny_recipe().fingerprint()}))
    result = run.invoke(cli.app, ["demo", "--out", str(tmp_path)])
    assert result.exit_code == 1
    assert "--fresh" in result.output and "Traceback" not in result.output


def test_the_module_runs_as_a_program_and_stays_offline():
    script = """
import os, sys
from mltd import cli
sys.argv = ["tarp", "--help"]
try:
    cli.main()
finally:
    print(os.environ["HF_HUB_OFFLINE"])
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert "doctor" in done.stdout and done.stdout.strip().endswith("1")
