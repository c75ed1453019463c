"""Device functions that the Triton kernels of several operators share: row tiles, dropout's mask, activations."""

import triton
import triton.language as tl


@triton.jit
def owned(tile, segments, tasks, rows, BT: tl.constexpr, SEGMENTS: tl.constexpr):
    """(task, first row, end of the task's rows) of a row tile; first ≥ end for a tile that nobody needs.

    Row tiles never straddle a task. Task i owns tiles ⌊segments[i] / BT⌋ + i and up: that leaves room for the ragged
    ends, is found by bisection, and needs ⌊T / BT⌋ + B tiles whatever the segments are, so nothing waits for the host.
    """
    if SEGMENTS:
        low, high = tasks * 0, tasks
        while high - low > 1:
            half = (low + high) // 2
            start, _ = rows_of_task(half, segments, rows, SEGMENTS)
            mine = start // BT + half <= tile
            low = tl.where(mine, half, low)
            high = tl.where(mine, high, half)
        start, end = rows_of_task(low, segments, rows, SEGMENTS)
        return low, start + (tile - start // BT - low) * BT, end
    else:
        return tasks * 0, tile * BT, rows


@triton.jit
def rows_of_task(task, segments, rows, SEGMENTS: tl.constexpr):
    """(first, end); offsets on a device are not checked, so they are clamped to the rows that exist."""
    if SEGMENTS:
        start = tl.minimum(tl.maximum(tl.load(segments + task).to(tl.int32), 0), rows)
        end = tl.minimum(tl.maximum(tl.load(segments + task + 1).to(tl.int32), 0), rows)
        return start, end
    else:
        return rows * 0, rows


@triton.jit
def lines(index, row, end, total):
    """Where rows [BT] lie in memory: row i is row index[i] of `total`, without index row i.

    An index on a device is not checked, so it is clamped to the rows that exist.
    """
    if index is None:
        return row
    else:
        return tl.minimum(tl.maximum(tl.load(index + row, mask=row < end, other=0), 0), total - 1).to(tl.int32)


@triton.jit
def kept(rows, columns, width, threshold, seed):
    """Which elements [rows, columns] of x [T, width] dropout keeps: the mask of `tarp_kernels.ops.philox`."""
    index = rows.to(tl.int64)[:, None] * width + columns[None, :]
    low = (index & 0xFFFFFFFF).to(tl.uint32)
    high = (index >> 32).to(tl.uint32)
    word, _, _, _ = tl.philox(seed, low, high, low * 0, low * 0)
    return word.to(tl.int64) >= threshold


@triton.jit
def number(value, IN_MEMORY: tl.constexpr):
    """A run-time number, or one that lies on the device, where compiled graphs keep it."""
    if IN_MEMORY:
        return tl.load(value).to(tl.float32)
    else:
        return value


@triton.jit
def vector(pointer, lanes, lanes_end, PRESENT: tl.constexpr):
    """A bias [lanes] as float32, zeros where there is none."""
    if PRESENT:
        return tl.load(pointer + lanes, mask=lanes < lanes_end, other=0.0).to(tl.float32)
    else:
        return tl.zeros_like(lanes).to(tl.float32)


# --- activations: the names of `Generator` ---------------------------------------------------------------------------


@triton.jit
def tanh(v):
    """By the exponential, and near 0, where that cancels, by the series."""
    e = tl.exp(-2 * tl.abs(v))
    far = tl.where(v < 0, -1.0, 1.0) * (1 - e) / (1 + e)
    square = v * v
    near = v * (1 - square * (1 / 3 - square * (2 / 15 - square * (17 / 315))))
    return tl.where(square < 0.01, near, far)


@triton.jit
def activate(g, NAME: tl.constexpr):
    if NAME == "one_plus":
        return g + 1
    elif NAME == "sigmoid":
        return 1 / (1 + tl.exp(-g))
    elif NAME == "tanh":
        return tanh(g)
    elif NAME == "softplus":
        e = tl.exp(-tl.abs(g))
        one = 1 + e
        return tl.maximum(g, 0) + tl.where(one == 1, e, tl.log(one) * (e / tl.where(one == 1, 1.0, one - 1)))
    else:
        return g


@triton.jit
def slope(s, NAME: tl.constexpr):
    """Derivative of `activate` from its value."""
    if NAME == "sigmoid":
        return s * (1 - s)
    elif NAME == "tanh":
        return 1 - s * s
    elif NAME == "softplus":
        return 1 - tl.exp(-s)
    else:
        return s * 0 + 1


@triton.jit
def activate_hidden(u, NAME: tl.constexpr):
    if NAME == "relu":
        return tl.maximum(u, 0)
    elif NAME == "tanh":
        return tanh(u)
    elif NAME == "silu":
        return u / (1 + tl.exp(-u))
    else:
        return 0.5 * u * (1 + tl.erf(u * 0.7071067811865476))


@triton.jit
def hidden_slope(u, NAME: tl.constexpr):
    if NAME == "relu":
        return (u > 0).to(tl.float32)
    elif NAME == "tanh":
        t = tanh(u)
        return 1 - t * t
    elif NAME == "silu":
        gate = 1 / (1 + tl.exp(-u))
        return gate * (1 + u * (1 - gate))
    else:
        density = tl.exp(-0.5 * u * u) * 0.3989422804014327
        return 0.5 * (1 + tl.erf(u * 0.7071067811865476)) + u * density
