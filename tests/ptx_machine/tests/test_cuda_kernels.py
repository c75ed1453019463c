"""Kernels compiled by nvcc, right ones and ones with seeded mistakes."""

import shutil
from pathlib import Path

import pytest
import torch

from tests import ptx_machine

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
KERNELS = Path(__file__).parent / "kernels"
GEMM_SHARED = 3 * 2 * 64 * 128


def run_gemm(nan_tensor, shape, bug=0):
    rows, columns, depth = shape
    a, b = torch.randn(rows, depth).bfloat16(), torch.randn(depth, columns).bfloat16()
    c = nan_tensor(rows, columns, dtype=torch.bfloat16)
    grid = (-(-columns // 64), -(-rows // 64))
    args = [a, b, c, rows, columns, depth]
    report = ptx_machine.run_cuda(
        KERNELS / "tile_gemm.cu", "tile_gemm", grid, 128, args, GEMM_SHARED, flags=(f"-DBUG={bug}",)
    )
    return report, c, a.double() @ b.double()


@pytest.mark.parametrize("shape", [(128, 128, 128), (100, 72, 200), (64, 8, 8)])
def test_gemm_is_right_and_clean(nan_tensor, shape):
    report, c, expected = run_gemm(nan_tensor, shape)
    report.raise_on_faults()
    torch.testing.assert_close(c.double(), expected, rtol=0.008, atol=1e-3)


def test_gemm_counters(nan_tensor):
    report, _, _ = run_gemm(nan_tensor, (128, 128, 128))
    # 4 CTAs x 2 k-steps x 4 slices x 8 column blocks x 4 warps; one A and four B ldmatrix per slice and warp.
    assert report.mma == 4 * 2 * 4 * 8 * 4
    assert report.ldmatrix == 4 * 2 * 4 * 5 * 4
    assert report.mma_flops == 2 * 128**3
    # Each operand is read once per tile row/column of C: 2 x 128 x 128 x 2 bytes, twice.
    assert report.global_load_bytes == 2 * 2 * 128 * 128 * 2
    assert report.global_load_sectors == report.global_load_bytes // 32
    # A warp stores 8 rows of 4 x 4 bytes: half of each of the 8 sectors that it touches.
    assert report.global_store_sectors == 2 * report.global_store_bytes // 32
    assert report.shared_wavefronts == report.shared_ideal_wavefronts


def test_missing_swizzle_shows_in_the_wavefronts(nan_tensor):
    report, c, expected = run_gemm(nan_tensor, (128, 128, 128), bug=3)
    report.raise_on_faults()  # slow is not wrong
    torch.testing.assert_close(c.double(), expected, rtol=0.008, atol=1e-3)
    assert report.shared_wavefronts > 3 * report.shared_ideal_wavefronts
    assert "ldmatrix" in report.worst_sites(1)[0].text


def test_short_wait_group_is_found(nan_tensor):
    report, c, _ = run_gemm(nan_tensor, (128, 128, 256), bug=1)
    assert report.races and c.isnan().any()
    assert any(kind == "asynchronous copy in flight" for kind, _, _ in report.faults)
    with pytest.raises(ptx_machine.KernelFault, match="tile_gemm.cu"):
        report.raise_on_faults()


def test_missing_barrier_in_the_pipeline_is_found(nan_tensor):
    report, _, _ = run_gemm(nan_tensor, (128, 128, 256), bug=2)
    assert any(kind == "race" for kind, _, _ in report.faults)


def test_off_by_one_guard_is_found(nan_tensor):
    report, _, _ = run_gemm(nan_tensor, (100, 72, 64), bug=4)
    assert report.out_of_bounds and not report.races
    assert "argument 2 (14400 bytes)" in report.describe_faults()


@pytest.mark.parametrize("threads", [32, 256, 64])
def test_block_sum(nan_tensor, threads):
    x, out = torch.randn(5, 301), nan_tensor(5)
    ptx_machine.run_cuda(KERNELS / "reductions.cu", "block_sum", 5, threads, [x, out, 301]).raise_on_faults()
    torch.testing.assert_close(out, x.sum(1), rtol=1e-5, atol=1e-5)


def test_missing_syncthreads_is_found(nan_tensor):
    x, out = torch.randn(5, 301), nan_tensor(5)
    flags = ("-DSKIP_BARRIER",)
    report = ptx_machine.run_cuda(KERNELS / "reductions.cu", "block_sum", 5, 128, [x, out, 301], flags=flags)
    assert report.races > 0
    assert "reads what another warp wrote" in report.describe_faults()


def test_named_barriers():
    x = torch.arange(160, dtype=torch.int32)
    out = torch.zeros_like(x)
    report = ptx_machine.run_cuda(KERNELS / "reductions.cu", "producer_consumer", 1, 64, [x, out, 5])
    report.raise_on_faults()
    assert torch.equal(out, 2 * x)


def test_missing_named_barrier_is_found():
    x = torch.arange(32, dtype=torch.int32)
    flags = ("-DSKIP_BARRIER",)
    args = [x, torch.zeros_like(x), 1]
    report = ptx_machine.run_cuda(KERNELS / "reductions.cu", "producer_consumer", 1, 64, args, flags=flags)
    assert report.faults


def test_shared_and_global_atomics():
    x = torch.randint(0, 16, (1000,), dtype=torch.int32)
    bins = torch.zeros(16, dtype=torch.int32)
    report = ptx_machine.run_cuda(KERNELS / "reductions.cu", "histogram", 4, 256, [x, bins, 1000])
    report.raise_on_faults()
    assert torch.equal(bins.long(), torch.bincount(x.long(), minlength=16))
    assert report.atomics == 1000 + 4 * 16


def test_launches_with_one_memory_may_leave_pointers_to_each_other(nan_tensor):
    source = """
extern "C" __global__ void leave(float* x, float** where) { *where = x + 1; }
extern "C" __global__ void follow(float** where, float* y) { *y = **where; }
"""
    x, where, y = torch.tensor([1.0, 2.0]), torch.zeros(1, dtype=torch.int64), nan_tensor(1)
    leave, follow = (ptx_machine.load(ptx_machine.compile_cuda(source), name) for name in ("leave", "follow"))
    memory = ptx_machine.GlobalMemory()
    ptx_machine.run(leave, 1, 1, [x, where], memory=memory).raise_on_faults()
    ptx_machine.run(follow, 1, 1, [where, y], memory=memory).raise_on_faults()
    assert y == 2
    ptx_machine.run(follow, 1, 1, [where, y])  # in a memory of its own something else is there
    assert y != 2
