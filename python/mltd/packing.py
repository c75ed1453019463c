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

from mltd.head import token_losses
from mltd.tasks import IGNORED, Example, collate

PASS_COST = 32
"""What one more pass costs, in tokens. An estimate for 100 million weights on a CPU: reading them twice from memory
takes as long as the products of 10 to 20 tokens, and starting the operators as long as those of some more."""


class Pass(NamedTuple):
    """One forward pass over some examples of B tasks: n sequences of L tokens, S of them scored."""

    input_ids: Tensor  # [n, L]
    attention_mask: Tensor  # [n, L]
    offsets: Tensor  # [B+1] int64 on the CPU: task i owns sequences offsets[i]:offsets[i+1]
    positions: Tensor  # [S] rows of the flattened [n·L] that predict a scored token, in task order
    targets: Tensor  # [S] the tokens that they predict
    scored: tuple[int, ...]  # [B] how many of the S belong to each task


class Packed(NamedTuple):
    """The passes that cover every example with a loss once, and how many scored tokens each task has in all of them."""

    passes: tuple[Pass, ...]
    scored: tuple[int, ...]  # [B]
    tokens: int  # real tokens, padding not counted
    examples: int


def pack(groups: Sequence[Sequence[Example]], max_tokens: int, device: torch.device | str = "cpu") -> Packed:
    """Pack `groups[i]`, the examples of task i, into passes of at most `max_tokens` tokens, padding included.

    Examples without a scored token are left out; one longer than max_tokens gets a pass of its own. The same groups
    give the same passes.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens: got {max_tokens}, expected at least 1")
    # an example without a scored token has no loss: it would cost a pass and teach nothing
    flat = [(task, example) for task, examples in enumerate(groups) for example in examples if example.scored]
    by_length = sorted(flat, key=lambda item: len(item[1].input_ids))
    bounds = cheapest_cuts([len(example.input_ids) for _, example in by_length], max_tokens)
    passes = tuple(_pass(by_length[i:j], len(groups), device) for i, j in pairwise(bounds))
    scored = tuple(sum(example.scored for example in examples) for examples in groups)
    return Packed(passes, scored, sum(len(example.input_ids) for _, example in flat), len(flat))


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


def _pass(chunk: list[tuple[int, Example]], tasks: int, device: torch.device | str) -> Pass:
    chunk = sorted(chunk, key=lambda item: item[0])
    owners = [task for task, _ in chunk]
    batch = collate([example for _, example in chunk], pad_id=0)  # id 0 exists in every vocabulary and is masked
    sizes = torch.bincount(torch.tensor(owners), minlength=tasks)
    offsets = torch.cat((torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)))
    ahead = batch["labels"][:, 1:]  # position t predicts token t + 1
    sequence, position = (ahead != IGNORED).nonzero(as_tuple=True)
    scored = [0] * tasks
    for task, example in chunk:
        scored[task] += example.scored
    return Pass(
        batch["input_ids"].to(device),
        batch["attention_mask"].to(device),
        offsets,
        (sequence * batch["labels"].shape[1] + position).to(device),
        ahead[sequence, position].to(device),
        tuple(scored),
    )


def loss_sums(model: Any, part: Pass) -> Tensor:
    """Summed cross-entropy (nats) of each task's scored tokens in one pass: [B], float32 (float64 stays)."""
    losses = token_losses(model, part.input_ids, part.attention_mask, part.positions, part.targets)
    # split and sum, not index_add: no float atomics on a GPU, so the same bits every time
    return torch.stack([own.sum() for own in losses.split(list(part.scored))])
