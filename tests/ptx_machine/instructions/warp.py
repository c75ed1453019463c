"""Exchange between the lanes of a warp: shfl, vote, match, redux, elect, activemask, bar.warp."""

import numpy as np

from ..forms import implements
from ..values import SIGNED, UNSIGNED, WIDTH, pack, unpack

_BITS = np.uint64(1) << np.arange(32, dtype=np.uint64)
_SHIFTS = np.arange(32, dtype=np.uint32)
_EVERY_LANE = np.uint32(0xFFFFFFFF)


def lane_bits(mask):
    """One 32-bit lane mask per warp from a bool per lane."""
    return (mask.reshape(-1, 32) * _BITS).sum(axis=1, dtype=np.uint64).astype(np.uint32)


def converge(machine, instruction, active, membermask):
    """Lanes that may execute a .sync instruction now: those whose named partners are all here.

    Lanes whose partners still wait elsewhere (at an mbarrier, say) are suspended until those come;
    partners that have gone another way are a fault.
    """
    if active is None:
        return None
    warp_mask = np.bitwise_or.reduce(np.where(active, membermask, np.uint32(0)).reshape(-1, 32), axis=1)
    named = ((warp_mask[:, None] >> _SHIFTS) & 1).astype(bool).ravel()
    missing = named & machine.living() & ~active
    if not missing.any():
        return active
    late = missing & machine.suspended()
    if late.any():
        hold = active & np.repeat(late.reshape(-1, 32).any(axis=1), 32)
        machine.wait_for_partners(hold)
        active = active & ~hold
        missing &= np.repeat(active.reshape(-1, 32).any(axis=1), 32)
    if missing.any():
        lane = int(np.nonzero(missing)[0][0])
        machine.fault("divergent warp", instruction, lane, "a lane that must take part is not here")
    return active


def converge_all(machine, instruction, active):
    """The same for .aligned instructions, which need every lane of the warp."""
    return converge(machine, instruction, active, _EVERY_LANE)


def nobody(active):
    return active is not None and not active.any()


@implements("shfl.sync.{up|down|bfly|idx}.b32")
def decode_shfl(instruction, binding):
    mode = instruction.modifiers[1]
    targets = instruction.operands[0].parts or (instruction.operands[0],)
    writers = [binding.target(operand) for operand in targets]
    value, distance, clamp, members = (binding.bits(operand, 4) for operand in instruction.operands[1:5])

    def execute(machine, active):
        membermask = members(machine)
        active = converge(machine, instruction, active, membermask)
        if nobody(active):
            return
        lane = machine.lane_id.astype(np.int64)
        shift, packed = distance(machine).astype(np.int64) & 31, clamp(machine).astype(np.int64)
        segment = (packed >> 8) & 31
        limit = (lane & segment) | (packed & 31 & ~segment)
        if mode == "up":
            source = lane - shift
            valid = source >= limit
        else:
            source = {"down": lane + shift, "bfly": lane ^ shift, "idx": (lane & segment) | (shift & ~segment)}[mode]
            valid = source <= limit
        source = machine.all_lanes - lane + np.where(valid, source, lane)
        if active is not None and (~active[source] & active & valid & machine.exists[source]).any():
            lane = int(np.nonzero(~active[source] & active & valid)[0][0])
            machine.fault("divergent warp", instruction, lane, "reads the register of an inactive lane")
        values = np.broadcast_to(value(machine), machine.lanes)
        for write, result in zip(writers, (values[source], np.broadcast_to(valid, machine.lanes)), strict=False):
            write(machine, result, active)

    return execute


@implements("vote.sync.{all|any|uni}.pred", "vote.sync.ballot.b32")
def decode_vote(instruction, binding):
    mode = instruction.modifiers[1]
    predicate, members = binding.predicate(instruction.operands[1]), binding.bits(instruction.operands[2], 4)
    write = binding.target(instruction.operands[0])

    def execute(machine, active):
        active = converge(machine, instruction, active, members(machine))
        if nobody(active):
            return
        here = machine.active_mask(active) & machine.exists
        votes = np.broadcast_to(predicate(machine), machine.lanes) & here
        rows, present = votes.reshape(-1, 32), here.reshape(-1, 32)
        if mode == "ballot":
            result = lane_bits(votes)
        elif mode == "any":
            result = rows.any(axis=1)
        else:
            result = (rows == present).all(axis=1)
            if mode == "uni":
                result |= ~rows.any(axis=1)
        write(machine, np.repeat(result, 32), active)

    return execute


@implements("match.any.sync.{b32|b64}")
def decode_match(instruction, binding):
    value = binding.bits(instruction.operands[1], WIDTH[instruction.type])
    members, write = binding.bits(instruction.operands[2], 4), binding.target(instruction.operands[0])

    def execute(machine, active):
        active = converge(machine, instruction, active, members(machine))
        if nobody(active):
            return
        here = (machine.active_mask(active) & machine.exists).reshape(-1, 32)
        rows = np.broadcast_to(value(machine), machine.lanes).reshape(-1, 32)
        equal = (rows[:, :, None] == rows[:, None, :]) & here[:, None, :]
        write(machine, (equal * _BITS).sum(axis=2, dtype=np.uint64).astype(np.uint32).ravel(), active)

    return execute


@implements("activemask.b32")
def decode_activemask(instruction, binding):
    write = binding.target(instruction.operands[0])

    def execute(machine, active):
        write(machine, np.repeat(lane_bits(machine.active_mask(active) & machine.exists), 32), active)

    return execute


_REDUCE = {"add": np.add, "min": np.minimum, "max": np.maximum}
_REDUCE.update({"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor})


@implements("redux.sync.{add|min|max}.{u32|s32}", "redux.sync.{and|or|xor}.b32", "redux.sync.{min|max}[.NaN].f32")
def decode_redux(instruction, binding):
    kind, operation = instruction.type, instruction.modifiers[1]
    value, members = binding.bits(instruction.operands[1], 4), binding.bits(instruction.operands[2], 4)
    write = binding.target(instruction.operands[0])
    combine = _REDUCE[operation]
    if kind == "f32" and not instruction.has("NaN"):
        combine = {"min": np.fmin, "max": np.fmax}[operation]

    def execute(machine, active):
        active = converge(machine, instruction, active, members(machine))
        if nobody(active):
            return
        here = (machine.active_mask(active) & machine.exists).reshape(-1, 32)
        rows = unpack(np.ascontiguousarray(np.broadcast_to(value(machine), machine.lanes)), kind).reshape(-1, 32)
        result = np.zeros(machine.lanes, UNSIGNED[4])
        for warp in np.nonzero(here.any(axis=1))[0]:
            total = combine.reduce(rows[warp][here[warp]])
            dtype = np.float32 if kind == "f32" else SIGNED[4] if kind[0] == "s" else UNSIGNED[4]
            result[32 * warp : 32 * warp + 32] = pack(np.array([total]).astype(dtype), kind)
        write(machine, result, active)

    return execute


@implements("elect.sync")
def decode_elect(instruction, binding):
    """The lowest lane of the member mask is elected."""
    targets = instruction.operands[0].parts
    leader_writer, elected_writer = (binding.target(operand) for operand in targets)
    members = binding.bits(instruction.operands[1], 4)

    def execute(machine, active):
        membermask = members(machine)
        active = converge(machine, instruction, active, membermask)
        if nobody(active):
            return
        here = machine.active_mask(active) & machine.exists
        leader = np.repeat(np.argmax(here.reshape(-1, 32), axis=1), 32).astype(np.uint32)
        leader_writer(machine, leader, active)
        elected_writer(machine, leader == machine.lane_id, active)

    return execute


@implements("bar.warp.sync")
def decode_warp_sync(instruction, binding):
    """Lanes of a warp are always ordered here; only the convergence is checked."""
    members = binding.bits(instruction.operands[0], 4)
    return lambda machine, active: converge(machine, instruction, active, members(machine))
