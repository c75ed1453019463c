"""The experiments on real data: each runs on made-up corpora of the same formats, and what they conclude is right."""

import argparse
import contextlib
import copy
import json
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.experiments import data_to_text, multi_domain, persona_chat, table, wikitext2
from benchmarks.experiments.common import Claim, folder, orderings
from benchmarks.experiments.small_model import pretrain, small_gpt2, train_tokenizer
from mltd import Example, InnerConfig, Task, TaskSet, baselines
from mltd.baselines import Comparison, MethodResult, run_method
from mltd.data.dialogue import Dialogue, Turn
from mltd.evaluation import Curve
from mltd.generation import Decoding
from mltd.measures import Written
from tarp_kernels import SearchCellConfig, TarpConfig, apply_tarp, architecture
from tarp_kernels.models_cells import search_cells
from tarp_kernels.ops.search_cell import OPERATIONS
from tests.mltd.data_parts import write, write_tar, write_zip

WORDS = "a red fox saw the old dog run by my big house and it sat down to eat some good food in our park".split()
TINY = ["--seeds", "1", "--iterations", "1", "--pretrain-steps", "2", "--width", "32", "--layers", "1"]


def sentences(seed, count):
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(5, 9))) for _ in range(count)]


def put(root, name, write_one, content):
    path = root / name
    path.parent.mkdir(exist_ok=True)
    write_one(path, content)


@pytest.fixture
def corpora(tmp_path, monkeypatch):
    """Every corpus that the experiments read, made up, where TARP_DATA says."""
    root = tmp_path / "data"
    root.mkdir()
    monkeypatch.setenv("TARP_DATA", str(root))
    rows = ["number,Persona,chat"]
    for persona in range(5):
        for dialogue in range(3):
            said = "\n".join(sentences(f"{persona} {dialogue}", 6))
            rows.append(f'{len(rows)},i like {persona} dogs. i own {persona} foxes.,"{said}"')
    put(root, "personachat_train1072/personachat.csv", write, "\n".join(rows) + "\n")
    spoken = []
    for persona in range(2):
        for dialogue in range(3):
            turns = sentences(f"valid {persona} {dialogue}", 4)
            own = [f"your persona: i see {persona} dogs.", f"your persona: i own {persona} foxes."]
            lines = [*own, f"{turns[0]}\t{turns[1]}", f"{turns[2]}\t{turns[3]}"]
            spoken += [f"{number} {line}" for number, line in enumerate(lines, 1)]
    put(root, "convai2_valid/valid_self_original_no_cands.txt", write, "\n".join(spoken) + "\n")

    def text(seed):
        return "\n".join(sentences(seed, 60))

    front = "# Title: T\n\n## Author: A\n\n## Year: 1900\n\n-------\n\n"
    books = {f"{name}/B.md": front + text(name) for name in ("Ann", "Bob", "Cid")}
    put(root, "classic_books/classic_books.tar.gz", write_tar, books)
    tagged = {f"{genre}.txt": "\n".join(f"{word}_X" for word in text(genre).split()) for genre in ("blog", "jokes")}
    masc = {"categories.txt": "blog.txt blog\njokes.txt jokes\n", **tagged}
    put(root, "masc/masc_tagged_no_email.tar.gz", write_tar, masc)
    addresses = {f"u/{year}-{name}.txt": text(name) for year, name in ((1950, "Truman"), (1980, "Reagan"))}
    put(root, "us_speeches/state_union.zip", write_zip, addresses)
    for part in ("valid", "test"):
        put(root, f"wikitext2/{part}.txt", write, f" \n = {part} = \n \n {text(part)} \n")

    def entries(category, count):
        made = []
        for i, said in enumerate(sentences(category, count)):
            triples = f"<mtriple>{category} {i} | saw | {WORDS[i]}</mtriple>"
            lexes = f'<lex comment="good">{category} {i} {said}</lex><lex comment="good">{category} {i}</lex>'
            made.append(f'<entry category="{category}"><modifiedtripleset>{triples}</modifiedtripleset>{lexes}</entry>')
        return "".join(made)

    def document(*categories):
        inner = "".join(entries(name, 6) for name in categories)
        return f"<benchmark><entries>{inner}</entries></benchmark>"

    files = {
        "w/train/1triples/x.xml": document("Airport", "Food", "City"),
        "w/test/testdata_unseen_with_lex.xml": document("Artist", "Athlete"),
    }
    put(root, "webnlg_2017/webnlg_challenge_2017.tar.gz", write_tar, files)
    return root


def ran(module, tmp_path, *options):
    """What the experiment has written with these options beside the tiny ones."""
    out = tmp_path / "result.json"
    module.main([*TINY, "--out", str(out), "--run-dir", str(tmp_path / "run"), *options])
    found = json.loads(out.read_text())
    assert {"settings", "budget", "machine", "published", "not_as_in_the_paper", "seconds"} <= set(found)
    assert str(tmp_path) not in out.read_text(), "a result is not tied to a disk"
    for entry in found["orderings"]:
        assert entry["verdict"] in entry["in_words"]
    return found


def test_persona_chat_runs_and_goes_on_where_it_was_cut(tmp_path, corpora, monkeypatch):
    monkeypatch.setattr(persona_chat, "STEPS", (0, 1))
    options = "--tasks 2 --validation-tasks 1 --query 1 --vocabulary 280 --context 48".split()
    monkeypatch.setattr(persona_chat, "LABELS", {"finetune": "finetune"})
    found = ran(persona_chat, tmp_path, *options)
    assert found["done"] == {"finetune": [0]} and found["orderings"] == []
    methods = {"finetune": "finetune", "maml from random weights": "maml", "tarp": "tarp", "mltd": "mltd"}
    monkeypatch.setattr(persona_chat, "LABELS", methods)
    cut = ran(persona_chat, tmp_path, *options, "--minutes", "-1")
    assert cut["done"] == {"finetune": [0]}, "nothing begins after the time, what is there is read back"
    assert cut["methods"]["finetune"] == found["methods"]["finetune"]
    whole = ran(persona_chat, tmp_path, *options)
    assert whole["done"] == dict.fromkeys(methods, [0])
    assert whole["data"]["training_tasks"] == 4 and whole["data"]["test_tasks"] == 2
    assert len(whole["orderings"]) == 5, "all claims but two about what did not run and one about step 10"
    assert (tmp_path / "run" / "persona_chat.png").stat().st_size > 10_000


def test_wikitext2_sweeps_windows_and_ranks(tmp_path, corpora, monkeypatch):
    for name, value in {"WINDOWS": (1, 2), "RANKS": (1, 2), "RANK": 2, "SHOTS": 2}.items():
        monkeypatch.setattr(wikitext2, name, value)
    monkeypatch.setattr(wikitext2, "METHODS", ("finetune", "tarp-nometa"))
    options = "--draws 2 --validation-draws 1 --query 2 --steps 3 --vocabulary 280 --context 16".split()
    found = ran(wikitext2, tmp_path, *options)
    assert len(found["done"]) == 2 * 2 + 2 * 3 - 1
    points = found["perplexity_mean_over_tasks"]
    assert {point["shots"] for point in points if point["method"] == "finetune"} == {1, 2}
    assert {point["method"] for point in points} >= {"bilinear, rank 1", "kronecker, rank 2", "tarp-nometa, rank 1"}
    numbers = {label: method["adapted_parameters"] for label, method in found["methods"].items()}
    dynamic, bilinear, kronecker = (numbers[f"{kind}, 2 windows, rank 2"] for kind in wikitext2.KINDS)
    # of layers [96, 32], [32, 32], [128, 32], [32, 128]: U V at rank 2, and A [2, 32] or A [2, 128] for a dynamic one
    assert bilinear == 2 * (128 + 64 + 160 + 160) and dynamic == bilinear + 2 * (32 + 32 + 32 + 128)
    assert kronecker not in (bilinear, dynamic)
    assert numbers["bilinear, 2 windows, rank 1"] == bilinear // 2
    assert len(found["orderings"]) == 2 + 3 + 4 + 2
    assert (tmp_path / "run" / "wikitext2.png").stat().st_size > 10_000


def test_domains_run_with_cells_of_both_forms(tmp_path, corpora, monkeypatch):
    monkeypatch.setattr(multi_domain, "STEPS", (0, 1))
    ahead = multi_domain.LOOKING_AHEAD
    kept = {label: multi_domain.LABELS[label] for label in ("zero-shot", "dapt", "mltd", ahead)}
    monkeypatch.setattr(multi_domain, "LABELS", kept)
    options = "--tasks 2 --validation-tasks 1 --support 2 --query 2 --episodes 1 --dapt-windows 3".split()
    found = ran(multi_domain, tmp_path, *options, "--vocabulary", "280", "--context", "16")
    assert found["done"] == dict.fromkeys(kept, [0])
    assert "wikitext2/articles" in found["data"]["test_domains"]
    validity = {label: method["valid"] for label, method in found["methods"].items()}
    assert validity == {label: label != ahead for label in kept}
    assert "next tokens" in found["methods"][ahead]["reason"]
    assert [(entry["claim"].split(" (")[0], entry["valid"]) for entry in found["orderings"]] == [
        ("mltd looking ahead below mltd", False)
    ]
    assert found["methods"]["mltd"]["perplexity_by_token"] != found["methods"][ahead]["perplexity_by_token"]


def test_data_to_text_measures_what_is_written(tmp_path, corpora, monkeypatch):
    monkeypatch.setattr(data_to_text, "STEPS", (0, 1))
    kept = {name: name for name in ("zero-shot", "lora", "tarp-nometa", "tarp")}
    monkeypatch.setattr(data_to_text, "LABELS", kept)
    options = "--validation-tasks 1 --support 2 --query 2 --episodes 1 --train-episodes 1 --new-tokens 4".split()
    found = ran(data_to_text, tmp_path, *options, "--vocabulary", "300", "--context", "64")
    assert found["done"] == dict.fromkeys(kept, [0])
    assert found["data"]["test_categories"] == ["Artist", "Athlete"]
    bleu = found["bleu_mean_over_tasks"]
    assert {point["method"] for point in bleu} == set(kept)
    assert all(0 <= point["mean"] <= 100 and point["tasks"] == 2 for point in bleu)
    assert sum(entry["claim"].startswith("BLEU") for entry in found["orderings"]) == 3


# --- what the experiments conclude ------------------------------------------------------------------------------------


def result(name, per_task, stop=1):
    """A method's result with these perplexities, task -> [at step 0, at step 1]."""
    curves = {task: dict(enumerate(values)) for task, values in per_task.items()}
    losses = {step: {task: math.log(curves[task][step]) for task in curves} for step in (0, 1)}
    curve = Curve.from_losses(losses, dict.fromkeys(curves, 1), 0.0)
    return MethodResult(name, curve, 0, stop, None, None, {}, 0, 0.0, 0.0, 0.0, None)


LOW = {"a": [40, 10], "b": [40, 11], "c": [40, 12]}
HIGH = {"a": [40, 20], "b": [40, 22], "c": [40, 24.1]}
MIXED = {"a": [40, 9], "b": [40, 12], "c": [40, 12.5]}


@pytest.mark.parametrize(
    ("better", "worse", "verdict"),
    [(LOW, HIGH, "holds"), (HIGH, LOW, "is reversed"), (LOW, MIXED, "is not settled"), (MIXED, LOW, "is not settled")],
    ids=["lower", "higher", "mixed", "mixed the other way"],
)
def test_an_ordering_is_judged_by_the_paired_interval(better, worse, verdict):
    results = {"one": {0: result("one", better)}, "other": {0: result("other", worse)}}
    (found,) = orderings(results, [Claim("one", "other", "the paper"), Claim("one", "absent", "the paper")])
    assert found["verdict"] == verdict
    ratios = [better[task][1] / worse[task][1] for task in "abc"]
    assert found["ratio"][0] == pytest.approx(math.prod(ratios) ** (1 / 3), rel=1e-4)


def test_an_ordering_is_taken_where_the_claim_says():
    results = {"one": {0: result("one", LOW, stop=0)}, "other": {0: result("other", HIGH)}}
    chosen, first, last = orderings(results, [Claim("one", "other", "", step=step) for step in (None, 0, 1)])
    assert chosen["verdict"] == "is reversed", "one stops where it is at 40, other at about 20"
    assert first["ratio"][0] == 1 and last["verdict"] == "holds"


def test_an_ordering_is_taken_over_the_seeds_that_both_have():
    one = {0: result("one", LOW), 1: result("one", {task: [40, 400] for task in LOW})}
    (found,) = orderings({"one": one, "other": {0: result("other", HIGH)}}, [Claim("one", "other", "")])
    assert found["verdict"] == "holds" and found["ratio"][0] < 0.51


def test_bleu_is_better_where_it_is_higher():
    def curve(values):
        metrics = {"bleu": {task: {0: 0.0, 3: value} for task, value in values.items()}}
        return replace(result("x", LOW).curve, metrics=metrics)

    high, low = curve({"a": 20.0, "b": 21.0, "c": 22.5}), curve({"a": 10.0, "b": 11.0, "c": 12.0})
    found = {
        name: data_to_text.bleu_orderings({"tarp": {0: first}, "lora": {0: second}})
        for name, first, second in (("up", high, low), ("down", low, high))
    }
    assert [entry["verdict"] for entry in found["up"]] == ["holds"]
    assert [entry["verdict"] for entry in found["down"]] == ["is reversed"]
    assert found["up"][0]["difference"][0] == pytest.approx(10.167, abs=1e-3)


# --- what they are made of --------------------------------------------------------------------------------------------


def test_an_absent_corpus_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("TARP_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"masc: no such folder, expected the corpus masc; set TARP_DATA"):
        folder("masc")


def test_the_tokenizer_gives_every_text_back():
    tokenizer = train_tokenizer(sentences(0, 50), 300)
    assert 257 < len(tokenizer) <= 300
    text = "  Größe 雪 the old dog\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_pretraining_learns_and_is_read_back(tmp_path):
    tokenizer = train_tokenizer(sentences(0, 50), 260)
    examples = [Example(tuple(range(start, start + 8)), tuple(range(start, start + 8))) for start in range(20)]
    model = small_gpt2(tokenizer, 32, 1, 8, seed=0)
    path = tmp_path / "weights.safetensors"
    losses = pretrain(model, examples, 40, batch=8, lr=1e-2, seed=0, path=path)
    assert losses[-1] < losses[0] / 2
    other = small_gpt2(tokenizer, 32, 1, 8, seed=1)
    assert pretrain(other, examples, 40, batch=8, lr=1e-2, seed=0, path=path) == losses
    for (name, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two), name
    assert other.lm_head.weight is other.transformer.wte.weight


@pytest.mark.parametrize("ahead", [True, False], ids=["ahead", "causal"])
def test_only_cells_that_look_ahead_see_the_next_token(ahead):
    model = small_gpt2(train_tokenizer(sentences(0, 50), 260), 32, 1, 8, seed=0)
    with multi_domain.looking_ahead() if ahead else contextlib.nullcontext():
        baselines.apply_tarp(model, TarpConfig(r=2, search_cell=SearchCellConfig(width=8)))
    assert baselines.apply_tarp is apply_tarp, "the library is as it was"
    torch.manual_seed(0)
    ids = torch.arange(8).unsqueeze(0)
    changed = ids.clone()
    changed[0, 4] = 100
    every_conv3 = torch.zeros(9, len(OPERATIONS))
    every_conv3[:, OPERATIONS.index("conv3")] = 1
    with torch.no_grad(), architecture(model, every_conv3):
        for cell in search_cells(model).values():
            for parameter in cell.parameters():
                parameter.normal_(std=0.3)
        before, after = (model(tokens).logits[0, 3] for tokens in (ids, changed))
    assert torch.allclose(before, after, atol=1e-5) != ahead


def test_text_for_dapt_has_nothing_that_is_judged(corpora):
    options = "--tasks 2 --validation-tasks 1 --support 2 --query 2 --episodes 2 --dapt-windows 4".split()
    asked = multi_domain.options().parse_args([*options, "--context", "16"])
    split = multi_domain.parts(asked)
    tokenizer = train_tokenizer((record.target for records in split.train.values() for record in records), 280)
    sets = multi_domain.task_sets(multi_domain.examples_of(split, tokenizer, 16), asked)
    assert len(sets["train"]) == 2 * len(split.train) and len(sets["test"]) == 2
    assert {task.name for task in sets["text"]} == {
        f"text of {name}" for part in (split.validation, split.test) for name in part
    }
    judged = {example.input_ids for part in ("validation", "test") for task in sets[part] for example in task.query}
    assert len(judged) == 3 * 2
    assert not judged & {example.input_ids for task in sets["text"] for example in (*task.support, *task.query)}


def test_personas_have_numbers_and_validation_is_not_pretrained_on(corpora):
    asked = argparse.Namespace(history=1, train_support=1, support=2, query=1, validation_tasks=2, tasks=1)
    split, seen = persona_chat.personas(asked)
    assert list(split.validation) == ["training persona 1", "training persona 2"]
    assert list(split.train) == list(seen) == [f"training persona {number}" for number in (3, 4, 5)]
    assert list(split.test) == ["persona 1"]


def test_personas_of_training_are_not_tested_on():
    def by(id, *persona):
        return Dialogue(id, persona, (Turn(False, "hi"), Turn(True, "ho")))

    trained = [by("1", "i ski.", "i read."), by("2", "i am old.", "i cook.")]
    unseen = [by("1", "i ski.", "i am old."), by("2", "i read.", "i swim.", "i ski."), by("3", "i swim.", "i read.")]
    left = persona_chat.strangers(unseen, trained)
    assert [one.id for one in left] == ["1"], "2 shares two sentences with training, and 3 two with 2"


def test_draws_of_windows_grow_and_are_judged_by_the_same(monkeypatch):
    monkeypatch.setattr(wikitext2, "WINDOWS", (1, 3))
    asked = argparse.Namespace(draws=2, validation_draws=1, query=2)
    texts = {
        part: [Example((first + i, 1), (first + i, 1)) for i in range(count)]
        for part, first, count in (("valid", 100, 11), ("test", 200, 4))
    }
    few, many = (wikitext2.drawn(texts, shots, asked) for shots in (1, 3))
    for part, count in (("validation", 1), ("test", 2)):
        assert len(few[part]) == count
        for one, other in zip(few[part], many[part], strict=True):
            assert one.support == other.support[:1] and len(other.support) == 3 and one.query == other.query
    assert not many["validation"].check_leaks(many["test"]) and not many["validation"].check_leaks()
    assert len({task.support for task in many["test"]}) == 2
    with pytest.raises(ValueError, match=r"draws, query: need \(11, 4\) windows of the two files, got \(10, 4\)"):
        wikitext2.drawn({**texts, "valid": texts["valid"][:10]}, 1, asked)


def test_what_is_written_is_by_the_method_that_was_measured(tmp_path, corpora):
    """A result of other settings is found out."""
    model = small_gpt2(train_tokenizer(sentences(0, 50), 260), 32, 1, 8, seed=0)
    task = Task("t", [Example((1, 2, 3), (-100, 2, 3))], [Example((4, 5, 6), (-100, 5, 6))])
    other = Task("u", [Example((7, 8, 9), (-100, 8, 9))], [Example((9, 8, 7), (-100, 8, 7))])
    inner = [InnerConfig(steps=1, lr=0.01)]
    sets = (TaskSet([], "train"), TaskSet([other], "validation"), TaskSet([task], "test"))
    comparison = Comparison(lambda: copy.deepcopy(model), *sets, inner={"finetune": inner}, steps=(0, 1))
    measure = Written(lambda tokens: "x", Decoding(1), {"t/query[0]": "x"}, metrics=("bleu",))
    right = run_method("finetune", comparison, progress=False)
    curve = data_to_text.write_texts("finetune", comparison, right, measure)
    assert set(curve.metrics["bleu"]["t"]) == {0, right.stop_step}
    wrong = replace(right, inner={**right.inner, "lr": 0.1})
    with pytest.raises(RuntimeError, match=r"finetune: perplexity .* at step 1, expected .* as before"):
        data_to_text.write_texts("finetune", comparison, wrong, measure)


def test_the_readme_shows_the_results():
    """Both are committed: who runs an experiment again brings its tables along."""
    readme = Path(__file__).parents[2] / "benchmarks" / "README.md"
    shown = readme.read_text().split("<!-- python -m benchmarks.experiments.table -->\n", 1)[1]
    assert shown.strip() == table.table().strip()
