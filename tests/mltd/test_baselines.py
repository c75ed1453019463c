"""The methods on tiny models: one budget, one result, nothing computed twice, no choice made on test tasks."""

import json
import math
from dataclasses import replace

import pytest
import torch

from mltd import METHODS, Comparison, InnerConfig, MetaConfig, TaskSet, evaluate, run_method
from mltd import baselines as baselines_module
from mltd.checkpoint import CheckpointError
from mltd.lora import apply_lora, lora_ranks
from mltd.starts import load_start
from tarp_kernels import SearchCellConfig, TarpConfig, apply_tarp, load_tarp, tarp_parameters
from tests.mltd.conftest import bare_model, pattern_tasks

STEPS = (0, 1, 3, 5)


def comparison(run_dir=None, **changes):
    rates = {"finetune": (1e-3, 1e-2), "lora": (1e-2,), "tarp-nometa": (1e-2, 5e-2)}
    trained = MetaConfig(
        InnerConfig(steps=3, lr=1e-2), iterations=6, tasks_per_batch=3, outer_lr=1e-2, query_steps=(1, 3)
    )
    values = {
        "make_model": bare_model,
        "train": pattern_tasks(6, 0, "train"),
        "validation": pattern_tasks(2, 1, "validation"),
        "test": pattern_tasks(3, 2, "test"),
        "tarp": TarpConfig(r=4, search_cell=SearchCellConfig(width=4)),
        "inner": {name: [InnerConfig(lr=lr) for lr in lrs] for name, lrs in rates.items()},
        "meta": {name: [trained] for name, method in METHODS.items() if method.trains},
        "text": pattern_tasks(4, 7, "text"),
        "steps": STEPS,
        "run_dir": run_dir,
    }
    return Comparison(**{**values, **changes})


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp("runs")
    done = {name: run_method(name, comparison(directory), progress=False) for name in METHODS}
    torch.set_num_threads(threads)
    return directory, done


def test_every_method_gives_the_same_kind_of_result(results):
    for name, result in results[1].items():
        assert result.name == name and result.seconds > 0
        assert result.curve.steps == ((0,) if name == "zero-shot" else STEPS)
        assert set(result.curve.per_task) == set(pattern_tasks(3, 2, "test").names)
        assert all(math.isfinite(ppl) and ppl > 1 for ppl in result.curve.perplexity_by_step.values())
        assert result.stop_step in result.curve.steps and result.stop_step in result.validation
        json.dumps(result.to_json(), allow_nan=False)


def test_all_start_from_the_same_pretrained_model(results):
    done = results[1]
    base = done["zero-shot"].curve.perplexity_by_step[0]
    for name in ("finetune", "lora", "tarp-nometa"):
        assert done[name].curve.perplexity_by_step[0] == pytest.approx(base, rel=1e-5)
        assert done[name].curve.perplexity_by_step[5] < 0.9 * base
    trained = [name for name, method in METHODS.items() if method.trains]
    for name in trained:
        assert done[name].curve.perplexity_by_step[0] != pytest.approx(base, rel=1e-3)
    ends = [done[name].curve.perplexity_by_step[3] for name in trained]
    assert len({round(end, 3) for end in ends}) == len(trained) == 7, "some methods do the same"


def test_parameters_are_counted_and_loras_match_tarps(results):
    done, model = results[1], bare_model()
    assert done["zero-shot"].parameters == 0
    everything = sum(p.numel() for p in model.parameters())
    assert {done[name].parameters for name in ("finetune", "maml", "reptile", "dapt", "tapt")} == {everything}
    tarp = sum(p.numel() for p in tarp_parameters(apply_tarp(model, TarpConfig(r=4))).values())
    assert {done[name].parameters for name in ("tarp-nometa", "tarp-multitask", "tarp")} == {tarp}
    assert done["mltd"].parameters > tarp
    assert abs(done["lora"].parameters - tarp) <= 0.05 * tarp


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("config", [{"r": 1}, {"r": 2}, {"r": 3, "scaling": 0.5}, {"r": 5, "sigma": "full"}])
def test_lora_has_tarps_parameters_on_tarps_layers_and_starts_as_the_base(family, config):
    adapted = apply_tarp(bare_model(family), TarpConfig(**config))
    target = sum(p.numel() for p in tarp_parameters(adapted).values())
    model, ids = bare_model(family), torch.arange(5)[None]
    before = model(ids).logits
    count = apply_lora(model, TarpConfig(**config))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert count == sum(p.numel() for p in trained.values()) and abs(count - target) <= 0.05 * target
    assert all("lora_" in name for name in trained)
    assert {name.partition(".lora_")[0] for name in trained} == {
        name.rpartition(".")[0] for name in tarp_parameters(adapted)
    }
    assert torch.equal(model(ids).logits, before)
    scalings = {m.scaling["default"] for m in model.modules() if hasattr(m, "lora_A")}
    assert scalings == {config.get("scaling", 1.0)}


def test_lora_ranks_meet_the_count_or_say_that_they_cannot():
    sizes = {f"layer{i}": 10 + i % 3 for i in range(30)}
    one = sum(sizes.values())
    assert set(lora_ranks(sizes, 12 * one + 3).values()) == {12}
    mixed = lora_ranks(sizes, round(1.5 * one))
    assert abs(sum(mixed[n] * s for n, s in sizes.items()) - 1.5 * one) <= 0.05 * 1.5 * one
    halves = [sum(mixed[f"layer{i}"] for i in part) for part in (range(15), range(15, 30))]
    assert set(mixed.values()) == {1, 2} and abs(halves[0] - halves[1]) <= 1  # spread, not all at one end
    with pytest.raises(ValueError, match="cannot be met within 5 %"):
        lora_ranks(sizes, one // 2)


def test_results_are_what_the_parts_give(results):
    """The best rate on validation, and the curve of that rate on the test tasks: found here without `run_method`."""
    done, setup = results[1], comparison()
    with torch.random.fork_rng():
        torch.manual_seed(setup.seed)
        model = apply_tarp(bare_model(), replace(setup.tarp, search_cell=None))
    scores = [
        min(evaluate(model, setup.validation, c, STEPS).perplexity_by_step.values()) for c in setup.inner["tarp-nometa"]
    ]
    best = setup.inner["tarp-nometa"][scores.index(min(scores))]
    assert done["tarp-nometa"].inner["lr"] == best.lr and scores[0] != scores[1]
    assert evaluate(model, setup.test, best, STEPS).perplexity_by_step == done["tarp-nometa"].curve.perplexity_by_step

    rates = setup.inner["finetune"]
    full_rates = [replace(c, adapts=("all",)) for c in rates]
    scores = [min(evaluate(bare_model(), setup.validation, c, STEPS).perplexity_by_step.values()) for c in full_rates]
    assert done["finetune"].inner["lr"] == rates[scores.index(min(scores))].lr and scores[0] != scores[1]


def test_a_trained_start_is_saved_and_gives_the_reported_curve(results):
    for name in ("mltd", "tarp", "tarp-multitask", "maml"):
        result, model = results[1][name], bare_model()
        start = load_start(model, results[0] / name)
        assert (start.controller is not None) == (name == "mltd")
        inner = InnerConfig(**result.inner)
        curve = evaluate(model, comparison().test, inner, STEPS, controller=start.controller, rates=start.rates)
        assert curve.perplexity_by_step == result.curve.perplexity_by_step
    result = results[1]["tarp"]
    model = load_tarp(bare_model(), result.adapter)
    curve = evaluate(model, comparison().test, InnerConfig(**result.inner), STEPS)
    assert curve.perplexity_by_step == result.curve.perplexity_by_step
    assert results[1]["tarp-nometa"].adapter is None


def test_a_finished_method_is_read_back_and_another_comparison_is_refused(results, monkeypatch):
    directory, done = results

    def computes(*args, **kwargs):
        raise AssertionError("computed again")

    for part in ("evaluate", "evaluate_unadapted", "MetaTrainer", "select"):
        monkeypatch.setattr(baselines_module, part, computes)
    for name in METHODS:
        assert run_method(name, comparison(directory), progress=False) == done[name]
    for change in (
        {"test": pattern_tasks(3, 5, "test")},
        {"steps": (0, 2)},
        {"make_model": lambda: bare_model(seed=3)},
    ):
        with pytest.raises(CheckpointError, match="is the result of another comparison"):
            run_method("mltd", comparison(directory, **change), progress=False)


def test_an_interrupted_method_goes_on_where_it_stopped(results, tmp_path, monkeypatch):
    """Interrupted in training, in the search and before the test tasks: each time the next call does what is left."""
    two = [MetaConfig(**{**vars(comparison().meta["mltd"][0]), "outer_lr": lr}) for lr in (1e-3, 1e-2)]
    setup = {"meta": {"mltd": two}, "inner": {"mltd": [InnerConfig(lr=1e-2), InnerConfig(lr=3e-2)]}}
    expected = run_method("mltd", comparison(**setup), progress=False)
    assert expected.select_seconds > 0

    real, real_step = baselines_module.evaluate, baselines_module.MetaTrainer._iterate
    for allowed_steps, allowed_curves in ((4, 99), (99, 0), (99, 2), (99, 1)):
        steps, curves = [], []

        def iterate(trainer, steps=steps, allowed=allowed_steps):
            steps.append(1)
            if len(steps) > allowed:
                raise KeyboardInterrupt
            return real_step(trainer)

        def measured(*args, curves=curves, allowed=allowed_curves, **kwargs):
            curves.append(1)
            if len(curves) > allowed:
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        monkeypatch.setattr(baselines_module.MetaTrainer, "_iterate", iterate)
        monkeypatch.setattr(baselines_module, "evaluate", measured)
        with pytest.raises(KeyboardInterrupt):
            run_method("mltd", comparison(tmp_path, **setup), progress=False)
        monkeypatch.undo()
    result = run_method("mltd", comparison(tmp_path, **setup), progress=False)
    for part in ("perplexity_by_step", "per_task"):
        assert getattr(result.curve, part) == getattr(expected.curve, part)
    assert (result.inner, result.meta, result.validation) == (expected.inner, expected.meta, expected.validation)


def test_the_trained_methods_share_one_budget():
    base = comparison().meta["mltd"][0]
    with pytest.raises(
        ValueError, match=r"meta: got candidates of \(iterations, tasks_per_batch\) \[\(6, 3\), \(7, 3\)\]"
    ):
        comparison(meta={"mltd": [base], "tarp-multitask": [MetaConfig(**{**vars(base), "iterations": 7})]})


def test_test_tasks_that_leak_are_refused():
    test = pattern_tasks(3, 2, "test")
    with pytest.raises(ValueError, match="test: shares data with train: the task name"):
        comparison(train=TaskSet([*pattern_tasks(6, 0, "train"), test[0]], "train"))
    with pytest.raises(ValueError, match="test: a query set is not held out: the same tokens"):
        leaky = test[0]
        comparison(test=TaskSet([type(leaky)("leaky", leaky.support, [*leaky.query, leaky.support[0]])], "test"))


def test_unknown_methods_and_missing_candidates_are_named():
    with pytest.raises(ValueError, match="name: got 'mamba', expected one of zero-shot"):
        run_method("mamba", comparison())
    with pytest.raises(ValueError, match="inner: got no candidate for 'lora'"):
        run_method("lora", comparison(inner={}))
    with pytest.raises(ValueError, match="meta: got no candidate for 'mltd'"):
        run_method("mltd", comparison(meta={}))
