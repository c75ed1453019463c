"""Source distribution, and a build from it on a machine without nvcc."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="needs the source tree")

# Python 3.11 got filters with 3.11.4, and later ones warn without.
EXTRACTION: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}


def run(command: list, cwd: Path, **environment: str) -> str:
    done = subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def build(kind: str, source: Path, target: Path, **environment: str) -> tuple[Path, str]:
    """What `python -m build` does, without its isolated environment (which would need the network)."""
    target.mkdir(exist_ok=True)
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(target)!r})"
    output = run([sys.executable, "-c", code], source, **environment)
    (made,) = target.iterdir()
    return made, output


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    return build("sdist", ROOT, tmp_path_factory.mktemp("sdist"))[0]


@pytest.fixture
def path_without_nvcc(tmp_path) -> str:
    """PATH in which every folder that has nvcc is replaced by links to everything else in it."""
    folders = []
    for number, folder in enumerate(map(Path, os.get_exec_path())):
        if (folder / "nvcc").exists():
            mirror = tmp_path / f"bin{number}"
            mirror.mkdir()
            for program in folder.iterdir():
                if program.name != "nvcc":
                    (mirror / program.name).symlink_to(program)
            folder = mirror
        folders.append(str(folder))
    return os.pathsep.join(folders)


def test_sdist_has_all_that_a_build_needs(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    files = {"setup.py", "pyproject.toml", "CMakeLists.txt", "constraints.txt", "Makefile", "LICENSE", "README.md"}
    for folder, suffixes in {
        "csrc": (".cpp", ".h", ".cu", ".cuh"),
        "tarp_kernels": (".py",),
        "python/mltd": (".py",),
    }.items():
        found = [path for path in (ROOT / folder).rglob("*") if path.suffix in suffixes]
        assert found, folder
        files |= {path.relative_to(ROOT).as_posix() for path in found}
    assert files <= names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


def configure(folder: Path, path: str) -> str:
    import cmake
    import ninja
    import pybind11

    command = [Path(cmake.CMAKE_BIN_DIR, "cmake"), "-S", ROOT, "-B", folder, "-G", "Ninja"]
    command += [f"-DCMAKE_MAKE_PROGRAM={Path(ninja.BIN_DIR, 'ninja')}", f"-DPython_EXECUTABLE={sys.executable}"]
    return run([*command, f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"], ROOT, PATH=path)


def test_a_build_without_nvcc_says_so(tmp_path, path_without_nvcc):
    assert "no nvcc on PATH: building the CPU part only" in configure(tmp_path / "build", path_without_nvcc)


def test_a_build_with_an_nvcc_that_does_not_work_goes_on_without(tmp_path, path_without_nvcc):
    (tmp_path / "nvcc").touch(mode=0o755)
    said = configure(tmp_path / "build", str(tmp_path) + os.pathsep + path_without_nvcc)
    assert f"{tmp_path / 'nvcc'} knows no architecture of ours" in said and "building the CPU part only" in said


@pytest.mark.parametrize(("release", "serves"), [("12.4", False), ("12.5", True), ("13.0", True)])
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs the toolkit that belongs to an nvcc")
def test_a_build_with_an_nvcc_that_is_too_old_goes_on_without(tmp_path, release, serves):
    nvcc = tmp_path / "nvcc"
    answers = f'--version|--list-gpu-code) echo "release {release}, sm_80 sm_86 sm_89 sm_90 sm_100 .";;'
    nvcc.write_text(f'#!/bin/sh\ncase "$*" in {answers} *) exec {shutil.which("nvcc")} "$@";; esac\n')
    nvcc.chmod(0o755)
    said = configure(tmp_path / "build", str(tmp_path) + os.pathsep + os.environ["PATH"])
    assert ("CUDA kernels for sm_80, sm_86, sm_89, sm_90a, sm_100, by" in said) == serves
    assert ("is older than 12.5" in said) != serves


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_a_build_with_nvcc_says_for_what(tmp_path):
    said = configure(tmp_path / "build", os.environ["PATH"])
    assert "CUDA kernels for sm_80, sm_86, sm_89, sm_90a, sm_100, by" in said


@pytest.mark.proof
def test_a_wheel_from_the_sdist_works_away_from_the_tree(tmp_path, sdist, path_without_nvcc):
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "source", **EXTRACTION)
    (source,) = (tmp_path / "source").iterdir()
    wheel, said = build("wheel", source, tmp_path / "wheel", PATH=path_without_nvcc)
    assert "no nvcc on PATH: building the CPU part only" in said
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
        names = archive.namelist()
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "csrc", "python"))]
    code = """
import torch, mltd, tarp_kernels, tarp_kernels._C
layer = tarp_kernels.TarpLinear.from_linear(torch.nn.Linear(8, 4), tarp_kernels.TarpConfig(r=2))
assert tarp_kernels._C.build_info()["cuda"] is False
with tarp_kernels.backend("cpu"):
    assert layer(torch.ones(3, 8)).shape == (3, 4)
print(tarp_kernels.__file__, mltd.__file__)
"""
    here = str(tmp_path / "site")
    assert run([sys.executable, "-c", code], tmp_path, PYTHONPATH=here).count(here) == 2
