"""The part of gpu_check.py about mltd's inner loop: steps launched one by one, and replayed as a CUDA graph.

Both times are of whole adaptations; the second one launches a step and records one before it replays the others.
"""

from dataclasses import replace

import torch
from torch import nn

from benchmarks.measuring import Row, timed
from mltd.bench import cells, inner_loop, models
from mltd.bench.cell_models import unselected
from mltd.bench.inner_loop import TOLERANCES, made
from mltd.inner_loop import InnerConfig, adapt
from tarp_kernels import tarp_parameters

STEPS = 10


def inner_steps(device: torch.device) -> list[Row]:
    """Eight tasks of one example, adapters alone and with search cells: where the steps end, and how long they take."""
    return [of_model(made(with_cells)[0].to(device), with_cells, device) for with_cells in (False, True)]


def of_model(model: nn.Module, with_cells: bool, device: torch.device) -> Row:
    """Replayed steps must end where launched ones do, but for rounding: the mask of a full batch is left out of these
    alone. A learning rate that falls tells a step from the recorded one."""
    tasks, alpha = models.random_tasks(1), cells.architecture()
    launched = InnerConfig(steps=STEPS, optimizer="sgd", lr=1.0 if with_cells else 0.05, lr_decay=0.7)
    configs = {"launched ms": launched, "recorded and replayed ms": replace(launched, cuda_graph=True)}
    calls = {name: lambda config=config: adapt(model, tasks, config) for name, config in configs.items()}
    still = [part for op in unselected(alpha) for part in (op, f"{op}_bias")] if with_cells else []
    facts = {"operator": "inner steps", "call": f"{STEPS} of {len(tasks)} tasks{', search cells' * with_cells}"}
    try:
        expected, found = (call() for call in calls.values())
        limit = TOLERANCES[with_cells, inner_loop.STEPS]
        error = models.same_steps("replayed steps", found, expected, tarp_parameters(model), still, limit)
    except (models.GateError, RuntimeError) as wrong:  # such as a capture that fails
        return facts | {"ok": False, "error": str(wrong)}
    return facts | {"ok": True, "error": error, **timed(calls, device)}
