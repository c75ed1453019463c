"""atom and red. Lanes take turns in lane order; memory orders and scopes are accepted and have no effect."""

import numpy as np

from ..forms import implements
from ..values import UNSIGNED, WIDTH, pack, unpack
from .load_store import SPACES, check_vector, state_space

_HINTS = f"relaxed|acquire|release|acq_rel|cta|cluster|gpu|sys|noftz|L2::cache_hint|v2|v4|v8|{SPACES}"
_OPERATIONS = ("add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec")
_FORMS = (
    "{add}.{u32|s32|u64|s64|f32|f64|f16|f16x2|bf16|bf16x2}",
    "{min|max}.{u32|s32|u64|s64|f16|f16x2|bf16|bf16x2}",
    "{and|or|xor|exch}.{b32|b64}",
    "cas.{b16|b32|b64}",
    "{inc|dec}.u32",
)


def _forms(opcode):
    """The operation may stand before or after the hints (vector forms put .v2 in front)."""
    for form in _FORMS:
        operation, types = form.split(".")
        yield f"{opcode}*{{{_HINTS}}}.{operation}*{{{_HINTS}}}.{types}"


_COMPUTE = {
    "add": lambda old, x: old + x,
    "min": np.fmin,
    "max": np.fmax,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "exch": lambda old, x: x,
    "cas": lambda old, compare, x: np.where(old == compare, x, old),
    "inc": lambda old, x: np.where(old >= x, np.uint32(0), old + np.uint32(1)),
    "dec": lambda old, x: np.where((old == 0) | (old > x), x, old - np.uint32(1)),
}


def _update(view, index, operands, kind, compute):
    """Read, modify and write one element; returns its old bits."""
    old = view[index : index + 1].copy()
    result = compute(unpack(old, kind), *[unpack(operand, kind) for operand in operands])
    view[index] = pack(result, kind)[0]
    return old[0]


@implements(*_forms("atom"), *_forms("red"))
def decode_atomic(instruction, binding):
    kind, space = instruction.type, state_space(instruction)
    operation = instruction.one_of(*_OPERATIONS)
    returns = instruction.opcode == "atom"
    operands = instruction.operands if returns else (None, *instruction.operands)
    width, compute = WIDTH[kind], _COMPUTE[operation]
    address = binding.address(operands[1])
    values = operands[2:4] if operation == "cas" else operands[2:3]
    elements = list(zip(*[check_vector(instruction, operand, binding) for operand in values], strict=False))
    readers = [[binding.bits(operand, width) for operand in element] for element in elements]
    writers = [binding.target(operand) for operand in binding.elements(operands[0])] if returns else []

    def execute(machine, active):
        chosen = machine.chosen(active)
        where, addresses = machine.resolve_space(space, address(machine)[chosen])
        locate = _global_elements if where == "global" else _shared_elements
        places = locate(machine, instruction, addresses, chosen, width, len(readers))
        old = np.zeros((machine.lanes, len(readers)), UNSIGNED[width])
        columns = [[np.broadcast_to(read(machine), machine.lanes) for read in element] for element in readers]
        for lane, view, index in places:
            for position, column in enumerate(columns):
                arguments = [values[lane : lane + 1] for values in column]
                old[lane, position] = _update(view, index + position, arguments, kind, compute)
        machine.report.atomics += chosen.size
        for position, write in enumerate(writers):
            write(machine, np.ascontiguousarray(old[:, position]), active)

    return execute


def _global_elements(machine, instruction, addresses, lanes, width, count):
    machine.count_global(instruction, addresses, lanes, width * count, is_store=True)
    for chosen, buffer, offsets in machine.memory.resolve(machine, instruction, addresses, lanes, width * count):
        if (offsets % width).any():
            raise NotImplementedError(f"atomics on a buffer that is not aligned to its elements: {instruction.text}")
        inside = lanes if chosen is None else lanes[chosen]
        for lane, offset in zip(inside, offsets, strict=False):
            yield int(lane), buffer.views[width], int(offset) // width


def _shared_elements(machine, instruction, addresses, lanes, width, count):
    """Atomics are recorded as reads: they do not race with each other, only with plain stores."""
    machine.count_shared(instruction, addresses, lanes, width * count, is_store=True)
    kept, physical = machine.shared.locate(machine, instruction, addresses, lanes, width * count)
    lanes = lanes if kept is None else lanes[kept]
    if lanes.size:
        machine.shared.note_read(machine, instruction, physical, lanes, width * count)
    for lane, offset in zip(lanes, physical, strict=False):
        yield int(lane), machine.shared.views[width], int(offset) // width
