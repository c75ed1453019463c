"""Peak memory of a forward pass, seen by the operating system: torch's tensors and the kernels' own buffers alike.

Measured in a process of its own in which freed blocks go back to the system at once, so that one contender's leftovers
do not hide another's needs. Linux only. The system counts pages per thread and settles up now and then: differences
below half a MiB are noise.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mltd.bench.layers import inference, layer_setup

MIB = 2**20
# Blocks from 64 KiB on are mapped one by one and unmapped when freed; glibc would otherwise keep them.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(2**16), "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_TOP_PAD_": "0"}
PR_SET_THP_DISABLE = 41


@dataclass(frozen=True)
class Memory:
    """One contender of one case, in MiB beyond what lay there before the call.

    kind         "additive", or "multiplicative": with a static multiplicative term beside the additive one
    output_mib   the result y itself
    peak_mib     most memory beside y during a forward pass without gradients
    saved_mib    what a forward pass with gradients keeps for backward, beside y
    kept_mib     what the very first call left behind: a packed weight, buffers of the libraries
    """

    kind: str
    shape: str
    contender: str
    output_mib: float
    peak_mib: float
    saved_mib: float
    kept_mib: float


def measure_memory(shapes: list[str], timeout: float = 600) -> list[Memory]:
    """Memory rows of every layer contender at every shape (rows x in_features x out_features x rank).

    Raises RuntimeError where the system does not tell (not Linux) or the measuring process fails, with its last words.
    """
    return [Memory(**row) for row in rows_of_a_process("mltd.bench.memory", shapes, timeout)]


def rows_of_a_process(module: str, arguments: list[str], timeout: float) -> list[dict[str, Any]]:
    """The JSON objects that `python -m module` prints, where freed blocks go back to the system at once.

    Raises RuntimeError where the system does not tell (not Linux) or the process fails, with its last words.
    """
    if not Path("/proc/self/clear_refs").exists():
        raise RuntimeError("peak memory is read from /proc/self, which only Linux has")
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env={**os.environ, **ALLOCATOR},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    if done.returncode:
        raise RuntimeError(f"the process that measures memory ended with {done.returncode}: {done.stderr[-500:]}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def _status(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"/proc/self/status has no {field}")
    return int(found[1]) * 1024


def peak(call: Callable[[], object]) -> int:
    """Highest resident memory during ``call`` beyond that before it, in bytes; its result is dropped."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to what is resident now
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


KINDS: dict[str, dict[str, str]] = {"additive": {}, "multiplicative": {"multiplicative": "static"}}


def _measure_shape(shape: str, kind: str) -> list[Memory]:
    modules, x, _ = layer_setup(shape, **KINDS[kind])
    found = []
    for name, module in modules.items():
        infer = inference(module, x)
        gc.collect()
        before = _status("VmRSS")
        output = infer().nbytes
        kept = _status("VmRSS") - before
        highest = peak(infer) - output
        module(x.requires_grad_())  # once for buffers that stay
        gc.collect()
        before = _status("VmRSS")
        y = module(x)
        saved = _status("VmRSS") - before - output
        del y
        x.requires_grad_(False)
        found.append(Memory(kind, shape, name, *(max(0, size) / MIB for size in (output, highest, saved, kept))))
    return found


def without_large_pages() -> None:
    """For this process: they would round everything up to 2 MiB."""
    ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)


def main(shapes: list[str]) -> None:
    """Print one JSON object a line, one for each contender and shape."""
    without_large_pages()
    for shape in shapes:
        for kind in KINDS:
            for row in _measure_shape(shape, kind):
                print(json.dumps(asdict(row)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
