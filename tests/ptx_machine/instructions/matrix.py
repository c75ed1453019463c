"""Warp-level matrix instructions: ldmatrix, stmatrix, movmatrix, mma.sync.

Fragment layout of mma.m16n8kK, for a lane with group g = lane // 4 and column c = lane % 4,
where one 32-bit register holds e elements (2 for 16-bit, 1 for tf32, 4 for 8-bit types):

    A register i   row g + 8 * (i % 2),  columns 4e * (i // 2) + e * c ... + e - 1
    B register i   rows 4e * i + e * c ... + e - 1,  column g
    C register i   row g + 8 * (i // 2), column 2 * c + i % 2          (32-bit accumulators)
                   row g + 8 * i, columns 2 * c, 2 * c + 1             (f16 accumulators)
"""

import re

import numpy as np

from ..forms import implements
from ..values import E4M3, E5M2, bf16_to_f32, f16_to_f32, f32_to_f16
from .warp import converge_all, nobody

_AS_TF32 = np.uint32(0xFFFFE000)

# How the bits of an operand become numbers, and the width of an element in bytes.
ELEMENT = {
    "f16": (2, f16_to_f32),
    "bf16": (2, bf16_to_f32),
    "tf32": (4, lambda bits: (bits & _AS_TF32).view(np.float32)),
    "e4m3": (1, lambda bits: E4M3[bits]),
    "e5m2": (1, lambda bits: E5M2[bits]),
    "s8": (1, lambda bits: bits.view(np.int8).astype(np.int32)),
    "u8": (1, lambda bits: bits.astype(np.int32)),
}
_ELEMENT_DTYPE = {1: np.uint8, 2: np.uint16, 4: np.uint32}


def elements_of(bits, kind):
    """Numbers held by 32-bit registers: [..., registers] -> [..., registers, elements per register]."""
    width, convert = ELEMENT[kind]
    parts = np.ascontiguousarray(bits).view(_ELEMENT_DTYPE[width])
    return convert(parts).reshape(*bits.shape, 4 // width)


def _matrix_count(instruction):
    return int(instruction.one_of("x1", "x2", "x4")[1:])


@implements("ldmatrix.sync.aligned.m8n8.{x1|x2|x4}[.trans].{shared|shared::cta}.b16")
def decode_ldmatrix(instruction, binding):
    """Lane 8 j + r gives the address of row r of matrix j; 16 bytes per row."""
    count = _matrix_count(instruction)
    writers = [binding.target(operand) for operand in binding.elements(instruction.operands[0])]
    address = binding.address(instruction.operands[1])

    def execute(machine, active):
        active = converge_all(machine, instruction, active)
        if nobody(active):
            return
        gives = machine.lane_id < 8 * count
        chosen = machine.chosen(active)
        chosen = chosen if count == 4 else chosen[gives[chosen]]
        words = machine.shared.load(machine, instruction, address(machine)[chosen], chosen, 4, 4)
        halves = np.ascontiguousarray(words).view(np.uint16).reshape(-1, count, 8, 8)  # [warp, matrix, row, column]
        if instruction.has("trans"):
            halves = halves.swapaxes(2, 3)
        pairs = np.ascontiguousarray(halves.swapaxes(0, 1)).view(np.uint32).reshape(count, -1)
        machine.report.ldmatrix += pairs.shape[1] // 32
        for write, column in zip(writers, pairs, strict=False):
            write(machine, machine.spread(column, active), active)

    return execute


@implements("stmatrix.sync.aligned.m8n8.{x1|x2|x4}[.trans].{shared|shared::cta}.b16")
def decode_stmatrix(instruction, binding):
    count = _matrix_count(instruction)
    readers = [binding.bits(operand, 4) for operand in binding.elements(instruction.operands[1])]
    address = binding.address(instruction.operands[0])

    def execute(machine, active):
        active = converge_all(machine, instruction, active)
        if nobody(active):
            return
        chosen = machine.chosen(active)
        bits = np.stack([np.broadcast_to(read(machine), machine.lanes)[chosen] for read in readers])
        halves = bits.view(np.uint16).reshape(count, -1, 8, 8)
        if instruction.has("trans"):
            halves = halves.swapaxes(2, 3)
        rows = np.ascontiguousarray(halves.swapaxes(0, 1)).view(np.uint32).reshape(-1, 4)
        givers = chosen[machine.lane_id[chosen] < 8 * count]
        machine.shared.store(machine, instruction, address(machine)[givers], givers, 4, rows)

    return execute


@implements("movmatrix.sync.aligned.m8n8.trans.b16")
def decode_movmatrix(instruction, binding):
    read, write = binding.bits(instruction.operands[1], 4), binding.target(instruction.operands[0])

    def execute(machine, active):
        active = converge_all(machine, instruction, active)
        if nobody(active):
            return
        tiles = np.ascontiguousarray(read(machine)).view(np.uint16).reshape(-1, 8, 8)
        write(machine, np.ascontiguousarray(tiles.swapaxes(1, 2)).view(np.uint32).reshape(-1), active)

    return execute


def _a_matrix(registers, kind):
    """[registers, warps, 32] -> [warps, 16, K]"""
    count, warps, _ = registers.shape
    values = elements_of(registers, kind)
    per = values.shape[-1]
    values = values.reshape(count // 2, 2, warps, 8, 4, per)  # [k block, row half, warp, g, c, element]
    return values.transpose(2, 1, 3, 0, 4, 5).reshape(warps, 16, count // 2 * 4 * per)


def _b_matrix(registers, kind):
    """[registers, warps, 32] -> [warps, K, 8]"""
    count, warps, _ = registers.shape
    values = elements_of(registers, kind)
    per = values.shape[-1]
    values = values.reshape(count, warps, 8, 4, per)  # [k block, warp, g, c, element]
    return values.transpose(1, 0, 3, 4, 2).reshape(warps, count * 4 * per, 8)


def _c_matrix(registers, dtype):
    """[4, warps, 32] accumulators -> [warps, 16, 8]"""
    values = registers.view(dtype).reshape(2, 2, -1, 8, 4)  # [row half, column, warp, g, c]
    return values.transpose(2, 0, 3, 4, 1).reshape(-1, 16, 8)


def _c_registers(matrix):
    values = matrix.reshape(-1, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3)
    return np.ascontiguousarray(values).reshape(4, -1)


@implements(
    "mma.sync.aligned.{m16n8k8|m16n8k16}.row.col.{f32|f16}.f16.f16.{f32|f16}",
    "mma.sync.aligned.{m16n8k8|m16n8k16}.row.col.f32.bf16.bf16.f32",
    "mma.sync.aligned.{m16n8k4|m16n8k8}.row.col.f32.tf32.tf32.f32",
    "mma.sync.aligned.{m16n8k16|m16n8k32}.row.col[.satfinite].s32.{s8|u8}.{s8|u8}.s32",
    "mma.sync.aligned.m16n8k32.row.col.f32.{e4m3|e5m2}.{e4m3|e5m2}.f32",
)
def decode_mma(instruction, binding):
    """A sum of products is rounded once, the same in every row and column; hardware's last bits may differ."""
    result_kind, a_kind, b_kind, c_kind = instruction.modifiers[-4:]
    if instruction.has("satfinite"):
        raise NotImplementedError(f"saturating integer mma: {instruction.text}")
    depth = int(re.search(r"k(\d+)$", instruction.modifiers[2]).group(1))
    writers = [binding.target(operand) for operand in instruction.operands[0].parts]
    vectors = [_as_vector(operand) for operand in instruction.operands[1:4]]
    a, b, c = ([binding.bits(operand, 4) for operand in vector.parts] for vector in vectors)
    accumulator = np.int32 if c_kind == "s32" else np.float32

    def gather(machine, readers):
        registers = [np.broadcast_to(read(machine), machine.lanes) for read in readers]
        return np.stack(registers).reshape(len(readers), -1, 32)

    def execute(machine, active):
        active = converge_all(machine, instruction, active)
        if nobody(active):
            return
        left, right = _a_matrix(gather(machine, a), a_kind), _b_matrix(gather(machine, b), b_kind)
        if accumulator is np.float32:
            left, right = left.astype(np.float64), right.astype(np.float64)
        product = np.matmul(left, right).astype(accumulator)
        addend = gather(machine, c)
        if c_kind == "f16":
            addend = elements_of(addend, "f16").transpose(0, 3, 1, 2).reshape(4, -1, 32)
        total = _c_registers(product + _c_matrix(np.ascontiguousarray(addend), accumulator))
        if result_kind == "f16":
            halves = f32_to_f16(total).astype(np.uint32).reshape(2, 2, -1)
            total = halves[:, 0] | halves[:, 1] << np.uint32(16)
        for write, column in zip(writers, total, strict=False):
            write(machine, column, active)
        executed = int(machine.active_mask(active).reshape(-1, 32).any(axis=1).sum())
        machine.report.mma += executed
        machine.report.mma_flops += executed * 2 * 16 * 8 * depth

    return execute


def _as_vector(operand):
    if operand.kind != "vector":
        raise NotImplementedError(f"mma operand '{operand.text}' must be a vector")
    return operand
