"""setp, set, selp, slct."""

import numpy as np

from ..forms import implements
from ..values import FLOATS, flush_subnormals, pack

_INT_TESTS = "eq|ne|lt|le|gt|ge|lo|ls|hi|hs"
_FLOAT_TESTS = "eq|ne|lt|le|gt|ge|equ|neu|ltu|leu|gtu|geu|num|nan"
_COMPARE = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
    "equ": lambda a, b: ~((a < b) | (a > b)),
    "neu": lambda a, b: ~(a == b),
    "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b),
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
    "nan": lambda a, b: np.isnan(a) | np.isnan(b),
}
_COMBINE = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def _comparison(instruction, kind):
    """Compare function; ``ne`` on floats is the ordered one (false if either is NaN)."""
    name = instruction.modifiers[0]
    if name == "ne" and kind in FLOATS:
        return lambda a, b: (a < b) | (a > b)
    return _COMPARE[name]


@implements(
    f"setp.{{{_INT_TESTS}}}[.and|or|xor].{{b16|u16|s16|b32|u32|s32|b64|u64|s64}}",
    f"setp.{{{_FLOAT_TESTS}}}[.and|or|xor][.ftz].{{f16|bf16|f32|f64}}",
)
def decode_setp(instruction, binding):
    kind = instruction.type
    compare = _comparison(instruction, kind)
    a, b = (binding.value(operand, kind) for operand in instruction.operands[1:3])
    flush = flush_subnormals if instruction.has("ftz") else lambda x: x
    targets = instruction.operands[0].parts or (instruction.operands[0],)
    writers = [binding.target(operand) for operand in targets]
    combine = _COMBINE.get(instruction.one_of(*_COMBINE))
    extra = binding.predicate(instruction.operands[3]) if combine else None

    def execute(machine, active):
        outcome = compare(flush(a(machine)), flush(b(machine)))
        for write, result in zip(writers, (outcome, ~outcome), strict=False):
            write(machine, combine(result, extra(machine)) if combine else result, active)

    return execute


@implements(
    f"set.{{{_INT_TESTS}}}.{{u32|s32|f32}}.{{u32|s32|b32}}",
    f"set.{{{_FLOAT_TESTS}}}[.ftz].{{u32|s32|f32}}.{{f32|f16|bf16}}",
)
def decode_set(instruction, binding):
    kind, result_kind = instruction.type, instruction.modifiers[-2]
    compare = _comparison(instruction, kind)
    a, b = (binding.value(operand, kind) for operand in instruction.operands[1:3])
    write = binding.target(instruction.operands[0])
    true_bits = pack(np.ones(1, np.float32), "f32")[0] if result_kind == "f32" else np.uint32(0xFFFFFFFF)

    def execute(machine, active):
        write(machine, np.where(compare(a(machine), b(machine)), true_bits, np.uint32(0)), active)

    return execute


@implements("selp.{b16|u16|s16|b32|u32|s32|f32|b64|u64|s64|f64}")
def decode_selp(instruction, binding):
    width = int(instruction.type[1:]) // 8
    a, b = (binding.bits(operand, width, instruction.type == "f64") for operand in instruction.operands[1:3])
    choose = binding.predicate(instruction.operands[3])
    write = binding.target(instruction.operands[0])
    return lambda machine, active: write(machine, np.where(choose(machine), a(machine), b(machine)), active)


@implements("slct.{b32|u32|s32|f32|b64|u64|s64|f64}.{s32|f32}")
def decode_slct(instruction, binding):
    width = int(instruction.modifiers[-2][1:]) // 8
    a, b = (binding.bits(operand, width) for operand in instruction.operands[1:3])
    selector = binding.value(instruction.operands[3], instruction.type)
    write = binding.target(instruction.operands[0])
    return lambda machine, active: write(machine, np.where(selector(machine) >= 0, a(machine), b(machine)), active)
