"""The compiled extension: what it links, what it exports, and how it picks an instruction set."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tarp_kernels import _C

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
pytestmark = pytest.mark.native


def lines_of(*command: str) -> list[str]:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()


@pytest.fixture
def restored_isa():
    before = _C.cpu_features()["active"]
    yield
    _C.set_isa(before)


def test_the_extension_is_the_instrumented_one_exactly_under_the_sanitizers():
    watched = "libasan" in os.environ.get("LD_PRELOAD", "")
    assert _C.build_info()["sanitizers"] == ("address,undefined" if watched else "")


def test_each_instruction_set_is_compiled_with_its_flags():
    expected = {"plain": (16, False, False), "avx2": (32, True, False)}
    expected |= {"avx512": (64, True, False), "avx512bf16": (64, True, True)}
    built = _C.build_info()["isas"]
    assert "plain" in built
    for name, flags in built.items():
        assert (flags["vector_bytes"], flags["fma"], flags["bf16_dot"]) == expected[name], name


def test_every_usable_instruction_set_can_be_chosen(restored_isa):
    usable = _C.cpu_features()["usable"]
    assert usable[0] == "plain" and set(usable) <= _C.build_info()["isas"].keys()
    for name in usable:
        _C.set_isa(name)
        assert _C.cpu_features()["active"] == name


def test_an_unknown_instruction_set_is_refused_and_changes_nothing(restored_isa):
    before = _C.cpu_features()["active"]
    with pytest.raises(ValueError, match=r"set_isa: got 'avx1024', expected .*plain"):
        _C.set_isa("avx1024")
    assert _C.cpu_features()["active"] == before


@pytest.mark.parametrize("wanted", ["plain", "", "avx1024"])
def test_the_environment_chooses_the_instruction_set(wanted):
    code = "import torch; from tarp_kernels import _C; print(_C.cpu_features()['active'])"
    environment = os.environ | {"TARP_CPU_ISA": wanted, "PYTHONPATH": str(Path(_C.__file__).parents[1])}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    if wanted == "avx1024":
        assert run.returncode != 0 and "ValueError: environment variable TARP_CPU_ISA: got 'avx1024'" in run.stderr
    else:
        assert run.stdout.strip() == (wanted or _C.cpu_features()["usable"][-1])


def test_torch_and_the_extension_share_one_openmp_runtime():
    before = torch.get_num_threads()
    try:
        for threads in (1, 3, before):
            torch.set_num_threads(threads)
            assert _C.cpu_features()["threads"] == threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(sys.platform != "linux", reason="reads ELF files")
def test_the_extension_links_no_torch_and_exports_only_its_entry():
    needed = [line for line in lines_of("readelf", "-d", _C.__file__) if "NEEDED" in line]
    assert needed and not [line for line in needed if "torch" in line or "c10" in line]
    exported = lines_of("nm", "-D", "--defined-only", "-C", _C.__file__)
    assert any("PyInit__C" in line for line in exported)
    assert not [line for line in exported if "tarp::" in line and "std::" not in line]


@pytest.mark.skipif(not BUILD.is_dir(), reason="no build folder with object files")
def test_no_code_of_one_instruction_set_can_replace_that_of_another():
    """The linker keeps one copy of each weak symbol: such a symbol must carry its instruction set in its name."""
    objects = list(BUILD.glob("CMakeFiles/tarp_*.dir/**/*.o"))
    assert len(objects) >= len(_C.build_info()["isas"])
    for path in objects:
        isa = next(part for part in path.parts if part.startswith("tarp_")).removeprefix("tarp_").removesuffix(".dir")
        for line in lines_of("nm", "-C", "--defined-only", str(path)):
            _, kind, name = line.split(maxsplit=2)
            shared = kind in "WVu" and not name.startswith("DW.ref.")  # a DW.ref points at the exception handler
            assert not shared or f"tarp::{isa}::" in name, f"{path.name}: {name}"
