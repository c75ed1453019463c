"""Whole models: one forward pass of SmolLM2-135M, and the inner steps of a meta-batch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
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
    base, weights = smollm2(cache)
    models = {"base": base, "tarp": apply_tarp(share(base), TarpConfig(r=8))}
    stir(models["tarp"])
    models["unfused"] = unfused(copy.deepcopy(models["tarp"]))
    tokens = random_tokens(base, batch, length)
    calls = {name: forward_pass(model, tokens) for name, model in models.items()}

    def gate() -> float:
        logits = {name: call() for name, call in calls.items()}
        return deviation(logits["tarp"], logits["unfused"], logits["base"], "logits of the adapted model")

    return Case("whole model", f"{batch}x{length} tokens, r=8, {weights}", calls, gate, "base", rounds)


def smollm2(cache: Path | None = None) -> tuple[PreTrainedModel, str]:
    """SmolLM2-135M and "pretrained" where the cache has it, else a model of its shapes and "random weights"."""
    found = load_cached(cache)
    if found is not None:
        return found.model, "pretrained"
    return smollm2_shaped(layers=30, vocabulary=49152), "random weights"


def random_tokens(model: PreTrainedModel, batch: int, length: int) -> Tensor:
    """Seeded token ids [batch, length] of the model's vocabulary."""
    generator = torch.Generator().manual_seed(3)
    return torch.randint(model.config.vocab_size, (batch, length), generator=generator)


def forward_pass(model: nn.Module, tokens: Tensor) -> Callable[[], Tensor]:
    """A call that gives the logits [batch, length, vocabulary], without gradients and without a cache."""
    model.eval()

    def call() -> Tensor:
        with torch.no_grad():
            return model(input_ids=tokens, use_cache=False).logits

    return call


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
    tasks = random_tasks(shots)
    config = InnerConfig(steps=3, optimizer="sgd", lr=0.05, max_tokens=TASKS * shots * TOKENS)
    baseline = "unfused task by task"
    calls = {
        "tarp task by task": one_by_one(model, tasks, config),
        "tarp at once": at_once(model, tasks, config),
        baseline: one_by_one(plain, tasks, config),
        "unfused at once": at_once(plain, tasks, config),
    }

    def gate() -> float:
        expected = calls[baseline]()
        others = [name for name in calls if name != baseline]
        return max(same_steps(name, calls[name](), expected, tarp_parameters(model)) for name in others)

    return Case(f"inner steps {shots}-shot", tasks_shape(shots), calls, gate, baseline, rounds)


def at_once(model: nn.Module, tasks: list[Task], config: InnerConfig) -> Callable[[], dict[str, Tensor]]:
    """A call that adapts all tasks in one batch: name -> [tasks, *shape]."""
    return lambda: adapt(model, tasks, config)


def one_by_one(model: nn.Module, tasks: list[Task], config: InnerConfig) -> Callable[[], dict[str, Tensor]]:
    """A call that adapts task after task: name -> [tasks, *shape]."""

    def call() -> dict[str, Tensor]:
        return joined([adapt(model, [task], config) for task in tasks])

    return call


def joined(single: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The results of runs with some tasks each as that of one run with all of them."""
    return {name: torch.cat([adapted[name] for adapted in single]) for name in single[0]}


def tasks_shape(shots: int) -> str:
    """What `random_tasks` are, for tables."""
    return f"{TASKS} tasks x {shots} shots x {TOKENS} tokens"


def random_tasks(shots: int) -> list[Task]:
    """TASKS tasks of ``shots`` seeded support sequences of TOKENS tokens, and one query sequence."""
    generator = torch.Generator().manual_seed(4)
    return [_random_task(f"task {i}", shots, generator) for i in range(TASKS)]


def _random_task(name: str, shots: int, generator: torch.Generator) -> Task:
    tokens = torch.randint(8192, (shots + 1, TOKENS), generator=generator).tolist()
    examples = [Example(tuple(ids), tuple(ids)) for ids in tokens]
    return Task(name, examples[:shots], examples[shots:])


def same_steps(
    who: str,
    adapted: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    start: Mapping[str, Tensor],
    still: Sequence[str] = (),
    tolerance: float = 2e-3,
) -> float:
    """Largest distance of ``adapted`` to ``expected``, name -> [tasks, *shape], over the way from ``start``.

    For each task and tensor by itself: all must have moved, except that parameters named in ``still`` may stay where
    they are expected to. Raises GateError above ``tolerance``.
    """
    worst = 0.0
    for key, value in adapted.items():
        size = (expected[key] - start[key]).detach().flatten(1).norm(dim=1)
        error = (value - expected[key]).flatten(1).norm(dim=1)
        moved = bool((size > 0).all()) or key.rpartition(".")[2] in still
        if not moved or not bool((error <= tolerance * size).all()):
            raise GateError(
                f"{who}: {key} moved otherwise than task by task in plain PyTorch, by up to "
                f"{float((error / size).max()):.1e} of the way; allowed is {tolerance:.0e}"
            )
        worst = max(worst, float((error / size).nan_to_num().max()))
    return worst
