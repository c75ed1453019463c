"""wgmma: 128 threads multiply tiles that lie in shared memory (sm_90a).

A shared-memory descriptor (64 bits) holds, in units of 16 bytes: start address (bits 0-13),
leading byte offset (16-29), stride byte offset (32-45), and the swizzle mode (62-63: none,
128, 64, 32 bytes). A tile is made of core matrices of 8 rows x 16 bytes; swizzling XORs address bits
4-6 with bits 7-9 (as many as the mode covers).

Execution is synchronous: a missing wgmma.wait_group before the accumulators are read, or a
shared buffer reused too early, stays invisible.
"""

import re

import numpy as np

from ..forms import implements
from .matrix import ELEMENT, elements_of
from .warp import converge_all, nobody

_SWIZZLE_BYTES = {0: 16, 1: 128, 2: 64, 3: 32}
_N = "|".join(f"m64n{n}" + "{k}" for n in range(8, 257, 8))


def _shapes(depth):
    return _N.replace("{k}", f"k{depth}")


def operand_offsets(descriptor, rows, depth, width, k_is_outer):
    """Shared byte offset of every element [rows, depth] (rows are M of A or N of B).

    ``k_is_outer`` is the transposed ("MN-major") layout: neighbouring rows are contiguous.
    """
    start = (descriptor & 0x3FFF) << 4
    leading = (descriptor >> 16 & 0x3FFF) << 4
    stride = (descriptor >> 32 & 0x3FFF) << 4
    mode = descriptor >> 62 & 3
    span = _SWIZZLE_BYTES[mode]
    row, k = np.arange(rows)[:, None], np.arange(depth)[None, :]
    if k_is_outer:
        per_span = span // width
        offsets = start + row // per_span * leading + k // 8 * stride + k % 8 * span + row % per_span * width
    elif mode:
        offsets = start + row // 8 * stride + row % 8 * span + k * width
    else:
        per_core = 16 // width
        offsets = start + row // 8 * stride + row % 8 * 16 + k // per_core * leading + k % per_core * width
    if mode:
        offsets = offsets ^ ((offsets >> 7 & (span // 16 - 1)) << 4)
    return offsets


def _load_tile(machine, instruction, descriptor, group, rows, depth, kind, k_is_outer):
    """The tile as numbers, after bounds, initialisation and race checks for the four warps."""
    width, convert = ELEMENT[kind]
    lanes = group * 128 + 32 * np.arange(4)
    offsets = operand_offsets(descriptor, rows, depth, width, k_is_outer)
    chunks = np.unique(offsets & ~15)
    everyone = np.repeat(lanes, chunks.size)
    kept, physical = machine.shared.locate(machine, instruction, np.tile(chunks, 4), everyone, 16)
    if kept is not None:
        return np.full((rows, depth), np.nan, np.float32)
    machine.shared.note_read(machine, instruction, physical, everyone, 16)
    base = int(machine.shared_base[lanes[0]])
    return convert(machine.shared.views[width][(offsets + base) // width])


def _register_tile(machine, readers, group, kind):
    """A from registers: the m16 fragments of the four warps stacked."""
    lanes = slice(group * 128, group * 128 + 128)
    bits = np.stack([np.broadcast_to(read(machine), machine.lanes)[lanes] for read in readers])
    values = elements_of(bits.reshape(len(readers), 4, 32), kind)
    per = values.shape[-1]
    values = values.reshape(len(readers) // 2, 2, 4, 8, 4, per)  # [k block, row half, warp, g, c, element]
    return values.transpose(2, 1, 3, 0, 4, 5).reshape(64, -1)


def _accumulator_registers(matrix):
    """[64, N] -> [N // 2 registers, 128 lanes]; the layout of mma.sync, warp w owning rows 16 w ..."""
    values = matrix.reshape(4, 2, 8, -1, 4, 2)  # [warp, row half, g, column block, c, column]
    return values.transpose(3, 1, 5, 0, 2, 4).reshape(-1, 128)


@implements(
    f"wgmma.mma_async.sync.aligned.{{{_shapes(16)}}}.f32.f16.f16",
    f"wgmma.mma_async.sync.aligned.{{{_shapes(16)}}}.f32.bf16.bf16",
    f"wgmma.mma_async.sync.aligned.{{{_shapes(8)}}}.f32.tf32.tf32",
    f"wgmma.mma_async.sync.aligned.{{{_shapes(32)}}}.f32.{{e4m3|e5m2}}.{{e4m3|e5m2}}",
)
def decode_wgmma(instruction, binding):
    columns, depth = (int(n) for n in re.search(r"n(\d+)k(\d+)", instruction.modifiers[3]).groups())
    a_kind, b_kind = instruction.modifiers[-2:]
    accumulators = instruction.operands[0].parts
    readers = [binding.value(operand, "f32") for operand in accumulators]
    writers = [binding.target(operand) for operand in accumulators]
    a_operand, b_operand, scale_d, *literals = instruction.operands[1:]
    scale_a, scale_b, *transposed = (binding.constant(operand) for operand in literals)
    a_in_registers = a_operand.kind == "vector"
    transpose_a = bool(transposed[0]) if len(transposed) == 2 else False
    transpose_b = bool(transposed[-1]) if transposed else False
    a_readers = [binding.bits(operand, 4) for operand in a_operand.parts]
    a_descriptor = None if a_in_registers else binding.bits(a_operand, 8)
    b_descriptor, keep = binding.bits(b_operand, 8), binding.predicate(scale_d)

    def one_group(machine, group):
        first = group * 128
        if a_in_registers:
            a = _register_tile(machine, a_readers, group, a_kind)
        else:
            descriptor = int(a_descriptor(machine)[first])
            a = _load_tile(machine, instruction, descriptor, group, 64, depth, a_kind, transpose_a)
        descriptor = int(b_descriptor(machine)[first])
        b = _load_tile(machine, instruction, descriptor, group, columns, depth, b_kind, transpose_b)
        return _accumulator_registers((a @ b.T) * np.float32(scale_a * scale_b))

    def execute(machine, active):
        active = converge_all(machine, instruction, active)
        if nobody(active):
            return
        if machine.padded % 128:
            raise NotImplementedError("wgmma needs blocks of whole warpgroups (128 threads)")
        groups = np.unique(machine.chosen(active) // 128)
        product = np.zeros((len(writers), machine.lanes), np.float32)
        for group in groups:
            product[:, group * 128 : group * 128 + 128] = one_group(machine, int(group))
        kept = keep(machine)
        for read, write, added in zip(readers, writers, product, strict=False):
            write(machine, added + np.where(kept, read(machine), np.float32(0)), active)
        machine.report.wgmma += groups.size
        machine.report.mma_flops += groups.size * 2 * 64 * columns * depth

    return execute


@implements("wgmma.{fence|commit_group}.sync.aligned", "wgmma.wait_group.sync.aligned")
def decode_wgmma_sync(instruction, binding):
    return lambda machine, active: None
