"""Which layers get an adapter, and what is refused before anything changes."""

import re

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, BartForSequenceClassification, RobertaForSequenceClassification

from tarp_kernels import TarpConfig, TarpConv1D, TarpLinear, apply_tarp
from tarp_kernels.models_targets import DEFAULT_TARGETS, select_layers
from tests.models.tiny import BLOCKS, FAMILIES, base_model, tarp_model

EXPECTED = {
    "gpt2": {
        f"transformer.h.{i}.{name}"
        for i in range(BLOCKS)
        for name in "attn.c_attn attn.c_proj mlp.c_fc mlp.c_proj".split()
    },
    "llama": {
        f"model.layers.{i}.{name}"
        for i in range(BLOCKS)
        for name in (*(f"self_attn.{x}_proj" for x in "qkvo"), *(f"mlp.{x}_proj" for x in ("gate", "up", "down")))
    },
    "bart": {
        f"model.{side}.layers.{i}.{name}"
        for i in range(BLOCKS)
        for side, attentions in (("encoder", ["self_attn"]), ("decoder", ["self_attn", "encoder_attn"]))
        for name in (
            *(f"{attention}.{x}_proj" for attention in attentions for x in ("q", "k", "v", "out")),
            *("fc1", "fc2"),
        )
    },
    "roberta": {
        f"roberta.encoder.layer.{i}.{name}"
        for i in range(BLOCKS)
        for name in (
            *(f"attention.self.{x}" for x in ("query", "key", "value")),
            *("attention.output.dense", "intermediate.dense", "output.dense"),
        )
    },
    "t5": {
        f"{side}.block.{i}.layer.{place}.{name}"
        for i in range(BLOCKS)
        for side, last in (("encoder", 1), ("decoder", 2))
        for place, name in (
            *((0, f"SelfAttention.{x}") for x in "qkvo"),
            *((1, f"EncDecAttention.{x}") for x in "qkvo" if last == 2),
            *((last, f"DenseReluDense.{x}") for x in ("wi_0", "wi_1", "wo")),
        )
    },
}


def adapted(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, TarpLinear | TarpConv1D)}


@pytest.mark.parametrize("family", FAMILIES)
def test_default_layers_of_each_family(family):
    model = tarp_model(family)
    assert adapted(model) == EXPECTED[family]
    kind = TarpConv1D if family == "gpt2" else TarpLinear
    assert all(type(model.get_submodule(name)) is kind for name in EXPECTED[family])


def test_t5_of_the_first_version_has_wi():
    names = adapted(tarp_model("t5", changes={"feed_forward_proj": "relu"}))
    assert "encoder.block.0.layer.1.DenseReluDense.wi" in names


def test_gpt2_with_cross_attention_adapts_it_too():
    assert "transformer.h.1.crossattention.q_attn" in adapted(tarp_model("gpt2", changes={"add_cross_attention": True}))


@pytest.mark.parametrize("model_type", sorted(DEFAULT_TARGETS))
def test_every_model_type_of_the_table_is_known_to_transformers(model_type):
    """Names drift between releases: each type must still have every linear layer of its blocks among the defaults."""
    config = AutoConfig.for_model(model_type)
    config.vocab_size, config.pad_token_id = 64, 0  # a large vocabulary takes seconds even on the meta device
    for name in "num_hidden_layers n_layer encoder_layers decoder_layers num_layers num_decoder_layers".split():
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, 2)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:2]
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    assert next(model.parameters()).is_meta
    kinds = ("Linear", "Conv1D")
    inside = {
        name
        for name, module in model.named_modules()
        if type(module).__name__ in kinds and re.search(r"\.\d+\.", f".{name}")
    }
    assert set(select_layers(model, TarpConfig())) == inside and len(inside) >= 8


@pytest.mark.parametrize(
    ("family", "kind"), [("bart", BartForSequenceClassification), ("roberta", RobertaForSequenceClassification)]
)
def test_heads_and_poolers_stay_as_they_are(family, kind):
    model = apply_tarp(kind(base_model(family).config), TarpConfig(r=2))
    heads = [module for name, module in model.named_modules() if "classif" in name and hasattr(module, "weight")]
    assert heads and not any(isinstance(module, TarpLinear) for module in heads)
    assert not any("classif" in name or "pooler" in name for name in adapted(model))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"target_modules": ["q_proj", "mlp.down_proj"]}, r".*(q_proj|mlp\.down_proj)"),
        ({"target_modules": ["proj"]}, None),  # an ending begins at a dot
        ({"target_modules": r".*\.1\.mlp\.(up|down)_proj"}, r".*\.1\.mlp\.(up|down)_proj"),
        ({"target_modules": "q_proj"}, None),  # a regular expression means the whole name
        ({"layers": [1]}, r"model\.layers\.1\..*"),
        ({"layers": (0,), "target_modules": ["v_proj"]}, r"model\.layers\.0\.self_attn\.v_proj"),
    ],
)
def test_targets_and_blocks_narrow_the_choice(config, expected):
    if expected is None:
        with pytest.raises(ValueError, match="target_modules"):
            tarp_model("llama", **config)
        return
    chosen = {name for name in EXPECTED["llama"] if re.fullmatch(expected, name)}
    assert chosen and adapted(tarp_model("llama", **config)) == chosen


def test_blocks_of_encoder_and_decoder_are_both_meant():
    names = adapted(tarp_model("t5", layers=[1]))
    assert names == {name for name in EXPECTED["t5"] if ".block.1." in name}


@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear_leaves_out_the_output_embeddings_only(family):
    base = base_model(family)
    head = base.get_output_embeddings()
    expected = {
        name
        for name, module in base.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D") and module is not head
    }
    assert adapted(tarp_model(family, target_modules="all-linear")) == expected
    assert EXPECTED[family] <= expected


def test_plain_torch_model_by_name_and_all_linear():
    def make():
        return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))

    assert adapted(apply_tarp(make(), TarpConfig(r=2, target_modules="all-linear"))) == {"0", "2"}
    assert adapted(apply_tarp(make(), TarpConfig(r=2, target_modules=["2"]))) == {"2"}


def test_rank_pattern_first_fit_counts():
    model = tarp_model("llama", r=4, rank_pattern={r"layers\.0\.mlp\.\w+": 7, "down_proj": 2, ".*self_attn.q_proj": 5})
    rank = {name: model.get_submodule(name).V.shape[0] for name in EXPECTED["llama"]}
    assert rank["model.layers.0.mlp.down_proj"] == 7 and rank["model.layers.1.mlp.down_proj"] == 2
    assert rank["model.layers.0.mlp.up_proj"] == 7 and rank["model.layers.1.mlp.up_proj"] == 4
    assert rank["model.layers.1.self_attn.q_proj"] == 5
    layer = model.get_submodule("model.layers.1.mlp.down_proj")
    assert layer.config.r == 2 and layer.U.shape[1] == layer.w1.shape[0] == 2
    assert model.tarp_config.r == 4


# --- refusals ---------------------------------------------------------------------------------------------------------


def state(model):
    return {name: (id(module), type(module), module.training) for name, module in model.named_modules()}, {
        name: (id(parameter), parameter.requires_grad) for name, parameter in model.named_parameters()
    }


def refused(model, config, error, *words):
    before = state(model)
    with pytest.raises(error) as caught:
        apply_tarp(model, config)
    for word in words:
        assert word in str(caught.value)
    assert state(model) == before and not hasattr(model, "tarp_config")


def test_unknown_family_lists_the_candidates():
    model = base_model("llama")
    model.config.model_type = "my_model"
    refused(model, TarpConfig(), ValueError, "'my_model'", "'q_proj'", "model.layers.*.mlp.gate_proj", "all-linear")
    refused(nn.Sequential(nn.Linear(2, 2)), TarpConfig(), ValueError, "Sequential", "['0']")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"target_modules": ["q_proj", "dwn_proj"]}, ["'dwn_proj'", "did you mean 'down_proj'"]),
        ({"target_modules": r".*\.q_prj"}, ["whole name", "model.layers.*.self_attn.q_proj"]),
        ({"target_modules": "(q_proj"}, ["target_modules", "no regular expression"]),
        ({"layers": [0, 2]}, ["there is no block 2", "from 0 to 1"]),
        ({"layers": []}, ["empty"]),
        ({"layers": [-1]}, ["there is no block -1"]),
        ({"target_modules": ["lm_head"], "layers": [0]}, ["no block 0", "none"]),
        ({"rank_pattern": {"fc1": 4}}, ["rank_pattern", "'fc1'"]),
        ({"rank_pattern": {".*": 4, "q_proj": 2}}, ["rank_pattern", "'q_proj'", "first"]),
    ],
)
def test_nothing_matched_is_an_error(config, words):
    refused(base_model("llama"), TarpConfig(r=2, **config), ValueError, *words)


@pytest.mark.parametrize("target", [[], [3], {"q_proj"}, 5])
def test_target_modules_of_a_wrong_type(target):
    refused(base_model("llama"), TarpConfig(r=2, target_modules=target), TypeError, "target_modules")


@pytest.mark.parametrize("layers", ["01", [True], [0.0]])
def test_layers_of_a_wrong_type(layers):
    refused(base_model("llama"), TarpConfig(r=2, layers=layers), TypeError, "layers")


def test_applying_twice_is_an_error():
    model = tarp_model("llama")
    before = state(model)
    with pytest.raises(ValueError, match="adapted already"):
        apply_tarp(model, TarpConfig(r=2))
    assert state(model) == before


def test_a_single_layer_or_no_module_at_all():
    with pytest.raises(TypeError, match=r"TarpLinear\.from_linear"):
        apply_tarp(nn.Linear(3, 4), TarpConfig(r=2, target_modules="all-linear"))
    with pytest.raises(TypeError, match="model: got dict"):
        apply_tarp({}, TarpConfig())
    with pytest.raises(TypeError, match="config: got dict"):
        apply_tarp(base_model("llama"), {"r": 4})


class PackedLinear(nn.Linear):
    """Stands for a quantised layer: its own forward, weights that are no plain matrix."""


class ForeignLinear(nn.Module):
    """Stands for a quantised layer that is no nn.Linear at all."""

    def __init__(self):
        super().__init__()
        self.in_features, self.out_features = 16, 16
        self.register_buffer("qweight", torch.zeros(16, 2, dtype=torch.int32))


class SubclassedWeight(torch.Tensor):
    pass


def with_layer(layer):
    model = base_model("llama")
    model.model.layers[1].self_attn.q_proj = layer
    return model


def hooked():
    layer = nn.Linear(16, 16)
    layer.register_forward_pre_hook(lambda module, arguments: None)
    return layer


def odd_weight(parameter):
    layer = nn.Linear(16, 16)
    layer.weight = parameter
    return layer


@pytest.mark.parametrize(
    ("make", "error", "word"),
    [
        (lambda: PackedLinear(16, 16), TypeError, "PackedLinear"),
        (lambda: ForeignLinear(), TypeError, "ForeignLinear"),
        (lambda: nn.utils.parametrizations.orthogonal(nn.Linear(16, 16)), TypeError, "ParametrizedLinear"),
        (
            lambda: odd_weight(nn.Parameter(torch.zeros(16, 16, dtype=torch.int8), requires_grad=False)),
            TypeError,
            "int8",
        ),
        (lambda: odd_weight(nn.Parameter(SubclassedWeight(torch.zeros(16, 16)))), TypeError, "SubclassedWeight"),
        (hooked, ValueError, "hooks"),
    ],
)
@pytest.mark.parametrize("target", [None, "all-linear", ["q_proj"], ".*"])
def test_layers_that_cannot_be_adapted_are_refused_and_not_skipped(make, error, word, target):
    config = TarpConfig(r=2, target_modules=target)
    refused(with_layer(make()), config, error, "model.layers.1.self_attn.q_proj", word)


def test_refused_layers_can_be_left_out():
    model = apply_tarp(with_layer(PackedLinear(16, 16)), TarpConfig(r=2, target_modules=["v_proj"]))
    assert adapted(model) == {f"model.layers.{i}.self_attn.v_proj" for i in range(BLOCKS)}


def test_layers_that_torch_reads_past_are_refused():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 24, batch_first=True), 2)
    refused(encoder, TarpConfig(r=2, target_modules=["linear1"]), TypeError, "layers.0.linear1", "fast path")
    refused(encoder, TarpConfig(r=2, target_modules=["out_proj"]), TypeError, "NonDynamicallyQuantizableLinear")
