"""Counters and faults of tiny kernels, against numbers worked out by hand."""

import numpy as np
import pytest
import torch

from tests import ptx_machine
from tests.ptx_machine.tests.test_instructions import ptx_kernel


def run(body, *buffers, threads=32, grid=1, **options):
    return ptx_machine.run(ptx_kernel(body, params=len(buffers)), grid, threads, list(buffers), **options)


@pytest.mark.parametrize("stride, sectors", [(1, 4), (2, 8), (8, 32), (32, 32)])
def test_global_sectors(stride, sectors):
    """32 lanes read 4 bytes each, ``stride`` words apart: 4 bytes * 32 * stride / 32, at most one per lane."""
    body = f"mul.wide.u32 %rd1, %r60, {4 * stride}; add.u64 %rd1, %rd21, %rd1;"
    body += "ld.global.u32 %r1, [%rd1]; st.global.u32 [%rd31], %r1;"
    data, out = np.arange(1024, dtype=np.uint32), np.zeros(32, np.uint32)
    report = run(body, out, data).raise_on_faults()
    assert (out == data[::stride][:32]).all()
    assert (report.global_load_sectors, report.global_load_bytes) == (sectors, 128)
    assert (report.global_store_sectors, report.global_store_bytes) == (4, 128)


def test_vector_load_sectors():
    body = "mul.wide.u32 %rd1, %r60, 16; add.u64 %rd1, %rd21, %rd1; ld.global.v4.u32 {%r1,%r2,%r3,%r4}, [%rd1];"
    body += "add.u32 %r1, %r1, %r4; st.global.u32 [%rd31], %r1;"
    data, out = np.arange(128, dtype=np.uint32), np.zeros(32, np.uint32)
    report = run(body, out, data).raise_on_faults()
    assert (out == data[::4] + data[3::4]).all()
    assert (report.global_load_sectors, report.global_load_bytes) == (16, 512)


@pytest.mark.parametrize("stride, wavefronts", [(1, 1), (2, 2), (3, 1), (4, 4), (32, 32), (33, 1), (0, 1)])
def test_bank_conflicts(stride, wavefronts):
    """A stride of s words serves gcd(s, 32) lanes per bank; equal addresses are broadcast."""
    body = f".shared .align 4 .b8 box[4352]; mov.u32 %r10, box; mad.lo.u32 %r11, %r60, {4 * stride}, %r10;"
    body += "st.shared.u32 [%r11], 5; bar.sync 0; ld.shared.u32 %r0, [%r11]; st.global.u32 [%rd31], %r0;"
    report = run(body, np.zeros(32, np.uint32)).raise_on_faults()
    assert report.shared_wavefronts == 2 * wavefronts
    assert report.shared_ideal_wavefronts == 2


@pytest.mark.parametrize(
    "vector, lanes, stride, wavefronts",
    [
        ("v4", 32, 16, 4),  # 512 bytes: one pass per quarter warp
        ("v4", 32, 32, 8),  # in each quarter, lanes 4 apart share banks
        ("v4", 8, 16, 4),  # the quarters read the same 128 bytes, one after the other
        ("v2", 32, 8, 2),  # 256 bytes: one pass per half warp
        ("v2", 32, 16, 4),
        ("v2", 16, 8, 2),
    ],
)
def test_wide_shared_loads(vector, lanes, stride, wavefronts):
    """Lane i reads 16 (v4) or 8 (v2) bytes at byte (i mod ``lanes``) * ``stride``."""
    registers = "{%r1, %r2, %r3, %r4}" if vector == "v4" else "{%r1, %r2}"
    body = f".shared .align 16 .b8 box[1024]; mov.u32 %r10, box; rem.u32 %r11, %r60, {lanes};"
    body += f"mad.lo.u32 %r11, %r11, {stride}, %r10; ld.shared.{vector}.u32 {registers}, [%r11];"
    report = run(body, np.zeros(32, np.uint32))
    assert report.shared_wavefronts == wavefronts
    assert report.shared_ideal_wavefronts == (4 if vector == "v4" else 2)


def test_instruction_counts():
    """A loop of 10 rounds for 2 CTAs of 3 warps; the tail warp of each is half full."""
    body = "mov.u32 %r1, 0; LOOP: add.u32 %r1, %r1, 1; setp.lt.u32 %p1, %r1, 10; @%p1 bra LOOP;"
    body += "st.global.u32 [%rd31], %r1;"
    out = np.zeros(80, np.uint32)
    report = run(body, out, threads=80, grid=2).raise_on_faults()
    assert report.instructions["setp"] == report.instructions["bra"] == 10 * 2 * 3
    assert report.instructions["st"] == report.instructions["ret"] == 2 * 3
    # Per thread: 4 of the preamble, 1 mov, 10 rounds of add and setp, 9 taken branches, st, ret.
    assert report.thread_instructions == 2 * 80 * (4 + 1 + 20 + 9 + 2)
    assert report.global_store_bytes == 2 * 80 * 4 and (out == 10).all()


def test_divergence_costs_both_sides():
    body = "setp.lt.u32 %p1, %r60, 7; @%p1 bra A; or.b32 %r1, %r60, 64; bra J;"
    body += "A: sub.u32 %r1, %r60, 3; J: st.global.u32 [%rd31], %r1;"
    out = np.zeros(32, np.uint32)
    report = run(body, out).raise_on_faults()
    assert report.instructions["or"] == 1 and report.instructions["sub"] == 1 and report.instructions["st"] == 1
    assert (out.astype(np.int32) == np.where(np.arange(32) < 7, np.arange(32) - 3, np.arange(32) | 64)).all()


def test_out_of_bounds_misaligned_and_null():
    out = np.zeros(31, np.uint32)
    report = run("st.global.u32 [%rd31], %r60;", out)
    assert report.out_of_bounds == 1 and "byte 124 of argument 0 (124 bytes)" in report.describe_faults()
    assert (out == np.arange(31)).all(), "the legal stores of the warp still happen"
    assert run("ld.global.u32 %r0, [%rd31+2];", np.zeros(64, np.uint32)).misaligned
    null = ptx_machine.run(ptx_kernel("st.global.u32 [%rd20], 1;"), 1, 1, [None])
    assert null.out_of_bounds
    assert run(".shared .b32 box; mov.u32 %r1, box; st.shared.u32 [%r1+4], 1;", np.zeros(32, np.uint32)).out_of_bounds


def test_uninitialised_shared_read_is_poison():
    body = ".shared .align 4 .b8 box[128]; mov.u32 %r10, box; ld.shared.u32 %r0, [%r10]; st.global.u32 [%rd31], %r0;"
    out = np.zeros(32, np.uint32)
    report = run(body, out)
    assert report.uninitialised_shared_reads == 1 and (out == 0xFFFFFFFF).all()
    run(body, out, poison=False)
    assert (out == 0).all()


def test_store_collision():
    body = ".shared .align 4 .b8 box[128]; mov.u32 %r10, box; st.shared.u32 [%r10], {};"
    assert run(body.format("%r60"), np.zeros(32, np.uint32)).races == 1
    assert run(body.format("5"), np.zeros(32, np.uint32)).races == 0


def test_race_between_warps_only_without_barrier():
    body = ".shared .align 4 .b8 box[256]; mov.u32 %r10, box; mad.lo.u32 %r11, %r60, 4, %r10;"
    body += "st.shared.u32 [%r11], %r60; {} xor.b32 %r12, %r60, 32; mad.lo.u32 %r12, %r12, 4, %r10;"
    body += "ld.shared.u32 %r0, [%r12]; st.global.u32 [%rd31], %r0;"
    out = np.zeros(64, np.uint32)
    run(body.format("bar.sync 0;"), out, threads=64).raise_on_faults()
    assert (out == (np.arange(64) ^ 32)).all()
    assert run(body.format(""), out, threads=64).races == 1
    assert run(body.format("bar.warp.sync -1;"), out, threads=64).races == 1
    assert run(body.format(""), out, threads=64, check_races=False).races == 0


def test_overwriting_what_another_warp_reads():
    body = ".shared .align 4 .b8 box[256]; mov.u32 %r10, box; mad.lo.u32 %r11, %r60, 4, %r10; xor.b32 %r12, %r11, 128;"
    body += "st.shared.u32 [%r11], %r60; bar.sync 0; ld.shared.u32 %r0, [%r12]; {} st.shared.u32 [%r11], 7;"
    out = np.zeros(64, np.uint32)
    run(body.format("bar.sync 0;"), out, threads=64).raise_on_faults()
    report = run(body.format(""), out, threads=64)
    assert report.races == 1 and "overwrites what another warp reads" in report.describe_faults()


def test_torch_views_and_scalars():
    body = "ld.param.f32 %f0, [p1]; ld.param.s32 %r1, [p2]; cvt.rn.f32.s32 %f1, %r1;"
    ptx = ptx_kernel(body + "add.f32 %f0, %f0, %f1; st.global.f32 [%rd31], %f0;")
    ptx = ptx.replace(".param .u64 p0", ".param .u64 p0, .param .f32 p1, .param .s32 p2")
    store = torch.zeros(40)
    ptx_machine.run(ptx, 1, 32, [store[4:36], 0.5, -3]).raise_on_faults()
    assert (store[4:36] == -2.5).all() and store[:4].eq(0).all() and store[36:].eq(0).all()
    assert ptx_machine.run(ptx, 1, 32, [store[9:], 0.5, -3]).out_of_bounds
    with pytest.raises(ValueError, match="takes 3 arguments"):
        ptx_machine.run(ptx, 1, 32, [store])
