"""What the model says to prompts of unseen topics: before, and after adapting the meta-trained start."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mltd.data.encoding import END
from mltd.inner_loop import InnerConfig, adapt
from mltd.learner import installed
from mltd.tasks import IGNORED, Example, Task
from tarp_kernels import disable_tarp


class Reply(TypedDict):
    """One prompt of a topic's query set with the corpus's reply and the model's, pretrained and adapted."""

    topic: str
    prompt: str
    reference: str
    before: str
    after: str


def replies(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    inner: InnerConfig,
    new_tokens: int = 40,
) -> list[Reply]:
    """Adapt the model's own adapter to ``tasks``, all at once, and let it answer each one's first query prompt.

    Greedy decoding, so the same replies every time; the adapter is left as it was.
    """
    adapted = adapt(model, tasks, inner)
    found: list[Reply] = []
    for index, task in enumerate(tasks):
        prompt, reference = _parts(task.query[0])
        with disable_tarp(model):
            before = _generate(model, tokenizer, prompt, new_tokens)
        with installed(model, adapted, index):
            after = _generate(model, tokenizer, prompt, new_tokens)
        found.append(
            Reply(
                topic=task.name,
                prompt=_said(tokenizer, prompt),
                reference=_said(tokenizer, reference),
                before=before,
                after=after,
            )
        )
    return found


def _parts(example: Example) -> tuple[list[int], list[int]]:
    cut = next(i for i, label in enumerate(example.labels) if label != IGNORED)
    return list(example.input_ids[:cut]), list(example.input_ids[cut:])


def _said(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True)).strip()


@torch.no_grad()
def _generate(model: Any, tokenizer: PreTrainedTokenizerBase, prompt: list[int], new_tokens: int) -> str:
    ids = torch.tensor([prompt])
    line_break = tokenizer(END, add_special_tokens=False).input_ids
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    said = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=[token for token in (tokenizer.eos_token_id, *line_break) if token is not None],
        pad_token_id=pad,
    )
    text = _said(tokenizer, said[0, len(prompt) :].tolist())
    return text if said.shape[1] - len(prompt) < new_tokens else f"{text} …"
