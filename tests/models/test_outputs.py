"""What an adapted model computes: its base at the start and when switched off, the same with and without cache."""

import copy
import io

import pytest
import torch
from torch import nn

from tarp_kernels import TarpConfig, TarpLinear, apply_tarp, backend, disable_tarp, tarp_parameters
from tests.models.tiny import FAMILIES, GENERATING, base_model, inputs, logits, move, tarp_model


def frozen_base(family, dtype=torch.float32):
    """The base for comparisons bit for bit: torch.matmul picks its product by requires_grad, frozen or not."""
    return base_model(family).to(dtype).requires_grad_(False)


FORMS = [
    {},
    {"sigma": "full"},
    {"generator": "mlp", "generator_bias": True},
    {"kind": "bilinear"},
    {"sigma": "full", "activation": "none", "train_layernorm": True},
]


@pytest.mark.parametrize("config", FORMS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_starts_as_the_base_model(family, config):
    batch = inputs(family)
    base = logits(base_model(family), batch)
    start = logits(tarp_model(family, moved=False, **config), batch)
    torch.testing.assert_close(start, base, rtol=1e-5, atol=1e-5)
    moved = logits(tarp_model(family, moved=True, **config), batch)
    assert (moved - base).abs().amax() > 1e-2, "the comparison above would not notice an adapter"


def test_published_start_is_not_the_base_model():
    batch = inputs("llama")
    start = logits(tarp_model("llama", moved=False, init="paper", activation="none"), batch)
    assert (start - logits(base_model("llama"), batch)).abs().amax() > 1e-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("family", FAMILIES)
def test_switched_off_it_is_the_base_model_bit_for_bit(family, dtype):
    batch = inputs(family)
    model = tarp_model(family, dtype=dtype, train_layernorm=True)
    base, adapted = logits(frozen_base(family, dtype), batch), logits(model, batch)
    with disable_tarp(model) as inside:
        assert inside is model
        assert torch.equal(logits(model, batch), base)
    assert torch.equal(logits(model, batch), adapted) and not torch.equal(adapted, base)
    assert adapted.dtype == dtype


def test_disable_nests_and_restores_each_layer():
    model, batch = tarp_model("llama", train_layernorm=True), inputs("llama")
    layers = [module for module in model.modules() if isinstance(module, TarpLinear)]
    layers[3].enabled = False
    partly, names = logits(model, batch), {name: id(p) for name, p in tarp_parameters(model).items()}
    with disable_tarp(model):
        off = logits(model, batch)
        with pytest.raises(RuntimeError), disable_tarp(model):
            assert {name: id(p) for name, p in tarp_parameters(model).items()} == names
            raise RuntimeError
        assert torch.equal(logits(model, batch), off)
        assert not any(layer.enabled for layer in layers)
    assert [layer.enabled for layer in layers] == [i != 3 for i in range(len(layers))]
    assert torch.equal(logits(model, batch), partly)
    assert {name: id(p) for name, p in tarp_parameters(model).items()} == names
    with pytest.raises(ValueError, match="apply_tarp"), disable_tarp(base_model("llama")):
        pass


def test_graphs_made_before_switching_off_stay_valid():
    model, batch = tarp_model("llama", train_layernorm=True), inputs("llama")
    loss = model(**batch).loss
    with disable_tarp(model):
        loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in tarp_parameters(model).values())


def generate(model, family, **options):
    """Eight sampled tokens per sequence from a fixed seed, and the logits that they were drawn from."""
    prompt = {name: tensor for name, tensor in inputs(family, 2, 6).items() if name != "labels"}
    torch.manual_seed(11)
    fixed = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": True, "return_dict_in_generate": True}
    result = model.generate(**prompt, **fixed, output_logits=True, **options)
    return result.sequences[:, -8:], torch.stack(result.logits)


@pytest.mark.parametrize("family", GENERATING)
def test_generate_with_and_without_cache(family):
    model, base = tarp_model(family, sigma="full"), frozen_base(family)
    tokens, scores = generate(model, family, use_cache=True)
    again, recomputed = generate(model, family, use_cache=False)
    assert torch.equal(tokens, again) and len(tokens.unique()) > 4
    torch.testing.assert_close(scores, recomputed, rtol=1e-4, atol=1e-4)
    plain, plain_scores = generate(base, family)
    assert (scores[0] - plain_scores[0]).abs().amax() > 1e-2, "the adapter had no effect"
    with disable_tarp(model):
        tokens, scores = generate(model, family)
    assert torch.equal(tokens, plain) and torch.equal(scores, plain_scores)


@pytest.mark.parametrize("family", GENERATING)
def test_greedy_and_beam_search_run(family):
    model = tarp_model(family)
    prompt = {name: tensor for name, tensor in inputs(family, 2, 6).items() if name != "labels"}
    for options in ({"do_sample": False}, {"num_beams": 3}):
        cached = model.generate(**prompt, **options, max_new_tokens=5)
        assert torch.equal(cached, model.generate(**prompt, **options, max_new_tokens=5, use_cache=False))


def test_cached_logits_are_those_of_one_pass():
    model, ids = tarp_model("llama"), inputs("llama", 2, 9)["input_ids"]
    whole = logits(model, {"input_ids": ids})
    with torch.no_grad():
        first = model(input_ids=ids[:, :5], use_cache=True)
        rest = model(input_ids=ids[:, 5:], past_key_values=first.past_key_values)
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], 1), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_autocast_to_bfloat16(family):
    model, batch = tarp_model(family), inputs(family)
    exact = logits(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        rough = logits(model, batch)
    assert rough.dtype == torch.bfloat16 or not torch.equal(rough, exact)
    bound = 0.05 * exact.abs().amax()
    assert (rough.float() - exact).abs().amax() < bound
    assert (logits(base_model(family), batch) - exact).abs().amax() > 2 * bound, "the bound would pass the base model"


# --- the base stays the base ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_base_names_and_parameters_do_not_change(family):
    model = base_model(family)
    before = dict(model.named_parameters())
    buffers = set(dict(model.named_buffers()))
    apply_tarp(model, TarpConfig(r=2))
    after = dict(model.named_parameters())
    assert all(after[name] is parameter and not parameter.requires_grad for name, parameter in before.items())
    assert after.keys() - before.keys() == tarp_parameters(model).keys()
    assert set(dict(model.named_buffers())) == buffers
    assert model.tarp_config == TarpConfig(r=2)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_tied_output_embeddings_stay_tied_when_adapted(family):
    model = base_model(family)
    apply_tarp(model, TarpConfig(r=2, target_modules=["lm_head"]))
    embeddings = model.get_input_embeddings().weight
    assert isinstance(model.lm_head, TarpLinear) and model.lm_head.weight is embeddings
    model.tie_weights()
    assert model.lm_head.weight is model.get_input_embeddings().weight is embeddings
    with torch.no_grad():
        embeddings[5] += 1
    assert torch.equal(model.lm_head.weight[5], embeddings[5])
    copied = copy.deepcopy(model)
    assert copied.lm_head.weight is copied.get_input_embeddings().weight is not embeddings


def test_a_layer_used_twice_gets_one_adapter():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"first": nn.Sequential(shared, nn.ReLU()), "second": nn.Sequential(shared)})
    apply_tarp(model, TarpConfig(r=2, target_modules="all-linear"))
    assert isinstance(model["first"][0], TarpLinear) and model["first"][0] is model["second"][0]
    assert list(tarp_parameters(model)) == ["first.0.V", "first.0.U", "first.0.w1"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.float16])
def test_adapters_take_the_dtype_of_their_layer(dtype):
    model = base_model("llama").to(dtype)
    model.model.layers[0].mlp.down_proj.to(torch.float32)
    apply_tarp(model, TarpConfig(r=2, train_layernorm=True))
    for name, parameter in tarp_parameters(model).items():
        assert parameter.dtype == (torch.float32 if "layers.0.mlp.down_proj" in name else dtype)


def test_t5_asks_a_layer_for_its_dtype():
    model = base_model("t5").to(torch.bfloat16)
    for block in (*model.encoder.block, *model.decoder.block):
        block.layer[-1].DenseReluDense.wo.float()  # as transformers keeps it
    apply_tarp(model, TarpConfig(r=2))
    assert logits(model, inputs("t5")).dtype == torch.bfloat16


def test_moving_to_another_dtype_takes_adapter_and_kept_norms_along():
    model, batch = tarp_model("llama", train_layernorm=True), inputs("llama")
    double = copy.deepcopy(model).to(torch.float64)
    assert {tensor.dtype for tensor in double.state_dict().values()} == {torch.float64}
    torch.testing.assert_close(logits(double, batch), logits(model, batch).double(), rtol=1e-4, atol=1e-4)
    with disable_tarp(double):
        base = logits(base_model("llama").double(), batch)
        torch.testing.assert_close(logits(double, batch), base, rtol=1e-10, atol=1e-10)


def test_a_model_from_the_meta_device_can_be_filled():
    with torch.device("meta"):
        model = base_model_on_meta()
    apply_tarp(model, TarpConfig(r=3))
    assert all(parameter.is_meta for parameter in model.parameters())
    filled = tarp_model("llama")
    model = model.to_empty(device="cpu")
    model.load_state_dict(filled.state_dict())
    model.tie_weights()
    for name, buffer in filled.named_buffers():
        model.get_buffer(name).copy_(buffer)
    assert torch.equal(logits(model.eval(), inputs("llama")), logits(filled, inputs("llama")))


def base_model_on_meta():
    config = base_model("llama").config
    return type(base_model("llama"))(config)


def test_start_is_reproducible_and_evaluation_mode_is_kept():
    first, second = tarp_model("llama", seed=3, moved=False), tarp_model("llama", seed=3, moved=False)
    for name, parameter in tarp_parameters(first).items():
        assert torch.equal(parameter, tarp_parameters(second)[name])
    assert not any(module.training for module in first.modules())
    assert tarp_model("llama", dropout=0.5).training is False
    batch = inputs("llama")
    dropping = tarp_model("llama", dropout=0.5)
    assert torch.equal(logits(dropping, batch), logits(dropping, batch))
    dropping.train()
    assert not torch.equal(logits(dropping, batch), logits(dropping, batch))


# --- copies -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_state_dict_loads_back(family):
    model = tarp_model(family, train_layernorm=True)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = tarp_model(family, seed=5, train_layernorm=True)
    batch = inputs(family)
    assert not torch.equal(logits(other, batch), logits(model, batch))
    result = other.load_state_dict(torch.load(file, weights_only=True))
    assert not result.missing_keys and not result.unexpected_keys
    assert torch.equal(logits(other, batch), logits(model, batch))
    with disable_tarp(model), disable_tarp(other):
        assert torch.equal(logits(other, batch), logits(model, batch))


def test_state_dict_of_the_base_loads_into_the_adapted_model():
    model, other = tarp_model("gpt2", moved=False), base_model("gpt2", seed=9)
    result = model.load_state_dict(other.state_dict(), strict=False)
    assert not result.unexpected_keys and set(result.missing_keys) == set(tarp_parameters(model))
    batch = inputs("gpt2")
    with disable_tarp(model):
        assert torch.equal(logits(model, batch), logits(other, batch))


def test_whole_model_can_be_pickled_and_copied():
    model, batch = tarp_model("bart", train_layernorm=True), inputs("bart")
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (torch.load(file, weights_only=False), copy.deepcopy(model)):
        assert other.tarp_config == model.tarp_config
        assert torch.equal(logits(other, batch), logits(model, batch))
        move(other)
        assert not torch.equal(logits(other, batch), logits(model, batch))
        with disable_tarp(other):
            assert torch.equal(logits(other, batch), logits(frozen_base("bart"), batch))


@pytest.mark.parametrize("family", FAMILIES)
def test_backends_agree_on_whole_models(family):
    model, batch = tarp_model(family, sigma="full"), inputs(family)
    with backend("reference"):
        exact = logits(model, batch)
    torch.testing.assert_close(logits(model, batch), exact, rtol=1e-4, atol=1e-4)
