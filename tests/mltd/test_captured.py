"""What a captured inner step replays is what the steps themselves do.

There is no GPU here: `Recorded` stands for the graph. It notes the operators that a step calls, with their tensors, and
runs the same ones on the same memory again. Whatever a step takes from the host is then as it was when it was recorded,
just as in a CUDA graph; and what a capture forbids, it forbids.
"""

import contextlib
import traceback
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mltd import InnerConfig, MetaConfig, adapt, captured
from mltd.inner_loop import Descent, trajectory
from mltd.learner import Learner
from tarp_kernels import SearchCellConfig, architecture, set_architecture, tarp_parameters
from tests.mltd.conftest import random_tasks, tarp_model

CELLS = SearchCellConfig(width=4)
FORBIDDEN = ("_local_scalar_dense", "lift_fresh")
"""Reading a value, and a tensor out of numbers of the host."""


class Recorded(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(name in str(function) for name in FORBIDDEN):
            files = {frame.filename.rpartition("/")[2] for frame in traceback.extract_stack()}
            if "linear_cross_entropy.py" not in files:  # looks at targets on the CPU alone
                raise RuntimeError(f"not while capturing: {function}")
        results = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, results))
        return results

    @torch.no_grad()
    def replay(self) -> None:
        for function, args, kwargs, results in self.calls:
            before = [result for result in tree_leaves(results) if isinstance(result, Tensor)]
            given = {tensor.untyped_storage().data_ptr() for tensor in tree_leaves((args, kwargs)) if _holds(tensor)}
            after = [one for one in tree_leaves(function(*args, **kwargs)) if isinstance(one, Tensor)]
            for old, new in zip(before, after, strict=True):
                if old.numel() and old.untyped_storage().data_ptr() not in given:  # no view, nothing done in place
                    old.copy_(new)


def _holds(value) -> bool:
    return isinstance(value, Tensor) and value.numel() > 0


@pytest.fixture
def pretended(monkeypatch):
    """Capturing by `Recorded`; yields the recordings."""
    made: list[Recorded] = []

    def record(stream, step):
        made.append(Recorded())
        state = {name: tensor.detach().clone() for name, tensor in touched.items()}
        with monkeypatch.context() as within:
            within.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)  # transformers asks
            with made[-1]:
                losses = step()
        for name, tensor in touched.items():  # recording runs the step, capturing does not
            tensor.detach().copy_(state.get(name, torch.zeros(())))
        return made[-1].replay, losses

    touched: dict[str, Tensor] = {}
    begin = Descent.__init__

    def noted(self, parameters, config):
        begin(self, parameters, config)
        self.optimizer.register_step_post_hook(lambda *_: touched.update(_moving(self)))

    monkeypatch.setattr(Descent, "__init__", noted)
    monkeypatch.setattr(captured, "DEVICES", ("cpu",))
    monkeypatch.setattr(captured, "side_stream", lambda device: None)
    monkeypatch.setattr(captured, "run_beside", lambda stream, step: step())
    monkeypatch.setattr(captured, "record", record)
    return made


def _moving(descent: Descent) -> dict[str, Tensor]:
    """All that a step moves in place."""
    found = {f"parameter {i}": parameter for i, parameter in enumerate(descent.parameters)}
    for i, parameter in enumerate(descent.parameters):
        for key, state in descent.optimizer.state.get(parameter, {}).items():
            if isinstance(state, Tensor):
                found[f"{key} {i}"] = state
    return found


def ends(model, tasks, config, **options) -> list[tuple[Tensor | None, dict[str, Tensor]]]:
    learner = Learner(model, config.adapts)
    found = []
    for group in learner.groups(tasks):
        for step in trajectory(learner, group, config, **options):
            found.append((step.losses, {name: value.detach().clone() for name, value in step.parameters.items()}))
    return found


def same(found, expected) -> None:
    assert len(found) == len(expected)
    for (losses, values), (other_losses, others) in zip(found, expected, strict=True):
        if losses is not None:
            torch.testing.assert_close(losses, other_losses, rtol=1e-9, atol=1e-12)
        for name in others:
            torch.testing.assert_close(values[name], others[name], rtol=1e-9, atol=1e-12)


CONFIGS = {  # a rate on a device is a float32
    "sgd": {"optimizer": "sgd", "lr": 0.5},
    "adam": {"lr": 2**-6},
    "adamw, clipped": {"optimizer": "adamw", "weight_decay": 0.1, "clip": 0.5, "lr": 2**-6},
    "ever slower": {"lr_decay": 0.5, "lr": 2**-6},
    "several passes": {"max_tokens": 40, "lr": 2**-6},
    "the base": {"adapts": ("all",), "lr": 2**-7},
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("cells", [False, True], ids=["tarp", "cells"])
def test_replayed_steps_are_the_steps(pretended, config, cells):
    model = tarp_model("gpt2", torch.float64, train_layernorm=True, search_cell=CELLS if cells else None)
    tasks, inner = list(random_tasks(3)), InnerConfig(steps=5, **config)
    if cells and inner.adapts == ("all",):
        with pytest.raises(ValueError, match="cuda_graph: search cells read"):
            ends(model, tasks, InnerConfig(cuda_graph=True, **config))
        return
    alpha = torch.eye(6)[torch.randint(6, (3, 9))] if cells else None
    expected = ends(model, tasks, inner, alpha=alpha)
    found = ends(model, tasks, InnerConfig(steps=5, cuda_graph=True, **config), alpha=alpha)
    same(found, expected)
    assert len(pretended) == len(Learner(model, inner.adapts).groups(tasks))
    moved = max(float((found[5][1][n] - found[2][1][n]).abs().max()) for n in found[0][1])
    assert moved > 1e-3, "steps that move nothing would pass as well"


def test_losses_of_a_step_stay_what_they_were(pretended):
    model, inner = tarp_model("llama", torch.float64), InnerConfig(steps=4, lr=2**-6, cuda_graph=True)
    losses = [step.losses for step in trajectory(Learner(model, ("adapter",)), random_tasks(2), inner)][1:]
    assert all(float((a - b).abs().min()) > 1e-6 for a, b in zip(losses, losses[1:], strict=False))


def test_a_graph_keeps_the_tables_that_it_reads(pretended, monkeypatch):
    table = torch.zeros(3)
    monkeypatch.setattr(captured.constants, "held", lambda: [table])
    made, begin = [], captured.CapturedStep.__init__

    def noted(self, *arguments):
        made.append(self)
        begin(self, *arguments)

    monkeypatch.setattr(captured.CapturedStep, "__init__", noted)
    model = tarp_model("gpt2", search_cell=CELLS)
    adapt(model, list(random_tasks(2)), InnerConfig(steps=3, cuda_graph=True))
    (one,) = made
    assert any(kept is table for kept in one.kept)
    layouts = [layout for part in one.packed.passes for layout in part.offsets.layouts.held()]
    assert layouts and all(any(kept is layout for kept in one.kept) for layout in layouts)


def test_architectures_are_read_from_the_cpu_once():
    model, alpha = tarp_model("gpt2", search_cell=CELLS), torch.eye(6)[torch.arange(9) % 6]
    set_architecture(model, alpha)
    learner = Learner(model, ("adapter",))
    assert torch.equal(captured.host_architecture(learner, None), alpha)
    assert captured.host_architecture(Learner(model, ("all",)), None).shape == (1, 9, 6)
    asked = alpha.clone().requires_grad_()
    assert not captured.host_architecture(learner, asked).requires_grad
    assert captured.host_architecture(Learner(tarp_model(), ("adapter",)), None) is None
    each = tarp_model("gpt2", search_cell=SearchCellConfig(width=4, per_layer=True))
    own = torch.eye(6)[torch.randint(6, (2, 9))]
    set_architecture(each, own)
    assert torch.equal(captured.host_architecture(Learner(each, ("adapter",)), None), own)


@pytest.mark.parametrize("adapts", ["adapter", "all"])
@pytest.mark.parametrize("per_layer", [False, True])
def test_the_architecture_of_a_block_around_is_adapted_with(adapts, per_layer):
    """It goes before the cells' own."""
    model = tarp_model("gpt2", torch.float64, search_cell=SearchCellConfig(width=4, per_layer=per_layer))
    tasks, inner = list(random_tasks(2)), InnerConfig(steps=2, lr=0.05, optimizer="sgd", adapts=(adapts,))
    alpha = torch.eye(6)[torch.randint(1, 6, (2, 9) if per_layer else (9,))]
    with architecture(model, alpha):
        inside = adapt(model, tasks, inner)
    with architecture(model, torch.zeros_like(alpha)):
        nothing = adapt(model, tasks, inner)
    given = adapt(model, tasks, inner, alpha=alpha.unsqueeze(-3).expand(*alpha.shape[:-2], 2, 9, 6))
    worst = max(float((inside[name] - given[name]).abs().max()) for name in given)
    assert worst < 1e-12 < max(float((inside[name] - nothing[name]).abs().max()) for name in given)


class Gpu:
    """torch.cuda as far as a capture goes; notes what happens on which device."""

    def __init__(self, monkeypatch) -> None:
        self.notes: list[str] = []
        self.current = 0
        for name in ("CUDAGraph", "graph", "device", "stream", "current_stream"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))

    def CUDAGraph(self):
        return SimpleNamespace(replay=lambda: self.notes.append(f"replay on {self.current}"))

    @contextlib.contextmanager
    def device(self, number):
        before, self.current = self.current, number
        try:
            yield
        finally:
            self.current = before

    @contextlib.contextmanager
    def graph(self, graph, stream):
        self.notes.append(f"capture on {self.current}")
        yield

    def stream(self, stream):
        return contextlib.nullcontext()

    def current_stream(self):
        return SimpleNamespace(wait_stream=lambda other: self.notes.append(f"wait on {self.current}"))


def test_everything_happens_on_the_model_s_device(monkeypatch):
    gpu = Gpu(monkeypatch)
    stream = SimpleNamespace(device=1, wait_stream=lambda other: gpu.notes.append(f"wait on {gpu.current}"))
    losses = torch.ones(2)
    assert captured.run_beside(stream, lambda: losses) is losses
    replay, kept = captured.record(stream, lambda: losses)
    replay()
    assert gpu.notes == ["wait on 1", "wait on 1", "capture on 1", "replay on 1"] and kept is losses

    def forbidden():
        raise RuntimeError("operation not permitted")

    with pytest.raises(RuntimeError, match=r"cuda_graph: .*\(operation not permitted\); leave it out"):
        captured.record(stream, forbidden)


def test_what_cannot_be_captured_is_named(monkeypatch):
    tasks, graph = list(random_tasks(2)), InnerConfig(steps=2, cuda_graph=True)
    with pytest.raises(ValueError, match="cuda_graph: the model lies on cpu"):
        adapt(tarp_model(), tasks, graph)
    with pytest.raises(ValueError, match="cuda_graph: got batch_size = 2"):
        InnerConfig(cuda_graph=True, batch_size=2)
    for wrong in ({"objective": "second_order"}, {"learn_rates": True}):
        with pytest.raises(ValueError, match="cuda_graph: "):
            MetaConfig(graph, **wrong)
    monkeypatch.setattr(captured, "DEVICES", ("cpu",))
    model = tarp_model()
    rates = {name: torch.full_like(value, 0.1) for name, value in tarp_parameters(model).items()}
    with pytest.raises(ValueError, match="cuda_graph: learned rates"):
        adapt(model, tasks, graph, rates=rates)
    training = InnerConfig(steps=2, cuda_graph=True, train_mode=True)
    with pytest.raises(ValueError, match=r"cuda_graph: TarpConfig\.dropout"):
        adapt(tarp_model(dropout=0.1), tasks, training)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with pytest.raises(ValueError, match="cuda_graph: activation checkpointing"):
        adapt(model, tasks, training)
    monkeypatch.setattr(captured, "is_sharded", lambda tensor: True)
    with pytest.raises(ValueError, match="cuda_graph: the model is sharded"):
        adapt(tarp_model(), tasks, graph)
    split = tarp_model()
    split.model.layers[1].to("meta")
    with pytest.raises(ValueError, match="cuda_graph: the model is spread over several devices"):
        adapt(split, tasks, graph)
