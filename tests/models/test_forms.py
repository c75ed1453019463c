"""The forms of the paper's tables by configuration: they start as the base model, train, and come back from a file."""

import pytest
import torch

from tarp_kernels import TarpConfig, apply_tarp, load_tarp, save_tarp, tarp_parameters, tarp_report
from tests.models.tiny import base_model, inputs, logits, move

FORMS = {  # configuration, and the form that the report prints
    "LoRA": ({"kind": "bilinear"}, "bilinear"),
    "bilinear": ({"kind": "bilinear", "multiplicative": "static"}, "bilinear × static"),
    "Kronecker": ({"kind": "kronecker", "kronecker_terms": 2, "multiplicative": "static"}, "kronecker × static"),
    "dynamic, diagonal": ({"multiplicative": "static"}, "dynamic diag linear × static"),
    "dynamic, full": (
        {"multiplicative": "static", "sigma": "full", "generator": "mlp"},
        "dynamic full mlp × static",
    ),
    "both halves dynamic": ({"multiplicative": "dynamic"}, "dynamic diag linear × dynamic diag linear"),
    "factor alone dynamic": (
        {"multiplicative": "dynamic", "additive": False, "sigma": "full"},
        "× dynamic full linear",
    ),
    "matrix product": (
        {"kind": "bilinear", "multiplicative": "static", "product": "matmul"},
        "bilinear × static matmul",
    ),
}


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("name", FORMS)
def test_start_step_and_file(name, family, tmp_path):
    values, form = FORMS[name]
    model, batch = base_model(family), inputs(family)
    base = logits(model, batch)
    torch.manual_seed(0)
    apply_tarp(model, TarpConfig(r=3, **values))
    assert {layer.form for layer in tarp_report(model).layers} == {form}
    torch.testing.assert_close(logits(model, batch), base, rtol=1e-5, atol=1e-5)

    move(model)
    assert (logits(model, batch) - base).abs().max() > 1e-3
    parameters = tarp_parameters(model)
    before = {key: parameter.detach().clone() for key, parameter in parameters.items()}
    optimizer = torch.optim.SGD(parameters.values(), lr=1e-3)
    loss = model(**batch).loss
    loss.backward()
    assert [key for key, parameter in parameters.items() if not parameter.grad.any()] == []
    optimizer.step()
    assert all(not torch.equal(parameter, before[key]) for key, parameter in parameters.items())
    with torch.no_grad():
        assert model(**batch).loss < loss

    save_tarp(model, tmp_path)
    other = load_tarp(base_model(family), tmp_path)
    assert other.tarp_config == model.tarp_config and torch.equal(logits(other, batch), logits(model, batch))
