"""Many tasks' examples as few forward passes, and per-task losses out of them.

Examples are sorted by length and cut into passes where that saves more padding than a pass costs (the topics of a
dialogue corpus in one pass: half as many padding tokens as real ones). Within a pass they lie in task order, because a
task-parallel model gives task i the sequences offsets[i]:offsets[i+1].
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mltd.kinds import KINDS, Example, Kind
from tarp_kernels.nn.task_parallel import Offsets

PASS_COST = 32
"""What one more pass costs, in tokens. An estimate for 100 million weights on a CPU: reading them twice from memory
takes as long as the products of 10 to 20 tokens, and starting the operators as long as those of some more."""


class Pass(NamedTuple):
    """One forward pass over n examples of B tasks; S numbers are scored."""

    inputs: dict[str, Tensor]  # [n, ...] each, what the model is called with
    offsets: Offsets  # [B+1]: task i owns examples offsets[i]:offsets[i+1]
    positions: Tensor  # [S] rows of the flattened logits that predict a target, in task order
    targets: Tensor  # [S] what they predict
    scored: tuple[int, ...]  # [B] how many of the S belong to each task


class Packed(NamedTuple):
    """The passes that cover every example with a loss once, and how much is scored in all of them."""

    kind: Kind
    passes: tuple[Pass, ...]
    scored: tuple[int, ...]  # [B]
    counts: Tensor  # [B] the same, float32 on the device
    tokens: int  # that the model reads, padding not counted
    examples: int

    def loss_sums(self, model: Any, part: Pass) -> Tensor:
        """Summed losses (nats) of each task's scored numbers in one pass: [B], float32 (float64 stays)."""
        losses = self.kind.losses(model, part.inputs, part.positions, part.targets)
        # split and sum, not index_add: no float atomics on a GPU, so the same bits every time
        return torch.stack([own.sum() for own in losses.split(list(part.scored))])


def pack(
    groups: Sequence[Sequence[Example]],
    max_tokens: int,
    device: torch.device | str = "cpu",
    kind: Kind = KINDS["causal"],
) -> Packed:
    """Pack `groups[i]`, the examples of task i, into passes of at most `max_tokens` tokens, padding included.

    Examples without anything scored are left out; one longer than max_tokens gets a pass of its own. The same groups
    give the same passes.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens: got {max_tokens}, expected at least 1")
    # an example without a scored token has no loss: it would cost a pass and teach nothing
    flat = [(task, example) for task, examples in enumerate(groups) for example in examples if kind.scored(example)]
    by_length = sorted(flat, key=lambda item: kind.length(item[1]))
    bounds = cheapest_cuts([kind.length(example) for _, example in by_length], max_tokens)
    passes = tuple(_pass(by_length[i:j], len(groups), device, kind) for i, j in pairwise(bounds))
    scored = tuple(sum(kind.scored(example) for example in examples) for examples in groups)
    counts = torch.tensor(scored, dtype=torch.float32).to(device)
    return Packed(kind, passes, scored, counts, sum(kind.length(example) for _, example in flat), len(flat))


def cheapest_cuts(lengths: Sequence[int], max_tokens: int) -> list[int]:
    """Where to cut ascending lengths into passes so that padded tokens plus PASS_COST a pass are fewest: 0, …, n."""
    costs, starts = [0], [0]
    for end, longest in enumerate(lengths, start=1):
        first = max(0, end - max(1, max_tokens // longest))
        start = min(range(first, end), key=lambda i: costs[i] + longest * (end - i))
        costs.append(costs[start] + longest * (end - start) + PASS_COST)
        starts.append(start)
    cuts = [len(lengths)]
    while cuts[-1]:
        cuts.append(starts[cuts[-1]])
    return cuts[::-1]


def _pass(chunk: list[tuple[int, Example]], tasks: int, device: torch.device | str, kind: Kind) -> Pass:
    chunk = sorted(chunk, key=lambda item: item[0])
    owners = [task for task, _ in chunk]
    batch = kind.collate([example for _, example in chunk])
    sizes = torch.bincount(torch.tensor(owners), minlength=tasks)
    offsets = torch.cat((torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)))
    scored = [0] * tasks
    for task, example in chunk:
        scored[task] += kind.scored(example)
    inputs = {name: tensor.to(device) for name, tensor in batch.inputs.items()}
    return Pass(inputs, Offsets(offsets), batch.positions.to(device), batch.targets.to(device), tuple(scored))
