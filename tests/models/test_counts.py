"""Parameter counts of published models, on the meta device, against the numbers of the paper; and the report."""

import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration, GPT2Config, GPT2LMHeadModel

from tarp_kernels import TarpConfig, TarpLinear, apply_tarp, tarp_parameters, tarp_report
from tests.models.tiny import FAMILIES, base_model, tarp_model


def gpt2_medium():
    return GPT2LMHeadModel(GPT2Config(n_embd=1024, n_layer=24, n_head=16))


def bart_base():
    sizes = {"d_model": 768, "encoder_layers": 6, "decoder_layers": 6, "encoder_ffn_dim": 3072, "decoder_ffn_dim": 3072}
    return BartForConditionalGeneration(BartConfig(vocab_size=50265, **sizes))


PUBLISHED = [
    (gpt2_medium, {"r": 4, "kind": "bilinear", "multiplicative": "static"}, 3_145_728),
    (gpt2_medium, {"r": 4, "sigma": "full", "multiplicative": "static"}, 5_898_240),
    (gpt2_medium, {"r": 4, "sigma": "diag", "multiplicative": "static"}, 3_833_856),
    (gpt2_medium, {"r": 4, "kind": "bilinear"}, 3_145_728 // 2),
    (gpt2_medium, {"r": 4, "kind": "kronecker", "multiplicative": "static"}, 3_158_016),
    (bart_base, {"r": 16, "sigma": "full"}, 29_196_288),
    (bart_base, {"r": 16, "sigma": "diag"}, 4_866_048),
]


@pytest.mark.parametrize(("make", "config", "expected"), PUBLISHED)
def test_published_counts(make, config, expected):
    with torch.device("meta"):
        model = make()
    base = sum(parameter.numel() for parameter in model.parameters())
    apply_tarp(model, TarpConfig(**config))
    parameters = tarp_parameters(model)
    assert all(parameter.is_meta and parameter.requires_grad for parameter in parameters.values())
    assert sum(parameter.numel() for parameter in parameters.values()) == expected
    report = tarp_report(model)
    assert (report.trained, report.base, report.layernorm) == (expected, base, 0)
    assert report.share == expected / base
    assert len(report.layers) == 96


def test_gpt2_medium_stays_within_one_percent():
    """The share that the paper names for r = 4."""
    with torch.device("meta"):
        report = tarp_report(apply_tarp(gpt2_medium(), TarpConfig(r=4)))
    assert report.base == 354_823_168 and report.share < 0.01


MLP_LAYER = 3 * (16 + 24) + 5 * 16 + 5 + 9 * 5 + 9  # V and U; w1, b1, w2, b2


def test_report_counts_each_layer():
    layer = {"r": 3, "sigma": "full", "generator": "mlp", "generator_hidden": 5, "generator_bias": True}
    model = tarp_model("llama", **layer, target_modules=["gate_proj"], rank_pattern={"layers.1.*": 2})
    report = tarp_report(model)
    assert [(one.name, one.in_features, one.out_features, one.rank) for one in report.layers] == [
        (f"model.layers.{i}.mlp.gate_proj", 16, 24, 3 - i) for i in range(2)
    ]
    assert report.layers[0].parameters == MLP_LAYER
    assert report.layers[1].parameters == 2 * (16 + 24) + 5 * 16 + 5 + 4 * 5 + 4


@pytest.mark.parametrize("family", FAMILIES)
def test_trained_norms_count(family):
    base = base_model(family)
    norms = sum(p.numel() for m in base.modules() if "Norm" in type(m).__name__ for p in m.parameters(recurse=False))
    without, along = tarp_report(tarp_model(family)), tarp_report(tarp_model(family, train_layernorm=True))
    assert norms > 0 and along.layernorm == norms
    assert along.trained == without.trained + norms
    assert along.base == without.base == sum(parameter.numel() for parameter in base.parameters())
    trainable = sum(p.numel() for p in tarp_model(family, train_layernorm=True).parameters() if p.requires_grad)
    assert along.trained == trainable


def test_report_prints_a_table_by_kind_of_layer():
    lines = str(tarp_report(tarp_model("gpt2", train_layernorm=True))).splitlines()
    assert len({len(line) for line in lines[:-1]}) == 1
    assert len(lines) == 1 + 4 + 1 + 1
    assert lines[1].split() == [
        "transformer.h.*.attn.c_attn",
        "2",
        "16",
        "→",
        "48",
        "dynamic",
        "diag",
        "linear",
        "3",
        "480",
    ]
    total = 2 * 3 * (2 * 16 + 48 + 2 * 16 + 16 + 2 * 16 + 64 + 2 * 64 + 16)
    assert f"trained {total + 160:,} of " in lines[-1]
    assert "dynamic" not in str(tarp_report(tarp_model("gpt2", kind="bilinear")))


def test_names_of_a_model_and_of_a_layer():
    model = tarp_model("llama", target_modules=["v_proj"], layers=[1])
    assert list(tarp_parameters(model)) == [f"model.layers.1.self_attn.v_proj.{name}" for name in ("V", "U", "w1")]
    layer = model.get_submodule("model.layers.1.self_attn.v_proj")
    assert isinstance(layer, TarpLinear)
    assert list(tarp_parameters(layer)) == ["V", "U", "w1"]
    assert all(tarp_parameters(layer)[name] is getattr(layer, name) for name in ("V", "U", "w1"))
    assert tarp_report(layer).trained == 3 * (16 + 8 + 16)


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_exactly_what_requires_a_gradient(family):
    model = tarp_model(family, train_layernorm=True)
    trainable = {name: id(p) for name, p in model.named_parameters() if p.requires_grad}
    assert {name: id(p) for name, p in tarp_parameters(model).items()} == trainable
    assert any("norm" in name.lower() or "ln_" in name for name in trainable)


def test_norms_only_of_the_chosen_blocks():
    names = tarp_parameters(tarp_model("llama", train_layernorm=True, layers=[1], target_modules=["v_proj"]))
    norms = {f"model.layers.1.{name}.weight" for name in ("input_layernorm", "post_attention_layernorm")}
    assert norms == {name for name in names if "norm" in name}


@pytest.mark.parametrize("call", [tarp_parameters, tarp_report])
def test_a_model_without_adapter_is_an_error(call):
    with pytest.raises(ValueError, match="apply_tarp"):
        call(base_model("llama"))
