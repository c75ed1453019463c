"""Importing is cheap and inert: no tensor code, no compilation, no model library."""

import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("tarp_kernels", "mltd")

SECONDS_BEYOND_TORCH = """
import time, torch
start = time.perf_counter()
import tarp_kernels
print(time.perf_counter() - start)
"""

WHAT_AN_IMPORT_DOES = """
import sys, torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

seen = []
class Functions(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        seen.append(f"function {function}")
        return function(*args, **(kwargs or {}))
class Kernels(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        seen.append(f"kernel {function}")
        return function(*args, **(kwargs or {}))
sys.addaudithook(lambda event, args: seen.append(f"{event} {args}")
                 if event in ("subprocess.Popen", "os.system", "os.posix_spawn", "os.fork") else None)
with Functions(), Kernels():
    BODY
print("\\n".join(seen), end="")
"""


def python(code: str) -> str:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "python")])
    run = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_import_takes_under_two_seconds_beyond_torch():
    assert statistics.median(float(python(SECONDS_BEYOND_TORCH)) for _ in range(3)) < 2


@pytest.mark.parametrize("package", PACKAGES)
def test_import_runs_no_tensor_code_and_starts_no_process(package):
    assert python(WHAT_AN_IMPORT_DOES.replace("BODY", f"import {package}")) == ""


@pytest.mark.parametrize("body", ["torch.zeros(2) + 1", "import subprocess; subprocess.run('true')"])
def test_the_watch_sees_what_it_watches_for(body):
    assert python(WHAT_AN_IMPORT_DOES.replace("BODY", body)) != ""


def test_operators_do_not_import_the_model_library():
    assert python("import sys, tarp_kernels; print('transformers' in sys.modules)").strip() == "False"
