"""The inner loop of a meta-batch as a whole: mltd, plain batching in PyTorch, and what a reader would write.

Every contender starts from the same weights and takes three SGD steps for each of eight tasks; their adapted parameters
must agree before any time is reported.

mltd             `mltd.inner_loop.adapt`
batched PyTorch  all tasks in one batch, base frozen, the adapters' products batched over tasks, one call per symbol
straightforward  task after task, each on a copy of the model, gradients of every weight as in the published code
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mltd.bench import cells, models
from mltd.bench.cases import Case
from mltd.bench.cell_models import TOLERANCE, WITH_CELLS, unselected
from mltd.bench.contenders import stir, stir_cells, unfused
from mltd.inner_loop import InnerConfig, adapt, stack
from mltd.learner import Learner
from mltd.tasks import Task
from tarp_kernels import TarpConfig, apply_tarp, set_architecture, tarp_parameters, task_parallel

BASELINE = "straightforward"
STEPS = 3
# By (with cells, steps): how far contenders may be from each other, over the way that they went. After one step with
# cells as in `cell_models`; the next ones start from there, where other inputs of a relu are near 0, and plain batching
# is by up to 3e-2 from task by task.
TOLERANCES = {(False, 1): 2e-3, (False, STEPS): 2e-3, (True, 1): TOLERANCE, (True, STEPS): 0.15}
Adapted = dict[str, Tensor]  # name -> [tasks, *shape]


def inner_cases(rounds: int = 12) -> Iterator[Case]:
    """Adapters alone at 5 shots and at 1 shot, then with a search cell beside every feed-forward block at 5 shots."""
    yield inner_case(5, False, rounds)
    yield inner_case(1, False, rounds)
    yield inner_case(5, True, rounds)


def inner_case(shots: int, with_cells: bool, rounds: int = 12) -> Case:
    """The model of `models.inner_steps_case`, rank 8 in every projection, ``shots`` sequences of 32 tokens a task.

    with_cells  a cell of width 64 in every block, and the paper's dominant architecture for every task: plain PyTorch
                runs all six operations of every edge and weighs them with alpha
    """
    model, plain = made(with_cells)
    tasks = models.random_tasks(shots)
    calls = inner_calls(model, plain, tasks, with_cells)
    alpha = cells.architecture()
    still = [part for op in unselected(alpha) for part in (op, f"{op}_bias")] if with_cells else []

    def gate() -> float:
        start, worst = tarp_parameters(model), 0.0
        for steps in (1, STEPS):
            tolerance = TOLERANCES[with_cells, steps]
            made_by = inner_calls(model, plain, tasks, with_cells, steps)
            expected = made_by.pop(BASELINE)()
            for name, call in made_by.items():
                worst = max(worst, models.same_steps(name, call(), expected, start, still, tolerance))
        return worst

    kind = f"inner loop {'with cells ' if with_cells else ''}{shots}-shot"
    return Case(kind, models.tasks_shape(shots), calls, gate, BASELINE, rounds)


def made(with_cells: bool) -> tuple[nn.Module, nn.Module]:
    """The adapted model, and the same in plain PyTorch with weights of its own."""
    config = WITH_CELLS if with_cells else TarpConfig(r=8)
    model = apply_tarp(models.smollm2_shaped(layers=6, vocabulary=8192), config)
    stir(model)
    stir_cells(model)
    if with_cells:
        set_architecture(model, cells.architecture())
    return model, unfused(copy.deepcopy(model))


def inner_calls(
    model: nn.Module,
    plain: nn.Module,
    tasks: list[Task],
    with_cells: bool,
    steps: int = STEPS,
    max_tokens: int | None = None,
) -> dict[str, Callable[[], Adapted]]:
    """The contenders by name. max_tokens of mltd's passes: None for all tasks' support sets in one."""
    tokens = torch.tensor([[example.input_ids for example in task.support] for task in tasks])  # [tasks, shots, L]
    # With cells a step this long: a shorter one drowns in the rounding of the norms' weights, which are near 1.
    lr = 1.0 if with_cells else 0.05
    config = InnerConfig(steps=steps, optimizer="sgd", lr=lr, max_tokens=max_tokens or tokens.numel())

    def ours() -> Adapted:
        alpha = cells.architecture().repeat(len(tasks), 1, 1) if with_cells else None
        return adapt(model, tasks, config, alpha=alpha)

    return {
        "mltd": ours,
        "batched PyTorch": lambda: batched(plain, tokens, steps, lr),
        BASELINE: lambda: straightforward(plain, tokens, steps, lr),
    }


def batched(model: nn.Module, tokens: Tensor, steps: int, lr: float) -> Adapted:
    """All tasks in one batch, gradients of the adapters alone: tokens [tasks, shots, L]."""
    tasks, shots, _ = tokens.shape
    stacked = stack(Learner(model, ("adapter",)), None, tasks)
    optimizer = torch.optim.SGD(stacked.values(), lr)
    for _ in range(steps):
        with task_parallel(model, stacked, torch.arange(tasks + 1) * shots):
            losses = token_losses(model, tokens.flatten(0, 1)).view(tasks, -1)
            losses.mean(dim=1).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: tensor.detach() for name, tensor in stacked.items()}


def straightforward(model: nn.Module, tokens: Tensor, steps: int, lr: float) -> Adapted:
    """Task after task on a copy of the model, gradients of every weight: tokens [tasks, shots, L]."""
    single = []
    for support in tokens:
        own = copy.deepcopy(model).requires_grad_()
        adapter = {name: own.get_parameter(name) for name in tarp_parameters(model)}
        optimizer = torch.optim.SGD(adapter.values(), lr)
        for _ in range(steps):
            own.zero_grad()
            token_losses(own, support).mean().backward()
            optimizer.step()
        single.append({name: parameter.detach().unsqueeze(0) for name, parameter in adapter.items()})
    return models.joined(single)


def token_losses(model: nn.Module, tokens: Tensor) -> Tensor:
    """Cross-entropy of every token but the first of each sequence: tokens [n, L] -> [n · (L - 1)]."""
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
