"""The losses of the scored tokens, with as little of the output head as they need.

A vocabulary of 49,152 over a width of 576 is a fifth of SmolLM2-135M's products, and its logits the largest tensor by
far, so the head sees the scored positions only. Where a model returns its head's output as it is, the head does not run
at all: `linear_cross_entropy` takes the rows that it would have got.
"""

import contextlib
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tarp_kernels.nn.linear import watched
from tarp_kernels.ops.linear_cross_entropy import linear_cross_entropy

_RETURNED: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()
"""Whether a model returns its head's output as it is; others cap it softly, for example."""


def token_losses(model: Any, inputs: Mapping[str, Any], positions: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy (nats) of the scored tokens: [S], float32 (float64 stays).

    inputs     what the model is called with
    positions  [S] rows of the flattened logits [n·L, vocabulary] that predict a scored token
    targets    [S] the tokens that they predict
    """

    def call() -> Tensor:
        return model(**inputs).logits

    head = model.get_output_embeddings()
    if type(head) is nn.Linear and not watched(head):
        if model not in _RETURNED:
            devices = [targets.device] if targets.device.type == "cuda" else []
            # a call for no other purpose, which must leave the dropout of the next ones as it would be
            with torch.no_grad(), torch.random.fork_rng(devices), _left_out(head, positions) as (_, stand_in):
                _RETURNED[model] = call() is stand_in
        if _RETURNED[model]:
            with _left_out(head, positions) as (seen, _):
                call()
            return linear_cross_entropy(seen[0], head.weight, head.bias, targets)
    if head is None or hasattr(head, "adapter_names"):  # an adapted head finds its task by the row
        logits = call().flatten(0, -2)[positions]
    else:
        with _only_at(head, positions):  # what Hugging Face models do after the head is elementwise
            logits = call().flatten(0, -2)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return nn.functional.cross_entropy(wide, targets, reduction="none")


@contextlib.contextmanager
def _left_out(head: nn.Linear, positions: Tensor) -> Iterator[tuple[list[Tensor], Tensor]]:
    """Within the block `head` returns a stand-in for its output; yields a list for the rows [S, K] and the stand-in."""
    seen: list[Tensor] = []
    stand_in = head.weight.new_zeros(()).expand(len(positions), head.out_features)

    def note(x: Tensor) -> Tensor:
        seen.append(x.flatten(0, -2)[positions])
        return stand_in

    vars(head)["forward"] = note
    try:
        yield seen, stand_in
    finally:
        del vars(head)["forward"]


@contextlib.contextmanager
def _only_at(head: nn.Module, positions: Tensor) -> Iterator[None]:
    """Within the block `head` sees the scored positions only."""
    hook = head.register_forward_pre_hook(lambda _, args: (args[0].flatten(0, -2)[positions], *args[1:]))
    try:
        yield
    finally:
        hook.remove()
