"""Peak memory of the contenders of `inner_loop`, for few tasks and for many: what one task more costs.

Measured like `memory`, in a process of its own. mltd at a bounded number of tokens a pass has one set of activations
however many tasks there are, so its growth is a task's own adapter, its gradient and what both pass through.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from mltd.bench import memory, models
from mltd.bench.inner_loop import inner_calls, made
from tarp_kernels import tarp_parameters

FEW, MANY = 2, 8
SHOTS = 5
ONE_TASK = "mltd, a task's tokens a pass"


@dataclass(frozen=True)
class InnerMemory:
    """One contender, in MiB.

    model_mib    the base model's parameters, once
    adapter_mib  one task's adapter
    peak_mib     most memory during three inner steps of MANY tasks beyond what lay there before
    task_mib     what each task beyond FEW adds to that
    """

    contender: str
    model_mib: float
    adapter_mib: float
    peak_mib: float
    task_mib: float


def measure_inner_memory(timeout: float = 600) -> list[InnerMemory]:
    """Every contender on the model of `inner_loop.inner_case`, adapters alone, at 5 shots; errors as in `memory`."""
    return [InnerMemory(**row) for row in memory.rows_of_a_process("mltd.bench.inner_memory", [], timeout)]


def measure_here() -> list[InnerMemory]:
    """The rows, measured in this process."""
    model, plain = made(with_cells=False)
    adapter = {id(parameter): parameter.nbytes for parameter in tarp_parameters(model).values()}
    base = sum(p.nbytes for p in model.parameters() if id(p) not in adapter)
    peaks: dict[str, list[int]] = {}
    for count in (FEW, MANY):
        tasks = models.random_tasks(SHOTS)[:count]
        calls = inner_calls(model, plain, tasks, with_cells=False)
        calls[ONE_TASK] = inner_calls(model, plain, tasks, False, max_tokens=SHOTS * models.TOKENS)["mltd"]
        for name, call in calls.items():
            call()  # once for buffers that stay
            peaks.setdefault(name, []).append(memory.peak(call))
    found = []
    for name, (few, many) in peaks.items():
        sizes = (base, sum(adapter.values()), many, (many - few) / (MANY - FEW))
        found.append(InnerMemory(name, *(size / memory.MIB for size in sizes)))
    return found


if __name__ == "__main__":
    memory.without_large_pages()
    for row in measure_here():
        print(json.dumps(asdict(row)), flush=True)
