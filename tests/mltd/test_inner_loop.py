"""Adapting all tasks at once equals adapting each alone, with torch's own optimiser and autograd and no packing."""

import traceback
from copy import deepcopy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mltd import DivergedError, Example, InnerConfig, MetaConfig, MetaTrainer, Task, adapt, installed
from mltd.inner_loop import (
    Descent,
    Health,
    Supports,
    clip_per_task,
    make_optimizer,
    stack,
    take_step,
    task_gradients,
    trajectory,
)
from mltd.learner import Learner
from mltd.lora import apply_lora
from tarp_kernels import SearchCellConfig, TarpConfig, architecture, backend, tarp_parameters
from tarp_kernels.ops.search_cell import OPERATIONS
from tests.mltd.conftest import bare_model, loss_by_hand, random_tasks, tarp_model


def adapt_alone(model, task, config):
    """A separate run: the model's own adapter, one example at a time, torch.optim; put back afterwards."""
    own = tarp_parameters(model)
    start = {name: parameter.detach().clone() for name, parameter in own.items()}
    names = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
    optimizer = names[config.optimizer](own.values(), lr=config.lr, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, config.lr_decay)
    for _ in range(config.steps):
        optimizer.zero_grad()
        loss_by_hand(model, task.support).backward()
        if config.clip is not None:
            torch.nn.utils.clip_grad_norm_(own.values(), config.clip)
        optimizer.step()
        schedule.step()
    adapted = {name: parameter.detach().clone() for name, parameter in own.items()}
    optimizer.zero_grad()
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(start[name])
    return adapted


def worst_difference(model, tasks, config):
    """The largest distance of a task's adapter to that of its separate run, relative to how far that one moved."""
    together, start = adapt(model, tasks, config), tarp_parameters(model)
    worst = 0.0
    for i, task in enumerate(tasks):
        alone = adapt_alone(model, task, config)
        moved = torch.cat([(alone[name] - start[name]).flatten() for name in start]).norm()
        apart = torch.cat([(alone[name] - together[name][i]).flatten() for name in start]).norm()
        assert moved > 1e-3
        worst = max(worst, (apart / moved).item())
    return worst


CONFIGS = [
    InnerConfig(steps=3, optimizer="adam", lr=1e-2),
    InnerConfig(steps=3, optimizer="adamw", lr=1e-2, weight_decay=0.1, lr_decay=0.5),
    InnerConfig(steps=3, optimizer="sgd", lr=0.3, clip=0.2),
    InnerConfig(steps=2, optimizer="adam", lr=1e-2, clip=0.05, max_tokens=40),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.optimizer}-{c.clip}-{c.max_tokens}")
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_all_at_once_equals_separate_runs_in_float64(family, config):
    model = tarp_model(family, torch.float64)
    assert worst_difference(model, random_tasks(4), config) < 1e-9


FORMS = [
    {"sigma": "full", "activation": "none"},
    {"generator": "mlp", "r": 1},
    {"multiplicative": "dynamic"},
    {"multiplicative": "static", "product": "matmul"},
]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_all_forms_of_the_adapter_equal_separate_runs(form):
    model = tarp_model("llama", torch.float64, **form)
    assert worst_difference(model, random_tasks(3, seed=1), InnerConfig(steps=2, lr=1e-2)) < 1e-9


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_trained_norms_equal_separate_runs(family):
    model = tarp_model(family, torch.float64, train_layernorm=True)
    assert any("norm" in name or "ln_" in name for name in tarp_parameters(model))
    # Llama's norm itself works in float32
    assert worst_difference(model, random_tasks(3), InnerConfig(steps=2, optimizer="sgd", lr=0.3)) < 1e-6
    model.gradient_checkpointing_enable({"use_reentrant": False})
    config = InnerConfig(steps=2, optimizer="sgd", lr=0.3, train_mode=True)
    if family == "llama":  # GPT-2 has dropout
        assert worst_difference(model, random_tasks(3), config) < 1e-6


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("moved", [True, False], ids=["moved", "identity"])
def test_all_at_once_equals_separate_runs_in_float32_on_the_backend_that_runs(family, moved):
    model = tarp_model(family, moved=moved)
    assert worst_difference(model, random_tasks(4), InnerConfig(steps=3, optimizer="sgd", lr=0.3)) < 1e-4
    # Adam divides by |g|, so rounding counts where a gradient is about zero
    assert worst_difference(model, random_tasks(4), InnerConfig(steps=3, lr=1e-2)) < 5e-3


CELLS = SearchCellConfig(width=4)


def worst_difference_with_cells(model, tasks, config, alpha):
    """`worst_difference` where task i has the architecture alpha[i]."""
    together = adapt(model, tasks, config, alpha=alpha)
    start, worst = tarp_parameters(model), 0.0
    for i, task in enumerate(tasks):
        with architecture(model, alpha[i]):
            alone = adapt_alone(model, task, config)
        for name in start:  # each by itself: cells are small beside the adapters
            moved, apart = (alone[name] - start[name]).norm(), (alone[name] - together[name][i]).norm()
            unselected = name.rpartition(".")[2].removesuffix("_bias") in unselected_operations(alpha[i])
            assert moved > 0 or unselected, name
            worst = max(worst, (apart / moved).item() if moved > 0 else apart.item())
    return worst


def unselected_operations(alpha):
    return [name for name, column in zip(OPERATIONS, alpha.T, strict=True) if not column.any()]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("config", [CONFIGS[0], CONFIGS[2], CONFIGS[3]], ids=lambda c: f"{c.optimizer}-{c.clip}")
def test_search_cells_are_adapted_each_task_with_its_own_architecture(family, config):
    """One task's operations are all live, the others' are one-hot; several passes, with padding, lack some tasks."""
    model, tasks = tarp_model(family, torch.float64, search_cell=CELLS), random_tasks(4)
    draw = torch.Generator().manual_seed(2)
    alpha = torch.eye(6)[torch.randint(6, (4, 9), generator=draw)].double()
    alpha[1] = torch.rand(9, 6, generator=draw).softmax(-1)
    assert worst_difference_with_cells(model, tasks, config, alpha) < 1e-8
    right = adapt(model, tasks, config, alpha=alpha)
    other = adapt(model, tasks, config, alpha=alpha.roll(1, 0))
    names = [name for name in right if name.endswith("search_cell.output")]
    assert names and all((right[name] - other[name]).norm() > 1e-3 for name in names), "alphas mixed up go unnoticed"


@pytest.mark.parametrize(
    "adapts", [("all",), ("base",), (r".*mlp.*\.weight", "tarp"), ("cells",), ("tarp",), ("lora",)], ids=str
)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_any_parts_of_the_model_equal_runs_on_deep_copies(family, adapts):
    """Plain PyTorch: a copy of the model for each task, torch.optim on what is adapted. Llama ties its embeddings."""
    if adapts == ("lora",):
        model = bare_model(family).double()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            apply_lora(model, TarpConfig(r=2))
            for name, parameter in model.named_parameters():
                if "lora_B" in name:  # zero at the start, where A would have no gradient
                    torch.nn.init.normal_(parameter, std=0.1)
    else:
        model = tarp_model(family, torch.float64, search_cell=CELLS)
    tasks, config = random_tasks(3), InnerConfig(steps=2, optimizer="adamw", lr=1e-2, weight_decay=0.1, adapts=adapts)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    together = adapt(model, tasks, config)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for i, task in enumerate(tasks):
        copy = deepcopy(model)
        own = {name: value for name, value in copy.named_parameters() if name in together}
        for parameter in own.values():
            parameter.requires_grad_(True)
        optimizer = torch.optim.AdamW(own.values(), lr=config.lr, weight_decay=0.1)
        for _ in range(config.steps):
            optimizer.zero_grad()
            loss_by_hand(copy, task.support).backward()
            for parameter in own.values():
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            optimizer.step()
        for name, value in own.items():
            moved, apart = (value - before[name]).norm(), (value - together[name][i]).norm()
            assert moved > 0 and apart < 1e-4 * moved, name  # Llama's norms compute in float32, and Adam divides by |g|


def test_the_measure_sees_swapped_tasks_and_steps_left_out():
    model, tasks, config = tarp_model(dtype=torch.float64), random_tasks(2), InnerConfig(steps=2, lr=1e-2)
    together, start = adapt(model, tasks, config), tarp_parameters(model)
    name = next(iter(start))
    alone = adapt_alone(model, tasks[0], config)[name]
    torch.testing.assert_close(together[name][0], alone, rtol=1e-8, atol=1e-12)
    moved = (alone - start[name]).norm()
    assert (together[name][1] - alone).norm() > 0.1 * moved
    assert (adapt(model, tasks, InnerConfig(steps=1, lr=1e-2))[name][0] - alone).norm() > 0.1 * moved


def test_the_reference_and_the_chosen_backend_agree():
    model, tasks, config = tarp_model(), random_tasks(3), InnerConfig(steps=2, optimizer="sgd", lr=0.3)
    with backend("reference"):
        expected = adapt(model, tasks, config)
    got = adapt(model, tasks, config)
    for name, start in tarp_parameters(model).items():
        assert (got[name] - expected[name]).norm() <= 1e-4 * (expected[name] - start).norm()


def test_neither_the_base_nor_the_models_own_adapter_moves():
    model, tasks = tarp_model(), random_tasks(2)
    model.lm_head.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    adapted = adapt(model, tasks, InnerConfig())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    assert set(adapted) == set(tarp_parameters(model))
    assert not any(tensor.requires_grad for tensor in adapted.values())


def test_a_given_start_is_used_and_checked():
    model, tasks = tarp_model(), random_tasks(2)
    own = tarp_parameters(model)
    start = {name: torch.full_like(parameter, 0.25) for name, parameter in own.items()}
    (step,) = trajectory(Learner(model, ("adapter",)), tasks, InnerConfig(steps=0), start)
    assert step.step == 0 and all(torch.equal(value[1], start[name]) for name, value in step.parameters.items())
    name = next(iter(own))
    with pytest.raises(ValueError, match=name):
        adapt(model, tasks, InnerConfig(), {key: value for key, value in start.items() if key != name})
    with pytest.raises(ValueError, match=r"got shape \[1\]"):
        adapt(model, tasks, InnerConfig(), start | {name: torch.zeros(1)})
    with pytest.raises(ValueError, match="has no adapter"):
        adapt(bare_model(), tasks, InnerConfig())
    with pytest.raises(ValueError, match="tasks: got none"):
        adapt(model, [], InnerConfig())


def test_dropout_runs_in_training_mode_only_and_follows_the_seed():
    model, tasks = tarp_model(dropout=0.5), random_tasks(2)

    def adapted(seed, train_mode):
        torch.manual_seed(seed)
        return torch.cat([v.flatten() for v in adapt(model, tasks, InnerConfig(train_mode=train_mode)).values()])

    assert torch.equal(adapted(0, False), adapted(1, False))
    assert torch.equal(adapted(0, True), adapted(0, True))
    assert not torch.equal(adapted(0, True), adapted(1, True))


def test_checkpointed_activations_give_the_same_adapters():
    model, tasks = tarp_model(dtype=torch.float64), random_tasks(3)
    expected = adapt(model, tasks, InnerConfig())
    model.gradient_checkpointing_enable({"use_reentrant": False})
    got = adapt(model, tasks, InnerConfig(train_mode=True))
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-12)


def test_installed_lends_the_model_one_tasks_adapter():
    model, tasks = tarp_model(), random_tasks(2)
    own = tarp_parameters(model)
    before = {name: parameter.detach().clone() for name, parameter in own.items()}
    adapted = adapt(model, tasks, InnerConfig(lr=0.1))
    with pytest.raises(KeyError), installed(model, adapted, task=1):
        assert all(torch.equal(parameter, adapted[name][1]) for name, parameter in own.items())
        raise KeyError
    assert all(torch.equal(parameter, before[name]) for name, parameter in own.items())


def test_divergence_names_the_task_and_the_step():
    model, good = tarp_model(), random_tasks(2)
    with pytest.raises(DivergedError, match=r"task 'tasks-0': support loss of inner step \d"):
        adapt(model, good, InnerConfig(steps=8, optimizer="sgd", lr=1e25))
    for losses, gradients, message in (
        ([1.0, 2.0], [torch.zeros(2, 3), torch.tensor([[0.0], [torch.inf]])], "'b': a loss leads to gradients"),
        ([torch.nan, 1.0], [None], "'a': a loss is nan"),
    ):
        health = Health(["a", "b"])
        health.note(torch.ones(2), [torch.zeros(2, 1)], "an earlier loss")
        health.check()
        health.note(torch.tensor(losses), gradients, "a loss")
        health.note(torch.full((2,), torch.nan), [], "a later loss")
        with pytest.raises(DivergedError, match=f"task {message}"):
            health.check()


class Waits(TorchDispatchMode):
    """Notes who asks for values, for which a device would have to be waited for, or for sizes that depend on them."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        asking = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "index.")
        if any(word in str(function) for word in asking):
            frames = [frame.filename for frame in traceback.extract_stack()]
            ours = [name for name in frames if "/torch/" not in name and "test_inner_loop" not in name]
            by_mask = str(function) != "aten.index.Tensor" or any(
                one is not None and one.dtype == torch.bool for one in args[1]
            )
            if by_mask:
                self.found.add(ours[-1].rpartition("/")[2])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("cells", [False, True], ids=["tarp", "cells"])
def test_an_inner_step_waits_for_no_device(cells):
    """But where it looks at tensors that lie on the CPU for that purpose: offsets, and targets to check. transformers
    looks whether the mask masks anything, except while a CUDA graph is captured."""
    model = tarp_model("gpt2", search_cell=CELLS if cells else None)
    ids = tuple(range(1, 13))
    tasks = [Task(f"t{i}", [Example(ids, ids)] * 2, [Example(ids, ids)]) for i in range(3)]
    config, learner = InnerConfig(steps=1, clip=1.0), Learner(model, ("adapter",))
    alpha = torch.eye(6)[torch.randint(6, (3, 9))] if cells else None
    support, stacked = Supports(tasks, config, learner.device).at(1), stack(learner, None, 3)
    descent, health = Descent(list(stacked.values()), config), Health([task.name for task in tasks])
    task_gradients(learner, support, stacked, alpha)  # what is found out once
    with Waits() as waits:
        losses, gradients = task_gradients(learner, support, stacked, alpha)
        health.note(losses, gradients, "a loss")
        clip_per_task(gradients, config.clip)
        descent.at(1)
        descent.take(gradients)
    assert waits.found <= {"task_parallel.py", "linear_cross_entropy.py", "masking_utils.py"}
    with Waits() as waits:
        health.check()
        losses[losses > 0]
    assert {"inner_loop.py"} <= waits.found, "nothing would have been noticed"


def test_large_numbers_of_half_precision_are_finite():
    health = Health(["a"])
    health.note(torch.ones(1), [torch.full((1, 300, 300), 2.0, dtype=torch.float16)], "a loss")
    health.check()


def test_reentrant_checkpointing_is_refused():
    """Blocks whose input nobody trains would get no gradient."""
    model, config = tarp_model(), InnerConfig(steps=1, train_mode=True)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="re-entrant"):
        adapt(model, list(random_tasks(2)), config)
    with pytest.raises(ValueError, match="re-entrant"):
        MetaTrainer(model, random_tasks(4), MetaConfig(config, iterations=1, objective="multitask")).train()
    adapt(model, list(random_tasks(2)), InnerConfig(steps=1))  # nothing is recomputed in evaluation mode


def test_clipping_is_per_task():
    gradients = [torch.tensor([[3.0, 0.0], [0.3, 0.0]]), torch.tensor([[[4.0]], [[0.4]]])]
    clip_per_task(gradients, 1.0)
    torch.testing.assert_close(gradients[0], torch.tensor([[0.6, 0.0], [0.3, 0.0]]))
    torch.testing.assert_close(gradients[1], torch.tensor([[[0.8]], [[0.4]]]))


@pytest.mark.parametrize(
    "wrong", [{"optimizer": "lion"}, {"steps": -1}, {"lr": 0}, {"clip": 0.0}, {"weight_decay": -1}, {"max_tokens": 0}]
)
def test_wrong_settings_are_named(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}: got"):
        InnerConfig(**wrong)


def test_a_long_task_is_named_before_anything_runs():
    long = Example((1,) * 60, (1,) * 60)
    with pytest.raises(ValueError, match="task 'long'"):
        adapt(tarp_model(), [Task("long", [long], [long])], InnerConfig())


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_steps_read_gradients_of_any_strides(name):
    """Torch's fused kernels do not."""
    gradient = torch.linspace(-2.0, 1.0, 12).view(4, 3).t()
    ends = []
    for given in (gradient, gradient.contiguous()):
        parameter = torch.zeros(3, 4, requires_grad=True)
        optimizer = make_optimizer(name, [parameter], 1.0, 0.1)
        for factor in (1, -0.5):
            take_step(optimizer, [parameter], [given * factor])
        ends.append(parameter.detach())
    assert torch.equal(*ends) and ends[0].std() > 0.01 and parameter.grad is None


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_a_missing_gradient_is_one_of_zero(optimizer, weight_decay):
    """A task alone finds None where tasks side by side find zeros; both must end at the same place."""
    start, moved = torch.randn(2, 3), torch.randn(2, 3)
    results = []
    for missing in (None, torch.zeros(2, 3)):
        parameters = [start.clone().requires_grad_() for _ in range(2)]
        descent = Descent(parameters, InnerConfig(optimizer=optimizer, weight_decay=weight_decay, lr=0.1))
        for step in (1, 2):
            descent.at(step)
            descent.take([moved, missing])
        results.append([parameter.detach() for parameter in parameters])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert torch.equal(results[0][1], start) == (weight_decay == 0) and not torch.equal(results[0][0], start)
