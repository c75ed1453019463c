"""Integer arithmetic."""

import numpy as np

from ..forms import implements
from ..values import SIGNED, UNSIGNED, WIDTH

_INTS = "u16|s16|u32|s32|u64|s64"
_BITS = "pred|b16|b32|b64"


def elementwise(instruction, binding, compute):
    """destination = compute(*sources), all of the instruction's type."""
    kind = instruction.type
    sources = [binding.value(operand, kind) for operand in instruction.operands[1:]]
    write = binding.result(instruction.operands[0], kind)

    def execute(machine, active):
        write(machine, compute(*[read(machine) for read in sources]), active)

    return execute


def _simple(form, compute):
    @implements(form)
    def decode(instruction, binding):
        return elementwise(instruction, binding, compute)


_simple(f"add.{{{_INTS}}}", np.add)
_simple(f"sub.{{{_INTS}}}", np.subtract)
_simple(f"mul.lo.{{{_INTS}}}", np.multiply)
_simple(f"min.{{{_INTS}}}", np.minimum)
_simple(f"max.{{{_INTS}}}", np.maximum)
_simple("abs.{s16|s32|s64}", np.abs)
_simple("neg.{s16|s32|s64}", np.negative)
_simple("sad.{u16|s16|u32|s32|u64|s64}", lambda a, b, c: c + (np.maximum(a, b) - np.minimum(a, b)))
_simple(f"mad.lo.{{{_INTS}}}", lambda a, b, c: a * b + c)


@implements("add.sat.s32", "sub.sat.s32")
def decode_saturating(instruction, binding):
    sign = 1 if instruction.opcode == "add" else -1
    limits = np.iinfo(np.int32)
    return elementwise(
        instruction,
        binding,
        lambda a, b: np.clip(a.astype(np.int64) + sign * b.astype(np.int64), limits.min, limits.max),
    )


def _divide(numerator, denominator):
    """Truncating division; division by zero gives all ones, as the hardware does."""
    if numerator.dtype.kind == "u":
        quotient = numerator // np.where(denominator == 0, 1, denominator)
        return np.where(denominator == 0, np.iinfo(numerator.dtype).max, quotient).astype(numerator.dtype)
    safe = np.where(denominator == 0, 1, denominator)
    floor = numerator // safe
    inexact = (floor * safe != numerator) & ((numerator < 0) != (safe < 0))
    return np.where(denominator == 0, -1, floor + inexact).astype(numerator.dtype)


@implements(f"div.{{{_INTS}}}")
def decode_div(instruction, binding):
    return elementwise(instruction, binding, _divide)


@implements(f"rem.{{{_INTS}}}")
def decode_rem(instruction, binding):
    return elementwise(instruction, binding, lambda a, b: np.where(b == 0, a, a - _divide(a, b) * b))


def multiply_high(a, b):
    """Upper half of the double-width product."""
    width = a.dtype.itemsize
    if width < 8:
        wide = (SIGNED if a.dtype.kind == "i" else UNSIGNED)[2 * width]
        return ((a.astype(wide) * b.astype(wide)) >> wide(8 * width)).astype(a.dtype)
    a, b = np.broadcast_arrays(a, b)
    product = [(int(x) * int(y)) >> 64 for x, y in zip(a, b, strict=False)]
    return np.array([value & (2**64 - 1) for value in product], np.uint64).view(a.dtype)


@implements("mul.hi.{u16|s16|u32|s32|u64|s64}")
def decode_mul_high(instruction, binding):
    return elementwise(instruction, binding, multiply_high)


@implements("mad.hi.{u32|s32|u64|s64}")
def decode_mad_high(instruction, binding):
    return elementwise(instruction, binding, lambda a, b, c: multiply_high(a, b) + c)


@implements("mul.wide.{u16|s16|u32|s32}", "mad.wide.{u16|s16|u32|s32}")
def decode_wide(instruction, binding):
    kind = instruction.type
    wide = f"{kind[0]}{16 * WIDTH[kind]}"
    dtype = (SIGNED if kind[0] == "s" else UNSIGNED)[2 * WIDTH[kind]]
    a, b = (binding.value(operand, kind) for operand in instruction.operands[1:3])
    write = binding.result(instruction.operands[0], wide)
    if instruction.opcode == "mul":
        return lambda machine, active: write(machine, a(machine).astype(dtype) * b(machine).astype(dtype), active)
    c = binding.value(instruction.operands[3], wide)

    def execute(machine, active):
        write(machine, a(machine).astype(dtype) * b(machine).astype(dtype) + c(machine), active)

    return execute


@implements("mul24.lo.{u32|s32}", "mad24.lo.{u32|s32}")
def decode_mul24(instruction, binding):
    def low24(values):
        shift = values.dtype.type(8)
        return (values << shift) >> shift

    return elementwise(instruction, binding, lambda a, b, c=0: low24(a) * low24(b) + c)


@implements(
    "add.cc.{u32|s32|u64|s64}",
    "addc[.cc].{u32|s32|u64|s64}",
    "sub.cc.{u32|s32|u64|s64}",
    "subc[.cc].{u32|s32|u64|s64}",
    "mad.lo.cc.{u32|s32}",
    "mad.hi.cc.{u32|s32}",
    "madc.lo[.cc].{u32|s32}",
    "madc.hi[.cc].{u32|s32}",
)
def decode_carry(instruction, binding):
    """Extended precision: the carry flag is one bool per lane; for subtraction it is the borrow."""
    kind = instruction.type
    unsigned = f"u{8 * WIDTH[kind]}"
    sources = [binding.value(operand, unsigned) for operand in instruction.operands[1:]]
    if instruction.has("hi") and kind[0] == "s":
        raise NotImplementedError(f"signed high products with carry: {instruction.text}")
    write = binding.result(instruction.operands[0], unsigned)
    carry_in = instruction.opcode.endswith("c") and instruction.opcode != "cc"
    subtract = instruction.opcode.startswith("sub")
    multiply = instruction.opcode.startswith("mad")
    high = instruction.has("hi")

    def execute(machine, active):
        a, b, *rest = np.broadcast_arrays(*[read(machine) for read in sources], machine.lane_id)[:-1]
        if multiply:
            a, b = (multiply_high(a, b) if high else a * b), rest[0]
        carry = machine.carry.astype(a.dtype) if carry_in else np.zeros_like(a)
        if subtract:
            result = a - b - carry
            flag = (a < b) | ((a == b) & (carry > 0))
        else:
            partial = a + b
            result = partial + carry
            flag = (partial < a) | (result < partial)
        if instruction.has("cc"):
            machine.carry = np.where(machine.active_mask(active), flag, machine.carry)
        write(machine, result, active)

    return execute


_simple(f"and.{{{_BITS}}}", np.bitwise_and)
_simple(f"or.{{{_BITS}}}", np.bitwise_or)
_simple(f"xor.{{{_BITS}}}", np.bitwise_xor)
_simple(f"not.{{{_BITS}}}", np.invert)
_simple("cnot.{b16|b32|b64}", lambda a: (a == 0).astype(a.dtype))
