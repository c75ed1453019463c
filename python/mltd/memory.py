"""How much memory adaptation will take, found out before it runs: base model once, adapters of B tasks, one pass."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mltd.inner_loop import InnerConfig, casting, stack
from mltd.learner import Learner, mode
from mltd.packing import Pass, pack
from mltd.tasks import Task, check_fits

MOMENTS = {"sgd": 0, "adam": 2, "adamw": 2}


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on the model's device while tasks are adapted.

    base         the model's parameters and buffers, whatever the number of tasks
    tasks        what tasks that run at once have of their own: adapted values, gradients, the optimiser's moments
    activations  what the largest forward pass keeps for backward, and the largest gradient on its way back
    """

    base: int
    tasks: int
    activations: int

    @property
    def total(self) -> int:
        return self.base + self.tasks + self.activations

    def __str__(self) -> str:
        parts = {"base model": self.base, "tasks": self.tasks, "activations": self.activations, "in all": self.total}
        return ", ".join(f"{name} {size / 2**20:.1f} MiB" for name, size in parts.items())


def estimate_memory(
    model: Any, tasks: Sequence[Task], inner: InnerConfig, tasks_per_batch: int | None = None
) -> MemoryEstimate:
    """What `adapt` of these tasks, `tasks_per_batch` of them at once (None: all), will take at its peak.

    Activations are counted in a forward pass of one example, the longest, and scaled to the tokens of the largest pass:
    everything that is kept belongs to a token. On the way back the gradient of the largest tensor, and what it is made
    into, come on top. At 9 to 15 % less than what torch's profiler sees of a Llama of width 576.

    Not seen: an operator's own scratch memory, and the layer that activation checkpointing makes again. Second order
    keeps every inner step: multiply activations by these.
    """
    check_fits(tasks, model)
    learner = Learner(model, inner.adapts)
    at_once = min(len(tasks), tasks_per_batch or len(tasks)) if learner.parallel else 1
    base = _bytes([*model.parameters(), *model.buffers()])
    own = _bytes(list(learner.shared.values())) * at_once * (2 + MOMENTS[inner.optimizer])
    by_size = sorted(tasks, key=lambda task: sum(map(task.kind.length, task.support)), reverse=True)
    group = by_size[:at_once]
    kind = group[0].kind
    passes = pack([task.support for task in group], inner.max_tokens, learner.device, kind).passes
    rows, longest = max((_size(one) for one in passes), key=lambda size: size[0] * size[1])
    example = max((e for task in group for e in task.support if kind.scored(e)), key=kind.length)
    (one,) = pack([[example]], inner.max_tokens, learner.device, kind).passes
    kept = _kept(learner, inner, one, kind)
    return MemoryEstimate(base, own, kept * rows * longest // _size(one)[1])


def _size(one: Pass) -> tuple[int, int]:
    """Examples of a pass, and tokens of each with padding."""
    shapes = [tensor.shape for name, tensor in one.inputs.items() if name != "attention_mask"]
    return shapes[0][0], sum(shape[1] if len(shape) > 1 else 1 for shape in shapes)


def _kept(learner: Learner, inner: InnerConfig, one: Pass, kind: Any) -> int:
    """Bytes that one pass keeps for backward, beside parameters; what several operators keep counts once."""
    stacked = stack(learner, None, 1)
    known = [*learner.model.parameters(), *learner.model.buffers(), *stacked.values()]
    counted = {tensor.untyped_storage().data_ptr() for tensor in known}
    sizes, alive = [0], []

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in counted:
            counted.add(storage.data_ptr())
            alive.append(tensor)  # or its address would be given to another one
            sizes.append(storage.nbytes())
        return tensor

    with mode(learner.model, inner.train_mode), torch.random.fork_rng():
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            with learner.running(stacked, one.offsets), casting(learner.device, inner.autocast):
                kind.losses(learner.model, one.inputs, one.positions, one.targets).sum()
    return sum(sizes) + 2 * max(sizes)


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
