"""The bilinear form is LoRA: the same weights give what PEFT's own layer gives."""

import pytest
import torch
from torch import nn

from tarp_kernels import TarpConfig, TarpLinear

peft = pytest.importorskip("peft", reason="peft is not installed")


@pytest.mark.parametrize(("rank", "alpha"), [(4, 4), (8, 32)])
def test_bilinear_is_lora(rank, alpha):
    torch.manual_seed(0)
    linear = nn.Linear(24, 40)
    holder = nn.ModuleDict({"layer": nn.Linear(24, 40)})
    holder["layer"].load_state_dict(linear.state_dict())
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=["layer"])
    theirs = peft.get_peft_model(holder, config).base_model.model["layer"]
    ours = TarpLinear.from_linear(linear, TarpConfig(r=rank, kind="bilinear", scaling=alpha / rank))
    with torch.no_grad():
        theirs.lora_B["default"].weight.normal_(std=0.1)
        ours.V.copy_(theirs.lora_A["default"].weight)
        ours.U.copy_(theirs.lora_B["default"].weight)
    x, dy = torch.randn(7, 24), torch.randn(7, 40)
    results = []
    for layer, tensors in (
        (ours, (ours.V, ours.U)),
        (theirs, (theirs.lora_A["default"].weight, theirs.lora_B["default"].weight)),
    ):
        at = x.clone().requires_grad_()
        y = layer(at)
        results.append((y, *torch.autograd.grad(y, (at, *tensors), dy)))
    base = torch.nn.functional.linear(x, linear.weight, linear.bias)
    assert (results[0][0] - base).abs().max() > 0.1
    for own, other in zip(*results, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-5)
