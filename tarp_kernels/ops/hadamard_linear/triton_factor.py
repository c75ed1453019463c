"""Triton kernels of `hadamard_linear`: W times its factor Φ = f(P Q) inside the dense product; gradients of P and Q.

Φ is made for one tile of W at a time and multiplied with it in registers. P, Q and Φ ⊙ W enter tensor cores in x's
dtype; sums are float32. P is [C, N, R] and Q [R, K / C]: column block c of the argument is P[c] Q.
"""

import triton
import triton.language as tl

from tarp_kernels.ops.factor import CENTRE
from tarp_kernels.ops.lowrank_linear.triton_forward import finish, tile_of
from tarp_kernels.ops.triton_pieces import activate, rows_of_task

_CENTRE: tl.constexpr = tl.constexpr(CENTRE)


@triton.jit
def factor(argument, NAME: tl.constexpr):
    """f at the argument: the names of `tarp_kernels.ops.factor`."""
    if NAME == "centred_softplus":
        return activate(argument + _CENTRE, "softplus")
    else:
        return activate(argument, NAME)


@triton.jit
def factor_slope(argument, NAME: tl.constexpr):
    """f' at the argument."""
    if NAME == "centred_softplus":
        return activate(argument + _CENTRE, "sigmoid")
    elif NAME == "softplus":
        return activate(argument, "sigmoid")
    else:
        return argument * 0 + 1


@triton.jit(do_not_specialize=["rows", "tasks", "inverse_keep", "threshold", "seed"])
def weighed_dense_kernel(
    a, b, bias, z, q, left, right, segments, c,
    rows, tasks, inner, outer, a_row, b_outer, b_inner, q_task, q_outer, q_extra, left_task, left_block, left_inner,
    left_rank, right_task, right_block, right_outer, right_rank, c_row, inverse_keep, threshold: tl.int64,
    seed: tl.int64,
    extra: tl.constexpr, factor_rank: tl.constexpr, FACTOR: tl.constexpr, INNER_BLOCKS: tl.constexpr,
    OUTER_BLOCKS: tl.constexpr, BIAS: tl.constexpr, SEGMENTS: tl.constexpr, DROPOUT: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr, EARLY: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    BE: tl.constexpr, BR: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """`dense_kernel` with b ⊙ f(argument) in place of b [outer, inner], argument = left · right, a sum over the rank.

    Forward: b = W, left = Qᵀ, right = P, and the inputs, which are `inner`, lie in blocks. Backward for dx: b = Wᵀ,
    left = P, right = Q, and `outer` lies in blocks. A tile of columns never straddles two blocks, nor does a k-step.
    """
    inner_width, outer_width = inner // INNER_BLOCKS, outer // OUTER_BLOCKS
    across = tl.cdiv(outer_width, BN)
    task, start, end, tile = tile_of(segments, tasks, rows, OUTER_BLOCKS * across, SEGMENTS, BT, GROUP)
    if start >= end:
        return
    if SEGMENTS:
        left += task.to(tl.int64) * left_task
        right += task.to(tl.int64) * right_task
    block = tile // across
    left += block.to(tl.int64) * left_block
    row, own = start + tl.arange(0, BT), tile % across * BN + tl.arange(0, BN)
    column, column_end = block * outer_width + own, (block + 1) * outer_width
    kind: tl.constexpr = c.dtype.element_ty
    acc = tl.zeros((BT, BN), tl.float32)
    for i in range(INNER_BLOCKS):
        for k in range(0, inner_width, BK):
            step = k + tl.arange(0, BK)
            lane = i * inner_width + step
            in_a, in_b = (row < end)[:, None], (own < outer_width)[None, :]
            if not EVEN:
                inside = step < inner_width
                in_a, in_b = in_a & inside[None, :], in_b & inside[:, None]
            argument = tl.zeros((BK, BN), tl.float32)
            for first in tl.range(0, factor_rank, BR, num_stages=1):
                rank = first + tl.arange(0, BR)
                some = rank < factor_rank
                at_left = step.to(tl.int64)[:, None] * left_inner + rank[None, :] * left_rank
                left_tile = tl.load(left + at_left, mask=(step < inner_width)[:, None] & some[None, :], other=0.0)
                at_right = i * right_block + own.to(tl.int64)[None, :] * right_outer + rank[:, None] * right_rank
                right_tile = tl.load(right + at_right, mask=some[:, None] & (own < outer_width)[None, :], other=0.0)
                argument = tl.dot(left_tile.to(kind), right_tile.to(kind), argument, input_precision=PRECISION)
            phi = factor(argument, FACTOR)
            at = tl.load(a + row.to(tl.int64)[:, None] * a_row + lane[None, :], mask=in_a, other=0.0)
            offset = column.to(tl.int64)[None, :] * b_outer + lane.to(tl.int64)[:, None] * b_inner
            bt = tl.load(b + offset, mask=in_b, other=0.0)
            acc = tl.dot(at, (bt * phi).to(kind), acc, input_precision=PRECISION)
    finish(
        acc, bias, z, q, c, task, start, end, row, row, column, column_end, tile, outer, q_task, q_outer, q_extra,
        c_row, inverse_keep, threshold, seed, extra, BIAS, SEGMENTS, DROPOUT, PRECISION, EARLY, False, False, BT, BN,
        BE,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "task"])
def factor_gradients_kernel(
    dy, x, weight, P, Q, segments, P_parts, Q_parts, weight_sum,
    rows, task, outer, inner, dy_row, x_row, w_outer, w_inner,
    factor_rank: tl.constexpr, FACTOR: tl.constexpr, BLOCKS: tl.constexpr, SEGMENTS: tl.constexpr,
    PRECISION: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, WEIGHT: tl.constexpr, UNIT: tl.constexpr,
    BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """What one task's rows and UNIT × UNIT elements of W add to the gradients of P, of Q, and of W:

        D = dyᵀ x,  G = D ⊙ W ⊙ f'(P Q):   P_parts[unit of columns, c] [N, R] = G Qᵀ if LEFT,
        Q_parts[unit of outputs, c] [R, K / C] = P[c]ᵀ G if RIGHT,   weight_sum [N, K] += D ⊙ f(P Q) if WEIGHT

    D is held one tile at a time. The tiles of a unit come in order, so its sums always have the same bits.
    """
    width = inner // BLOCKS
    units = tl.cdiv(width, UNIT)
    block, unit = tl.program_id(1) // units, tl.program_id(1) % units
    start, end = rows_of_task(task, segments, rows, SEGMENTS)
    kind: tl.constexpr = x.dtype.element_ty
    P += (task.to(tl.int64) * BLOCKS + block) * outer * factor_rank
    Q += task.to(tl.int64) * factor_rank * width
    if LEFT:
        P_parts += (unit.to(tl.int64) * BLOCKS + block) * outer * factor_rank
    if RIGHT:
        Q_parts += (tl.program_id(0).to(tl.int64) * BLOCKS + block) * factor_rank * width
    first_n, first_k = tl.program_id(0) * UNIT, unit * UNIT
    for n in range(first_n, tl.minimum(first_n + UNIT, outer), BN):
        for k in range(first_k, tl.minimum(first_k + UNIT, width), BK):
            output, own = n + tl.arange(0, BN), k + tl.arange(0, BK)
            column = block * width + own
            inside = (output < outer)[:, None] & (own < width)[None, :]
            product = tl.zeros((BN, BK), tl.float32)
            for t in range(start, end, BT):
                row = t + tl.arange(0, BT)
                far = row.to(tl.int64)
                in_dy, in_x = (row < end)[None, :] & (output < outer)[:, None], (row < end)[:, None]
                dyt = tl.load(dy + far[None, :] * dy_row + output[:, None], mask=in_dy, other=0.0)
                xt = tl.load(x + far[:, None] * x_row + column[None, :], mask=in_x & (own < width)[None, :], other=0.0)
                product = tl.dot(dyt, xt, product, input_precision=PRECISION)
            argument = tl.zeros((BN, BK), tl.float32)
            for first in tl.range(0, factor_rank, BR, num_stages=1):
                p, _, _ = tile_of_P(P, first, output, outer, factor_rank, BR)
                q, _, _ = tile_of_Q(Q, first, own, width, factor_rank, BR)
                argument = tl.dot(p.to(kind), q.to(kind), argument, input_precision=PRECISION)
            if WEIGHT:
                at_sum = weight_sum + output.to(tl.int64)[:, None] * inner + column[None, :]
                total = tl.load(at_sum, mask=inside, other=0.0) + product * factor(argument, FACTOR)
                tl.store(at_sum, total, mask=inside)
            if LEFT or RIGHT:
                at_W = output.to(tl.int64)[:, None] * w_outer + column.to(tl.int64)[None, :] * w_inner
                w = tl.load(weight + at_W, mask=inside, other=0.0)
                g = (product * w * factor_slope(argument, FACTOR)).to(kind)
                for first in tl.range(0, factor_rank, BR, num_stages=1):
                    p, at_P, in_P = tile_of_P(P, first, output, outer, factor_rank, BR)
                    q, at_Q, in_Q = tile_of_Q(Q, first, own, width, factor_rank, BR)
                    if LEFT:
                        left = tl.dot(g, tl.trans(q.to(kind)), input_precision=PRECISION)
                        if k > first_k:
                            left += tl.load(P_parts + at_P, mask=in_P, other=0.0)
                        tl.store(P_parts + at_P, left, mask=in_P)
                    if RIGHT:
                        right = tl.dot(tl.trans(p.to(kind)), g, input_precision=PRECISION)
                        if n > first_n:
                            right += tl.load(Q_parts + at_Q, mask=in_Q, other=0.0)
                        tl.store(Q_parts + at_Q, right, mask=in_Q)
                tl.debug_barrier()  # the next tile adds to what other threads of this block may have stored


@triton.jit
def tile_of_P(P, first, output, outer, factor_rank: tl.constexpr, BR: tl.constexpr):
    """P[output, first : first + BR] of one task and block, where it lies, and which elements there are."""
    rank = first + tl.arange(0, BR)
    at = output.to(tl.int64)[:, None] * factor_rank + rank[None, :]
    inside = (output < outer)[:, None] & (rank < factor_rank)[None, :]
    return tl.load(P + at, mask=inside, other=0.0), at, inside


@triton.jit
def tile_of_Q(Q, first, own, width, factor_rank: tl.constexpr, BR: tl.constexpr):
    """Q[first : first + BR, own] of one task, where it lies, and which elements there are."""
    rank = first + tl.arange(0, BR)
    at = rank.to(tl.int64)[:, None] * width + own[None, :]
    inside = (rank < factor_rank)[:, None] & (own < width)[None, :]
    return tl.load(Q + at, mask=inside, other=0.0), at, inside
