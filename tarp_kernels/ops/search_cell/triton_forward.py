"""Triton kernels of the forward pass of `search_cell`: to s0 and s1, one for each node, and back to h's width.

Nodes are [5, T, C] float32: s0, s1, n0, n1, n2. Factors of the products enter tensor cores in h's dtype. A tile of rows
belongs to one task and reads its alpha itself: an operation whose alpha is zero is jumped over, whatever other tiles
do, and no value of alpha compiles another kernel.
"""

import triton
import triton.language as tl

from tarp_kernels.ops.triton_pieces import owned


@triton.jit
def place_of(number, edge, linear, glu, conv3, conv5, size):
    """(where an edge's map lies, its taps): linear, glu's value, glu's gate, conv3 and conv5 are maps 0 to 4."""
    found = tl.where(number == 0, linear + edge * size, glu + (2 * edge + number - 1) * size)
    found = tl.where(number == 3, conv3 + 3 * edge * size, found)
    return tl.where(number == 4, conv5 + 5 * edge * size, found), tl.where(number < 3, 1, 2 * number - 3)


@triton.jit
def operation_of(number):
    """Of a map, among the operations of alpha."""
    return number + tl.where(number < 2, 2, 1)


@triton.jit
def bias_of(number, edge, linear, glu, conv3, conv5, width):
    """Where the bias of an edge's map lies."""
    found = tl.where(number == 0, linear + edge * width, glu + (2 * edge + number - 1) * width)
    found = tl.where(number == 3, conv3 + edge * width, found)
    return tl.where(number == 4, conv5 + edge * width, found)


@triton.jit
def affine(
    weight, taps, bias, source, state, position, length, past, lane, width, kind: tl.constexpr, CAUSAL: tl.constexpr,
    STATE: tl.constexpr, PRECISION: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """b + Σ over taps of the shifted rows' products; a linear map is one tap. Beyond the ends of a sequence are zeros.

    The tile's first row lies at `source`; rows past the end of its task have length 0. With STATE there is a past
    before the first token: row `past` + place of `state`, place < 0. Factors come in slices of BK features: whole ones
    would fill the registers.
    """
    b = tl.load(bias + lane, mask=lane < width, other=0.0).to(tl.float32)
    acc = tl.zeros((BT, C), tl.float32) + b[None, :]
    for step in tl.range(0, taps * (C // BK), num_stages=1):
        j, feature = step // (C // BK), step % (C // BK) * BK + tl.arange(0, BK)
        shift = j + 1 - taps if CAUSAL else j - taps // 2
        place = position + shift
        there = (place >= 0) & (place < length)
        at = (tl.arange(0, BT) + shift)[:, None] * width + feature[None, :]
        x = tl.load(source + at, mask=there[:, None] & (feature < width)[None, :], other=0.0)
        if STATE:
            at = (past + place)[:, None] * width + feature[None, :]
            x += tl.load(state + at, mask=(place < 0)[:, None] & (feature < width)[None, :], other=0.0)
        at_w = j * width * width + lane[None, :] * width + feature[:, None]
        w = tl.load(weight + at_w, mask=(lane < width)[None, :] & (feature < width)[:, None], other=0.0)
        acc = tl.dot(x.to(kind), w.to(kind), acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=["rows", "tasks", "eps"])
def entry_kernel(
    h, norm, norm_bias, project, project_bias, segments, nodes, rows, tasks, d, width, eps,
    NORM: tl.constexpr, PER_TASK: tl.constexpr, SEGMENTS: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """s0, s1 = relu(Linear(stem(h))) for a tile of rows h [T, d]."""
    task, start, end = owned(tl.program_id(0), segments, tasks, rows, BT, SEGMENTS)
    if start >= end:
        return
    row, lane = start + tl.arange(0, BT), tl.arange(0, C)
    far = row.to(tl.int64)
    kind: tl.constexpr = h.dtype.element_ty
    if PER_TASK:
        project += task.to(tl.int64) * 2 * width * d
        project_bias += task * 2 * width
        if NORM:
            norm += task * d
            norm_bias += task * d
    if NORM:
        total = tl.zeros((BT,), tl.float32)
        for k in range(0, d, BK):
            feature = k + tl.arange(0, BK)
            inside = (row < end)[:, None] & (feature < d)[None, :]
            total += tl.sum(tl.load(h + far[:, None] * d + feature[None, :], mask=inside, other=0.0).to(tl.float32), 1)
        mean = total / d
        total = tl.zeros((BT,), tl.float32)
        for k in range(0, d, BK):
            feature = k + tl.arange(0, BK)
            inside = (row < end)[:, None] & (feature < d)[None, :]
            x = tl.load(h + far[:, None] * d + feature[None, :], mask=inside, other=0.0).to(tl.float32)
            x = tl.where(inside, x - mean[:, None], 0.0)
            total += tl.sum(x * x, 1)
        scale = 1 / tl.sqrt(total / d + eps)
    s0, s1 = tl.zeros((BT, C), tl.float32), tl.zeros((BT, C), tl.float32)
    for k in range(0, d, BK):
        feature = k + tl.arange(0, BK)
        in_h, in_w = (row < end)[:, None], (lane < width)[None, :]
        if not EVEN:
            in_h, in_w = in_h & (feature < d)[None, :], in_w & (feature < d)[:, None]
        x = tl.load(h + far[:, None] * d + feature[None, :], mask=in_h, other=0.0)
        if NORM:
            g = tl.load(norm + feature, mask=feature < d, other=0.0).to(tl.float32)
            b = tl.load(norm_bias + feature, mask=feature < d, other=0.0).to(tl.float32)
            x = ((x.to(tl.float32) - mean[:, None]) * (scale[:, None] * g[None, :]) + b[None, :]).to(kind)
        at = lane[None, :] * d + feature[:, None]
        s0 = tl.dot(x, tl.load(project + at, mask=in_w, other=0.0).to(kind), s0, input_precision=PRECISION)
        at += width * d
        s1 = tl.dot(x, tl.load(project + at, mask=in_w, other=0.0).to(kind), s1, input_precision=PRECISION)
    b0 = tl.load(project_bias + lane, mask=lane < width, other=0.0).to(tl.float32)
    b1 = tl.load(project_bias + width + lane, mask=lane < width, other=0.0).to(tl.float32)
    inside = (row < end)[:, None] & (lane < width)[None, :]
    place = nodes + far[:, None] * width + lane[None, :]
    tl.store(place, tl.maximum(s0 + b0[None, :], 0.0), mask=inside)
    tl.store(place + tl.cast(rows, tl.int64) * width, tl.maximum(s1 + b1[None, :], 0.0), mask=inside)


@triton.jit(do_not_specialize=["rows", "tasks", "alpha_task", "first", "inputs"])
def node_kernel(
    h, nodes, alpha, linear, linear_bias, glu, glu_bias, conv3, conv3_bias, conv5, conv5_bias, positions, lengths,
    state, sequences, segments, rows, tasks, alpha_task, width, first, inputs,
    CAUSAL: tl.constexpr, STATE: tl.constexpr, PER_TASK: tl.constexpr, SEGMENTS: tl.constexpr,
    PRECISION: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The node whose edges begin at `first` and read the `inputs` nodes before it; h only for its dtype.

    With STATE each sequence has a past, its rows of state [sequences, 4 nodes, 4 rows, C].
    """
    task, start, end = owned(tl.program_id(0), segments, tasks, rows, BT, SEGMENTS)
    if start >= end:
        return
    row, lane = start + tl.arange(0, BT), tl.arange(0, C)
    first_row = start.to(tl.int64)
    kind: tl.constexpr = h.dtype.element_ty
    position = tl.load(positions + row, mask=row < end, other=0)
    length = tl.load(lengths + row, mask=row < end, other=0)
    past, before = position, state
    if STATE:
        sequence = tl.load(sequences + start)
        past = (tl.load(sequences + row, mask=row < end, other=sequence) - sequence) * 16 + 4
        state += sequence.to(tl.int64) * 16 * width
    inside = (row < end)[:, None] & (lane < width)[None, :]
    here = tl.arange(0, BT)[:, None] * width + lane[None, :]
    size = width * width
    total = tl.zeros((BT, C), tl.float32)
    for i in tl.range(0, inputs, num_stages=1):
        source = nodes + (i * tl.cast(rows, tl.int64) + first_row) * width
        if STATE:
            before = state + i * 4 * width
        edge = first + i
        if PER_TASK:
            edge += 9 * task
        chosen = alpha + task * alpha_task + (first + i) * 6
        a = tl.load(chosen + 1)
        if a != 0:
            total += a * tl.load(source + here, mask=inside, other=0.0)
        value = total
        for number in tl.range(0, 5, num_stages=1):
            a = tl.load(chosen + operation_of(number))
            if a != 0:
                weight, taps = place_of(number, edge, linear, glu, conv3, conv5, size)
                bias = bias_of(number, edge, linear_bias, glu_bias, conv3_bias, conv5_bias, width)
                y = affine(
                    weight, taps, bias, source, before, position, length, past, lane, width, kind, CAUSAL, STATE,
                    PRECISION, BT, BK, C,
                )  # fmt: skip
                if number == 1:
                    value = y
                elif number == 2:
                    total += a * value / (1 + tl.exp(-y))
                else:
                    total += a * tl.maximum(y, 0.0)
    tl.store(nodes + (inputs * tl.cast(rows, tl.int64) + first_row) * width + here, total, mask=inside)


@triton.jit(do_not_specialize=["rows", "tasks"])
def exit_kernel(
    h, nodes, output, output_bias, segments, out, rows, tasks, d, width,
    PER_TASK: tl.constexpr, SEGMENTS: tl.constexpr, PRECISION: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr,
    C: tl.constexpr,
):  # fmt: skip
    """out = h + Linear((n0 + n1 + n2) / 3) for a tile of rows and BN columns."""
    task, start, end = owned(tl.program_id(0), segments, tasks, rows, BT, SEGMENTS)
    if start >= end:
        return
    row, lane, column = start + tl.arange(0, BT), tl.arange(0, C), tl.program_id(1) * BN + tl.arange(0, BN)
    far, size = row.to(tl.int64), tl.cast(rows, tl.int64) * width
    kind: tl.constexpr = h.dtype.element_ty
    if PER_TASK:
        output += task.to(tl.int64) * d * width
        output_bias += task * d
    inside = (row < end)[:, None] & (lane < width)[None, :]
    at = 2 * size + far[:, None] * width + lane[None, :]
    mean = tl.load(nodes + at, mask=inside, other=0.0) + tl.load(nodes + size + at, mask=inside, other=0.0)
    mean = (mean + tl.load(nodes + 2 * size + at, mask=inside, other=0.0)) * (1.0 / 3)
    in_w = (lane < width)[:, None] & (column < d)[None, :]
    w = tl.load(output + column.to(tl.int64)[None, :] * width + lane[:, None], mask=in_w, other=0.0).to(kind)
    acc = tl.dot(mean.to(kind), w, input_precision=PRECISION)
    acc += tl.load(output_bias + column, mask=column < d, other=0.0).to(tl.float32)[None, :]
    here = (row < end)[:, None] & (column < d)[None, :]
    place = far[:, None] * d + column[None, :]
    acc += tl.load(h + place, mask=here, other=0.0).to(tl.float32)
    tl.store(out + place, acc.to(kind), mask=here)


@triton.jit(do_not_specialize=["rows"])
def state_kernel(nodes, state, ends, after, rows, width, C: tl.constexpr):
    """after [sequences, 4, 4, C] = the last four rows of one sequence's (state, then s0, s1, n0, n1)."""
    sequence, lane, slot = tl.program_id(0), tl.arange(0, C), tl.arange(0, 16)
    node, inside = slot // 4, (lane < width)[None, :]
    start, end = tl.load(ends + sequence), tl.load(ends + sequence + 1)
    place = end - start - 4 + slot % 4
    fresh = (place >= 0)[:, None]
    at = (node * tl.cast(rows, tl.int64) + start + place)[:, None] * width + lane[None, :]
    own = tl.cast(sequence, tl.int64) * 16 * width
    at_old = (node * 4 + 4 + place)[:, None] * width + lane[None, :]
    new = tl.load(nodes + at, mask=fresh & inside, other=0.0)
    old = tl.load(state + own + at_old, mask=(fresh == 0) & inside, other=0.0)
    tl.store(after + own + slot[:, None] * width + lane[None, :], tl.where(fresh, new, old), mask=inside)
