"""Triton kernels of the forward pass, and the dense product with an adapter's extra k-step that backward uses too.

Small operands (V, U, generator) enter tensor cores in x's dtype; sums are float32.
"""

import triton
import triton.language as tl

from tarp_kernels.ops.triton_pieces import activate, activate_hidden, kept, lines, number, owned, vector


@triton.jit
def products(
    x, V, w1, weight, row, line, end, column, rank, rank_end, width, outer, x_row, v_lane, v_feature, w_outer, w_inner,
    threshold, seed, first: tl.constexpr, SECOND: tl.constexpr, ALIGNED: tl.constexpr, DENSE: tl.constexpr,
    DROPOUT: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, R: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """x V[rank]ᵀ [BT, R], x w1ᵀ [BT, M] if SECOND, x Wᵀ [BT, BN] if DENSE, all from one pass over x.

    `row` is what the call counts, and `line` where it lies in x.

    V and w1 of a kind are one factor [V; w1], rank by rank: half the products and half the loads of their addresses.
    """
    PAIRED: tl.constexpr = SECOND and ALIGNED and R == M and V.dtype == w1.dtype
    LANES: tl.constexpr = 2 * R if PAIRED else R
    lane, second = tl.arange(0, M), tl.arange(0, LANES)
    if PAIRED:
        # a sum and not a choice of two pointers, in steps of 16 bytes: the compiler then still sees whole vectors
        apart = (w1.to(tl.int64) - V.to(tl.int64)) // 16 * (128 // V.dtype.element_ty.primitive_bitwidth)
        v = V + ((second >= R) * apart + second % R * width)
        v_end = tl.where(second < R, rank_end, R + first)
    else:
        second, v, v_end = rank, V + rank * v_lane, rank_end
    h, u, y = tl.zeros((BT, LANES), tl.float32), tl.zeros((BT, M), tl.float32), tl.zeros((BT, BN), tl.float32)
    for k in range(0, width, BK):
        feature = k + tl.arange(0, BK)
        in_x, in_v, in_w1 = (row < end)[:, None], (second < v_end)[None, :], (lane < first)[None, :]
        in_w = (column < outer)[None, :]
        if not EVEN:
            inside = feature < width
            in_x, in_v = in_x & inside[None, :], in_v & inside[:, None]
            in_w1, in_w = in_w1 & inside[:, None], in_w & inside[:, None]
        a = tl.load(x + line.to(tl.int64)[:, None] * x_row + feature[None, :], mask=in_x, other=0.0)
        if DENSE:
            offset = column.to(tl.int64)[None, :] * w_outer + feature.to(tl.int64)[:, None] * w_inner
            b = tl.load(weight + offset, mask=in_w, other=0.0)
            y = tl.dot(a, b, y, input_precision=PRECISION)
        if DROPOUT:
            a = tl.where(kept(row, feature, width, threshold, seed), a, 0.0)
        b = tl.load(v[None, :] + feature[:, None] * v_feature, mask=in_v, other=0.0)
        h = tl.dot(a, b.to(a.dtype), h, input_precision=PRECISION)
        if SECOND and not PAIRED:
            b = tl.load(w1 + lane[None, :] * width + feature[:, None], mask=in_w1, other=0.0)
            u = tl.dot(a, b.to(a.dtype), u, input_precision=PRECISION)
    if PAIRED:
        h, u = tl.split(tl.permute(tl.reshape(h, (BT, 2, R)), (0, 2, 1)))
    return h, u, y


@triton.jit
def skinny(
    x, q, row, line, end, lane, lane_end, width, x_row, q_lane, q_feature, threshold, seed, DROPOUT: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """x q[lane]ᵀ [BT, R] alone."""
    found, _, _ = products(
        x, q, x, x, row, line, end, lane, lane, lane_end, width, 0, x_row, q_lane, q_feature, 0, 0, threshold, seed, 0,
        False, False, False, DROPOUT, EVEN, PRECISION, BT, R, BK, R, R,
    )  # fmt: skip
    return found


@triton.jit
def middle(
    h, u, x, w1, b1, w2, b2, h_out, s_out, u_out, row, line, end, width, x_row, inverse_keep, threshold, seed,
    r: tl.constexpr, first: tl.constexpr, outputs: tl.constexpr, FULL: tl.constexpr, HIDDEN: tl.constexpr,
    ACTIVATION: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr, SAVE: tl.constexpr, DROPOUT: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, R: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """Σ(x) h [BT, R] from h = x Vᵀ and u = x w1ᵀ; h, s, u are kept where SAVE, by the first column of tiles.

    Only a full Σ from a linear generator multiplies x again: its w1 has a block of r rows for each row of Σ.
    """
    rank, lane, far = tl.arange(0, R), tl.arange(0, M), row.to(tl.int64)
    keeps = row < tl.where(tl.program_id(1) == 0, end, 0)
    here = keeps[:, None] & (rank < r)[None, :]
    h *= inverse_keep
    if SAVE:
        tl.store(h_out + far[:, None] * r + rank[None, :], h, mask=here)
    found = h
    if outputs > 0:
        u *= inverse_keep
        if HIDDEN is not None:
            u += vector(b1, lane, first, B1)[None, :]
            if SAVE:
                wide = keeps[:, None] & (lane < first)[None, :]
                tl.store(u_out + far[:, None] * first + lane[None, :], u, mask=wide)
            u = activate_hidden(u, HIDDEN)
        if FULL:
            found = tl.zeros((BT, R), tl.float32)
        for i in range(r if FULL else 1):
            out = i * r + rank
            if HIDDEN is not None:
                in_w2 = (rank < r)[None, :] & (lane < first)[:, None]
                w = tl.load(w2 + out[None, :] * first + lane[:, None], mask=in_w2, other=0.0)
                kind: tl.constexpr = x.dtype.element_ty
                g = tl.dot(u.to(kind), w.to(kind), input_precision=PRECISION)
                g += vector(b2, out, i * r + r, B2)[None, :]
            else:
                g = u
                if FULL:
                    g = inverse_keep * skinny(
                        x, w1, row, line, end, out, i * r + r, width, x_row, width, 1, threshold, seed, DROPOUT, EVEN,
                        PRECISION, BT, BK, R,
                    )  # fmt: skip
                g += vector(b1, out, i * r + r, B1)[None, :]
            if FULL and ACTIVATION == "one_plus":
                s = g + (rank == i).to(tl.float32)[None, :]
            else:
                s = activate(g, ACTIVATION)
            if SAVE:
                tl.store(s_out + far[:, None] * outputs + out[None, :], s, mask=here)
            if FULL:
                found = tl.where((rank == i)[None, :], tl.sum(s * h, 1)[:, None], found)
            else:
                found = s * h
    return found


@triton.jit(do_not_specialize=["rows", "tasks", "scaling", "inverse_keep", "threshold", "seed", "x_total", "y_total"])
def forward_kernel(
    x, weight, bias, V, U, w1, b1, w2, b2, segments, y, z, h_out, s_out, u_out, x_index, y_index, x_total, y_total,
    rows, tasks, width, outer, x_row, w_outer, w_inner, scaling, inverse_keep, threshold: tl.int64, seed: tl.int64,
    r: tl.constexpr, first: tl.constexpr, outputs: tl.constexpr, FULL: tl.constexpr, HIDDEN: tl.constexpr,
    ACTIVATION: tl.constexpr, SCALING_IN_MEMORY: tl.constexpr, BIAS: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr,
    DENSE: tl.constexpr, SEGMENTS: tl.constexpr, SAVE: tl.constexpr, DROPOUT: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr, EARLY: tl.constexpr, ALIGNED: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, R: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """If DENSE a tile of y, its rows' z made on the way; else z = scaling · Σ(x) x Vᵀ for `dense_kernel`.

    `first` rows of w1, S `outputs`; h, s, u for backward. EARLY: `dense_kernel` may start while this one runs.
    ALIGNED: V and w1 lie at multiples of 16 bytes, those of each task. The indices say where rows lie in x and in y.
    """
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    task, start, end = owned(tl.program_id(0), segments, tasks, rows, BT, SEGMENTS)
    if start >= end:
        return
    row, column, rank = start + tl.arange(0, BT), tl.program_id(1) * BN + tl.arange(0, BN), tl.arange(0, R)
    line = lines(x_index, row, end, x_total)
    if SEGMENTS:
        V += task.to(tl.int64) * r * width
        U += task.to(tl.int64) * outer * r
        if outputs > 0:
            w1 += task.to(tl.int64) * first * width
            if B1:
                b1 += task * first
            if HIDDEN is not None:
                w2 += task.to(tl.int64) * outputs * first
            if B2:
                b2 += task * outputs
    SECOND: tl.constexpr = HIDDEN is not None or (outputs > 0 and not FULL)
    h, u, acc = products(
        x, V, w1, weight, row, line, end, column, rank, r, width, outer, x_row, width, 1, w_outer, w_inner, threshold,
        seed, first, SECOND, ALIGNED, DENSE, DROPOUT, EVEN, PRECISION, BT, BN, BK, R, M,
    )  # fmt: skip
    found = number(scaling, SCALING_IN_MEMORY) * middle(
        h, u, x, w1, b1, w2, b2, h_out, s_out, u_out, row, line, end, width, x_row, inverse_keep, threshold, seed,
        r, first, outputs, FULL, HIDDEN, ACTIVATION, B1, B2, SAVE, DROPOUT, EVEN, PRECISION, BT, BK, R, M,
    )  # fmt: skip
    kind: tl.constexpr = x.dtype.element_ty
    if DENSE:
        in_u = (column < outer)[None, :] & (rank < r)[:, None]
        q = tl.load(U + column[None, :] * r + rank[:, None], mask=in_u, other=0.0)
        acc = tl.dot(found.to(kind), q.to(kind), acc, input_precision=PRECISION)
        acc += vector(bias, column, outer, BIAS)[None, :]
        inside = (row < end)[:, None] & (column < outer)[None, :]
        y += lines(y_index, row, end, y_total).to(tl.int64)[:, None] * outer
        tl.store(y + column[None, :], acc.to(kind), mask=inside)
    else:
        inside = (row < end)[:, None] & (rank < r)[None, :]
        tl.store(z + row.to(tl.int64)[:, None] * r + rank[None, :], found.to(kind), mask=inside)


@triton.jit
def tile_of(segments, tasks, rows, across, SEGMENTS: tl.constexpr, BT: tl.constexpr, GROUP: tl.constexpr):
    """(task, first row, end of its rows, number of the column tile) of this block, `across` tiles to a row of tiles.

    GROUP row tiles go through the columns together, so that what they read of b is still in the second-level cache.
    """
    tiles = tl.num_programs(0) // across
    group = tl.program_id(0) // (GROUP * across)
    height = tl.minimum(tiles - group * GROUP, GROUP)
    within = tl.program_id(0) % (GROUP * across)
    task, start, end = owned(group * GROUP + within % height, segments, tasks, rows, BT, SEGMENTS)
    return task, start, end, within // height


@triton.jit
def finish(
    acc, bias, z, q, c, task, start, end, row, line, column, column_end, tile, outer, q_task, q_outer, q_extra, c_row,
    inverse_keep, threshold, seed, extra: tl.constexpr, BIAS: tl.constexpr, SEGMENTS: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr, EARLY: tl.constexpr, BULK_LOW: tl.constexpr,
    TRANSPOSED_LOW: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """Store acc + mask · z qᵀ + bias: the adapter's k-step at the end of a dense product, before the only rounding.

    `line` is where the rows lie in c.
    """
    far = row.to(tl.int64)
    if SEGMENTS and not BULK_LOW:
        q += task.to(tl.int64) * q_task
    if EARLY:
        tl.extra.cuda.gdc_wait()
    low = tl.zeros((BT, BN), tl.float32) if DROPOUT else acc
    for e in tl.range(0, extra, BE, num_stages=1):  # one step, mostly: nothing to overlap
        if BULK_LOW:
            zt = z.load([start, e])
            if TRANSPOSED_LOW:
                qt = q.load([task * extra + e, tile * BN])
            else:
                qt = q.load([task * outer + tile * BN, e]).T
        else:
            lane = e + tl.arange(0, BE)
            in_z, in_q = (row < end)[:, None], (column < column_end)[None, :]
            if extra % BE:
                in_z = in_z & (lane < extra)[None, :]
                in_q = in_q & (lane < extra)[:, None]
            zt = tl.load(z + far[:, None] * extra + lane[None, :], mask=in_z, other=0.0)
            qt = tl.load(q + column[None, :] * q_outer + lane[:, None] * q_extra, mask=in_q, other=0.0).to(zt.dtype)
        low = tl.dot(zt, qt, low, input_precision=PRECISION)
    if DROPOUT:
        low = acc + tl.where(kept(row, column, outer, threshold, seed), low * inverse_keep, 0.0)
    if BIAS:
        low += tl.load(bias + column, mask=column < column_end, other=0.0).to(tl.float32)[None, :]
    inside = (row < end)[:, None] & (column < column_end)[None, :]
    tl.store(c + line.to(tl.int64)[:, None] * c_row + column[None, :], low.to(c.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "tasks", "inverse_keep", "threshold", "seed", "a_total", "c_total"])
def dense_kernel(
    a, b, bias, z, q, segments, c, a_index, c_index, a_total, c_total,
    rows, tasks, inner, outer, a_row, b_outer, b_inner, q_task, q_outer, q_extra, c_row, inverse_keep,
    threshold: tl.int64, seed: tl.int64,
    extra: tl.constexpr, BIAS: tl.constexpr, SEGMENTS: tl.constexpr, DROPOUT: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr, EARLY: tl.constexpr, BULK: tl.constexpr, BULK_LOW: tl.constexpr,
    TRANSPOSED: tl.constexpr, TRANSPOSED_LOW: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    BE: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """c [T, outer] = a bᵀ + bias + mask · z qᵀ, with a [T, inner], b [outer, inner], z [T, extra], q [B, outer, extra].

    Forward: a = x, b = W, q = U. Backward for dx: a = dy, b = Wᵀ, z = [dh, du], q = [V; w1]ᵀ, masked by dropout.
    EARLY: the kernel that makes z may still run, and is waited for where z is read first.
    The indices say where rows lie in a and in c.
    BULK: a and b are tensor descriptors, of bᵀ if TRANSPOSED; BULK_LOW: so are z and q, whose extra columns fill BE.
    """
    task, start, end, tile = tile_of(segments, tasks, rows, tl.cdiv(outer, BN), SEGMENTS, BT, GROUP)
    if start >= end:
        return
    row, column = start + tl.arange(0, BT), tile * BN + tl.arange(0, BN)
    line = lines(a_index, row, end, a_total)
    acc = tl.zeros((BT, BN), tl.float32)
    for k in range(0, inner, BK):
        if BULK:  # rows past the task's end and columns past the last are read, but never stored
            at = a.load([start, k])
            bt = b.load([k, tile * BN]) if TRANSPOSED else b.load([tile * BN, k]).T
        else:
            lane = k + tl.arange(0, BK)
            in_a, in_b = (row < end)[:, None], (column < outer)[None, :]
            if not EVEN:
                in_a = in_a & (lane < inner)[None, :]
                in_b = in_b & (lane < inner)[:, None]
            at = tl.load(a + line.to(tl.int64)[:, None] * a_row + lane[None, :], mask=in_a, other=0.0)
            offset = column.to(tl.int64)[None, :] * b_outer + lane.to(tl.int64)[:, None] * b_inner
            bt = tl.load(b + offset, mask=in_b, other=0.0)
        acc = tl.dot(at, bt, acc, input_precision=PRECISION)
    line = lines(c_index, row, end, c_total)
    finish(
        acc, bias, z, q, c, task, start, end, row, line, column, outer, tile, outer, q_task, q_outer, q_extra, c_row,
        inverse_keep, threshold, seed, extra, BIAS, SEGMENTS, DROPOUT, PRECISION, EARLY, BULK_LOW, TRANSPOSED_LOW, BT,
        BN, BE,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "tasks", "inverse_keep", "threshold", "seed"])
def skinny_kernel(
    x, q, segments, out, rows, tasks, width, wide, x_row, q_task, q_lane, q_feature, inverse_keep,
    threshold: tl.int64, seed: tl.int64, SEGMENTS: tl.constexpr, DROPOUT: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """out [T, wide] = x qᵀ, x [T, width] behind dropout, q [B, wide, width]: for second-order gradients."""
    task, start, end = owned(tl.program_id(0), segments, tasks, rows, BT, SEGMENTS)
    if start >= end:
        return
    row, lane = start + tl.arange(0, BT), tl.program_id(1) * R + tl.arange(0, R)
    if SEGMENTS:
        q += task.to(tl.int64) * q_task
    found = skinny(
        x, q, row, row, end, lane, wide, width, x_row, q_lane, q_feature, threshold, seed, DROPOUT, EVEN, PRECISION, BT,
        BK, R,
    )  # fmt: skip
    if DROPOUT:
        found *= inverse_keep
    inside = (row < end)[:, None] & (lane < wide)[None, :]
    tl.store(out + row.to(tl.int64)[:, None] * wide + lane[None, :], found.to(out.dtype.element_ty), mask=inside)
