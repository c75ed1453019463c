"""The machine code of the CUDA kernels: which there is, what it takes of a GPU, and that tensor cores run it."""

import functools
import hashlib
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from tarp_kernels import _C
from tarp_kernels.ops.lowrank_linear import cuda_gradients, cuda_skinny
from tests.lowrank_linear.cuda_runs import needs_nvcc, source, tool

ARCHITECTURES = ["sm_80", "sm_86", "sm_89", "sm_90a", "sm_100"]
BUILT = _C.build_info()["cuda"]
needs_cuda = pytest.mark.skipif(not BUILT, reason="the extension was built without CUDA kernels")
each_architecture = pytest.mark.parametrize("architecture", BUILT or [])

# Registers of a thread, and bytes of shared memory that a launch does not ask for.
BUDGETS = {
    "_sm90_": (168, 1024),  # one block of 384 threads, beside 192 KB of tiles
    "search_cell_backward": (255, 3072),  # one block of 256: with these and twelve tiles of 8 KB sm_86 is full
    "search_cell_gradients": (255, 3072),  # one block
    # Two blocks of 256. Beside the 48 KB of x of few rows, and 1024 bytes of the GPU's own, they fit sm_86's 100 KB.
    "": (128, 1024),
}


@functools.cache
def cuobjdump(*arguments: str) -> str:
    command = [str(tool("cuobjdump")), *arguments, _C.__file__]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@functools.cache
def kernels(architecture: str) -> dict[str, list[str]]:
    """The instructions of each kernel."""
    parts = re.split(r"Function : (\S+)", cuobjdump("-sass", "-arch", architecture))
    return {name: operations(text) for name, text in zip(parts[1::2], parts[2::2], strict=True)}


def operations(text: str) -> list[str]:
    """The opcodes of a disassembly; with their number where it is of groups of products that may be under way."""
    opcodes = r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*(?: gsb0, 0x\d+)?)"
    return re.findall(opcodes, text)


def test_kernels_are_built_exactly_where_nvcc_is():
    """A test run elsewhere than where the extension was built may find an nvcc that the build did not have."""
    if _C.build_info()["sanitizers"] or shutil.which("nvcc") is None:
        assert BUILT is False or set(BUILT) <= set(ARCHITECTURES)
    else:
        assert BUILT == ARCHITECTURES, "CUDA 13 knows them all; build again with `make setup`"


def test_the_extension_says_from_which_sources_its_kernels_were_built():
    """Every one of them, headers too: what was measured with other kernels is not used."""
    assert _C.build_info()["cuda_sources"] == (digest_of_cuda_sources(CSRC) if BUILT else "")


def digest_of_cuda_sources(folder: Path) -> str:
    patterns = ("*.cu", "*.cuh", "*_cuda.h", "cuda/*.h")
    found = {path.as_posix(): path for pattern in patterns for path in folder.rglob(pattern)}
    assert len(found) >= 20
    digests = (hashlib.sha256(path.read_bytes()).hexdigest() for _, path in sorted(found.items()))
    return hashlib.sha256("".join(digests).encode()).hexdigest()


@needs_cuda
def test_the_newest_architecture_is_there_as_ptx_too():
    assert re.findall(r"arch = (\w+)", cuobjdump("-ptx").partition("Fatbin ptx code")[2])[0] == BUILT[-1]


@needs_cuda
@each_architecture
def test_no_kernel_spills_and_as_many_blocks_fit_a_multiprocessor_as_are_meant_to(architecture):
    usage = cuobjdump("-res-usage", "-arch", architecture)
    found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    assert {name for name, *_ in found} == kernels(architecture).keys() and len(found) >= 10
    counted = 1024 if architecture in ("sm_90a", "sm_100") else 0  # the GPU's own are among those that are listed
    for name, *numbers in found:
        registers, stack, shared, local = map(int, numbers)
        most_registers, most_shared = next(budget for part, budget in BUDGETS.items() if part in name)
        assert registers <= most_registers and shared - counted <= most_shared, name
        assert stack == local == 0, name


@needs_cuda
@each_architecture
def test_few_rows_go_to_tensor_cores_in_loads_of_16_bytes_many_under_way(architecture):
    few_rows = {name: code for name, code in kernels(architecture).items() if "few_rows" in name}
    assert len(few_rows) == 8
    for name, code in few_rows.items():
        bf16 = "bfloat16" in name
        products = [op for op in code if op.startswith("HMMA.16816.F32")]
        assert products and all(op.endswith(".BF16") == bf16 for op in products)
        assert not any(op.startswith(("LDL", "STL")) for op in code), "memory of a thread: spills"
        marks = "".join("l" if is_stream(op) else "p" if op in products else "" for op in code)
        # a lane loads the rows of its two halves of A for every chunk under way: 4, of wide tiles 2
        assert max(map(len, marks.split("p"))) >= (4 if "Li8E" in name else 8), name


@needs_cuda
@each_architecture
def test_many_rows_come_by_copies_of_16_bytes_and_go_to_tensor_cores(architecture):
    many_rows = {name: code for name, code in kernels(architecture).items() if "many_rows_kernel" in name}
    assert len(many_rows) == 2
    for name, code in many_rows.items():
        products = [op for op in code if op.startswith("HMMA.16816.F32")]
        assert products and all(op.endswith(".BF16") == ("bfloat16" in name) for op in products)
        copies = [op for op in code if op.startswith("LDGSTS")]
        assert copies and all(".128" in op and ".BYPASS" in op for op in copies)
        assert any(op.startswith("LDSM.16.M88.4") for op in code) and not any(
            op.startswith(("LDL", "STL")) for op in code
        )


def many_rows_sm90_is_right(code: list[str], wide: bool, bf16: bool) -> bool:
    """What a missing wait or fence changes, and no machine in software sees: the order of what is asynchronous.

    Four products a step wait for nothing between them; the next step ends those before it, the last wait comes before
    any sum is read. What is written for products is shown to them: the barriers, z and U.
    """
    product = f"HGMMA.64x{256 if wide else 128}x16.F32" + ".BF16" * bf16
    waits = [f"WARPGROUP.DEPBAR.LE gsb0, 0x{pending}" for pending in (1, 0)]
    reads = ("F2FP", "FADD")
    order = [op for op in code if op.startswith(("HGMMA", "WARPGROUP", *reads))]
    expected = ["WARPGROUP.ARRIVE", *[product] * 4, *waits]
    return (
        order[: len(expected)] == expected
        and all(op.startswith(reads) for op in order[len(expected) :])
        and [op for op in code if op.startswith(("UTMACCTL", "UTMALDG"))] == ["UTMACCTL.IV"] * 2 + ["UTMALDG.2D"] * 2
        and sum(op.startswith("FENCE.VIEW.ASYNC") for op in code) == 3
        and not any(op.startswith(("LDL", "STL")) for op in code)
    )


@needs_cuda
@each_architecture
@pytest.mark.parametrize(("name", "count"), [("skinny", 8), ("tall", 8)])
def test_what_is_narrow_comes_by_copies_of_16_bytes_and_goes_to_tensor_cores(architecture, name, count):
    found = {kernel: code for kernel, code in kernels(architecture).items() if f"{name}_kernel" in kernel}
    assert len(found) == count
    for kernel, code in found.items():
        products = [op for op in code if op.startswith("HMMA.16816.F32")]
        assert products and all(op.endswith(".BF16") == ("bfloat16" in kernel) for op in products)
        copies = [op for op in code if op.startswith("LDGSTS")]
        assert copies and all(".128" in op and ".BYPASS" in op for op in copies)
        assert any(op.startswith("LDSM.16.M") for op in code)
        assert not any(op.startswith(("LDL", "STL")) for op in code), "memory of a thread: spills"


@needs_cuda
@each_architecture
def test_what_is_for_sm90_alone_is_built_for_it_alone(architecture):
    found = {name: code for name, code in kernels(architecture).items() if "_sm90_" in name}
    assert len(found) == (4 if architecture == "sm_90a" else 0)
    assert sum("tile_maps" in name for name in kernels(architecture)) == (architecture == "sm_90a")
    for name, code in found.items():
        assert many_rows_sm90_is_right(code, "Li256E" in name, "bfloat16" in name), name


SM90_MISTAKES = {
    "nothing": ("", ""),
    "a stage is given back while it is read": ("wait_for_products<1>();", ""),
    "a step waits for its own products": ("wait_for_products<1>();", "wait_for_products<0>();"),
    "sums are read before they are there": ("    wait_for_sums(sum);", ""),
    "sums are written without a word": ("        begin_products();", ""),
    "z is not shown to the products": ("show_to_copies();\n            sync", "sync"),
    "an older map is used": ("acquire_map(map_of_W);", ""),
}


@needs_nvcc
@pytest.mark.parametrize("name", SM90_MISTAKES)
def test_a_missing_wait_of_the_sm90_kernel_is_seen(name, tmp_path):
    right, wrong = SM90_MISTAKES[name]
    text = source("many_rows_sm90", torch.bfloat16, 128)
    assert not right or text.count(right) == 1
    (tmp_path / "kernel.cu").write_text(text.replace(right, wrong) if right else text)
    command = ["nvcc", "-cubin", "-std=c++17", "-arch=sm_90a", "-o", tmp_path / "kernel.cubin", tmp_path / "kernel.cu"]
    subprocess.run(command, check=True, capture_output=True)
    command = [tool("cuobjdump"), "-sass", tmp_path / "kernel.cubin"]
    parts = re.split(r"Function : (\S+)", subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    (code,) = (text for name, text in zip(parts[1::2], parts[2::2], strict=True) if "_sm90_" in name)
    assert many_rows_sm90_is_right(operations(code), wide=False, bf16=True) == (name == "nothing")


@needs_cuda
@each_architecture
@pytest.mark.parametrize(
    ("name", "transposed"),
    [("search_cell_forward", False), ("search_cell_backward", True), ("search_cell_gradients", True)],
)
def test_a_cell_comes_by_copies_of_16_bytes_and_goes_to_tensor_cores(architecture, name, transposed):
    found = {kernel: code for kernel, code in kernels(architecture).items() if f"{name}_kernel" in kernel}
    assert len(found) == 2
    for kernel, code in found.items():
        products = [op for op in code if op.startswith("HMMA.16816.F32")]
        assert products and all(op.endswith(".BF16") == ("bfloat16" in kernel) for op in products)
        copies = [op for op in code if op.startswith("LDGSTS")]
        assert copies and all(".128" in op and ".BYPASS" in op for op in copies)
        assert any(op.startswith("LDSM.16.MT88.4" if transposed else "LDSM.16.M88.4") for op in code)


@needs_cuda
@each_architecture
def test_rows_are_copied_by_16_bytes_four_at_a_time(architecture):
    found = {kernel: code for kernel, code in kernels(architecture).items() if "_rows_kernelI5uint4" in kernel}
    assert len(found) == 2
    for kernel, code in found.items():
        marks = "".join("l" if is_stream(op) else "s" if op.startswith("STG.E.128") else "" for op in code)
        assert "llll" in marks and marks.count("s") >= 4, kernel


def is_stream(op: str) -> bool:
    """A load of 16 bytes that leaves no trace in the first-level cache."""
    return op.startswith("LDG") and ".128" in op and ".NA" in op


@needs_cuda
@pytest.mark.parametrize(
    ("name", "kind", "tensors", "numbers", "scaling"),
    [
        ("lowrank_linear_skinny", (True, 0, 16), cuda_skinny.Tensors._fields, 13, (1.0,)),
        ("lowrank_linear_tall", (True, 0, 16), cuda_gradients.Tensors._fields, 13, ()),
        ("lowrank_linear_add_parts", (0,), ("parts", "segments", "out"), 6, ()),
        ("gather_rows", (16,), ("x", "numbers", "out"), 4, ()),
        ("scatter_rows", (16,), ("base", "values", "numbers", "mask", "out"), 5, ()),
    ],
)
def test_the_extension_takes_what_python_hands_over(name, kind, tensors, numbers, scaling):
    """As far as CUDA itself, which has no GPU here and elsewhere refuses a launch of no blocks."""
    with pytest.raises(RuntimeError, match="backend='cuda'"):
        getattr(_C, name)(0, 0, *kind, [0] * len(tensors), (0,) * numbers, *scaling)


CSRC = Path(__file__).resolve().parents[2] / "csrc"
SOURCES = sorted(path.relative_to(CSRC) for path in CSRC.glob("*/*_cuda.cu*"))


@pytest.mark.parametrize("source", SOURCES, ids=str)
def test_machine_instructions_are_written_in_common_alone(source):
    assert not re.search(
        r"\basm\b|\b__(?!(syncthreads|global__|device__|shared__|forceinline__|align__|launch_bounds__|float_as|uint_as))",
        (CSRC / source).read_text().replace("__nv_bfloat16", "").replace("__half", ""),
    )
