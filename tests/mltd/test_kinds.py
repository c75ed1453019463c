"""Sequence to sequence, classification, regression: tasks side by side equal each alone, by the model's own loss."""

import random
from dataclasses import replace

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from mltd import Example, InnerConfig, MetaConfig, MetaTrainer, Task, TaskSet, adapt, evaluate
from mltd.tasks import check_fits
from tarp_kernels import SearchCellConfig, TarpConfig, apply_tarp, tarp_parameters
from tests.mltd.conftest import VOCABULARY, random_tasks, tarp_model

CLASSES = 3


def build(family, dtype=torch.float64, **tarp):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MODELS[family]().to(dtype).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.mul_(4 if family != "t5" else 1)
        apply_tarp(model, TarpConfig(**{"r": 3, **tarp}))
        with torch.no_grad():
            for parameter in tarp_parameters(model).values():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def bart():
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    ids = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2}
    return BartForConditionalGeneration(
        BartConfig(vocab_size=VOCABULARY, max_position_embeddings=32, **sizes, **heads, **ids)
    )


def t5():
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(
        T5Config(vocab_size=VOCABULARY, decoder_start_token_id=0, pad_token_id=0, **sizes)
    )


def bert(labels=CLASSES):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    return BertForSequenceClassification(
        BertConfig(vocab_size=VOCABULARY, max_position_embeddings=32, num_labels=labels, **sizes)
    )


def llama():
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    return LlamaForSequenceClassification(
        LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=32, num_labels=CLASSES, pad_token_id=0, **sizes)
    )


MODELS = {"bart": bart, "t5": t5, "bert": bert, "llama": llama, "regression": lambda: bert(1)}
KIND = {"bart": "seq2seq", "t5": "seq2seq", "bert": "classification", "llama": "classification"}
KIND["regression"] = "regression"


def tasks_of(kind, count=3, seed=0, name="tasks"):
    draw = random.Random(seed)

    def example():
        ids = tuple(draw.randrange(3, VOCABULARY) for _ in range(draw.randint(4, 9)))
        if kind == "seq2seq":
            return Example(ids, tuple(draw.randrange(3, VOCABULARY) for _ in range(draw.randint(1, 6))))
        return Example(ids, (draw.randrange(CLASSES) if kind == "classification" else draw.uniform(-1, 1),))

    def some():
        return [example() for _ in range(draw.randint(2, 4))]

    return TaskSet([Task(f"{name}-{i}", some(), some(), kind) for i in range(count)], name)


def own_loss(model, kind, examples):
    """The model's own loss of one example at a time, with nothing padded; weighted by what is scored."""
    total, count = 0.0, 0
    for example in examples:
        ids, labels = torch.tensor([example.input_ids]), torch.tensor([example.labels])
        if kind == "regression":
            total, count = total + (model(ids).logits.double().squeeze() - labels.double().squeeze()) ** 2, count + 1
            continue
        logits = model(ids, labels=labels).logits.double().reshape(labels.numel(), -1)
        total = total + torch.nn.functional.cross_entropy(logits, labels.reshape(-1), reduction="sum")
        count += labels.numel()
    return total / count


def alone(model, task, inner):
    own = tarp_parameters(model)
    start = {name: value.detach().clone() for name, value in own.items()}
    optimizer = torch.optim.SGD(own.values(), lr=inner.lr)
    for _ in range(inner.steps):
        optimizer.zero_grad()
        own_loss(model, task.kind.name, task.support).backward()
        optimizer.step()
    ends = {name: value.detach().clone() for name, value in own.items()}
    with torch.no_grad():
        loss = own_loss(model, task.kind.name, task.query).item()
        for name, value in own.items():
            value.copy_(start[name])
    optimizer.zero_grad()
    return ends, loss


@pytest.mark.parametrize("cells", [False, True], ids=["tarp", "cells"])
@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("max_tokens", [1024, 24])
def test_tasks_side_by_side_equal_each_alone(family, cells, max_tokens):
    model = build(family, search_cell=SearchCellConfig(width=4) if cells else None)
    tasks = tasks_of(KIND[family])
    inner = InnerConfig(steps=2, optimizer="sgd", lr=0.3, max_tokens=max_tokens)
    together = adapt(model, tasks, inner)
    curve = evaluate(model, tasks, inner, (2,))
    start = tarp_parameters(model)
    for i, task in enumerate(tasks):
        ends, loss = alone(model, task, inner)
        moved = torch.cat([(ends[name] - start[name]).flatten() for name in start]).norm()
        apart = torch.cat([(ends[name] - together[name][i]).flatten() for name in start]).norm()
        assert moved > 1e-3 and apart < 1e-5 * moved  # norms of T5 and Llama compute in float32
        assert torch.tensor(curve.per_task[task.name][2]).log().item() == pytest.approx(loss, rel=1e-5)


def test_one_sampler_serves_every_kind_and_training_lowers_the_loss(tmp_path):
    for family in ("bart", "bert", "regression"):
        model = build(family, torch.float32)
        train = tasks_of(KIND[family], 4)
        config = MetaConfig(InnerConfig(steps=1, lr=1e-2), iterations=12, tasks_per_batch=4, outer_lr=2e-2)
        MetaTrainer(model, train, config, tmp_path / family).train(progress=False)
        before = evaluate(build(family, torch.float32), train, config.inner, (1,)).perplexity_by_step[1]
        assert evaluate(model, train, config.inner, (1,)).perplexity_by_step[1] < 0.9 * before


def test_a_task_of_another_kind_is_named():
    causal, seq2seq, classes = tarp_model(), build("bart"), build("bert")
    for model, tasks, message in (
        (causal, tasks_of("seq2seq"), "LlamaForCausalLM has no decoder of its own"),
        (causal, tasks_of("classification"), "LlamaForCausalLM has no classification head"),
        (seq2seq, random_tasks(2), "BartForConditionalGeneration is an encoder-decoder"),
        (classes, tasks_of("regression"), r"the model has num_labels = 3, expected 1"),
    ):
        with pytest.raises(ValueError, match=message):
            check_fits(tasks, model)
    odd = Example((4, 5), (CLASSES,))
    with pytest.raises(ValueError, match=r"task 'odd': support\[0\]: got class 3, expected 0 ≤ class < 3"):
        check_fits([Task("odd", [odd], [odd], "classification")], classes)
    for labels in ((), (1, 2), (0.5,)):
        with pytest.raises(ValueError, match=r"task 'odd': support\[0\]: got labels .* expected one int"):
            Task("odd", [Example((4,), labels)], [odd], "classification")
    with pytest.raises(ValueError, match="task 'odd': kind: got 'tagging', expected one of causal"):
        Task("odd", [odd], [odd], "tagging")
    with pytest.raises(ValueError, match="labels: got 40 tokens, expected at most 32"):
        check_fits([Task("long", [Example((4,), (5,) * 40)], [Example((4,), (5,))], "seq2seq")], seq2seq)


def test_all_weights_of_a_classifier_its_head_included_are_adapted_task_by_task():
    model = build("bert", torch.float32)
    tasks, inner = tasks_of("classification"), InnerConfig(steps=2, lr=1e-3)
    head = adapt(model, tasks, replace(inner, adapts=(r"classifier\..*", "adapter")))
    assert set(head) == {*tarp_parameters(model), "classifier.weight", "classifier.bias"}
    moved = head["classifier.weight"] - model.classifier.weight
    assert (moved.flatten(1).norm(dim=1) > 1e-4).all() and (moved[0] - moved[1]).norm() > 1e-4
