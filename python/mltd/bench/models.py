"""Whole models: one forward pass of SmolLM2-135M, and the inner steps of a meta-batch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from mltd.bench.cases import Case, GateError
from mltd.bench.contenders import deviation, stir, unfused
from mltd.data.smollm2 import load_cached
from mltd.inner_loop import InnerConfig, adapt
from mltd.tasks import Example, Task
from tarp_kernels import TarpConfig, apply_tarp, tarp_parameters

TASKS, TOKENS = 8, 32


def model_cases(cache: Path | None = None, rounds: int = 12) -> Iterator[Case]:
    """The whole-model forward pass, then the inner steps at 5 shots and at 1 shot."""
    yield whole_model_case(cache, rounds)
    for shots in (5, 1):
        yield inner_steps_case(shots, rounds)


def whole_model_case(cache: Path | None = None, rounds: int = 12, batch: int = 4, length: int = 256) -> Case:
    """SmolLM2-135M, logits included, all seven projections adapted at rank 8: base, TarpLinear, unfused PyTorch.

    The pretrained weights where the cache has them (default: the usual one), else random ones of the same shapes.
    """
    found = load_cached(cache)
    base = found.model if found is not None else smollm2_shaped(layers=30, vocabulary=49152)
    models = {"base": base, "tarp": apply_tarp(share(base), TarpConfig(r=8))}
    stir(models["tarp"])
    models["unfused"] = unfused(copy.deepcopy(models["tarp"]))
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(base.config.vocab_size, (batch, length), generator=generator)

    def run(model: nn.Module) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with torch.no_grad():
                return model(input_ids=tokens, use_cache=False).logits

        return call

    calls = {name: run(model.eval()) for name, model in models.items()}

    def gate() -> float:
        logits = {name: call() for name, call in calls.items()}
        return deviation(logits["tarp"], logits["unfused"], logits["base"], "logits of the adapted model")

    weights = "pretrained" if found is not None else "random weights"
    return Case("whole model", f"{batch}x{length} tokens, r=8, {weights}", calls, gate, "base", rounds)


def share(model: PreTrainedModel) -> PreTrainedModel:
    """A second model object over the same parameters."""
    memo: dict[int, object] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo)


def smollm2_shaped(layers: int, vocabulary: int) -> LlamaForCausalLM:
    """A Llama of SmolLM2-135M's width 576, FFN 1536 and 9/3 heads, with seeded random weights."""
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=vocabulary,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def inner_steps_case(shots: int, rounds: int = 12) -> Case:
    """Three SGD steps for eight tasks, all at once against task by task, with TarpLinear and with unfused PyTorch.

    A 6-layer Llama of width 576 and vocabulary 8192, rank 8 in every projection, ``shots`` sequences of 32 tokens a
    task. Every contender runs the same loop and takes gradients of the adapters only; the gate compares the results.
    """
    model = apply_tarp(smollm2_shaped(layers=6, vocabulary=8192), TarpConfig(r=8))
    stir(model)
    plain = unfused(copy.deepcopy(model))
    generator = torch.Generator().manual_seed(4)
    tasks = [_random_task(f"task {i}", shots, generator) for i in range(TASKS)]
    config = InnerConfig(steps=3, optimizer="sgd", lr=0.05, max_tokens=TASKS * shots * TOKENS)

    def at_once(model: nn.Module) -> Callable[[], dict[str, Tensor]]:
        return lambda: adapt(model, tasks, config)

    def one_by_one(model: nn.Module) -> Callable[[], dict[str, Tensor]]:
        def call() -> dict[str, Tensor]:
            single = [adapt(model, [task], config) for task in tasks]
            return {name: torch.cat([adapted[name] for adapted in single]) for name in single[0]}

        return call

    calls: dict[str, Callable[[], object]] = {
        "tarp task by task": one_by_one(model),
        "tarp at once": at_once(model),
        "unfused task by task": one_by_one(plain),
        "unfused at once": at_once(plain),
    }
    start = {name: parameter.detach() for name, parameter in tarp_parameters(model).items()}
    shape = f"{TASKS} tasks x {shots} shots x {TOKENS} tokens"
    kind = f"inner steps {shots}-shot"
    return Case(kind, shape, calls, lambda: _same_steps(calls, start), "unfused task by task", rounds)


def _random_task(name: str, shots: int, generator: torch.Generator) -> Task:
    tokens = torch.randint(8192, (shots + 1, TOKENS), generator=generator).tolist()
    examples = [Example(tuple(ids), tuple(ids)) for ids in tokens]
    return Task(name, examples[:shots], examples[shots:])


def _same_steps(calls: dict[str, Callable[[], object]], start: dict[str, Tensor], tolerance: float = 2e-3) -> float:
    """Every contender must have moved the adapters of every task in the same way; returns the largest deviation."""
    moved = {}
    for name, call in calls.items():
        adapted = call()
        assert isinstance(adapted, dict)
        moved[name] = {key: value - start[key] for key, value in adapted.items()}
    expected = moved.pop("unfused task by task")
    worst = 0.0
    for name, values in moved.items():
        for key, value in values.items():
            size = expected[key].flatten(1).norm(dim=1)
            error = (value - expected[key]).flatten(1).norm(dim=1)
            if not bool((size > 0).all()) or not bool((error <= tolerance * size).all()):
                raise GateError(
                    f"{name}: {key} moved otherwise than task by task in plain PyTorch, by up to "
                    f"{float((error / size).max()):.1e} of the way; allowed is {tolerance:.0e}"
                )
            worst = max(worst, float((error / size).max()))
    return worst
