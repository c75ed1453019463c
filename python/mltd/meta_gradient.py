"""What an outer step descends on: the objectives of meta-training by name, each from a meta-batch to one gradient."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mltd.inner_loop import InnerConfig, accumulate, filled, mode, require_finite, task_gradients, trajectory
from mltd.packing import pack
from mltd.tasks import Task
from tarp_kernels import tarp_parameters


class MetaGradient(NamedTuple):
    """The gradient for the shared adapter, in the order of `tarp_parameters`, and what it cost."""

    losses: Tensor  # [B] loss of each task that was descended on
    gradients: list[Tensor]
    tokens: int  # through forward and backward, padding not counted
    examples: int  # distinct ones


def first_order(model: Any, tasks: Sequence[Task], inner: InnerConfig, query_steps: Sequence[int]) -> MetaGradient:
    """The query gradient at the adapted parameters, averaged over the tasks and over `query_steps` (method.md §4).

    With one query step, the last inner step, this is first-order MAML. Several ask for a good model all along the
    adaptation, step 0 included, and not at one step only.
    """
    names = [task.name for task in tasks]
    device = next(iter(tarp_parameters(model).values())).device
    query = pack([task.query for task in tasks], inner.max_tokens, device)
    support = pack([task.support for task in tasks], inner.max_tokens, device)
    total: list[Tensor] | None = None
    losses: list[Tensor] = []
    for reached in trajectory(model, tasks, inner):
        if reached.step in query_steps:
            with mode(model, inner.train_mode):
                now, gradients = task_gradients(model, query, reached.parameters)
            require_finite(now, gradients, names, f"query loss after inner step {reached.step}")
            parameters = list(reached.parameters.values())
            means = [gradient.mean(dim=0) for gradient in filled(gradients, parameters)]
            total = means if total is None else [a.add_(b) for a, b in zip(total, means, strict=True)]
            losses.append(now)
        if reached.step == max(query_steps):
            break
    assert total is not None
    tokens = max(query_steps) * support.tokens + len(query_steps) * query.tokens
    averaged = [gradient.div_(len(query_steps)) for gradient in total]
    return MetaGradient(torch.stack(losses).mean(dim=0), averaged, tokens, support.examples + query.examples)


def multitask(model: Any, tasks: Sequence[Task], inner: InnerConfig, query_steps: Sequence[int]) -> MetaGradient:
    """Joint training: the gradient of the tasks' mean losses on support and query together, nothing adapted first."""
    packed = pack([(*task.support, *task.query) for task in tasks], inner.max_tokens, model.device)
    with mode(model, inner.train_mode):
        parameters: list[Tensor] = list(tarp_parameters(model).values())
        losses, found = accumulate(model, packed, parameters)
    gradients = filled(found, parameters)
    summed = [gradient.unsqueeze(0) for gradient in gradients]
    require_finite(losses, [], [task.name for task in tasks], "loss of joint training")
    require_finite(
        losses.sum().unsqueeze(0), summed, [" + ".join(task.name for task in tasks)], "loss of joint training"
    )
    return MetaGradient(losses, [gradient.div_(len(tasks)) for gradient in gradients], packed.tokens, packed.examples)


OBJECTIVES: dict[str, Callable[[Any, Sequence[Task], InnerConfig, Sequence[int]], MetaGradient]] = {
    "first_order": first_order,
    "multitask": multitask,
}
