"""Tiny random models and tasks with ragged examples. One thread: at these sizes a second one only waits."""

import random

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from mltd import Example, Task, TaskSet
from tarp_kernels import TarpConfig, apply_tarp, tarp_parameters
from tests.threads import on_one_thread  # noqa: F401

VOCABULARY, LONGEST = 61, 48


def bare_model(family: str = "llama", seed: int = 0):
    """A random decoder, frozen by nobody, in evaluation mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if family == "gpt2":
            sizes = {"n_positions": LONGEST, "n_embd": 24, "n_layer": 2, "n_head": 2}
            config = GPT2Config(vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2, **sizes)
            model = GPT2LMHeadModel(config)
        else:
            config = LlamaConfig(
                vocab_size=VOCABULARY,
                max_position_embeddings=LONGEST,
                hidden_size=24,
                intermediate_size=40,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                tie_word_embeddings=True,
            )
            model = LlamaForCausalLM(config)
        with torch.no_grad():  # the usual start at std 0.02 predicts every token alike: nothing to tell a wrong row by
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.mul_(5)
    return model.eval()


def tarp_model(family: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0, moved: bool = True, **config):
    """A tiny model with an adapter; `moved` takes it off its identity start, where some gradients are exactly zero."""
    model = bare_model(family, seed).to(dtype)
    with torch.random.fork_rng():
        torch.manual_seed(seed + 1)
        apply_tarp(model, TarpConfig(**{"r": 3, **config}))
        if moved:
            with torch.no_grad():
                for parameter in tarp_parameters(model).values():
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def random_example(draw: random.Random, length: int, prompt: int) -> Example:
    ids = tuple(draw.randrange(VOCABULARY) for _ in range(length))
    return Example(ids, (-100,) * prompt + ids[prompt:])


def random_tasks(count: int, seed: int = 0, name: str = "tasks") -> TaskSet:
    """Tasks of different numbers of examples of different lengths, prompts not scored."""
    draw = random.Random(seed)

    def examples(most: int) -> list[Example]:
        return [random_example(draw, draw.randint(5, 16), draw.randint(0, 3)) for _ in range(draw.randint(1, most))]

    return TaskSet([Task(f"{name}-{i}", examples(4), examples(5)) for i in range(count)], name)


def loss_by_hand(model, examples) -> torch.Tensor:
    """Mean loss over the scored tokens, one example at a time and nothing padded: the oracle for everything packed."""
    losses = []
    for example in examples:
        logits = model(input_ids=torch.tensor([example.input_ids]), use_cache=False).logits[0]
        logs = logits.log_softmax(dim=-1)
        losses += [-logs[t - 1, label] for t, label in enumerate(example.labels) if t and label != -100]
    return torch.stack(losses).mean()


def pattern_tasks(count: int, seed: int, name: str) -> TaskSet:
    """Learnable tasks: each repeats a few tokens of its own in a fixed order, from a start that differs by example."""
    draw = random.Random(seed)
    tasks = []
    for i in range(count):
        cycle = draw.sample(range(3, VOCABULARY), 4)

        def example(start: int, length: int, cycle: list[int] = cycle) -> Example:
            ids = tuple(cycle[(start + t) % len(cycle)] for t in range(length))
            return Example(ids, ids)

        support = [example(start, 8 + start) for start in range(2)]
        tasks.append(Task(f"{name}-{i}", support, [example(2, 9), example(3, 12)]))
    return TaskSet(tasks, name)
