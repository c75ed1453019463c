"""Triton's interpreter: a process in which kernels run as Python on the CPU, and kernels with mistakes in them.

The interpreter must be chosen before Triton is imported, hence processes of their own: a test_triton.py runs the file
interpreted.py beside it. It multiplies the raw bits of bfloat16 and so is used for float32 and float16 only.
"""

import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tarp_kernels import backends
from tarp_kernels.ops.lowrank_linear import autograd as lowrank_linear
from tarp_kernels.ops.search_cell import autograd as search_cell


def run(file: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Pytest on a file in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", *arguments, str(file)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(autouse=True)
def triton_on_the_cpu(monkeypatch):
    """backend="triton" takes CPU tensors; for import into a file that is interpreted."""
    import triton

    assert triton.knobs.runtime.interpret, "set TRITON_INTERPRET=1"
    monkeypatch.setattr(backends, "choose", lambda requested, *_: requested)


SOURCES = (  # each imports from those before it
    "triton_pieces",
    "lowrank_linear.triton_forward",
    "lowrank_linear.triton_backward",
    "lowrank_linear.triton_products",
    "hadamard_linear.triton_factor",
    "hadamard_linear.triton_kernels",
    "lowrank_linear.triton_kernels",
    "search_cell.triton_forward",
    "search_cell.triton_backward",
    "search_cell.triton_kernels",
)


def make(mistake: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let backend="triton" run kernels with one mistake in their sources: a text, and what stands there instead."""
    (old, new), met, kernels = mistake, 0, {}
    for module in SOURCES:  # the right ones first, or they would import the mistaken ones, and keep them
        importlib.import_module(f"tarp_kernels.ops.{module}")
    for module in SOURCES:
        full = f"tarp_kernels.ops.{module}"
        source = Path(importlib.import_module(full).__file__).read_text()
        met += source.count(old)
        file = tmp_path / f"{module}.py"
        file.write_text(source.replace(old, new))
        spec = importlib.util.spec_from_file_location(full, file)
        mistaken = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, full, mistaken)
        package, _, name = full.rpartition(".")
        monkeypatch.setattr(importlib.import_module(package), name, mistaken)
        spec.loader.exec_module(mistaken)
        kernels[module] = mistaken
    assert met, "the kernels have changed: describe this mistake anew"
    for operator in (lowrank_linear, search_cell):
        own = kernels[f"{operator.__name__.split('.')[-2]}.triton_kernels"]
        monkeypatch.setattr(operator, "kernels", lambda backend, own=own: own)
