"""Kernels compiled by Triton for sm_80 (mma.sync) and sm_90a (wgmma)."""

import dataclasses
import re

import pytest
import torch
import triton
import triton.language as tl

from tests import ptx_machine

pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")


@triton.jit
def softmax_kernel(out, x, n, BLOCK: tl.constexpr):
    row, column = tl.program_id(0), tl.arange(0, BLOCK)
    value = tl.load(x + row * n + column, mask=column < n, other=-float("inf"))
    value = tl.exp(value - tl.max(value, 0))
    tl.store(out + row * n + column, value / tl.sum(value, 0), mask=column < n)


@triton.jit
def rmsnorm_kernel(out, x, weight, n, eps, BLOCK: tl.constexpr):
    row, column = tl.program_id(0), tl.arange(0, BLOCK)
    value = tl.load(x + row * n + column, mask=column < n, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 0) / n + eps)
    value = value * scale * tl.load(weight + column, mask=column < n, other=0.0)
    tl.store(out + row * n + column, value.to(tl.bfloat16), mask=column < n)


@triton.jit
def gemm_kernel(a, b, c, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GUARD: tl.constexpr):
    rm, rn = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    rk = tl.arange(0, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        mask_k = k + rk < K
        x = tl.load(a + rm[:, None] * K + (k + rk)[None, :], mask=(rm < M)[:, None] & mask_k[None, :], other=0.0)
        y = tl.load(b + (k + rk)[:, None] * N + rn[None, :], mask=mask_k[:, None] & (rn < N)[None, :], other=0.0)
        acc = tl.dot(x, y, acc)
    inside = (rm < M + GUARD)[:, None] & (rn < N)[None, :]
    tl.store(c + rm[:, None] * N + rn[None, :], acc.to(c.dtype.element_ty), mask=inside)


@triton.jit
def attention_kernel(q, k, v, o, S, scale, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr):
    block, base = tl.program_id(0), tl.program_id(1) * S * D
    rm, d = block * BM + tl.arange(0, BM), tl.arange(0, D)
    query = tl.load(q + base + rm[:, None] * D + d[None, :], mask=rm[:, None] < S, other=0.0)
    top = tl.full((BM,), -float("inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, D), tl.float32)
    for start in range(0, (block + 1) * BM, BN):
        rn = start + tl.arange(0, BN)
        key = tl.load(k + base + rn[None, :] * D + d[:, None], mask=rn[None, :] < S, other=0.0)
        score = tl.dot(query, key) * scale
        score = tl.where((rm[:, None] >= rn[None, :]) & (rn[None, :] < S), score, -1e30)
        new_top = tl.maximum(top, tl.max(score, 1))
        p = tl.exp2(score - new_top[:, None])
        decay = tl.exp2(top - new_top)
        total = total * decay + tl.sum(p, 1)
        value = tl.load(v + base + rn[:, None] * D + d[None, :], mask=rn[:, None] < S, other=0.0)
        acc = tl.dot(p.to(tl.bfloat16), value, acc * decay[:, None])
        top = new_top
    tl.store(o + base + rm[:, None] * D + d[None, :], (acc / total[:, None]).to(tl.bfloat16), mask=rm[:, None] < S)


@triton.jit
def scatter_add_kernel(target, source, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(target + i % 7, tl.load(source + i, mask=i < n, other=0), mask=i < n)


@triton.jit
def sort_cumsum_kernel(out, x, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, tl.cumsum(tl.sort(tl.load(x + i)), 0))


@triton.jit
def random_kernel(out, seed, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.randn(seed, i), mask=i < n)


@triton.jit
def integer_kernel(out, x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a, b = tl.load(x + i, mask=i < n), tl.load(y + i, mask=i < n, other=1)
    tl.store(out + i, a // b * 1000 + a % b + (a >> 2), mask=i < n)


@triton.jit
def descriptor_gemm_kernel(
    a, b, c, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPECIALIZE: tl.constexpr
):
    da = tl.make_tensor_descriptor(a, [M, K], [K, 1], [BM, BK])
    db = tl.make_tensor_descriptor(b, [N, K], [K, 1], [BN, BK])
    dc = tl.make_tensor_descriptor(c, [M, N], [N, 1], [BM, BN])
    pm, pn = tl.program_id(0), tl.program_id(1)
    acc = tl.zeros((BM, BN), tl.float32)
    for k in tl.range(0, K, BK, warp_specialize=SPECIALIZE):
        acc = tl.dot(da.load([pm * BM, k]), db.load([pn * BN, k]).T, acc)
    dc.store([pm * BM, pn * BN], acc.to(tl.bfloat16))


both_targets = pytest.mark.parametrize("cc", [80, 90])


@pytest.mark.parametrize("cc", [80, 90, 100])
def test_softmax(nan_tensor, cc):
    x, out = torch.randn(16, 777), nan_tensor(16, 777)
    ptx_machine.run_triton(softmax_kernel, (16,), out, x, 777, BLOCK=1024, cc=cc).raise_on_faults()
    torch.testing.assert_close(out, x.softmax(1), rtol=1e-5, atol=1e-8)


@both_targets
def test_rmsnorm(nan_tensor, cc):
    x, weight = torch.randn(9, 500).bfloat16(), torch.randn(500)
    out = nan_tensor(9, 500, dtype=torch.bfloat16)
    ptx_machine.run_triton(rmsnorm_kernel, (9,), out, x, weight, 500, 1e-5, BLOCK=512, cc=cc).raise_on_faults()
    wide = x.double()
    expected = wide * (wide.square().mean(1, keepdim=True) + 1e-5).rsqrt() * weight
    torch.testing.assert_close(out.double(), expected, rtol=0.008, atol=1e-6)


def run_gemm(nan_tensor, dtype, cc, shape, guard=0, **launch):
    rows, columns, depth = shape
    a, b = torch.randn(rows, depth).to(dtype), torch.randn(depth, columns).to(dtype)
    c = nan_tensor(rows, columns, dtype=dtype)
    grid = (-(-rows // 64), -(-columns // 64))
    tiles = {"BM": 64, "BN": 64, "BK": 32, "GUARD": guard}
    report = ptx_machine.run_triton(gemm_kernel, grid, a, b, c, *shape, **tiles, cc=cc, **launch)
    return report, c, a.double() @ b.double(), a.double().abs() @ b.double().abs()


@both_targets
@pytest.mark.parametrize("shape", [(200, 136, 72), (65, 33, 17)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gemm(nan_tensor, dtype, cc, shape):
    report, c, expected, magnitude = run_gemm(nan_tensor, dtype, cc, shape)
    report.raise_on_faults()
    # float32 operands are truncated to tf32 (10 fraction bits); 16-bit results are rounded once.
    result, product = {torch.bfloat16: (2**-8, 1e-6), torch.float16: (2**-11, 1e-6), torch.float32: (0, 2**-9)}[dtype]
    assert ((c.double() - expected).abs() <= result * expected.abs() + product * magnitude).all()
    assert (report.mma > 0) == (cc == 80) and (report.wgmma > 0) == (cc == 90)


def test_wrong_guard_is_found(nan_tensor):
    report, _, _, _ = run_gemm(nan_tensor, torch.float16, 80, (65, 64, 32), guard=1)
    assert report.out_of_bounds
    with pytest.raises(ptx_machine.KernelFault, match="test_triton_kernels.py:"):
        report.raise_on_faults()


@both_targets
def test_causal_attention(nan_tensor, cc):
    heads, length, width = 2, 150, 64
    q, k, v = (torch.randn(heads, length, width).bfloat16() for _ in range(3))
    o = nan_tensor(heads, length, width, dtype=torch.bfloat16)
    scale = 1.4426950408889634 / width**0.5
    tiles = {"BM": 64, "BN": 64, "D": width}
    ptx_machine.run_triton(attention_kernel, (3, heads), q, k, v, o, length, scale, **tiles, cc=cc).raise_on_faults()
    expected = torch.nn.functional.scaled_dot_product_attention(*(x.double() for x in (q, k, v)), is_causal=True)
    torch.testing.assert_close(o.double(), expected, rtol=0.02, atol=0.01)


@both_targets
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.int64])
def test_atomics(dtype, cc):
    source = torch.randint(-8, 9, (1000,)).to(dtype)  # small integers: exact in every format and order
    # sm_80 emulates bf16 atomics by 32-bit compare-and-swap, so the buffer must have an even number of elements.
    target = torch.zeros(8, dtype=dtype)
    ptx_machine.run_triton(scatter_add_kernel, (4,), target, source, 1000, BLOCK=256, cc=cc).raise_on_faults()
    expected = torch.zeros(8, dtype=torch.float64).index_add_(0, torch.arange(1000) % 7, source.double())
    assert torch.equal(target.double(), expected)


@both_targets
def test_sort_and_cumsum(nan_tensor, cc):
    x, out = torch.randn(256), nan_tensor(256)
    ptx_machine.run_triton(sort_cumsum_kernel, (1,), out, x, BLOCK=256, cc=cc).raise_on_faults()
    torch.testing.assert_close(out, x.sort().values.cumsum(0), rtol=1e-4, atol=1e-4)


def test_philox_and_transcendentals(nan_tensor):
    """Philox needs wide products and carries; Box-Muller log, sqrt, sin and cos."""
    first, second = nan_tensor(4000), nan_tensor(4000)
    for out, cc in ((first, 80), (second, 90)):
        ptx_machine.run_triton(random_kernel, (8,), out, 1234, 4000, BLOCK=512, cc=cc).raise_on_faults()
    assert torch.allclose(first, second, atol=1e-5)
    assert abs(first.mean()) < 0.06 and abs(first.std() - 1) < 0.05


def test_integer_division():
    x = torch.randint(-(2**20), 2**20, (300,), dtype=torch.int32)
    y = torch.randint(1, 999, (300,), dtype=torch.int32) * torch.where(torch.rand(300) < 0.5, 1, -1).int()
    out = torch.zeros_like(x)
    ptx_machine.run_triton(integer_kernel, (2,), out, x, y, 300, BLOCK=256, cc=80).raise_on_faults()
    quotient = torch.div(x, y, rounding_mode="trunc")
    assert torch.equal(out, quotient * 1000 + torch.fmod(x, y) + (x >> 2))


@pytest.mark.parametrize("specialize", [False, True])
def test_missing_mbarrier_wait_is_found(nan_tensor, specialize):
    """Every wait for a bulk copy is replaced by an instruction that succeeds at once."""
    signature = {"a": "*bf16", "b": "*bf16", "c": "*bf16", "M": "i32", "N": "i32", "K": "i32"}
    tiles = {"BM": 128, "BN": 128, "BK": 64, "SPECIALIZE": specialize}
    compiled = ptx_machine.compile_triton(
        descriptor_gemm_kernel, signature, tiles, cc=90, divisible_by_16=tuple(signature)
    )
    mutant = re.sub(r"mbarrier\.try_wait\S* +(\S+), *\[[^;]*;", r"setp.eq.b32 \1, 0, 0;", compiled.ptx)
    broken = dataclasses.replace(compiled, ptx=mutant, kernel=ptx_machine.load(mutant))
    a, b = torch.randn(128, 192).bfloat16(), torch.randn(128, 192).bfloat16()
    c = nan_tensor(128, 128, dtype=torch.bfloat16)
    report = ptx_machine.launch_compiled(broken, (1, 1), [a, b, c, 128, 128, 192])
    assert any(kind == "asynchronous copy in flight" for kind, _, _ in report.faults)


@pytest.mark.parametrize("specialize", [False, True])
def test_tensor_descriptors(nan_tensor, specialize):
    """TMA loads and stores with mbarriers; with ``specialize`` separate producer and consumer warps."""
    rows, columns, depth = 200, 136, 192
    a, b = torch.randn(rows, depth).bfloat16(), torch.randn(columns, depth).bfloat16()
    c = nan_tensor(rows, columns, dtype=torch.bfloat16)
    tiles = {"BM": 128, "BN": 128, "BK": 64, "SPECIALIZE": specialize}
    report = ptx_machine.run_triton(descriptor_gemm_kernel, (2, 2), a, b, c, rows, columns, depth, **tiles, cc=90)
    report.raise_on_faults()
    torch.testing.assert_close(c.double(), a.double() @ b.double().T, rtol=0.008, atol=1e-3)
