"""Triton kernels of `search_cell`'s backward pass.

The affine maps of an edge are counted linear, glu's value, glu's gate, conv3, conv5. What flows back into a selected
map is `flow` [slot, T, C] in h's dtype, zero where a row's task did not select it; `slots` [9, 5] names the slot of
each edge's map, -1 for none. Sums over rows are cut at fixed places and added in order.
"""

import triton
import triton.language as tl

from tarp_kernels.ops.search_cell.triton_forward import affine, bias_of, operation_of, place_of
from tarp_kernels.ops.triton_pieces import owned


@triton.jit
def keep(flow, slot, g, first_row, here, inside, rows, width, kind: tl.constexpr):
    """flow[slot] = g, where there is such a slot."""
    if slot >= 0:
        tl.store(flow + (slot * tl.cast(rows, tl.int64) + first_row) * width + here, g.to(kind), mask=inside)


@triton.jit(do_not_specialize=["rows", "tasks", "alpha_task", "first", "inputs"])
def node_backward_kernel(
    h, nodes, dnode, alpha, linear, linear_bias, glu, glu_bias, conv3, conv3_bias, conv5, conv5_bias, positions,
    lengths, slots, segments, flow, alpha_parts, rows, tasks, alpha_task, width, first, inputs,
    CAUSAL: tl.constexpr, PER_TASK: tl.constexpr, ALPHA: tl.constexpr, SEGMENTS: tl.constexpr,
    PRECISION: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """`flow` of the maps of one node's edges, from dnode [T, C]; if ALPHA ⟨dnode, op(input)⟩ of every operation.

    Operations run again; with ALPHA those that nobody selected run too, and leave nothing but their number.
    """
    tile = tl.program_id(0)
    task, start, end = owned(tile, segments, tasks, rows, BT, SEGMENTS)
    if start >= end:
        return
    row, lane = start + tl.arange(0, BT), tl.arange(0, C)
    first_row = start.to(tl.int64)
    kind: tl.constexpr = h.dtype.element_ty
    position = tl.load(positions + row, mask=row < end, other=0)
    length = tl.load(lengths + row, mask=row < end, other=0)
    inside = (row < end)[:, None] & (lane < width)[None, :]
    here = tl.arange(0, BT)[:, None] * width + lane[None, :]
    size = width * width
    d = tl.load(dnode + first_row * width + here, mask=inside, other=0.0)
    for i in tl.range(0, inputs, num_stages=1):
        source = nodes + (i * tl.cast(rows, tl.int64) + first_row) * width
        edge = first + i
        if PER_TASK:
            edge += 9 * task
        chosen = alpha + task * alpha_task + (first + i) * 6
        parts = alpha_parts + tile * 54 + (first + i) * 6
        own = slots + (first + i) * 5
        if ALPHA:
            x = tl.load(source + here, mask=inside, other=0.0)
            tl.store(parts + 1, tl.sum(d * x))
        value = d
        for number in tl.range(0, 5, num_stages=1):
            operation = operation_of(number)
            a, slot = tl.load(chosen + operation), tl.load(own + number)
            g = tl.zeros((BT, C), tl.float32)
            if ALPHA or a != 0:
                weight, taps = place_of(number, edge, linear, glu, conv3, conv5, size)
                bias = bias_of(number, edge, linear_bias, glu_bias, conv3_bias, conv5_bias, width)
                y = affine(
                    weight, taps, bias, source, None, position, length, None, lane, width, kind, CAUSAL, False,
                    PRECISION, BT, BK, C,
                )  # fmt: skip
                if number == 1:
                    value = y
                elif number == 2:
                    gate = 1 / (1 + tl.exp(-y))
                    keep(flow, tl.load(own + 1), a * d * gate, first_row, here, inside, rows, width, kind)
                    g = d * value * gate
                    if ALPHA:
                        tl.store(parts + operation, tl.sum(tl.where(inside, g, 0.0)))
                    g = a * g * (1 - gate)
                else:
                    if ALPHA:
                        tl.store(parts + operation, tl.sum(d * tl.maximum(y, 0.0)))
                    g = tl.where(y > 0, a * d, 0.0)
            keep(flow, slot, g, first_row, here, inside, rows, width, kind)


@triton.jit
def through(
    acc, source, weight, taps, position, length, lane, width, kind: tl.constexpr, CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """acc + what one map's flow gives its input: each tap's, from the token that saw this one through it.

    The tile's first row lies at `source`; rows past the end of its task have length 0.
    """
    for step in tl.range(0, taps * (C // BK), num_stages=1):
        j, feature = step // (C // BK), step % (C // BK) * BK + tl.arange(0, BK)
        shift = j + 1 - taps if CAUSAL else j - taps // 2
        place = position - shift
        there = (place >= 0) & (place < length)
        at = (tl.arange(0, BT) - shift)[:, None] * width + feature[None, :]
        g = tl.load(source + at, mask=there[:, None] & (feature < width)[None, :], other=0.0)
        at_w = j * width * width + feature[:, None] * width + lane[None, :]
        w = tl.load(weight + at_w, mask=(feature < width)[:, None] & (lane < width)[None, :], other=0.0)
        acc = tl.dot(g.to(kind), w.to(kind), acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=["rows", "tasks", "alpha_task", "node"])
def input_backward_kernel(
    h, nodes, dmean, dnodes, alpha, linear, glu, conv3, conv5, positions, lengths, slots, segments, flow, ds,
    rows, tasks, alpha_task, width, node,
    CAUSAL: tl.constexpr, PER_TASK: tl.constexpr, SEGMENTS: tl.constexpr, PRECISION: tl.constexpr, BT: tl.constexpr,
    BK: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The gradient of s0, s1, n0 or n1 (node 0 to 3) [T, C], from the edges that read it and, of n0 and n1, the mean.

    Of n0 and n1 it enters dnodes [3, T, C]; of s0 and s1 it is that of the projection before its relu, and enters ds
    [T, 2 C] in h's dtype.
    """
    task, start, end = owned(tl.program_id(0), segments, tasks, rows, BT, SEGMENTS)
    if start >= end:
        return
    row, lane = start + tl.arange(0, BT), tl.arange(0, C)
    first_row = start.to(tl.int64)
    kind: tl.constexpr = h.dtype.element_ty
    position = tl.load(positions + row, mask=row < end, other=0)
    length = tl.load(lengths + row, mask=row < end, other=0)
    inside = (row < end)[:, None] & (lane < width)[None, :]
    size = width * width
    here = tl.arange(0, BT)[:, None] * width + lane[None, :]
    flow += first_row * width
    in_mean = (row < tl.where(node >= 2, end, 0))[:, None] & (lane < width)[None, :]
    acc = tl.load(dmean + first_row * width + here, mask=in_mean, other=0.0)
    for reader in tl.range(tl.maximum(node - 1, 0), 3, num_stages=1):  # node `reader` reads all nodes before it
        number = reader * (reader + 3) // 2 + node
        edge = number
        if PER_TASK:
            edge += 9 * task
        chosen = alpha + task * alpha_task + number * 6
        own = slots + number * 5
        a = tl.load(chosen + 1)
        if a != 0:
            at = (reader * tl.cast(rows, tl.int64) + first_row) * width
            acc += a * tl.load(dnodes + at + here, mask=inside, other=0.0)
        for map_number in tl.range(0, 5, num_stages=1):
            if tl.load(chosen + operation_of(map_number)) != 0:
                weight, taps = place_of(map_number, edge, linear, glu, conv3, conv5, size)
                source = flow + tl.load(own + map_number) * tl.cast(rows, tl.int64) * width
                acc = through(
                    acc, source, weight, taps, position, length, lane, width, kind, CAUSAL, PRECISION, BT, BK, C,
                )  # fmt: skip
    if node < 2:
        s = tl.load(nodes + (node * tl.cast(rows, tl.int64) + first_row) * width + here, mask=inside, other=0.0)
        place = row.to(tl.int64)[:, None] * (2 * width) + node * width + lane[None, :]
        tl.store(ds + place, tl.where(s > 0, acc, 0.0).to(kind), mask=inside)
    else:
        tl.store(dnodes + ((node - 2) * tl.cast(rows, tl.int64) + first_row) * width + here, acc, mask=inside)


@triton.jit(do_not_specialize=["rows", "tasks", "slot", "source"])
def matrix_gradient_kernel(
    h, nodes, flow, positions, lengths, segments, parts, rows, tasks, slot, source, width,
    SIZE: tl.constexpr, CAUSAL: tl.constexpr, SEGMENTS: tl.constexpr, PRECISION: tl.constexpr, CHUNK: tl.constexpr,
    BT: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """parts[chunk, tap] [C, C] = flow[slot]ᵀ · the rows of node `source` that the tap sees, over one chunk of rows."""
    _, start, end = owned(tl.program_id(0), segments, tasks, rows, CHUNK, SEGMENTS)
    if start >= end:
        return
    lane, tap = tl.arange(0, C), tl.program_id(1)
    kind: tl.constexpr = h.dtype.element_ty
    shift = tap + ((1 - SIZE) if CAUSAL else (1 - SIZE) // 2)
    acc = tl.zeros((C, C), tl.float32)
    whole = tl.cast(rows, tl.int64)
    for t in range(start, tl.minimum(start + CHUNK, end), BT):
        row = t + tl.arange(0, BT)
        inside = (row < end) & (row < start + CHUNK)
        place = tl.load(positions + row, mask=inside, other=0) + shift
        there = inside & (place >= 0) & (place < tl.load(lengths + row, mask=inside, other=0))
        at_g = (slot * whole + row)[None, :] * width + lane[:, None]
        g = tl.load(flow + at_g, mask=inside[None, :] & (lane < width)[:, None], other=0.0)
        at_x = (source * whole + row + shift)[:, None] * width + lane[None, :]
        x = tl.load(nodes + at_x, mask=there[:, None] & (lane < width)[None, :], other=0.0)
        acc = tl.dot(g.to(kind), x.to(kind), acc, input_precision=PRECISION)
    offset = (tl.program_id(0).to(tl.int64) * SIZE + tap) * width * width + lane[:, None] * width + lane[None, :]
    tl.store(parts + offset, acc, mask=(lane < width)[:, None] & (lane < width)[None, :])
