"""ld and st in all state spaces."""

import numpy as np

from ..forms import implements
from ..values import SIGNED, UNSIGNED, WIDTH

SPACES = "global|shared|shared::cta|local|const|param|param::entry"
_HINTS = (
    "weak|relaxed|acquire|release|volatile|cta|cluster|gpu|sys|nc|ca|cg|cs|lu|cv|wb|wt|"
    "L1::evict_normal|L1::evict_unchanged|L1::evict_first|L1::evict_last|L1::no_allocate|"
    "L2::evict_normal|L2::evict_first|L2::evict_last|L2::cache_hint|L2::64B|L2::128B|L2::256B"
)
_TYPES = "b8|u8|s8|b16|u16|s16|b32|u32|s32|f32|b64|u64|s64|f64"


def state_space(instruction):
    """global, shared, local, const, param, or None for generic addresses."""
    space = instruction.one_of(*SPACES.split("|"))
    return space.split("::")[0] if space else None


def check_vector(instruction, operand, binding):
    """Elements of a vector operand; their number must be what .v2/.v4/.v8 says."""
    elements = binding.elements(operand)
    said = int((instruction.one_of("v2", "v4", "v8") or "v1")[1:])
    if len(elements) != said:
        raise NotImplementedError(f"{len(elements)} registers for .v{said}: {instruction.text}")
    return elements


@implements(f"ld*{{{_HINTS}|{SPACES}|v2|v4|v8}}.{{{_TYPES}}}")
def decode_load(instruction, binding):
    kind, space = instruction.type, state_space(instruction)
    width = WIDTH[kind]
    writers = [binding.target(operand) for operand in check_vector(instruction, instruction.operands[0], binding)]
    count = len(writers)
    if space == "param":
        return _load_param(instruction, binding, writers, kind)
    address = binding.address(instruction.operands[1])
    signed = SIGNED[width] if kind[0] == "s" else UNSIGNED[width]

    def execute(machine, active):
        chosen = machine.chosen(active)
        where, addresses = machine.resolve_space(space, address(machine)[chosen])
        data = machine.space_memory(where).load(machine, instruction, addresses, chosen, width, count)
        columns = np.ascontiguousarray(data.T).view(signed)
        for write, column in zip(writers, columns, strict=False):
            write(machine, machine.spread(column, active), active)

    return execute


def _load_param(instruction, binding, writers, kind):
    operand, width = instruction.operands[1], WIDTH[kind]
    if operand.base not in binding.param_offsets:
        raise NotImplementedError(f"indirect parameter access: {instruction.text}")
    first = binding.param_offsets[operand.base] + operand.offset
    dtype = SIGNED[width] if kind[0] == "s" else UNSIGNED[width]
    if first % width:
        raise NotImplementedError(f"misaligned parameter access: {instruction.text}")

    def execute(machine, active):
        for position, write in enumerate(writers):
            index = first // width + position
            write(machine, machine.params[width][index : index + 1].view(dtype), active)

    return execute


@implements(f"st*{{{_HINTS}|{SPACES}|v2|v4|v8}}.{{{_TYPES}}}")
def decode_store(instruction, binding):
    kind, space = instruction.type, state_space(instruction)
    width = WIDTH[kind]
    elements = check_vector(instruction, instruction.operands[1], binding)
    readers = [binding.bits(operand, width, kind == "f64") for operand in elements]
    address = binding.address(instruction.operands[0])

    def execute(machine, active):
        chosen = machine.chosen(active)
        where, addresses = machine.resolve_space(space, address(machine)[chosen])
        data = np.empty((chosen.size, len(readers)), UNSIGNED[width])
        for column, read in enumerate(readers):
            values = read(machine)
            data[:, column] = values if values.shape[0] == 1 or active is None else values[chosen]
        machine.space_memory(where).store(machine, instruction, addresses, chosen, width, data)

    return execute
