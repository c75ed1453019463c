"""Scores of labels are the sums of one label's token log-probabilities, whatever else is in the batch."""

import math
import random

import pytest
import torch

from mltd import Example, InnerConfig, Task, adapt
from mltd.classification import classify, label_scores
from mltd.learner import installed
from mltd.metrics import accuracy
from mltd.query_batches import query_prompts
from tarp_kernels import TarpConfig, apply_tarp, architecture
from tests.mltd.stories import Tokenizer, load_model, needs_stories
from tests.mltd.test_generation import ALPHAS, TASKS, adapters, ragged_prompts, with_cells
from tests.models.tiny import GENERATING, VOCABULARY, base_model, tarp_model


def ragged_candidates(seed=2):
    """Four to six labels a task, of one to three tokens; the first begins the second."""
    draw = random.Random(seed)
    candidates = []
    for task in range(TASKS):
        own = {
            f"label {i}": [draw.randrange(3, VOCABULARY) for _ in range(draw.randint(1, 3))] for i in range(4 + task)
        }
        own["label 1"] = own["label 0"] + [7]
        candidates.append(own)
    return candidates


@torch.no_grad()
def by_brute_force(model, source, candidate):
    """Token by token, nothing padded, no other label in the batch."""
    encodes, total = model.config.is_encoder_decoder, 0.0
    before = [model.config.decoder_start_token_id] if encodes else list(source)
    for token in candidate:
        read = torch.tensor([source if encodes else before])
        own = {"decoder_input_ids": torch.tensor([before])} if encodes else {}
        total += float(model(input_ids=read, use_cache=False, **own).logits[0, -1].log_softmax(-1)[token])
        before.append(token)
    return total


@pytest.mark.parametrize("family", GENERATING)
@pytest.mark.parametrize("cells", [False, True], ids=["layers", "cells"])
def test_scores_of_all_tasks_at_once_equal_brute_force(family, cells):
    model, prompts, candidates = with_cells(family, cells), ragged_prompts(), ragged_candidates()
    parameters, alphas = adapters(model), ALPHAS if cells else None
    expected = {}
    for i, own in enumerate(prompts):
        with installed(model, parameters, i), architecture(model, ALPHAS[i]) if cells else installed(model, {}):
            for key, source in own.items():
                labels = candidates[i].items()
                expected[key] = {label: by_brute_force(model, source, candidate) for label, candidate in labels}
    for most in (1024, 32, 1):
        found = label_scores(model, prompts, candidates, parameters, alphas, max_tokens=most)
        assert list(found) == list(expected)
        for key, own in expected.items():
            assert found[key] == pytest.approx(own, rel=1e-9)
    chosen = classify(found)
    assert chosen == {key: max(own, key=own.__getitem__) for key, own in expected.items()}
    assert len(set(chosen.values())) > 1, "a constant answer would agree by chance"
    exchanged = label_scores(model, prompts, candidates, {n: v.flip(0) for n, v in parameters.items()}, alphas)
    key = next(iter(prompts[0]))
    assert exchanged[key] != pytest.approx(expected[key], rel=1e-3)


def test_without_parameters_all_tasks_meet_the_model_as_it_stands():
    model, prompts, candidates = base_model("llama").double(), ragged_prompts(), ragged_candidates()
    found = label_scores(model, prompts, candidates)
    key, source = next(iter(prompts[2].items()))
    assert found[key]["label 5"] == pytest.approx(by_brute_force(model, source, candidates[2]["label 5"]), rel=1e-9)
    assert found[key]["label 1"] < found[key]["label 0"] < 0, "a longer label that begins alike is less likely"


def test_the_first_of_equal_labels_is_chosen_and_nan_is_none():
    assert classify({"x": {"b": -1.0, "a": -1.0, "c": -2.0}, "y": {"b": -math.inf, "a": -3.0}}) == {"x": "b", "y": "a"}
    with pytest.raises(ValueError, match=r"scores\['x'\]: 'a' has NaN"):
        classify({"x": {"b": -1.0, "a": math.nan}})


def test_what_cannot_be_scored_is_named():
    model, two = base_model("gpt2"), {"yes": [5], "no": [6, 7]}  # 64 positions
    for prompts, candidates, message in (
        ([{"x": [3]}], [two, two], "candidates: got 2 for 1 tasks"),
        ([{"x": [3]}], [{"yes": [5]}], r"candidates\[0\]: got 1 label"),
        ([{"x": [3]}], [{"yes": [5], "no": []}], r"candidates\[0\]\['no'\]: got no token"),
        ([{"x": [3]}], [{"yes": [5], "no": [61]}], r"candidates\[0\]\['no'\]: got token 61"),
        ([{"x": [3]}], [{"yes": [5], "no": (5,)}], r"candidates\[0\]: 'yes' and 'no' have the same tokens"),
        ([{"x": []}], [two], r"prompts\['x'\]: got no token"),
        ([{"x": [3] * 63}], [two], r"prompts\['x'\] with label 'no': got 65 tokens, expected at most 64"),
    ):
        with pytest.raises(ValueError, match=message):
            label_scores(model, prompts, candidates)
    assert len(label_scores(model, [{"x": [3] * 62}], [two])["x"]) == 2
    assert len(label_scores(base_model("bart"), [{"x": [3] * 64}], [two])["x"]) == 2
    with pytest.raises(ValueError, match=r"prompts\['x'\] with label 'yes': got 65 tokens"):
        label_scores(base_model("bart"), [{"x": [3] * 65}], [two])
    with pytest.raises(ValueError, match=r"parameters\['.*'\]: got shape \[2, "):
        adapted = tarp_model("gpt2", dtype=torch.float64)
        label_scores(adapted, ragged_prompts(), ragged_candidates(), adapters(adapted, 2))


@needs_stories
def test_a_pretrained_model_learns_each_task_s_own_labels():
    tokenizer = Tokenizer()
    happy = ["Lily won a prize.", "The sun was warm.", "Tom got a new toy.", "The cake was good."]
    sad = ["Lily lost her doll.", "The rain was cold.", "Tom fell and hurt his knee.", "The cat ran away."]
    words = {"feeling": (" happy", " sad"), "other way": (" sad", " happy")}

    def example(text, word):
        prompt = tokenizer.encode(f"{text} This is")
        ids = tokenizer.encode(f"{text} This is{word}")
        assert ids[: len(prompt)] == prompt
        return Example(ids, (-100,) * len(prompt) + tuple(ids[len(prompt) :]))

    tasks, answers, candidates = [], {}, []
    for name, (good, bad) in words.items():
        labelled = [(text, good) for text in happy] + [(text, bad) for text in sad]
        tasks.append(Task(name, [example(*one) for one in labelled], [example(*one) for one in labelled]))
        answers |= {f"{name}/query[{i}]": word for i, (_, word) in enumerate(labelled)}
        start = len(tokenizer.encode("This is"))
        candidates.append({word: tokenizer.encode(f"This is{word}")[start:] for word in (good, bad)})
    torch.manual_seed(0)
    model = apply_tarp(load_model(), TarpConfig(r=4))
    prompts = query_prompts(tasks)
    before = classify(label_scores(model, prompts, candidates))
    adapted = adapt(model, tasks, InnerConfig(steps=20, lr=1e-2))
    after = classify(label_scores(model, prompts, candidates, adapted))
    assert accuracy(before, answers) == 0.5, "the tasks ask the same and want opposite answers"
    assert accuracy(after, answers) == 1, after
