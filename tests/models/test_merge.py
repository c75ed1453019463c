"""merge_tarp and unmerge_tarp: same outputs, original bits back, and what cannot be merged."""

import pytest
import torch

from tarp_kernels import (
    TarpConfig,
    TarpLinear,
    apply_tarp,
    disable_tarp,
    load_tarp,
    merge_tarp,
    save_tarp,
    task_parallel,
    unmerge_tarp,
)
from tarp_kernels.nn.linear import TarpLayer
from tests.models.tiny import FAMILIES, base_model, inputs, logits, tarp_model

STATIC = {
    "bilinear": {"kind": "bilinear"},
    "bilinear and factor": {"kind": "bilinear", "multiplicative": "static"},
    "kronecker": {"kind": "kronecker", "kronecker_terms": 2, "multiplicative": "static", "scaling": 0.5},
    "matmul": {"kind": "bilinear", "multiplicative": "static", "product": "matmul", "scaling": 0.5},
    "matmul of kronecker": {
        "kind": "kronecker",
        "kronecker_terms": 2,
        "multiplicative": "static",
        "product": "matmul",
        "additive": False,
    },
    "factor": {"additive": False, "multiplicative": "static", "multiplicative_activation": "softplus", "init": "paper"},
}
MIXED = [{"multiplicative": "static"}, {"multiplicative": "static", "product": "matmul"}]


def output(model, family):
    with torch.no_grad():
        return logits(model, inputs(family))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", STATIC)
def test_a_merged_model_is_the_adapted_one_and_costs_the_base_layer(family, form):
    model = tarp_model(family, r=3, **STATIC[form])
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    adapted = output(model, family)
    with disable_tarp(model):
        base = output(model, family)
    assert (adapted - base).abs().max() > 1e-3
    assert merge_tarp(model) == {}
    torch.testing.assert_close(output(model, family), adapted, rtol=1e-4, atol=1e-4)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("lowrank_linear", "hadamard_linear", "matmul_linear"):
            patch.setattr(f"tarp_kernels.nn.linear.{name}", lambda *a, **k: pytest.fail("the operator ran"))
        output(model, family)
    with disable_tarp(model):
        assert torch.equal(output(model, family), base)
    unmerge_tarp(model)
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert torch.equal(output(model, family), adapted)


@pytest.mark.parametrize("form", MIXED, ids=str)
def test_what_is_made_from_the_input_stays(form):
    model = tarp_model("llama", r=3, **form)
    adapted = output(model, "llama")
    left = merge_tarp(model)
    layers = [name for name, module in model.named_modules() if isinstance(module, TarpLayer)]
    assert list(left) == layers and all("made from the input" in text for text in left.values())
    torch.testing.assert_close(output(model, "llama"), adapted, rtol=1e-4, atol=1e-4)


def test_beside_a_factor_made_from_the_input_nothing_is_folded():
    """Φ(x) would multiply what is added to W."""
    factor = {"multiplicative": "dynamic", "kind": "bilinear"}
    for form, words in (
        (factor, r"Φ\(x\), .*, and what is added .*"),
        (factor | {"additive": False}, r"Φ\(x\), [^,]*"),
    ):
        model = tarp_model("llama", **form)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        with pytest.raises(ValueError, match=rf"nothing can be folded.*what stays is {words}$"):
            merge_tarp(model)
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    layers = torch.nn.Sequential(
        TarpLinear.from_linear(torch.nn.Linear(4, 4), TarpConfig(r=2, **factor)),
        TarpLinear.from_linear(torch.nn.Linear(4, 4), TarpConfig(r=2, kind="bilinear")),
    )
    left = merge_tarp(layers)
    assert list(left) == ["0"] and "Φ(x)" in left["0"]
    assert layers[0].original is None and layers[1].original is not None
    with pytest.raises(ValueError, match=r"merge: nothing can be folded; what stays is Φ\(x\)"):
        layers[0].merge()


def test_what_cannot_be_merged_is_named_and_nothing_changes():
    with pytest.raises(ValueError, match="no adapted layer"):
        merge_tarp(base_model("llama"))
    with pytest.raises(ValueError, match="made from the input"):
        merge_tarp(tarp_model("llama"))
    model = tarp_model("llama", **STATIC["bilinear"])
    with pytest.raises(ValueError, match="nothing in this model is merged"):
        unmerge_tarp(model)
    merge_tarp(model)
    with pytest.raises(ValueError, match=r"weight is merged already; unmerge first"):
        merge_tarp(model)


def test_a_tied_weight_is_refused_by_name():
    model = base_model("llama")
    model.lm_head.weight = model.get_input_embeddings().weight
    apply_tarp(model, TarpConfig(r=2, kind="bilinear", target_modules=["lm_head", "q_proj"]))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"lm_head\.weight is tied to model\.embed_tokens\.weight"):
        merge_tarp(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_merged_model_is_saved_but_takes_no_other_adapter(tmp_path):
    model = tarp_model("llama", **STATIC["bilinear"])
    save_tarp(model, tmp_path)
    merge_tarp(model)
    save_tarp(model, tmp_path)  # names the base as it was before
    fresh = load_tarp(base_model("llama"), tmp_path)
    torch.testing.assert_close(output(fresh, "llama"), output(model, "llama"), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="hold a merged adapter; call unmerge_tarp"):
        load_tarp(model, tmp_path)
    stacked = {n: p.detach()[None] for n, p in model.named_parameters() if n.rpartition(".")[2] in ("U", "V")}
    with (
        pytest.raises(ValueError, match="holds a merged adapter; call unmerge_tarp"),
        task_parallel(model, stacked, torch.tensor([0, 2])),
    ):
        pass


def test_the_original_moves_with_the_layer_and_stays_out_of_files():
    model = tarp_model("llama", **STATIC["bilinear"])
    merge_tarp(model)
    assert not [name for name in model.state_dict() if "original" in name]
    model.to(torch.float64)
    assert all(m.original.dtype == torch.float64 for m in model.modules() if isinstance(m, TarpLayer))


def test_not_inside_task_parallel():
    model = tarp_model("llama", **STATIC["bilinear"])
    stacked = {n: p.detach()[None] for n, p in model.named_parameters() if n.rpartition(".")[2] in ("U", "V")}
    with (
        task_parallel(model, stacked, torch.tensor([0, 2])),
        pytest.raises(ValueError, match="inside task_parallel"),
    ):
        merge_tarp(model)
