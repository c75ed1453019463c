"""Training through the tools people have: Trainer, checkpointing of activations, torch.compile, many tasks at once."""

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from tarp_kernels import TarpConfig, TarpLinear, apply_tarp, load_tarp, save_tarp, tarp_parameters, task_parallel
from tests.models.tiny import FAMILIES, base_model, gradients, inputs, logits, tarp_model

NO_DROPOUT = {
    "gpt2": {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0},
    "llama": {},
    "bart": {"dropout": 0},
    "roberta": {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0},
    "t5": {"dropout_rate": 0},
}


pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning"),
]


def arguments(folder, **changes) -> TrainingArguments:
    defaults = {"max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 2e-2, "save_strategy": "no"}
    quiet = {"report_to": [], "disable_tqdm": True, "logging_steps": 1, "use_cpu": True, "seed": 3}
    return TrainingArguments(output_dir=str(folder), **defaults | quiet | changes)


def examples(family, count=8):
    batch = inputs(family, count)
    return [{name: tensor[i] for name, tensor in batch.items()} for i in range(count)]


def bits(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_trainer_trains_the_adapter_and_nothing_else(family, tmp_path):
    model = tarp_model(family, moved=False, changes=NO_DROPOUT[family], train_layernorm=family == "llama")
    before, names = bits(model), tarp_parameters(model).keys()
    settings = arguments(tmp_path, max_steps=10, per_device_train_batch_size=8, learning_rate=5e-2)
    trainer = Trainer(model, settings, train_dataset=examples(family))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.95 * losses[0]
    after = model.state_dict()
    tied = {name for name in after if after[name].data_ptr() in {p.data_ptr() for p in tarp_parameters(model).values()}}
    assert tied == set(names)
    assert {name for name in after if not torch.equal(after[name], before[name])} == set(names)


class Stop(TrainerCallback):
    """Ends the run after step 3, as an interruption would."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 3
        return control


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_trainer_goes_on_from_its_checkpoint_with_the_same_bits(family, tmp_path):
    def run(callbacks=(), resume=None):
        model = tarp_model(family, moved=False)
        settings = arguments(tmp_path, save_strategy="steps", save_steps=3)
        trainer = Trainer(model, settings, train_dataset=examples(family), callbacks=list(callbacks))
        trainer.train(resume_from_checkpoint=resume)
        return bits(model)

    whole = run()
    stopped = run([Stop()])
    resumed = run(resume=str(tmp_path / "checkpoint-3"))
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())
    assert any(not torch.equal(stopped[name], tensor) for name, tensor in whole.items())


def test_a_trained_adapter_is_saved_and_loaded_onto_a_fresh_base(tmp_path):
    model = tarp_model("llama", moved=False, train_layernorm=True)
    Trainer(model, arguments(tmp_path / "run"), train_dataset=examples("llama")).train()
    save_tarp(model, tmp_path / "adapter")
    fresh, batch = load_tarp(base_model("llama"), tmp_path / "adapter"), inputs("llama")
    assert torch.equal(logits(fresh, batch), logits(model.eval(), batch))


# --- activation checkpointing -----------------------------------------------------------------------------------------


def checkpointed(model) -> nn.Module:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def assert_same(found: torch.Tensor, expected: torch.Tensor, family: str) -> None:
    """The same bits; but checkpointing T5 adds the gradients of what its blocks share in another order."""
    if family == "t5":
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * expected.abs().amax().item())
    else:
        assert torch.equal(found, expected)


def count_forwards(model) -> list[int]:
    """A counter of the adapted layers' forward passes: recomputation adds to it."""
    calls = [0]
    for layer in model.modules():
        if isinstance(layer, TarpLinear):
            layer.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    return calls


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("family", ["llama", "bart", "roberta", "t5"])
def test_checkpointing_gives_the_same_gradients(family, dropout):
    model, batch = tarp_model(family, dropout=dropout, changes=NO_DROPOUT[family]).train(), inputs(family)
    calls = count_forwards(model)
    torch.manual_seed(4)
    plain = gradients(model, batch)
    once = calls[0]
    torch.manual_seed(4)
    recomputed = gradients(checkpointed(model), batch)
    assert calls[0] > 2 * once, "nothing was recomputed"
    for name, gradient in plain.items():
        assert_same(recomputed[name], gradient, family)
    if dropout:
        other = gradients(model, batch)  # another draw
        change = [(other[name] - gradient).abs().amax() / gradient.abs().amax() for name, gradient in plain.items()]
        assert max(change) > 0.1


def stacked_parameters(model, tasks: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(7)
    stacked = {}
    for name, parameter in tarp_parameters(model).items():
        noise = 0.1 * torch.randn((tasks, *parameter.shape), generator=draw)
        stacked[name] = (parameter.detach() + noise).requires_grad_()
    return stacked


def grouped_gradients(model, batch, stacked, offsets):
    with task_parallel(model, stacked, torch.tensor(offsets)):
        found = torch.autograd.grad(model(**batch).loss, list(stacked.values()))
    return dict(zip(stacked, found, strict=True))


@pytest.mark.parametrize("family", ["llama", "bart", "gpt2", "t5", "roberta"])
def test_checkpointing_inside_task_parallel(family):
    model, batch = tarp_model(family, changes=NO_DROPOUT[family]).train(), inputs(family, 5)
    stacked, offsets = stacked_parameters(model, 3), [0, 2, 2, 5]
    plain = grouped_gradients(model, batch, stacked, offsets)
    recomputed = grouped_gradients(checkpointed(model), batch, stacked, offsets)
    for name, gradient in plain.items():
        assert_same(recomputed[name], gradient, family)
        assert not gradient[1].any(), "the task without sequences has no gradient"
    assert all(gradient[0].any() and gradient[2].any() for gradient in plain.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_task_parallel_equals_one_run_per_task(family):
    """Logits and gradients of all tasks at once against the same model carrying one task's adapter at a time."""
    model, batch = tarp_model(family, changes=NO_DROPOUT[family], sigma="full"), inputs(family, 5)
    stacked, offsets = stacked_parameters(model, 3), [0, 1, 3, 5]
    weights = torch.randn(logits(model, batch).shape, generator=torch.Generator().manual_seed(1))
    with task_parallel(model, stacked, torch.tensor(offsets)):
        together = model(**batch).logits
        found = torch.autograd.grad((together * weights).sum(), list(stacked.values()))
    parameters = tarp_parameters(model)
    for task, (start, end) in enumerate(zip(offsets[:-1], offsets[1:], strict=True)):
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(stacked[name][task])
        alone = model(**{name: tensor[start:end] for name, tensor in batch.items()}).logits
        torch.testing.assert_close(together[start:end], alone, rtol=1e-4, atol=1e-4)
        single = torch.autograd.grad((alone * weights[start:end]).sum(), list(parameters.values()))
        for gradient, expected in zip(found, single, strict=True):
            torch.testing.assert_close(gradient[task], expected, rtol=1e-3, atol=1e-4 * expected.abs().amax().item())
            assert expected.any()


# --- torch.compile ----------------------------------------------------------------------------------------------------


def stack(**config) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 24, bias=False), nn.Tanh(), nn.Linear(24, 8))
    return apply_tarp(model, TarpConfig(r=3, target_modules="all-linear", **config))


@pytest.mark.parametrize(
    ("engine", "config"),
    [
        ("inductor", {"sigma": "full"}),
        ("aot_eager", {}),
        ("aot_eager", {"generator": "mlp", "generator_bias": True}),
        ("aot_eager", {"kind": "bilinear"}),
    ],
)
def test_compiled_stack_is_one_graph_for_any_number_of_rows(engine, config):
    torch._dynamo.reset()
    model = stack(**config)
    with torch.no_grad():
        for parameter in tarp_parameters(model).values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=engine)
    names, parameters = zip(*tarp_parameters(model).items(), strict=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (5, 9, 12):
            x = torch.randn(rows, 16)
            eager, fast = model(x), compiled(x)
            torch.testing.assert_close(fast, eager, rtol=1e-4, atol=1e-5)
            expected = torch.autograd.grad(eager.square().sum(), parameters)
            for name, gradient, wanted in zip(
                names, torch.autograd.grad(fast.square().sum(), parameters), expected, strict=True
            ):
                assert wanted.any(), name
                torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("family", "blocks"), [("llama", "num_hidden_layers"), ("gpt2", "n_layer")])
def test_compiled_model_gives_the_same_loss_and_gradients(family, blocks):
    torch._dynamo.reset()
    model, batch = tarp_model(family, changes={blocks: 1}), inputs(family)
    eager = gradients(model, batch)
    compiled = torch.compile(model, backend="aot_eager")
    loss = compiled(**batch).loss
    torch.testing.assert_close(loss, model(**batch).loss, rtol=1e-5, atol=1e-5)
    loss.backward()
    for name, parameter in tarp_parameters(model).items():
        torch.testing.assert_close(parameter.grad, eager[name], rtol=1e-3, atol=1e-5)


def test_a_compiled_model_is_saved_under_the_names_of_the_model(tmp_path):
    model = tarp_model("llama")
    save_tarp(torch.compile(model, backend="eager"), tmp_path)
    loaded = load_tarp(base_model("llama"), tmp_path)
    assert all(torch.equal(p, tarp_parameters(model)[name]) for name, p in tarp_parameters(loaded).items())
