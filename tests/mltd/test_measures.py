"""What is measured of adapted models, against the metrics of each task's answers found alone."""

import random

import pytest
import torch

from mltd import Curve, Example, InnerConfig, Task, TaskSet, adapt, evaluate, installed
from mltd.generation import Decoding
from mltd.measures import Headed, Named, Written
from mltd.metrics import accuracy, bleu, matthews, pearson, rouge
from tests.mltd.conftest import random_tasks, tarp_model
from tests.mltd.test_kinds import build, tasks_of

INNER, STEPS = InnerConfig(lr=2e-2), (0, 2)


def decode(tokens):
    return " ".join(f"w{token % 3}" for token in tokens)  # few words, so that some are right


def answers(task):
    return {
        f"{task.name}/query[{i}]": decode([label for label in example.labels if label != -100])
        for i, example in enumerate(task.query)
    }


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_texts_are_measured_at_every_step(family):
    model = tarp_model() if family == "llama" else build("t5", torch.float32)
    tasks = random_tasks(3) if family == "llama" else tasks_of("seq2seq")
    references = {key: text for task in tasks for key, text in answers(task).items()}
    decoding = Decoding(max_new_tokens=5)
    curve = evaluate(model, tasks, INNER, STEPS, measures=[Written(decode, decoding, references)])
    assert Curve.from_json(curve.to_json()) == curve
    assert set(curve.metrics) == {"bleu", "rouge1", "rouge2", "rougeL"}
    for step in STEPS:
        adapted = adapt(model, tasks, InnerConfig(steps=step, lr=INNER.lr))
        for index, task in enumerate(tasks):
            texts = {}
            for i, example in enumerate(task.query):
                scored = [t for t, label in enumerate(example.labels) if t and label != -100]
                ids = torch.tensor([example.input_ids[: scored[0]] if family == "llama" else example.input_ids])
                with installed(model, adapted, index):
                    found = model.generate(ids, max_new_tokens=5, do_sample=False, num_beams=1, pad_token_id=0)[0]
                new = found[ids.shape[1] :] if family == "llama" else found[1:]
                ends = model.generation_config.eos_token_id
                kept = new.tolist()
                texts[f"{task.name}/query[{i}]"] = decode(kept[: kept.index(ends)] if ends in kept else kept)
            own = answers(task)
            assert curve.metrics["bleu"][task.name][step] == pytest.approx(bleu(texts, own))
            assert curve.metrics["rougeL"][task.name][step] == pytest.approx(rouge(texts, own).rougeL)
    assert max(curve.metrics["rouge1"][task.name][2] for task in tasks) > 0


def test_labels_written_as_text_are_measured_and_adaptation_finds_them():
    draw, labels = random.Random(0), {"one": (5, 6), "two": (7,)}

    def task(name, first):
        def example(label):
            source = (draw.randrange(20, 50), 10 if label == first else 11)
            return Example(source + labels[label], (-100, -100, *labels[label])), label

        pairs = [example(label) for label in ("one", "two") * 3]
        examples, names = zip(*pairs, strict=True)
        return Task(name, examples, examples), {f"{name}/query[{i}]": label for i, label in enumerate(names)}

    made = [task("a", "one"), task("b", "two")]  # the same sources mean the opposite
    tasks, right = [one for one, _ in made], {key: label for _, own in made for key, label in own.items()}
    measure = Named({"a": labels, "b": labels}, right)
    curve = evaluate(tarp_model(), tasks, InnerConfig(lr=1e-2, adapts=("all",)), (0, 40), measures=[measure])
    for name in ("a", "b"):
        assert curve.metrics["accuracy"][name] == {0: pytest.approx(0.5, abs=0.35), 40: 1.0}
        assert curve.metrics["matthews"][name][40] == 1.0


@pytest.mark.parametrize("family", ["bert", "llama", "regression"])
def test_heads_are_measured_as_each_task_alone(family):
    kind = "regression" if family == "regression" else "classification"
    model, tasks = build(family, torch.float64), tasks_of(kind, 3)
    tasks = TaskSet([Task(task.name, task.support, task.query + task.support, kind) for task in tasks])
    curve = evaluate(model, tasks, InnerConfig(lr=3e-2), STEPS, measures=[Headed()])
    adapted = adapt(model, tasks, InnerConfig(steps=2, lr=3e-2))
    for index, task in enumerate(tasks):
        with installed(model, adapted, index), torch.no_grad():
            outputs = [model(torch.tensor([example.input_ids])).logits[0] for example in task.query]
        expected = {str(i): example.labels[0] for i, example in enumerate(task.query)}
        if kind == "regression":
            found = {str(i): output.item() for i, output in enumerate(outputs)}
            assert curve.metrics["pearson"][task.name][2] == pytest.approx(pearson(found, expected))
        else:
            found = {str(i): output.argmax().item() for i, output in enumerate(outputs)}
            assert curve.metrics["accuracy"][task.name][2] == accuracy(found, expected)
            assert curve.metrics["matthews"][task.name][2] == pytest.approx(matthews(found, expected))
    with pytest.raises(ValueError, match="has kind 'causal', expected one with a classification head"):
        evaluate(tarp_model(), random_tasks(1), InnerConfig(), (0,), measures=[Headed()])
