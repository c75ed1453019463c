"""Single instructions against values worked out by hand or by Python, and the allow-list."""

import struct

import numpy as np
import pytest

from tests import ptx_machine

HEADER = ".version 8.0\n.target sm_90a\n.address_size 64\n"


def ptx_kernel(body, params=1):
    names = ", ".join(f".param .u64 p{i}" for i in range(params))
    registers = ".reg .pred %p<16>; .reg .b16 %h<16>; .reg .b32 %r<64>; .reg .b64 %rd<32>; .reg .f32 %f<16>;"
    load = "".join(f"ld.param.u64 %rd{20 + i}, [p{i}];" for i in range(params))
    tid = "mov.u32 %r60, %tid.x; mul.wide.u32 %rd30, %r60, 4; add.u64 %rd31, %rd20, %rd30;"
    return f"{HEADER}.visible .entry test({names})\n{{\n{registers}{load}{tid}\n{body}\nret;\n}}"


def evaluate(body, threads=32, **options):
    """Run ``body``, which leaves its result in %r0, and return one uint32 per thread."""
    out = np.full(threads, 0xDEADBEEF, np.uint32)
    report = ptx_machine.run(ptx_kernel(body + "\nst.global.u32 [%rd31], %r0;"), 1, threads, [out], **options)
    report.raise_on_faults()
    return out


def f32(value):
    return struct.unpack("<I", struct.pack("<f", value))[0]


@pytest.mark.parametrize(
    "body, expected",
    [
        ("bfe.u32 %r0, 0xabcd1234, 8, 12;", 0xD12),
        ("bfe.s32 %r0, 0xabcd1234, 20, 12;", 0xFFFFFABC),
        ("bfe.s32 %r0, 0x0000f000, 12, 4;", 0xFFFFFFFF),
        ("bfe.u32 %r0, 0xabcd1234, 8, 0;", 0),
        ("bfi.b32 %r0, 0xff, 0x12345678, 8, 8;", 0x1234FF78),
        ("prmt.b32 %r0, 0x33221100, 0x77665544, 0x7420;", 0x77442200),
        ("prmt.b32 %r0, 0x00008000, 0, 0x9999;", 0xFFFFFFFF),
        ("lop3.b32 %r0, 0xf0f0f0f0, 0xcccccccc, 0xaaaaaaaa, 0x96;", 0xF0F0F0F0 ^ 0xCCCCCCCC ^ 0xAAAAAAAA),
        (
            "lop3.b32 %r0, 0xf0f0f0f0, 0xcccccccc, 0xaaaaaaaa, 0xca;",
            (0xF0F0F0F0 & 0xCCCCCCCC) | (0x0F0F0F0F & 0xAAAAAAAA),
        ),
        ("shf.l.wrap.b32 %r0, 0x80000001, 0x00000001, 33;", 3),
        ("shf.r.clamp.b32 %r0, 0x80000001, 0x00000001, 4;", 0x18000000),
        ("shl.b32 %r0, 1, 32;", 0),
        ("shr.s32 %r0, 0x80000000, 99;", 0xFFFFFFFF),
        ("mul.hi.u32 %r0, 0xffffffff, 0xffffffff;", 0xFFFFFFFE),
        ("mul.hi.s32 %r0, -1, 5;", 0xFFFFFFFF),
        ("div.s32 %r0, -7, 2;", 0xFFFFFFFD),
        ("rem.s32 %r0, -7, 2;", 0xFFFFFFFF),
        ("div.u32 %r0, 7, 0;", 0xFFFFFFFF),
        ("add.sat.s32 %r0, 0x7fffffff, 5;", 0x7FFFFFFF),
        ("popc.b32 %r0, 0xf00f;", 8),
        ("clz.b32 %r0, 0x00010000;", 15),
        ("brev.b32 %r0, 1;", 0x80000000),
        ("add.cc.u32 %r1, 0xffffffff, 1; addc.u32 %r0, 5, 0;", 6),
        ("mad.lo.cc.u32 %r1, 0x10000, 0x10000, 7; madc.hi.u32 %r0, 0x10000, 0x10000, 0;", 1),
        ("mov.b32 {%h1, %h2}, 0x12345678; mov.b32 %r0, {%h2, %h1};", 0x56781234),
        ("cvt.u8.u32 %h1, 0x1ff; cvt.u32.u16 %r0, %h1;", 0xFF),
        ("cvt.s8.s32 %h1, 0x80; cvt.s32.s16 %r0, %h1;", 0xFFFFFF80),
        ("cvt.sat.u8.s32 %h1, 300; cvt.u32.u16 %r0, %h1;", 255),
    ],
)
def test_integer(body, expected):
    assert (evaluate(body) == expected).all()


@pytest.mark.parametrize(
    "body, expected",
    [
        ("mov.f32 %f1, 0f3FC00000; fma.rn.f32 %f0, %f1, %f1, 0f3F800000;", f32(3.25)),
        ("mov.f32 %f1, 0f00000001; add.ftz.f32 %f0, %f1, %f1;", 0),
        ("mov.f32 %f1, 0f00000001; add.f32 %f0, %f1, %f1;", 2),
        ("mov.f32 %f1, 0f40000000; add.sat.f32 %f0, %f1, %f1;", f32(1.0)),
        ("max.f32 %f0, 0f7FC00000, 0f3F800000;", f32(1.0)),
        ("max.NaN.f32 %f0, 0f7FC00000, 0f3F800000;", 0x7FC00000),
        ("ex2.approx.ftz.f32 %f0, 0f40400000;", f32(8.0)),
        ("lg2.approx.f32 %f0, 0f41000000;", f32(3.0)),
        ("rcp.approx.f32 %f0, 0f40800000;", f32(0.25)),
        ("rsqrt.approx.f32 %f0, 0f40800000;", f32(0.5)),
        ("tanh.approx.f32 %f0, 0f00000000;", 0),
        ("cvt.rni.f32.f32 %f0, 0f40200000;", f32(2.0)),
        ("cvt.rpi.f32.f32 %f0, 0f40200000;", f32(3.0)),
        ("cvt.rn.f32.s32 %f0, -3;", f32(-3.0)),
    ],
)
def test_float(body, expected):
    assert (evaluate(body + "mov.b32 %r0, %f0;") == expected).all()


@pytest.mark.parametrize(
    "body, expected",
    [
        ("cvt.rn.bf16x2.f32 %r0, 0f3F800000, 0f40000000;", 0x3F804000),  # first operand in the upper half
        ("cvt.rn.f16x2.f32 %r0, 0f3F800000, 0f40000000;", 0x3C004000),
        ("cvt.rn.bf16.f32 %h0, 0f3F808000; cvt.u32.u16 %r0, %h0;", 0x3F80),  # a tie goes to even
        ("cvt.rz.bf16.f32 %h0, 0f3F80FFFF; cvt.u32.u16 %r0, %h0;", 0x3F80),
        ("cvt.rn.bf16x2.f32 %r0, 0f3F80FFFF, 0f3F818000;", 0x3F813F82),
        ("cvt.rz.bf16x2.f32 %r0, 0f3F80FFFF, 0f3F818000;", 0x3F803F81),
        ("cvt.rna.tf32.f32 %r0, 0f3F801000;", 0x3F802000),
        ("cvt.rzi.s32.f32 %r0, 0fC0200000;", 0xFFFFFFFE),
        ("cvt.rzi.u32.f32 %r0, 0fC0200000;", 0),
        ("cvt.rzi.s32.f32 %r0, 0f4F800000;", 0x7FFFFFFF),
        ("cvt.rzi.s32.f32 %r0, 0f7FC00000;", 0),
        ("fma.rn.bf16x2 %r0, 0x3f804000, 0x40004000, 0x3f803f80;", 0x404040A0),
        ("add.f16x2 %r0, 0x3c004000, 0x3c003c00;", 0x40004200),
        ("mul.bf16x2 %r0, 0x3f804000, 0x40004040;", 0x400040C0),
        ("max.bf16x2 %r0, 0x3f80c000, 0x40003f80;", 0x40003F80),
    ],
)
def test_conversion_and_packed_arithmetic(body, expected):
    assert (evaluate(body) == expected).all()


def test_shuffles():
    lane = np.arange(32)
    source = "mov.u32 %r1, %laneid; shfl.sync.{} %r0|%p1, %r1, {}, {}, -1;"
    assert (evaluate(source.format("bfly.b32", 5, 31)) == lane ^ 5).all()
    assert (evaluate(source.format("up.b32", 3, 0)) == np.where(lane >= 3, lane - 3, lane)).all()
    assert (evaluate(source.format("down.b32", 3, 31)) == np.where(lane < 29, lane + 3, lane)).all()
    assert (evaluate(source.format("idx.b32", 7, 31)) == 7).all()
    # Width 8: clamp 0x181f keeps the three low bits of the lane inside its segment.
    assert (evaluate(source.format("idx.b32", 2, 0x181F)) == lane // 8 * 8 + 2).all()
    in_range = evaluate("mov.u32 %r1, %laneid; shfl.sync.down.b32 %r2|%p1, %r1, 3, 31, -1; selp.u32 %r0, 1, 0, %p1;")
    assert (in_range == (lane < 29)).all()


def test_warp_collectives():
    odd = "mov.u32 %r1, %laneid; and.b32 %r2, %r1, 1; setp.eq.u32 %p1, %r2, 1;"
    assert (evaluate(odd + "vote.sync.ballot.b32 %r0, %p1, -1;") == 0xAAAAAAAA).all()
    assert (evaluate(odd + "vote.sync.any.pred %p2, %p1, -1; selp.u32 %r0, 1, 0, %p2;") == 1).all()
    assert (evaluate(odd + "vote.sync.all.pred %p2, !%p1, -1; selp.u32 %r0, 1, 0, %p2;") == 0).all()
    assert (evaluate(odd + "redux.sync.add.u32 %r0, %r1, -1;") == 496).all()
    assert (evaluate("mov.u32 %r1, %laneid; sub.u32 %r1, 3, %r1; redux.sync.min.s32 %r0, %r1, -1;") == 2**32 - 28).all()
    assert evaluate("elect.sync %r1|%p1, -1; selp.u32 %r0, 1, 0, %p1;").sum() == 1
    assert (evaluate(odd + "mov.u32 %r0, 0; @!%p1 bra DONE; activemask.b32 %r0; DONE:")[1::2] == 0xAAAAAAAA).all()


@pytest.mark.parametrize(
    "body, named",
    [
        ("frobnicate.b32 %r0, 1;", "frobnicate.b32 %r0, 1"),
        ("add.rz.f32 %f0, %f1, %f2;", "add.rz.f32"),
        ("mul.lo.sat.u32 %r0, 1, 2;", "mul.lo.sat.u32"),
        ("ld.global.L3::imaginary.b32 %r0, [%rd31];", "L3::imaginary"),
        ("ld.global.v2.b32 %r0, [%rd31];", "1 registers for .v2"),
    ],
)
def test_unknown_opcodes_and_modifiers_are_refused(body, named):
    with pytest.raises(NotImplementedError, match=named.replace(".", r"\.")):
        evaluate(body)


def test_divergent_shuffle_is_found():
    body = "mov.u32 %r1, %laneid; mov.u32 %r0, 0; setp.lt.u32 %p1, %r1, 5; @!%p1 bra END;"
    body += "shfl.sync.bfly.b32 %r0, %r1, 1, 31, -1; END:"
    with pytest.raises(ptx_machine.KernelFault, match="divergent warp"):
        evaluate(body)


def test_divergent_barrier_is_found():
    body = "mov.u32 %r0, 0; setp.lt.u32 %p1, %r60, 5; @!%p1 bra END; bar.sync 0; END:"
    with pytest.raises(ptx_machine.KernelFault, match="divergent barrier"):
        evaluate(body)


def test_deadlock_is_reported():
    body = "mov.u32 %r0, 0; setp.lt.u32 %p1, %r60, 32; @%p1 bar.sync 1, 64; @!%p1 bar.sync 2, 64;"
    with pytest.raises(ptx_machine.Deadlock, match="bar.sync 1, 64"):
        evaluate(body, threads=64)


def test_flag_wait_between_warps_makes_progress():
    """Warp 0 spins on a flag that warp 1 sets: the lowest program counter must not run forever."""
    body = (
        "setp.ge.u32 %p1, %r60, 32; mov.u32 %r0, 7; @%p1 bra SET;"
        "SPIN: ld.acquire.gpu.global.u32 %r1, [%rd21]; setp.eq.u32 %p2, %r1, 0; @%p2 bra SPIN; bra DONE;"
        "SET: st.release.gpu.global.u32 [%rd21], 1; DONE: st.global.u32 [%rd31], %r0;"
    )
    out, flag = np.zeros(64, np.uint32), np.zeros(1, np.uint32)
    ptx_machine.run(ptx_kernel(body, params=2), 1, 64, [out, flag]).raise_on_faults()
    assert (out == 7).all()


def test_mbarrier_orders_two_warps():
    body = """
    .shared .align 8 .b8 box[136];
    mov.u32 %r10, box; setp.eq.u32 %p1, %r60, 0;
    @%p1 mbarrier.init.shared::cta.b64 [%r10+128], 32;
    bar.sync 0;
    setp.ge.u32 %p2, %r60, 32; and.b32 %r11, %r60, 31; shl.b32 %r12, %r11, 2; add.u32 %r12, %r12, %r10;
    @%p2 bra CONSUME;
    st.shared.u32 [%r12], %r60; mov.u32 %r0, 99;
    mbarrier.arrive.shared::cta.b64 _, [%r10+128];
    bra DONE;
    CONSUME: mbarrier.try_wait.parity.shared::cta.b64 %p3, [%r10+128], 0; @!%p3 bra CONSUME;
    ld.shared.u32 %r0, [%r12];
    DONE:
    """
    assert (evaluate(body, threads=64)[32:] == np.arange(32)).all()


@pytest.mark.parametrize("meeting", ["bar.sync 0;", "bar.warp.sync -1;"])
def test_one_lane_waits_for_its_warp(meeting):
    """One lane waits at an mbarrier, the others go ahead to the barrier and must be kept there."""
    body = f"""
    .shared .align 8 .b8 box[16];
    mov.u32 %r10, box; setp.eq.u32 %p1, %r60, 0; setp.eq.u32 %p2, %r60, 32;
    @%p1 mbarrier.init.shared::cta.b64 [%r10], 1;
    bar.sync 0;
    @!%p1 bra GO;
    WAIT: mbarrier.try_wait.parity.shared::cta.b64 %p3, [%r10], 0; @!%p3 bra WAIT;
    GO: setp.ge.u32 %p4, %r60, 32; @%p4 bra SECOND;
    {meeting}
    ld.shared.u32 %r0, [%r10+8];
    bra DONE;
    SECOND: @%p2 st.shared.u32 [%r10+8], 5;
    @%p2 mbarrier.arrive.shared::cta.b64 _, [%r10];
    mov.u32 %r0, 5;
    {"bar.sync 0;" if meeting.startswith("bar.sync") else ""}
    DONE:
    """
    out = np.zeros(64, np.uint32)
    report = ptx_machine.run(ptx_kernel(body + "\nst.global.u32 [%rd31], %r0;"), 1, 64, [out])
    assert (out == 5).all(), report.describe_faults()
    assert not any(kind.startswith("divergent") for kind, _, _ in report.faults)
