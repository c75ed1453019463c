"""A real pretrained decoder and real text: banking questions, an intent a task, for a model that knows only stories."""

import csv
from collections import defaultdict

import pytest
import torch

from mltd import Example, InnerConfig, MetaConfig, MetaTrainer, Task, TaskSet, evaluate
from tarp_kernels import TarpConfig, apply_tarp
from tests.mltd.stories import DATA, Tokenizer, load_model, needs_stories

INTENTS = DATA.parent / "banking77" / "train.csv"
needs_intents = pytest.mark.skipif(
    not INTENTS.exists(), reason=f"the banking questions are not at {INTENTS}; set TARP_DATA"
)

STORY = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
    "One day, she saw a big, red ball."
)


def loss(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids]), labels=torch.tensor([ids])).loss.item()


@needs_stories
def test_the_pretrained_model_reads_stories_and_tells_one():
    model, tokenizer = load_model(), Tokenizer()
    ids = tokenizer.encode(STORY)
    assert tokenizer.decode(ids) == STORY and len(ids) < len(STORY) / 2
    assert loss(model, ids) < 0.5  # the wrong order of RoPE's pairs gives above 2
    assert loss(model, tokenizer.encode("Parliament enacted legislation on municipal taxation in 1873.")) > 3.5
    told = model.generate(torch.tensor([[1]]), max_new_tokens=25, do_sample=False, pad_token_id=0)[0]
    assert tokenizer.decode(told.tolist()).startswith("Once upon a time, there was a little girl named Lily.")


def intent_tasks():
    """Twelve intents to train on and four to adapt to: three support and five query questions each."""
    by_intent, tokenizer = defaultdict(list), Tokenizer()
    with open(INTENTS, newline="") as file:
        for row in csv.DictReader(file):
            if len(row["text"]) <= 60 and "\n" not in row["text"]:
                by_intent[row["category"]].append(row["text"])

    def example(text):
        ids = tokenizer.encode(text)
        return Example(ids, ids)

    tasks = []
    for intent in sorted(name for name, texts in by_intent.items() if len(texts) >= 8)[::4][:16]:
        examples = [example(text) for text in by_intent[intent][:8]]
        tasks.append(Task(intent, examples[:3], examples[3:]))
    return TaskSet(tasks[:12], "train"), TaskSet(tasks[12:], "test")


@needs_stories
@needs_intents
def test_meta_training_on_real_tasks_beats_adapting_from_the_initial_state_on_unseen_ones():
    train, test = intent_tasks()
    assert not train.check_leaks(test)
    torch.manual_seed(0)
    model = apply_tarp(load_model(), TarpConfig(r=4))
    inner, steps = InnerConfig(steps=3, lr=5e-3), (0, 1, 3, 5)
    before = evaluate(model, test, inner, steps).perplexity_by_step
    config = MetaConfig(inner, iterations=8, tasks_per_batch=4, outer_lr=5e-3, query_steps=(1, 3))
    MetaTrainer(model, train, config).train(progress=False)
    after = evaluate(model, test, inner, steps).perplexity_by_step
    assert after[3] < after[0], "adaptation must still help"
    assert after[3] < 0.85 * min(before.values()), (before, after)
