"""The outer loop: its gradient by hand, what it learns, when it stops, and what it writes down."""

import json
import math
from dataclasses import replace

import pytest
import torch

from mltd import Controller, DivergedError, Example, InnerConfig, MetaConfig, MetaTrainer, Task, TaskSet, evaluate
from mltd.checkpoint import CheckpointError, checkpoints, load_checkpoint
from mltd.controller import entropy, sampled, support_embeddings
from mltd.meta_gradient import OBJECTIVES
from tarp_kernels import SearchCellConfig, architecture, tarp_parameters
from tests.mltd.conftest import VOCABULARY, bare_model, loss_by_hand, pattern_tasks, random_tasks, tarp_model
from tests.mltd.test_meta_gradient import apart, by_hand

FAST = MetaConfig(inner=InnerConfig(steps=2, lr=1e-2), iterations=4, tasks_per_batch=2, outer_lr=3e-3)


@pytest.mark.parametrize(("optimizer", "schedule"), [("adam", "constant"), ("sgd", "cosine"), ("adamw", "linear")])
def test_outer_steps_are_those_of_the_outer_optimiser(optimizer, schedule):
    config = MetaConfig(
        inner=InnerConfig(steps=1, lr=1e-2),
        iterations=3,
        tasks_per_batch=3,
        outer_lr=0.05,
        outer_optimizer=optimizer,
        outer_schedule=schedule,
        outer_weight_decay=0.1,
        outer_clip=0.5,
    )
    tasks = random_tasks(3)
    expected = tarp_model(dtype=torch.float64)
    own = list(tarp_parameters(expected).values())
    torch_optimizer = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[optimizer]
    outer = torch_optimizer(own, lr=0.05, weight_decay=0.1)
    for iteration in range(3):
        factor = {"constant": 1, "linear": 1 - iteration / 3, "cosine": 0.5 * (1 + math.cos(math.pi * iteration / 3))}
        outer.param_groups[0]["lr"] = 0.05 * factor[schedule]
        for parameter, gradient in zip(own, by_hand(expected, tasks, config.inner, (1,)), strict=True):
            parameter.grad = gradient
        torch.nn.utils.clip_grad_norm_(own, 0.5)
        outer.step()
    model = tarp_model(dtype=torch.float64)
    start = [parameter.detach().clone() for parameter in tarp_parameters(model).values()]
    result = MetaTrainer(model, tasks, config).train(progress=False)
    assert apart(result.parameters.values(), own) < 1e-8 < 1e-3 < apart(start, own)


def test_meta_training_makes_adaptation_to_unseen_tasks_better():
    train, test = pattern_tasks(12, 0, "train"), pattern_tasks(4, 1, "test")
    model = tarp_model(moved=False, r=4)
    base = {name: value.clone() for name, value in model.state_dict().items() if name not in tarp_parameters(model)}
    inner = InnerConfig(steps=3, lr=2e-2)
    before = evaluate(model, test, inner, (0, 1, 3)).perplexity_by_step
    config = MetaConfig(inner, iterations=25, tasks_per_batch=4, outer_lr=1e-2, query_steps=(1, 3))
    MetaTrainer(model, train, config).train(progress=False)
    after = evaluate(model, test, inner, (0, 1, 3)).perplexity_by_step
    assert after[3] < 0.6 * before[3] and after[3] < 0.8 * after[0]
    assert all(torch.equal(model.state_dict()[name], value) for name, value in base.items())


def cells_model(**config):
    return tarp_model(search_cell=SearchCellConfig(width=4, **config))


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("gumbel", [False, True])
def test_the_controllers_gradient_is_that_of_the_loss_it_chose_cells_for(gumbel, per_layer):
    """Nothing adapted: the whole of it in one graph, one task after the other, the bonus for undecided choices too."""
    model, tasks = cells_model(per_layer=per_layer), list(random_tasks(3))
    config = MetaConfig(trains=("controller",), query_steps=(0,), tasks_per_batch=3, gumbel=gumbel, entropy_weight=0.5)
    trainer = MetaTrainer(model, TaskSet(tasks), config)
    _, found = trainer._gradient(tasks)
    controller = trainer.controller
    alpha, logits = sampled(controller, model, tasks, config.temperature.at(0), gumbel, "0/0")
    total = -0.5 * 3 * entropy(logits)
    for i, task in enumerate(tasks):
        with architecture(model, alpha.select(-3, i)):
            total = total + loss_by_hand(model, task.query)
    expected = torch.autograd.grad(total, list(controller.parameters()))
    assert list(found) == [f"controller/{name}" for name, _ in controller.named_parameters()]
    assert apart(found.values(), expected) < 1e-4
    without = torch.autograd.grad(-1.5 * entropy(controller(support_embeddings(model, tasks))), controller.parameters())
    assert apart(without, expected) > 0.1, "the losses count for nothing"


def test_meta_training_with_cells_and_a_controller_learns_and_resumes_on_the_same_bits(tmp_path):
    train, test = pattern_tasks(8, 0, "train"), pattern_tasks(4, 1, "test")
    config = MetaConfig(
        InnerConfig(steps=2, lr=2e-2),
        iterations=16,
        tasks_per_batch=4,
        outer_lr=1e-2,
        trains=("adapter", "controller"),
        controller_lr=1e-3,
        learn_rates=True,
        rates_lr=1e-4,
        accumulate=2,
    )
    model = cells_model()
    before = evaluate(model, test, config.inner, (2,), controller=Controller.for_model(model)).perplexity_by_step[2]
    trainer = MetaTrainer(model, train, config, tmp_path / "whole")
    untrained = {name: value.detach().clone() for name, value in trainer.controller.named_parameters()}
    result = trainer.train(progress=False)
    after = evaluate(model, test, config.inner, (2,), controller=trainer.controller, rates=result.rates)
    assert after.perplexity_by_step[2] < 0.8 * before
    assert all((value - untrained[name]).norm() > 0 for name, value in trainer.controller.named_parameters())
    assert all((rate - config.inner.lr).abs().max() > 1e-5 for rate in result.rates.values())
    assert len({task for line in log(tmp_path / "whole") for task in line.get("losses", ())}) == 8

    MetaTrainer(cells_model(), train, replace(config, iterations=7), tmp_path / "parts").train(progress=False)
    parts = MetaTrainer(cells_model(), train, config, tmp_path / "parts").train(progress=False)
    for name in result.parameters:
        assert torch.equal(parts.parameters[name], result.parameters[name])
    last = [checkpoints(tmp_path / name)[-1].read_bytes() for name in ("whole", "parts")]
    assert last[0] == last[1]


def log(directory):
    return [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("objective", ["first_order", "second_order", "reptile", "multitask"])
def test_an_outer_loop_over_all_weights_learns(objective):
    """Task by task where the inner loop adapts them too; every objective, the pretrained weights in the outer loop."""
    train, model = pattern_tasks(6, 0, "train"), bare_model("gpt2")
    model.set_attn_implementation("eager")
    inner = InnerConfig(steps=2, optimizer="sgd", lr=0.05, adapts=("all",), clip=1.0)
    outer = {"outer_optimizer": "sgd", "outer_lr": 1.0} if objective == "reptile" else {"outer_lr": 3e-3}
    config = MetaConfig(inner, iterations=10, tasks_per_batch=3, objective=objective, trains=("all",), **outer)
    before = evaluate(model, train, inner, (2,)).perplexity_by_step[2]
    MetaTrainer(model, train, config).train(progress=False)
    assert evaluate(model, train, inner, (2,)).perplexity_by_step[2] < 0.8 * before


def test_the_log_has_a_line_for_every_outer_step(tmp_path):
    tasks = random_tasks(4)
    result = MetaTrainer(tarp_model(), tasks, FAST, tmp_path).train(progress=False)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [0, 1, 2, 3, 4] and result.iteration == 4
    for line in lines[1:]:
        assert len(line["losses"]) == 2 and set(line["losses"]) <= set(tasks.names)
        assert all(math.isfinite(loss) and loss > 0 for loss in line["losses"].values())
        assert line["tokens"] > 0 and line["seconds"] > 0 and line["examples"] > 0
    assert sum(line["seconds"] for line in lines) == pytest.approx(result.seconds)


def test_validation_keeps_the_best_start_and_stops_when_patience_ends(tmp_path):
    train, validation = pattern_tasks(4, 0, "train"), pattern_tasks(2, 9, "validation")
    config = MetaConfig(
        inner=InnerConfig(steps=1, lr=1e-2),
        iterations=40,
        tasks_per_batch=2,
        outer_lr=0.5,  # far too large: it soon gets worse
        validate_every=1,
        validation_steps=(0, 1),
        patience=3,
    )
    model = tarp_model(moved=False)
    result = MetaTrainer(model, train, config, tmp_path, validation).train(progress=False)
    assert result.stopped_early and result.iterations < 40
    assert result.iteration == min(result.validation, key=result.validation.get) == result.iterations - 3
    curve = evaluate(model, validation, config.inner, (0, 1))
    assert curve.geometric_mean((0, 1)) == pytest.approx(result.validation[result.iteration], rel=1e-6)

    again = MetaTrainer(tarp_model(moved=False), train, config, tmp_path, validation).train(progress=False)
    assert again.iterations == result.iterations and again.validation == result.validation
    assert all(torch.equal(again.parameters[name], value) for name, value in result.parameters.items())


def test_a_finished_run_goes_on_with_more_iterations_as_if_never_stopped(tmp_path):
    tasks = random_tasks(5)
    whole = MetaTrainer(tarp_model(dropout=0.3), tasks, with_dropout(7), tmp_path / "whole").train(progress=False)
    MetaTrainer(tarp_model(dropout=0.3), tasks, with_dropout(3), tmp_path / "parts").train(progress=False)
    torch.manual_seed(12345)  # the run has its own generator state
    other_start = tarp_model(dropout=0.3, moved=False)
    parts = MetaTrainer(other_start, tasks, with_dropout(7), tmp_path / "parts").train(progress=False)
    assert all(torch.equal(parts.parameters[name], value) for name, value in whole.parameters.items())
    last = [checkpoints(tmp_path / name)[-1].read_bytes() for name in ("whole", "parts")]
    assert last[0] == last[1]
    with pytest.raises(CheckpointError, match="is at iteration 7, expected at most iterations = 5"):
        MetaTrainer(tarp_model(dropout=0.3), tasks, with_dropout(5), tmp_path / "whole").train(progress=False)


def with_dropout(iterations):
    return MetaConfig(InnerConfig(steps=2, train_mode=True), iterations=iterations, tasks_per_batch=2)


def test_training_leaves_the_callers_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    MetaTrainer(tarp_model(dropout=0.3), random_tasks(2), with_dropout(2)).train(progress=False)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"outer_lr": 1e-4}, "another config: outer_lr was 0.003 and is now 0.0001"),
        ({"query_steps": (0, 2)}, r"another config: query_steps was None and is now \[0, 2\]"),
        ({"tasks": random_tasks(4, seed=8)}, "another tasks"),
        ({"model": lambda: tarp_model(seed=4)}, "another model"),
        ({"model": lambda: tarp_model(r=2)}, "another model"),
    ],
)
def test_another_runs_directory_is_refused(tmp_path, change, complaint):
    settings = {"model": tarp_model, "tasks": random_tasks(4)}
    MetaTrainer(settings["model"](), settings["tasks"], FAST, tmp_path).train(progress=False)
    config = {name: value for name, value in change.items() if name not in settings}
    settings |= {name: value for name, value in change.items() if name in settings}
    with pytest.raises(CheckpointError, match=complaint):
        trainer = MetaTrainer(settings["model"](), settings["tasks"], MetaConfig(**{**vars(FAST), **config}), tmp_path)
        trainer.train(progress=False)


def test_divergence_names_the_task_and_the_last_good_checkpoint(tmp_path, monkeypatch):
    tasks, broken = random_tasks(4), "tasks-2"
    config = MetaConfig(**{**vars(FAST), "iterations": 12, "checkpoint_every": 5})
    model = tarp_model()
    real = OBJECTIVES["first_order"]

    def breaks_at_seven(problem, tasks, alpha):
        if trainer.iteration == 7 and broken in [task.name for task in tasks]:
            with torch.no_grad():
                next(iter(tarp_parameters(model).values())).fill_(torch.nan)
        return real(problem, tasks, alpha)

    trainer = MetaTrainer(model, tasks, config, tmp_path)
    if broken not in batch_names(tasks, config, 8):
        broken = batch_names(tasks, config, 8)[0]
    monkeypatch.setitem(OBJECTIVES, "first_order", breaks_at_seven)
    with pytest.raises(DivergedError, match=r"iteration 8: task 'tasks-\d': .*iteration 7, is .*00000007.safetensors"):
        trainer.train(progress=False)


def batch_names(tasks, config, iteration):
    trainer = MetaTrainer(tarp_model(), tasks, config)
    for _ in range(iteration):
        batch = next(trainer.sampler)
    return [task.name for task in batch]


def test_training_that_diverges_by_itself_stops_with_the_last_good_state(tmp_path):
    config = MetaConfig(InnerConfig(steps=1), iterations=50, tasks_per_batch=2, outer_lr=1e30, outer_optimizer="sgd")
    with pytest.raises(DivergedError, match=r"iteration \d+: task 'tasks-\d': .* the last good state, iteration \d+"):
        MetaTrainer(tarp_model(), random_tasks(3), config, tmp_path).train(progress=False)
    for path in checkpoints(tmp_path):
        assert load_checkpoint(path).iteration >= 0
    with pytest.raises(DivergedError, match="nothing was kept, as there is no run_dir"):
        MetaTrainer(tarp_model(), random_tasks(3), config).train(progress=False)


def test_bad_tasks_are_named_before_training_starts():
    train = random_tasks(3)
    bad = TaskSet([*train, Task("bad", [Example((VOCABULARY,), (1,))] * 2 + [train[0].support[0]], train[0].query)])
    with pytest.raises(ValueError, match=r"task 'bad': support\[0\]: got token"):
        MetaTrainer(tarp_model(), bad, FAST)
    with pytest.raises(ValueError, match="validation: shares data with the training tasks: the task name"):
        MetaTrainer(tarp_model(), train, FAST, validation=train[:1])
    with pytest.raises(ValueError, match="validation: got None with validate_every > 0"):
        MetaTrainer(tarp_model(), train, MetaConfig(validate_every=1))
    with pytest.raises(ValueError, match="has no adapter"):
        MetaTrainer(bare_model(), train, FAST)
    with pytest.raises(ValueError, match="tasks_per_batch: got 4 for 3 tasks"):
        MetaTrainer(tarp_model(), train, MetaConfig(tasks_per_batch=4))


@pytest.mark.parametrize(
    "wrong",
    [
        {"outer_optimizer": "lion"},
        {"outer_schedule": "square"},
        {"objective": "zeroth_order"},
        {"iterations": 0},
        {"outer_lr": 0.0},
        {"outer_clip": -1.0},
        {"patience": 0},
        {"query_steps": (1, 4)},
    ],
)
def test_wrong_settings_are_named(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}: got"):
        MetaConfig(**wrong)
