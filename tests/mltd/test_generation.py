"""Texts of many tasks from one batch are those of every prompt alone, and stop where they should."""

import contextlib
import random

import pytest
import torch

from mltd import Example, InnerConfig, Task, adapt
from mltd.generation import Decoding, generate
from mltd.learner import installed
from mltd.metrics import bleu
from mltd.query_batches import batches, query_prompts
from tarp_kernels import TarpConfig, apply_tarp, architecture, tarp_parameters
from tests.mltd.conftest import random_tasks
from tests.mltd.stories import Tokenizer, load_model, needs_stories
from tests.models.cell_models import MIXED, PUBLISHED, cell_model, one_hot
from tests.models.tiny import GENERATING, VOCABULARY, base_model, move, tarp_model

END = 2
NEW = 10
TASKS = 3
ALPHAS = torch.stack([one_hot(PUBLISHED), one_hot(MIXED), one_hot(MIXED[::-1])])


def decode(ids):
    return " ".join(map(str, ids))


def adapters(model, tasks=TASKS, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return {
        name: own.detach() + 0.3 * torch.randn((tasks, *own.shape), generator=draw, dtype=torch.float64)
        for name, own in tarp_parameters(model).items()
    }


def ragged_prompts(tasks=TASKS, seed=1):
    """Differing numbers of prompts of differing lengths."""
    draw = random.Random(seed)
    return [
        {
            f"t{i}/query[{j}]": tuple(draw.randrange(3, VOCABULARY) for _ in range(draw.randint(2, 12)))
            for j in range(1 + i)
        }
        for i in range(tasks)
    ]


def with_cells(family, cells):
    return cell_model(family, dtype=torch.float64) if cells else tarp_model(family, dtype=torch.float64)


def alone(model, prompts, parameters, alphas=None, **options):
    """Each prompt by itself, unpadded, with its task's values put into the model's own adapter."""
    found = {}
    for i, own in enumerate(prompts):
        cells = contextlib.nullcontext() if alphas is None else architecture(model, alphas[i])
        with installed(model, parameters, i), cells:
            for key, tokens in own.items():
                found[key] = decode(continued(model, tokens, **options))
    return found


def continued(model, tokens, beams=1):
    """Greedy: token by token without a cache. Beams: what Hugging Face's search gives for the prompt alone."""
    ids, encodes = torch.tensor([tokens]), model.config.is_encoder_decoder
    start = 1 if encodes else len(tokens)
    with torch.no_grad():
        if beams > 1:
            given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": NEW, "do_sample": False}
            row = model.generate(ids, num_beams=beams, **given)[0].tolist()
        else:
            row = [model.config.decoder_start_token_id] if encodes else list(tokens)
            while len(row) < start + NEW and END not in row[start:]:
                own = {"decoder_input_ids": torch.tensor([row])} if encodes else {}
                read = ids if encodes else torch.tensor([row])
                row.append(int(model(input_ids=read, use_cache=False, **own).logits[0, -1].argmax()))
    new = row[start:]
    return new[: new.index(END)] if END in new else new


@pytest.mark.parametrize("family", GENERATING)
@pytest.mark.parametrize("cells", [False, True], ids=["layers", "cells"])
@pytest.mark.parametrize("beams", [1, 3], ids=["greedy", "beams"])
def test_all_tasks_at_once_give_what_each_prompt_gives_alone(family, cells, beams):
    model, prompts, alphas = with_cells(family, cells), ragged_prompts(), ALPHAS if cells else None
    parameters, decoding = adapters(model), Decoding(NEW, beams)
    expected = alone(model, prompts, parameters, alphas, beams=beams)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    found = generate(model, prompts, decode, decoding, parameters, alphas)
    assert found == expected
    assert list(found) == [key for own in prompts for key in own]
    assert model.training, "the mode is put back"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    small = Decoding(NEW, beams, max_tokens=2 * beams * (NEW + 12))  # two or three prompts in a batch
    assert generate(model, prompts, decode, small, parameters, alphas) == expected
    # what would go unnoticed otherwise: another task's adapter, or another task's architecture
    exchanged = {name: value.flip(0) for name, value in parameters.items()}
    assert generate(model, prompts, decode, decoding, exchanged, alphas) != expected
    if cells:
        assert generate(model, prompts, decode, decoding, parameters, alphas.flip(0)) != expected
    assert len(set(expected.values())) > len(expected) / 2


def test_without_parameters_all_tasks_meet_the_model_as_it_stands():
    model, prompts = base_model("gpt2").double(), ragged_prompts()
    expected = {key: decode(continued(model, tokens)) for own in prompts for key, tokens in own.items()}
    assert generate(model, prompts, decode, Decoding(NEW)) == expected
    # a task may have nothing to generate
    assert generate(model, [{}, prompts[1]], decode, Decoding(NEW)) == {key: expected[key] for key in prompts[1]}


def test_an_architecture_that_all_tasks_share():
    model, prompts = cell_model("llama", dtype=torch.float64), ragged_prompts()
    parameters, shared = adapters(model), one_hot(MIXED)
    found = generate(model, prompts, decode, Decoding(NEW), parameters, shared)
    assert found == alone(model, prompts, parameters, [shared] * TASKS)
    own = {name: value.detach().expand(TASKS, *value.shape) for name, value in tarp_parameters(model).items()}
    found = generate(model, prompts, decode, Decoding(NEW), None, ALPHAS)
    assert found == alone(model, prompts, own, list(ALPHAS))
    with pytest.raises(ValueError, match="alpha"):
        generate(model, prompts, decode, Decoding(NEW), parameters, ALPHAS[:2])


def forwards(model, call):
    """What `call` returns, and how many forward passes it took."""
    count = []
    hook = model.register_forward_hook(lambda *_: count.append(1))
    try:
        return call(), len(count)
    finally:
        hook.remove()


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_the_end_token_ends_a_text(family):
    model, prompts = move(tarp_model(family, dtype=torch.float64), scale=0.5), ragged_prompts()
    whole = {key: text.split() for key, text in generate(model, prompts, decode, Decoding(NEW)).items()}
    # a token that one text has, though not first
    key, at = next((key, at) for key, own in whole.items() for at in range(2, len(own)) if own[at] not in own[:at])
    end = whole[key][at]
    model.generation_config.eos_token_id = [END, int(end)]
    expected = {name: decode(own[: own.index(end)] if end in own else own) for name, own in whole.items()}
    assert generate(model, prompts, decode, Decoding(NEW)) == expected
    single = [{key: own[key]} for own in prompts if key in own]
    assert forwards(model, lambda: generate(model, single, decode, Decoding(NEW))) == ({key: expected[key]}, at + 1)


@pytest.mark.parametrize("family", ["llama", "bart"])
@pytest.mark.parametrize("beams", [1, 3])
def test_a_stop_text_ends_a_text_even_across_tokens(family, beams):
    model, prompts = tarp_model(family, dtype=torch.float64), ragged_prompts()
    parameters = adapters(model, seed=3)
    texts = generate(model, prompts, decode, Decoding(NEW, beams), parameters)
    if beams == 1:
        words = next(text for text in texts.values() if len(text.split()) == NEW).split()
        stop = f"{words[1]} {words[2]}"
        found = generate(model, prompts, decode, Decoding(NEW, stop=("none such", stop)), parameters)
        assert found == {key: text.split(stop)[0] for key, text in texts.items()} != texts
        one = next(key for key, text in texts.items() if text.split() == words)
        index = next(i for i, own in enumerate(prompts) if one in own)
        own = {name: value[index : index + 1] for name, value in parameters.items()}
        single = [{one: prompts[index][one]}]
        _, passes = forwards(model, lambda: generate(model, single, decode, Decoding(NEW, stop=(stop,)), own))
        assert passes == 3, "as many as the stop text needs"
    else:
        stop = " "  # every beam of two tokens has one
        found = generate(model, prompts, decode, Decoding(NEW, beams, stop=(stop,)), parameters)
        assert all(" " not in text for text in found.values()) and any(found.values())
        together = {}
        for i, own in enumerate(prompts):
            with installed(model, parameters, i):
                for key, tokens in own.items():
                    together |= generate(model, [{key: tokens}], decode, Decoding(NEW, beams, stop=(stop,)))
        assert found == together


def test_n_grams_that_must_not_come_twice_and_the_length_penalty_reach_the_search():
    model, prompts = base_model("gpt2").double(), ragged_prompts()
    free = generate(model, prompts, decode, Decoding(20))
    once = generate(model, prompts, decode, Decoding(20, no_repeat_ngram=2))

    def repeats(texts):
        pairs = [list(zip(text.split(), text.split()[1:], strict=False)) for text in texts.values()]
        return sum(len(own) - len(set(own)) for own in pairs)

    assert repeats(once) == 0 < repeats(free)
    model = tarp_model("llama", dtype=torch.float64)
    short, long = (generate(model, prompts, decode, Decoding(20, 4, penalty)) for penalty in (-4.0, 4.0))
    assert sum(map(len, short.values())) < sum(map(len, long.values()))


def test_prompts_of_tasks_are_what_comes_before_the_first_scored_token():
    ids = (5, 6, 7, 8)
    task = Task("t", [Example(ids, ids)], [Example(ids, (-100, -100, 7, 8)), Example(ids, ids)])
    assert query_prompts([task]) == [{"t/query[0]": (5, 6), "t/query[1]": (5,)}]
    half = Task("h", [Example(ids, ids)], [Example(ids, ids), Example(ids, (-100,) * 4)])
    with pytest.raises(ValueError, match=r"task 'h': query\[1\]: got no scored token"):
        query_prompts([task, half])
    names = [key for own in query_prompts(random_tasks(3)) for key in own]
    assert len(set(names)) == len(names)


def test_batches_hold_every_row_once_in_task_order_and_no_more_tokens_than_allowed():
    draw = random.Random(0)
    rows = [[(task, i, draw.randint(1, 30)) for i in range(draw.randint(0, 9))] for task in range(6)]
    seen = []
    for batch, offsets in batches(rows, lambda row: row[2], 64):
        assert len(batch) * max(row[2] for row in batch) <= 64 and offsets.tolist()[0] == 0
        for task in range(6):
            assert all(row[0] == task for row in batch[offsets[task] : offsets[task + 1]])
        assert int(offsets[-1]) == len(batch)
        seen += batch
    assert sorted(seen) == [row for own in rows for row in own]
    assert [len(batch) for batch, _ in batches([[90], [1]], lambda row: row, 64)] == [1, 1], "a long row has its own"


def test_what_cannot_be_generated_is_named():
    model = base_model("gpt2")  # 64 positions
    for prompts, message in (
        ([], "prompts: got none"),
        ([{}], "prompts: got none"),
        ({"x": (3,)}, "prompts: got one mapping, expected a mapping from id to tokens for each task"),
        ([{"x": "Once"}], r"prompts\['x'\]: got the text 'Once', expected token ids"),
        ([{"x": (3,)}, {"x": (4,)}], "prompts: got 'x' in two tasks"),
        ([{"x": ()}], r"prompts\['x'\]: got no token"),
        ([{"x": (3, VOCABULARY)}], rf"prompts\['x'\]: got token {VOCABULARY}, expected 0 ≤ token < {VOCABULARY}"),
        ([{"x": (3, -1)}], r"prompts\['x'\]: got token -1"),
        ([{"x": (3,) * 55}], r"prompts\['x'\]: got 55 tokens, expected at most 54 beside 10 new ones"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(model, prompts, decode, Decoding(NEW))
    assert generate(model, [{"x": (3,) * 54}], decode, Decoding(NEW))["x"]
    bart = base_model("bart")
    with pytest.raises(ValueError, match=r"prompts\['x'\]: got 65 tokens, expected at most 64, for Bart"):
        generate(bart, [{"x": (3,) * 65}], decode, Decoding(NEW))
    with pytest.raises(ValueError, match="max_new_tokens: got 64, expected fewer than 64"):
        generate(bart, [{"x": (3,)}], decode, Decoding(64))
    adapted = tarp_model("gpt2", dtype=torch.float64)
    with pytest.raises(ValueError, match=r"parameters\['.*'\]: got shape \[2, "):
        generate(adapted, ragged_prompts(), decode, Decoding(NEW), adapters(adapted, 2))


@pytest.mark.parametrize(
    "wrong, name",
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"beams": 0}, "beams"),
        ({"no_repeat_ngram": -1}, "no_repeat_ngram"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop": "\n"}, "stop"),
        ({"stop": ("",)}, "stop"),
    ],
    ids=["new", "beams", "ngram", "tokens", "text", "empty"],
)
def test_wrong_settings_are_named(wrong, name):
    with pytest.raises(ValueError, match=f"{name}: got"):
        Decoding(**{"max_new_tokens": 5, **wrong})


@needs_stories
def test_a_pretrained_model_tells_each_task_s_own_story():
    tokenizer = Tokenizer()
    begins = "Once upon a time, there was a"
    ends = {"dog": " big dog named Rex. Rex liked to swim.", "bird": " little blue bird who could not fly."}

    def example(begin, end):
        prompt, ids = tokenizer.encode(begin), tokenizer.encode(begin + end)
        assert ids[: len(prompt)] == prompt
        return Example(ids, (-100,) * len(prompt) + tuple(ids[len(prompt) :]))

    tasks = [Task(name, [example(begins, end)], [example("One day, there was a", end)]) for name, end in ends.items()]
    torch.manual_seed(0)
    model = apply_tarp(load_model(), TarpConfig(r=4))
    prompts, decoding = query_prompts(tasks), Decoding(20, stop=(".",))
    references = {f"{name}/query[0]": end.split(".")[0] for name, end in ends.items()}
    before = generate(model, prompts, tokenizer.decode, decoding)
    after = generate(model, prompts, tokenizer.decode, decoding, adapt(model, tasks, InnerConfig(steps=20, lr=1e-2)))
    assert bleu(before, references) < 30 and bleu(after, references) > 60, (before, after)
