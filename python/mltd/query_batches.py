"""Query sets of many tasks as batches of rows: every row keeps its id, and the rows of a batch lie in task order.

So what comes out is found by id, however the rows were sorted, and one batch serves all tasks (`task_parallel` gives
task i the rows offsets[i]:offsets[i+1]).
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from mltd.kinds import IGNORED, padded
from mltd.learner import mode, running
from mltd.tasks import Task
from tarp_kernels.nn.task_parallel import Offsets

Row = TypeVar("Row")
Tokens = Mapping[str, Sequence[int]]


def query_prompts(tasks: Sequence[Task]) -> list[dict[str, tuple[int, ...]]]:
    """For each task, {"task/query[i]": what an answer is asked for}.

    Of a causal example that is what comes before the first scored token, of any other its input.
    """
    prompts = []
    for task in tasks:
        own: dict[str, tuple[int, ...]] = {}
        for i, (ids, labels) in enumerate(task.query):
            if task.kind.name != "causal":
                own[query_id(task, i)] = ids
                continue
            scored = [t for t, label in enumerate(labels) if t and label != IGNORED]
            if not scored:
                raise ValueError(
                    f"task {task.name!r}: query[{i}]: got no scored token, expected an answer after the prompt; "
                    "leave the example out"
                )
            own[query_id(task, i)] = ids[: scored[0]]
        prompts.append(own)
    return prompts


def query_id(task: Task, index: int) -> str:
    """What the i-th query example of a task is called, whatever is made of it."""
    return f"{task.name}/query[{index}]"


def check_prompts(prompts: Sequence[Tokens], model: Any) -> None:
    """Raise ValueError that names an id that comes twice, or a prompt that is empty or not of this vocabulary."""
    if isinstance(prompts, Mapping) or not any(prompts):
        came = "one mapping" if isinstance(prompts, Mapping) and prompts else "none"
        raise ValueError(f"prompts: got {came}, expected a mapping from id to tokens for each task, in a sequence")
    vocabulary = model.get_input_embeddings().weight.shape[0]
    seen: set[str] = set()
    for own in prompts:
        for key, tokens in own.items():
            if key in seen:
                raise ValueError(f"prompts: got {key!r} in two tasks, expected distinct ids; put the task's name first")
            seen.add(key)
            check_tokens(f"prompts[{key!r}]", tokens, vocabulary)


def check_tokens(where: str, tokens: Sequence[int], vocabulary: int) -> None:
    """Raise ValueError that begins with `where` for a text, no token, or one that is not in the vocabulary."""
    if isinstance(tokens, str):
        raise ValueError(f"{where}: got the text {tokens!r}, expected token ids; encode it")
    if not len(tokens):
        raise ValueError(f"{where}: got no token, expected at least one; begin with a beginning-of-sequence token")
    wrong = [token for token in tokens if not 0 <= token < vocabulary]
    if wrong:
        raise ValueError(
            f"{where}: got token {wrong[0]}, expected 0 ≤ token < {vocabulary}; use the tokenizer of this model"
        )


def batches(
    rows: Sequence[Sequence[Row]], length: Callable[[Row], int], max_tokens: int
) -> Iterator[tuple[list[Row], Tensor]]:
    """Batches of rows[i], the rows of task i, of like lengths: at most max_tokens, padding included, or a single row.

    Yields the rows of a batch in task order, and offsets int64 [B+1] on the CPU.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens: got {max_tokens}, expected at least 1")
    flat = sorted(((task, row) for task, own in enumerate(rows) for row in own), key=lambda item: length(item[1]))
    batch: list[tuple[int, Row]] = []
    for item in flat:
        if batch and (len(batch) + 1) * length(item[1]) > max_tokens:
            yield _in_task_order(batch, len(rows))
            batch = []
        batch.append(item)
    if batch:
        yield _in_task_order(batch, len(rows))


def _in_task_order(batch: list[tuple[int, Row]], tasks: int) -> tuple[list[Row], Tensor]:
    batch.sort(key=lambda item: item[0])
    sizes = torch.bincount(torch.tensor([task for task, _ in batch]), minlength=tasks)
    return [row for _, row in batch], torch.cat((torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)))


@contextlib.contextmanager
def adapted(
    model: Any, parameters: Mapping[str, Tensor] | None, alpha: Tensor | None, offsets: Tensor
) -> Iterator[None]:
    """Within the block the model is in evaluation mode and every task's rows meet its own adapter and architecture.

    parameters  name -> [B, *shape], as `mltd.adapt` returns them; None: all tasks by the model as it stands
    alpha       as `tarp_kernels.architecture` takes it; None: the cells' own
    """
    with mode(model, False), running(model, parameters or {}, Offsets(offsets), alpha):
        yield


def padded_and_mask(
    rows: Sequence[Sequence[int]], pad_id: int, device: Any, left: bool = False
) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, each int64 [rows, longest]."""
    mask = padded([(1,) * len(row) for row in rows], 0, left)
    return padded(rows, pad_id, left).to(device), mask.to(device)
