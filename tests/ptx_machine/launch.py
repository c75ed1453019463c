"""Launching a kernel: arguments, decoding, and running all CTAs of the grid."""

import itertools

import numpy as np

from . import instructions  # noqa: F401  (registers every handler)
from .binding import Binding
from .forms import find_handler
from .instructions.bulk_copy import HostTensorMap
from .machine import Machine, Step
from .memory import GlobalMemory, typed_views
from .parser import Kernel, parse_module
from .report import Report
from .values import WIDTH

_LANES_TOGETHER = 1024  # numpy calls cost the same for 128 lanes as for 1000
_MAX_BACKWARD_JUMPS = 50_000_000


class Program:
    """A kernel whose instructions have been decoded into functions; reusable across launches."""

    def __init__(self, kernel):
        binding = Binding(kernel)
        self.widths, self.param_offsets, self.param_bytes = binding.widths, binding.param_offsets, binding.param_bytes
        self.steps, refused = [], {}
        for instruction in kernel.code:
            try:
                execute = find_handler(instruction)(instruction, binding)
                self.steps.append(Step(instruction, execute, _guard(instruction, binding)))
            except NotImplementedError as error:
                refused.setdefault(str(error), None)
        if refused:
            shown = "\n  ".join(list(refused)[:12])
            raise NotImplementedError(f"kernel {kernel.name} cannot be run ({len(refused)} reasons):\n  {shown}")
        self.shared_cell = _shared_cell(kernel)


def _guard(instruction, binding):
    if not instruction.guard:
        return None
    slot = binding.slots[instruction.guard]
    if instruction.guard_negated:
        return lambda machine: ~machine.registers[slot]
    return lambda machine: machine.registers[slot]


def _shared_cell(kernel):
    """Granularity of race detection: the narrowest element that any access may touch, at most 4 bytes."""
    elsewhere = ("global", "param", "const", "local")
    accesses = [
        step for step in kernel.code if step.opcode in ("ld", "st", "atom", "red") and not step.one_of(*elsewhere)
    ]
    return min({WIDTH[step.type] for step in accesses} | {4})


def _program(kernel):
    """Decoding is remembered with the kernel."""
    if kernel.program is None:
        kernel.program = Program(kernel)
    return kernel.program


class Launch:
    """Everything the CTAs of one launch share."""

    def __init__(self, kernel, grid, block, args, shared_bytes, check_races, poison, memory=None):
        self.kernel, self.program = kernel, _program(kernel)
        self.grid, self.block = _three(grid), _three(block)
        self.check_races, self.poison = check_races, poison
        self.shared_bytes = kernel.static_shared + shared_bytes
        self.report = Report(kernel.name)
        self.memory = GlobalMemory() if memory is None else memory
        self._jumps_left = _MAX_BACKWARD_JUMPS
        threads = self.block[0] * self.block[1] * self.block[2]
        if not 1 <= threads <= 1024:
            raise ValueError(f"block {self.block} has {threads} threads; a CTA holds 1 to 1024")
        if kernel.required_threads not in (None, threads):
            raise ValueError(f"kernel {kernel.name} requires {kernel.required_threads} threads, block has {threads}")
        self.variable_bases = {
            variable.name: self.memory.add(np.frombuffer(bytearray(variable.data), np.uint8), variable.name)
            for variable in kernel.variables.values()
            if variable.space in ("global", "const")
        }
        packed = self._pack_params(args)
        self.param_views = typed_views(packed)
        self.param_base = self.memory.add(packed, "the parameters")  # for those whose address is taken

    def _pack_params(self, args):
        if len(args) != len(self.kernel.params):
            names = ", ".join(name for name, _, _ in self.kernel.params)
            wanted = f"{len(self.kernel.params)} arguments ({names})"
            raise ValueError(f"kernel {self.kernel.name} takes {wanted}, got {len(args)}")
        packed = np.zeros(-(-self.program.param_bytes // 8) * 8, np.uint8)
        for position, ((name, size, _), value) in enumerate(zip(self.kernel.params, args, strict=False)):
            start = self.program.param_offsets[name]
            packed[start : start + size] = np.frombuffer(self._encode(value, size, position), np.uint8)
        return packed

    def _encode(self, value, size, position):
        if isinstance(value, (bytes, bytearray)):
            if len(value) != size:
                raise ValueError(f"argument {position} has {len(value)} bytes, the parameter has {size}")
            return bytes(value)
        if isinstance(value, (bool, int, np.integer)):
            return (int(value) & ((1 << 8 * size) - 1)).to_bytes(size, "little")
        if isinstance(value, (float, np.floating)):
            return np.array(value, {2: np.float16, 4: np.float32, 8: np.float64}[size]).tobytes()
        if value is None:
            return bytes(size)
        if isinstance(value, HostTensorMap):
            return value.encode(int.from_bytes(self._encode(value.base, 8, position), "little"))
        if size != 8:
            raise ValueError(f"argument {position} is a buffer but the parameter has {size} bytes")
        pointer, raw = host_bytes(value, position)
        return self.memory.place(pointer, raw, f"argument {position}").to_bytes(8, "little")

    def count_jump(self):
        self._jumps_left -= 1
        if self._jumps_left < 0:
            raise RuntimeError(f"kernel {self.kernel.name}: more than {_MAX_BACKWARD_JUMPS} backward jumps, giving up")

    def run(self):
        threads = -(-self.block[0] * self.block[1] * self.block[2] // 32) * 32
        together = max(1, _LANES_TOGETHER // threads)
        x, y, z = (range(extent) for extent in self.grid)
        blocks = [(i, j, k) for k, j, i in itertools.product(z, y, x)]
        with np.errstate(all="ignore"):
            for start in range(0, len(blocks), together):
                Machine(self, blocks[start : start + together]).run()
        return self.report


def host_bytes(value, position):
    """(host address, uint8 array) over the memory of a torch CPU tensor or numpy array, without copying."""
    if isinstance(value, np.ndarray):
        if value.size and not value.flags.c_contiguous and not value.T.flags.c_contiguous:
            raise ValueError(f"argument {position}: numpy arrays must be contiguous")
        flat = value.reshape(-1) if value.flags.c_contiguous else value.T.reshape(-1)
        return value.ctypes.data, flat.view(np.uint8)
    if not hasattr(value, "untyped_storage"):
        raise TypeError(f"argument {position}: {type(value).__name__} is neither a buffer nor a number")
    if value.device.type != "cpu":
        raise ValueError(f"argument {position} is on {value.device}; buffers must be CPU tensors")
    import torch

    extent = (
        1 + sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=False))
        if value.numel()
        else 0
    )
    flat = torch.as_strided(value.detach(), (extent,), (1,))
    return value.data_ptr(), flat.view(torch.uint8).numpy() if extent else np.zeros(0, np.uint8)


def _three(extents):
    extents = (extents,) if isinstance(extents, int) else tuple(int(extent) for extent in extents)
    if not 1 <= len(extents) <= 3 or min(extents) < 1:
        raise ValueError(f"grid and block have one to three positive extents, got {extents}")
    return extents + (1,) * (3 - len(extents))


def load(source, entry=None):
    """Parse PTX text; ``entry`` may be any unique part of the kernel's name."""
    kernels = parse_module(source)
    exact = [name for name in kernels if entry in (None, name)]
    matches = exact or [name for name in kernels if entry in name]
    if len(matches) != 1:
        raise ValueError(f"entry {entry!r} fits {matches or 'none'} of the kernels {list(kernels)}")
    return kernels[matches[0]]


def run(kernel, grid, block, args, shared_bytes=0, check_races=True, poison=True, memory=None):
    """Run a kernel on the CPU and return its Report.

    kernel        a parsed ``Kernel`` or PTX text with one entry
    grid, block   one to three extents
    args          one per kernel parameter: CPU tensors and numpy arrays (changed in place), numbers, None
                  (a null pointer), bytes or a HostTensorMap (parameters passed by value)
    shared_bytes  dynamic shared memory
    poison        shared memory, registers and failed loads start as all-ones bits (NaN) instead of zero
    memory        a ``GlobalMemory`` that launches share: buffers keep their addresses from one to the next, so
                  what one writes into a buffer may point to another
    """
    if not isinstance(kernel, Kernel):
        kernel = load(kernel)
    return Launch(kernel, grid, block, list(args), shared_bytes, check_races, poison, memory).run()
