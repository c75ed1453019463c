"""SIMT execution: one numpy lane per thread, several CTAs side by side.

All lanes that share a program counter advance together, whatever their warp; among several
program counters the lowest goes first, which reconverges structured control flow. Lanes wait
at barriers individually, so named barriers, producer and consumer warps and early exits work.
Lanes that spin in a loop while others could run are set aside for a while (no fairness is
lost and flag waits make progress).
"""

import numpy as np

from .access_patterns import global_sectors, shared_wavefronts
from .barriers import Barriers
from .memory import LOCAL_WINDOW, SHARED_WINDOW, LocalMemory, SharedMemory
from .values import UNSIGNED

_FAR = 1 << 40
_SPIN_LIMIT = 2000  # backward jumps of a part of the lanes before the others get a turn


class Deadlock(RuntimeError):
    """Every living thread waits for something that cannot happen any more."""


class Step:
    """A decoded instruction."""

    __slots__ = ("execute", "guard", "instruction")

    def __init__(self, instruction, execute, guard):
        self.instruction, self.execute, self.guard = instruction, execute, guard


class Machine:
    """Runs the CTAs ``blocks`` of one launch to completion, together."""

    def __init__(self, launch, blocks):
        self.launch, self.program, self.report = launch, launch.program, launch.report
        self.memory, self.params, self.param_base = launch.memory, launch.param_views, launch.param_base
        self.blocks = blocks
        block = launch.block
        self.threads = block[0] * block[1] * block[2]
        self.warps_per_cta = -(-self.threads // 32)
        self.padded = 32 * self.warps_per_cta
        self.lanes = len(blocks) * self.padded
        self.warps = self.lanes // 32
        self.all_lanes = np.arange(self.lanes)
        self.lane_id = (self.all_lanes % 32).astype(np.uint32)
        self.cta_of_lane = self.all_lanes // self.padded
        thread = self.all_lanes % self.padded
        self.exists = thread < self.threads
        self._specials = self._special_registers(thread, block)
        self.shared = SharedMemory(
            len(blocks),
            self.warps_per_cta,
            launch.shared_bytes,
            launch.program.shared_cell,
            launch.poison,
            launch.check_races,
        )
        self.shared_base = self.cta_of_lane * self.shared.stride
        self.local = LocalMemory(self.lanes, launch.kernel.local_bytes)
        self.registers = self._fresh_registers()
        self.barriers = Barriers(self)
        self.async_copies, self.copy_groups = [], np.zeros(self.lanes, np.int64)
        self.carry = np.zeros(self.lanes, bool)  # the condition code register CC.CF
        self.issued = np.zeros(len(self.program.steps) + 1, np.int64)
        self.pc = np.where(self.exists, 0, len(self.program.steps))
        self.blocked = np.zeros(self.lanes, bool)
        self.parked = np.zeros(self.lanes, bool)
        self._waits_for_partners = np.zeros(self.lanes, bool)
        self._blocked_at = np.zeros(self.lanes, np.int64)
        self._spins = 0

    def _special_registers(self, thread, block):
        as_lanes = {"tid": (thread % block[0], thread // block[0] % block[1], thread // (block[0] * block[1]))}
        indices = np.array(self.blocks)[self.cta_of_lane]
        as_lanes["ctaid"] = as_lanes["clusterid"] = tuple(indices.T)
        for name, extents in (("ntid", block), ("nctaid", self.launch.grid), ("nclusterid", self.launch.grid)):
            as_lanes[name] = tuple(np.full(self.lanes, extent) for extent in extents)
        for name, number in (("cluster_ctaid", 0), ("cluster_nctaid", 1)):
            as_lanes[name] = tuple(np.full(self.lanes, number) for _ in "xyz")
        table = {
            f"%{name}.{axis}": v for name, vectors in as_lanes.items() for axis, v in zip("xyz", vectors, strict=False)
        }
        table["%laneid"], table["%warpid"] = self.lane_id, thread // 32
        table["%nwarpid"] = np.full(self.lanes, self.warps_per_cta)
        for name in ("%clock", "%clock64", "%globaltimer", "%smid", "%cluster_ctarank", "%gridid"):
            table[name] = np.zeros(self.lanes, np.uint64)
        table["%cluster_nctarank"] = table["%nsmid"] = np.ones(self.lanes, np.uint32)
        bit = np.uint64(1) << self.lane_id.astype(np.uint64)
        table["%lanemask_eq"], table["%lanemask_lt"] = bit, bit - np.uint64(1)
        table["%lanemask_le"] = (bit << np.uint64(1)) - np.uint64(1)
        table["%lanemask_ge"] = np.uint64(0xFFFFFFFF) - table["%lanemask_lt"]
        table["%lanemask_gt"] = np.uint64(0xFFFFFFFF) - table["%lanemask_le"]
        return {name: np.ascontiguousarray(values).astype(np.uint64) for name, values in table.items()}

    def _fresh_registers(self):
        fill = {width: np.full(self.lanes, self.poison_value(width), dtype) for width, dtype in UNSIGNED.items()}
        fill[0] = np.zeros(self.lanes, bool)
        return [fill[width] for width in self.program.widths]

    # ---- services for instruction handlers

    def poison_value(self, width):
        return np.iinfo(UNSIGNED[width]).max if self.launch.poison else 0

    def special(self, name):
        try:
            return self._specials[name]
        except KeyError:
            raise NotImplementedError(f"special register '{name}'") from None

    def variable_address(self, name):
        variable = self.launch.kernel.variables[name]
        return variable.offset if variable.space in ("shared", "local") else self.launch.variable_bases[name]

    def set_register(self, slot, values, active):
        """Arrays are shared between registers, so they are replaced and never changed in place."""
        if active is None:
            self.registers[slot] = values if values.shape[0] == self.lanes else np.repeat(values, self.lanes)
        else:
            self.registers[slot] = np.where(active, values, self.registers[slot])

    def chosen(self, active):
        return self.all_lanes if active is None else np.nonzero(active)[0]

    def active_mask(self, active):
        return np.ones(self.lanes, bool) if active is None else active

    def living(self):
        return self.exists & (self.pc < len(self.program.steps))

    def spread(self, compact, active):
        """Values of the chosen lanes only, back to one value per lane."""
        if active is None:
            return compact
        full = np.zeros((self.lanes, *compact.shape[1:]), compact.dtype)
        full[active] = compact
        return full

    def resolve_space(self, space, addresses):
        """Replace generic addresses by (space, address inside that space)."""
        if space is not None:
            return space, addresses
        for name, window in (("shared", SHARED_WINDOW), ("local", LOCAL_WINDOW)):
            inside = (addresses >= window) & (addresses < window + (1 << 32))
            if inside.all() and inside.size:
                return name, addresses - window
            if inside.any():
                raise NotImplementedError("one generic access that mixes shared and other memory")
        return "global", addresses

    def space_memory(self, space):
        return {"global": self.memory, "const": self.memory, "shared": self.shared, "local": self.local}[space]

    def fault(self, kind, instruction, lane, detail):
        slot, thread = divmod(int(lane), self.padded)
        self.report.fault(kind, instruction, f"{detail}; block {tuple(self.blocks[slot])}, thread {thread}")

    def count_global(self, instruction, addresses, lanes, size, is_store):
        requests, sectors = global_sectors(addresses, lanes // 32, size)
        report, nbytes = self.report, lanes.size * size
        if is_store:
            report.global_store_bytes += nbytes
            report.global_store_sectors += sectors
        else:
            report.global_load_bytes += nbytes
            report.global_load_sectors += sectors
        report.site(instruction, requests, sectors, -(-nbytes // 32))

    def count_shared(self, instruction, addresses, lanes, size, is_store):
        wavefronts, ideal = shared_wavefronts(addresses, lanes, size)
        if is_store:
            self.report.shared_store_bytes += lanes.size * size
        else:
            self.report.shared_load_bytes += lanes.size * size
        self.report.shared_wavefronts += wavefronts
        self.report.shared_ideal_wavefronts += ideal
        self.report.site(instruction, np.unique(lanes // 32).size, wavefronts, ideal)

    # ---- control flow, called by handlers

    def jump(self, active, target):
        """Send the active lanes to ``target``."""
        if target < self._at:
            self._backward_jump()
        front = self._front
        if active is None or active is front or (front is not None and (active == front).all()):
            self._at = target
            self._switch = self._switch or front is not None
            if self._committed:
                self.pc[self._front_mask()] = target
        else:
            self._commit()
            self.pc[active] = target

    def exit(self, active):
        self.jump(active, len(self.program.steps))

    def block(self, active, retry=False):
        """Suspend lanes after the current instruction (or before it, to run it again)."""
        self._commit()
        mask = self._front_mask() if active is None else active
        if retry:
            self.pc[mask] = self._at - 1
        self._blocked_at[mask] = self._at - 1
        self.blocked[mask] = True

    def release(self, mask):
        self.blocked[mask] = False
        self._release_partners()
        self._switch = True

    def suspended(self):
        return self.blocked | self.parked

    def wait_for_partners(self, mask):
        """Suspend lanes at a .sync instruction until other lanes of their warps move on."""
        self.block(mask, retry=True)
        self._waits_for_partners |= mask

    def _release_partners(self):
        self.blocked[self._waits_for_partners] = False
        self._waits_for_partners[:] = False

    def _front_mask(self):
        return np.ones(self.lanes, bool) if self._front is None else self._front

    def _commit(self):
        """Write the program counter of the running lanes back, so that they can part."""
        if not self._committed:
            self.pc[self._front_mask()] = self._at
        self._switch = self._committed = True

    def _backward_jump(self):
        self.launch.count_jump()
        if self._front is not None:
            self._spins += 1
            if self._spins > _SPIN_LIMIT:
                self._spins = 0
                self.parked |= self._front
                self._switch = True

    # ---- the loop

    def _select(self):
        """Choose the next lanes to run; False when all have exited."""
        end = len(self.program.steps)
        while True:
            keys = np.where(self.blocked | self.parked, _FAR, self.pc)
            lowest = int(keys.min())
            if lowest < end:
                break
            if self.parked.any():
                self.parked[:] = False
                self._release_partners()
            elif not self.blocked.any():
                return False
            elif not self.barriers.complete_pending():
                raise Deadlock(self._describe_deadlock())
        front = keys == lowest
        self._front = None if front.all() else front
        self._limit = _FAR if self._front is None else int(keys[~front].min())
        self._at, self._switch, self._committed = lowest, False, False
        self._front_threads = np.count_nonzero(front)
        self._front_warps = self.warps if self._front is None else int(front.reshape(-1, 32).any(axis=1).sum())
        return True

    def _describe_deadlock(self):
        places = {}
        for lane in np.nonzero(self.blocked)[0]:
            instruction = self.program.steps[self._blocked_at[lane]].instruction
            places.setdefault((instruction.text, instruction.line), []).append(int(lane) % self.padded)
        waits = "; ".join(f"threads {t[0]}..{t[-1]} ({len(t)}) at {text} {line}" for (text, line), t in places.items())
        return f"kernel {self.launch.kernel.name}: all living threads wait: {waits}"

    def run(self):
        steps, issued = self.program.steps, self.issued
        self._front, self._at, self._committed = None, 0, True
        while self._select():
            front, limit = self._front, min(self._limit, len(steps))
            while self._at < limit and not self._switch:
                position = self._at
                step = steps[position]
                issued[position] += self._front_warps
                self._at = position + 1
                active, threads = front, self._front_threads
                if step.guard is not None:
                    guard = step.guard(self)
                    active = guard if front is None else front & guard
                    threads = np.count_nonzero(active)
                    if not threads:
                        continue
                    if threads == self.lanes:
                        active = None
                self.report.thread_instructions += int(threads)
                step.execute(self, active)
            if not self._committed:
                self.pc[self._front_mask()] = self._at
        self._summarise()

    def _summarise(self):
        for step, count in zip(self.program.steps, self.issued, strict=False):
            if count:
                self.report.instructions[step.instruction.opcode] += int(count)
