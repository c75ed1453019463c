"""Triton kernels of the backward pass: the middle, and sums over rows without atomics.

Sums over rows are cut into chunks at fixed places and added in order: the same bits on every call.
"""

import triton
import triton.language as tl

from tarp_kernels.ops.lowrank_linear.triton_forward import skinny
from tarp_kernels.ops.triton_pieces import (
    activate_hidden,
    hidden_slope,
    kept,
    lines,
    number,
    owned,
    rows_of_task,
    slope,
)


@triton.jit(do_not_specialize=["rows", "tasks", "scaling", "dy_total"])
def middle_backward_kernel(
    dy, U, w2, segments, h_in, s_in, u_in, z, inputs, dg_out, hidden_out, dy_index, dy_total,
    rows, tasks, width, dy_row, scaling,
    r: tl.constexpr, first: tl.constexpr, outputs: tl.constexpr, FULL: tl.constexpr, HIDDEN: tl.constexpr,
    ACTIVATION: tl.constexpr, SCALING_IN_MEMORY: tl.constexpr, SEGMENTS: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr, EARLY: tl.constexpr, Z: tl.constexpr, INPUTS: tl.constexpr, BT: tl.constexpr,
    BK: tl.constexpr, R: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """From dy and what forward kept: z (scaled) if Z; `inputs` = [dh, du] [T, r + first] and of an MLP dg, hidden if
    INPUTS.

    EARLY: `dense_kernel`, which makes dx, may start while this one runs. The index says where rows lie in dy.
    """
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    task, start, end = owned(tl.program_id(0), segments, tasks, rows, BT, SEGMENTS)
    if start >= end:
        return
    row, rank = start + tl.arange(0, BT), tl.arange(0, R)
    far = row.to(tl.int64)
    kind: tl.constexpr = z.dtype.element_ty
    here = (row < end)[:, None] & (rank < r)[None, :]
    if SEGMENTS:
        U += task.to(tl.int64) * width * r
    scaling = number(scaling, SCALING_IN_MEMORY)
    dz = tl.zeros((BT, R), tl.float32)
    if INPUTS:
        line = lines(dy_index, row, end, dy_total)
        dz = scaling * skinny(
            dy, U, row, line, end, rank, r, width, dy_row, 1, r, 0, 0, False, EVEN, PRECISION, BT, BK, R
        )
    h = tl.load(h_in + far[:, None] * r + rank[None, :], mask=here, other=0.0)
    middle, dh = h, dz
    columns: tl.constexpr = r + first
    if outputs > 0:
        lane = tl.arange(0, M)
        wide = (row < end)[:, None] & (lane < first)[None, :]
        du = tl.zeros((BT, M), tl.float32)
        if HIDDEN is not None and SEGMENTS:
            w2 += task.to(tl.int64) * outputs * first
        if FULL:
            middle, dh = tl.zeros((BT, R), tl.float32), tl.zeros((BT, R), tl.float32)
        for i in range(r if FULL else 1):
            out = i * r + rank
            s = tl.load(s_in + far[:, None] * outputs + out[None, :], mask=here, other=0.0)
            if FULL:
                dzi = tl.sum(tl.where((rank == i)[None, :], dz, 0.0), 1)[:, None]
                middle = tl.where((rank == i)[None, :], tl.sum(s * h, 1)[:, None], middle)
                dh += s * dzi
                dg = dzi * h * slope(s, ACTIVATION)
            else:
                middle, dh = s * h, s * dz
                dg = dz * h * slope(s, ACTIVATION)
            dg = tl.where(here, dg, 0.0)
            if HIDDEN is not None and INPUTS:
                tl.store(dg_out + far[:, None] * outputs + out[None, :], dg.to(kind), mask=here)
                in_w2 = (rank < r)[:, None] & (lane < first)[None, :]
                w = tl.load(w2 + out[:, None] * first + lane[None, :], mask=in_w2, other=0.0)
                du = tl.dot(dg.to(kind), w.to(kind), du, input_precision=PRECISION)
            elif INPUTS:
                tl.store(inputs + far[:, None] * columns + r + out[None, :], dg.to(kind), mask=here)
        if HIDDEN is not None and INPUTS:
            u = tl.load(u_in + far[:, None] * first + lane[None, :], mask=wide, other=0.0)
            tl.store(hidden_out + far[:, None] * first + lane[None, :], activate_hidden(u, HIDDEN).to(kind), mask=wide)
            du *= hidden_slope(u, HIDDEN)
            tl.store(inputs + far[:, None] * columns + r + lane[None, :], du.to(kind), mask=wide)
    if INPUTS:
        tl.store(inputs + far[:, None] * columns + rank[None, :], dh.to(kind), mask=here)
    if Z:
        tl.store(z + far[:, None] * r + rank[None, :], (scaling * middle).to(kind), mask=here)


@triton.jit(do_not_specialize=["rows", "tasks", "threshold", "seed", "a_total", "b_total"])
def tall_kernel(
    a, b, segments, parts, a_index, b_index, a_total, b_total,
    rows, tasks, p, q, a_row, b_row, threshold: tl.int64, seed: tl.int64,
    ONES: tl.constexpr, SEGMENTS: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, CHUNK: tl.constexpr,
    BT: tl.constexpr, BP: tl.constexpr, BQ: tl.constexpr,
):  # fmt: skip
    """parts[c] [p, q] = aᵀ b over the rows of chunk c, a [T, p], b [T, q]; with ONES b is a column of ones.

    The indices say where rows lie in a and in b.
    """
    _, start, end = owned(tl.program_id(0), segments, tasks, rows, CHUNK, SEGMENTS)
    if start >= end:
        return
    i, j = tl.program_id(1) * BP + tl.arange(0, BP), tl.program_id(2) * BQ + tl.arange(0, BQ)
    acc = tl.zeros((BP, BQ), tl.float32)
    for t in range(start, tl.minimum(start + CHUNK, end), BT):
        row = t + tl.arange(0, BT)
        inside = (row < end) & (row < start + CHUNK)
        line = lines(a_index, row, end, a_total)
        at = tl.load(
            a + line.to(tl.int64)[None, :] * a_row + i[:, None], mask=inside[None, :] & (i < p)[:, None], other=0.0
        )
        if ONES:
            bt = tl.where(inside[:, None] & (j == 0)[None, :], 1.0, 0.0).to(at.dtype)
        else:
            line = lines(b_index, row, end, b_total)
            bt = tl.load(
                b + line.to(tl.int64)[:, None] * b_row + j[None, :], mask=inside[:, None] & (j < q)[None, :], other=0.0
            )
        if DROPOUT:
            bt = tl.where(kept(row, j, q, threshold, seed), bt, 0.0)
        acc = tl.dot(at, bt, acc, input_precision=PRECISION)
    offset = tl.program_id(0).to(tl.int64) * p * q + i.to(tl.int64)[:, None] * q + j[None, :]
    tl.store(parts + offset, acc, mask=(i < p)[:, None] & (j < q)[None, :])


@triton.jit(do_not_specialize=["shift", "rows", "factor"])
def add_parts_kernel(
    parts, segments, out, shift, rows, size, first, count, factor,
    SEGMENTS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[shift + task] [count] = factor · the sum of parts[:, first : first + count] over its chunks, in order."""
    task = tl.program_id(0)
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    start, end = rows_of_task(task, segments, rows, SEGMENTS)
    acc = tl.zeros((BLOCK,), tl.float32)
    parts += (start // CHUNK + task).to(tl.int64) * size + first
    for _ in range(0, end - start, CHUNK):
        acc += tl.load(parts + index, mask=index < count, other=0.0)
        parts += size
    tl.store(
        out + (shift + task).to(tl.int64) * count + index, (acc * factor).to(out.dtype.element_ty), mask=index < count
    )
