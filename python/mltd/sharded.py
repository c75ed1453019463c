"""A model whose weights `torch.distributed.fsdp.fully_shard` (FSDP2) has spread over the processes of a run.

    own = set(tarp_parameters(model).values())          # what tasks adapt stays whole in every process
    for layer in layers:
        fully_shard(layer, ignored_params=own)
    fully_shard(model, ignored_params=own)

A layer's weights are gathered around its forward and its backward, in all processes at once. So all of them run all of
the tasks: they share the memory of weights, gradients and the outer optimiser's state, and not the work. What works:
"first_order" and "multitask" for anything that is trained, "reptile" for what is adapted.

Gradients of what is spread are summed in `.backward()` alone. torch.autograd.grad, which serves everywhere else, would
find none: it asks for the shards, and what was differentiated is what had been gathered from them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def is_sharded(tensor: Tensor) -> bool:
    return isinstance(tensor, DTensor)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; of a sharded one its parts from all processes, which must ask for it together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def placed(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor as `like` has it: its dtype, its device, and this process's part where that is sharded."""
    if isinstance(value, DTensor) or not isinstance(like, DTensor):
        return value.to(like)
    return distribute_tensor(value.to(like.device, like.dtype), like.device_mesh, like.placements)


def differentiated(
    model: Any, loss: Tensor, wanted: Sequence[Tensor], create_graph: bool = False
) -> Sequence[Tensor | None]:
    """torch.autograd.grad, None for what the loss does not depend on; of sharded parameters of `model` too."""
    if not any(is_sharded(tensor) for tensor in wanted):
        return torch.autograd.grad(loss, wanted, allow_unused=True, create_graph=create_graph)
    loss.backward()
    found = [tensor.grad for tensor in wanted]
    for tensor in (*wanted, *model.parameters()):
        tensor.grad = None
    return found


def require_possible(model: Any, adapted: Mapping[str, Tensor], objective: str, cells_are_chosen: bool) -> bool:
    """Whether the model is sharded; ValueError, with what to do, for what cannot be done with it then."""
    sharded = [name for name, parameter in model.named_parameters() if is_sharded(parameter)]
    if not sharded:
        return False
    if not isinstance(model, FSDPModule):
        raise ValueError(
            f"model: {sharded[0]!r} is sharded, but not by fully_shard(model); call that, or load it whole"
        )
    for name in sharded:
        if name in adapted:
            raise ValueError(
                f"adapts: {name!r} is sharded, and each task has its own values of it; leave it whole by "
                "fully_shard(..., ignored_params=...), or adapt less of the model"
            )
    if objective == "second_order":
        raise ValueError(
            "objective: 'second_order' needs the weights again that a sharded model has let go of; use 'first_order' "
            "or a model that is not sharded"
        )
    if cells_are_chosen:
        raise ValueError(
            "controller: reads the embeddings outside of the model's forward, where a sharded model has not gathered "
            "them; use a model that is not sharded"
        )
    return True
