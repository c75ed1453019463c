"""Whole models with a search cell beside every feed-forward block: a forward pass, and an inner step of a meta-batch.

The cells run the dominant cell that the paper publishes, so only what it selects is computed.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from mltd.bench import cells, models
from mltd.bench.cases import Case
from mltd.bench.contenders import deviation, stir, stir_cells, unfused
from mltd.inner_loop import InnerConfig
from mltd.tasks import Task
from tarp_kernels import SearchCellConfig, TarpConfig, apply_tarp, architecture, set_architecture, tarp_parameters
from tarp_kernels.nn.cell_beside import CellBeside
from tarp_kernels.nn.linear import TarpLayer
from tarp_kernels.ops.search_cell import OPERATIONS

WITH_CELLS = TarpConfig(r=8, search_cell=SearchCellConfig(width=64))
# Among 13 million inputs of a relu some are so near 0 that rounding alone decides their side, and with it one token's
# part of a gradient: plain PyTorch in float32 is by 2e-3 of a bias's way from itself in float64, and the two forms are
# by up to 4e-3 from each other.
TOLERANCE = 1e-2


def cell_model_cases(cache: Path | None = None, rounds: int = 12) -> Iterator[Case]:
    """The whole-model forward pass, then an inner step at 5 shots and at 1 shot."""
    yield whole_model_with_cells_case(cache, rounds)
    for shots in (5, 1):
        yield inner_step_with_cells_case(shots, rounds)


def whole_model_with_cells_case(cache: Path | None = None, rounds: int = 12, batch: int = 4, length: int = 256) -> Case:
    """SmolLM2-135M with adapters of rank 8 and cells of width 64: base, this library's form, unfused PyTorch.

    Unfused PyTorch runs all six operations of every edge. Weights as in `models.whole_model_case`.
    """
    base, weights = models.smollm2(cache)
    adapted = apply_tarp(models.share(base), WITH_CELLS)
    stir(adapted)
    stir_cells(adapted)
    set_architecture(adapted, cells.architecture())
    plain = unfused(copy.deepcopy(adapted))
    tokens = models.random_tokens(base, batch, length)
    made = {"base": base, "tarp + cells": adapted, "unfused": plain}
    calls = {name: models.forward_pass(model, tokens) for name, model in made.items()}

    def gate() -> float:
        got, expected = calls["tarp + cells"](), calls["unfused"]()
        worst = 0.0
        # Against each part alone, lest the one hides behind the other.
        for kind, what in (
            (CellBeside, "logits, against the cells' part"),
            (TarpLayer, "logits, against the adapters'"),
        ):
            with off(plain, kind):
                without = calls["unfused"]()
            worst = max(worst, deviation(got, expected, without, what, tolerance=1e-4))
        return worst

    shape = f"{batch}x{length} tokens, r=8, C=64, {weights}"
    return Case("whole model TAMS", shape, calls, gate, "base", rounds)


@contextlib.contextmanager
def off(model: nn.Module, kind: type[CellBeside] | type[TarpLayer]) -> Iterator[None]:
    """Within the block the model is as if it had no modules of that class."""
    found = [module for module in model.modules() if isinstance(module, kind)]
    try:
        for module in found:
            module.enabled = False
        yield
    finally:
        for module in found:
            module.enabled = True


def inner_step_with_cells_case(shots: int, rounds: int = 12) -> Case:
    """One SGD step for eight tasks at once on adapters and cells, with every task's own architecture.

    unfused all live  plain PyTorch, alpha soft, another one for each task: all six operations of every edge run
    all live          the same in the library's kernels
    masked            the dominant cell for every task
    without cells     the adapters alone: what no cell can be faster than

    The model is that of `models.inner_steps_case`. The contenders compute different things, so the gate holds each
    against its own steps task by task in plain PyTorch.
    """
    model, bare = _model(WITH_CELLS), _model(TarpConfig(r=8))
    tasks = models.random_tasks(shots)
    # A step this long tells the gradient: a shorter one drowns in the rounding of the norms' weights, which are near 1.
    config = InnerConfig(steps=1, optimizer="sgd", lr=1.0, max_tokens=len(tasks) * shots * models.TOKENS)
    generator = torch.Generator().manual_seed(6)
    alphas = {
        "all live": torch.randn(len(tasks), 9, len(OPERATIONS), generator=generator).softmax(-1),
        "masked": cells.architecture().repeat(len(tasks), 1, 1),
    }
    calls = {name: _within(model, alpha, models.at_once(model, tasks, config)) for name, alpha in alphas.items()}
    calls["without cells"] = models.at_once(bare, tasks, config)
    plain = unfused(copy.deepcopy(model))
    calls["unfused all live"] = _within(plain, alphas["all live"], models.at_once(plain, tasks, config))

    def gate() -> float:
        worst = 0.0
        for name, alpha in alphas.items():
            expected = _one_by_one(plain, alpha, tasks, config)
            still = [part for op in unselected(alpha) for part in (op, f"{op}_bias")]
            for own in (name, f"unfused {name}"):
                if own in calls:
                    moved = calls[own]()
                    worst = max(
                        worst, models.same_steps(own, moved, expected, tarp_parameters(model), still, TOLERANCE)
                    )
        alone = models.one_by_one(unfused(copy.deepcopy(bare)), tasks, config)()
        return max(worst, models.same_steps("without cells", calls["without cells"](), alone, tarp_parameters(bare)))

    return Case("inner step with cells", models.tasks_shape(shots), calls, gate, "unfused all live", rounds)


def unselected(alpha: Tensor) -> list[str]:
    """The operations that no edge of any task selects: alpha [..., 9, 6]."""
    selected = (alpha != 0).flatten(0, -2).any(0).tolist()
    return [name for name, one in zip(OPERATIONS, selected, strict=True) if not one]


def _model(config: TarpConfig) -> nn.Module:
    model = apply_tarp(models.smollm2_shaped(layers=6, vocabulary=8192), config)
    stir(model)
    stir_cells(model)
    return model


def _within(model: nn.Module, alpha: Tensor, call: Callable[[], dict[str, Tensor]]) -> Callable[[], dict[str, Tensor]]:
    def inside() -> dict[str, Tensor]:
        with architecture(model, alpha):
            return call()

    return inside


def _one_by_one(model: nn.Module, alpha: Tensor, tasks: list[Task], config: InnerConfig) -> dict[str, Tensor]:
    """What `models.one_by_one` gives where task i has the architecture alpha[i]."""
    single = []
    for own, task in zip(alpha, tasks, strict=True):
        with architecture(model, own):
            single.append(models.at_once(model, [task], config)())
    return models.joined(single)
