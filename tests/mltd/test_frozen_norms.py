"""Frozen RMS norms in fewer passes are the same norms; everything else is left as it is."""

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from mltd.frozen_norms import _RMSNorm, frozen_norms
from tests.mltd.conftest import bare_model


class Stretched(LlamaRMSNorm):
    def forward(self, x):
        return super().forward(x) * 1.001


def made(kind, width: int = 24, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    norm = kind(width)
    with torch.no_grad():
        norm.weight.normal_()
    return norm.requires_grad_(False)


def node(norm: nn.Module, x: torch.Tensor) -> str:
    return type(norm(x).grad_fn).__name__


def ours(norm: nn.Module, **options) -> bool:
    with frozen_norms(norm):
        return node(norm, torch.randn(3, 24, requires_grad=True, **options)) == "_RMSNormBackward"


def rms_norm(width: int) -> nn.RMSNorm:
    return nn.RMSNorm(width, eps=1e-5)


@pytest.mark.parametrize("kind", [LlamaRMSNorm, Qwen3RMSNorm, T5LayerNorm, rms_norm])
@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_values_and_gradients_are_the_norm_s_own(kind, scale):
    norm = made(kind)
    x = (torch.randn(2, 5, 24) * scale).requires_grad_()
    dy = torch.randn(2, 5, 24)
    y = norm(x)
    (expected,) = torch.autograd.grad(y, x, dy)
    assert ours(norm)
    with frozen_norms(norm):
        fewer = norm(x)
        (gradient,) = torch.autograd.grad(fewer, x, dy)
    torch.testing.assert_close(fewer, y, rtol=1e-5, atol=1e-6)
    size = float(expected.abs().max())
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6 * size)
    assert "forward" not in vars(norm)


def test_gradients_against_finite_differences_once_and_twice():
    torch.manual_seed(0)
    x = (torch.randn(3, 7, dtype=torch.float64) * torch.tensor([[1.0], [0.1], [3.0]])).requires_grad_()
    weight = torch.randn(7, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: _RMSNorm.apply(x, weight, 0.1), x)
    assert torch.autograd.gradgradcheck(lambda x: _RMSNorm.apply(x, weight, 0.1), x)


def test_what_is_no_frozen_rms_norm_is_left_alone():
    assert ours(made(LlamaRMSNorm))
    for kind in (Stretched, GemmaRMSNorm, nn.RMSNorm, nn.LayerNorm):  # nn.RMSNorm's ε depends on the dtype
        assert not ours(made(kind)), kind
    assert not ours(made(LlamaRMSNorm).double(), dtype=torch.float64)
    assert not ours(made(LlamaRMSNorm).requires_grad_(True))
    watched = made(LlamaRMSNorm)
    watched.register_forward_hook(lambda *_: None)
    assert not ours(watched)


def test_without_gradients_and_under_autocast_the_norm_itself_runs():
    norm, x = made(LlamaRMSNorm), torch.randn(3, 24, requires_grad=True)
    with frozen_norms(norm):
        assert norm(x.detach()).grad_fn is None
        with torch.no_grad():
            assert torch.equal(norm(x), norm.forward.args[1](x))
        with torch.autocast("cpu", torch.bfloat16):
            assert node(norm, x) != "_RMSNormBackward"


def test_norms_are_as_they_were_after_an_error():
    model = bare_model().requires_grad_(False)
    with pytest.raises(RuntimeError, match="stop"), frozen_norms(model):
        assert sum("forward" in vars(module) for module in model.modules()) == 5
        raise RuntimeError("stop")
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_norm_that_takes_more_than_one_tensor_gets_it_all():
    norm, x = made(lambda width: MambaRMSNormGated(width, group_size=width)), torch.randn(3, 24, requires_grad=True)
    gate, llama = torch.randn(3, 24), made(LlamaRMSNorm)
    expected, named = norm(x, gate), llama(hidden_states=x)
    with frozen_norms(nn.ModuleList([norm, llama])):
        assert torch.equal(norm(x, gate), expected) and torch.equal(norm(x, gate=gate), expected)
        assert torch.equal(llama(hidden_states=x), named)


def test_a_compiled_model_keeps_its_norms():
    model = bare_model().requires_grad_(False)
    model.model.layers[0].compile(backend="eager")
    with frozen_norms(model):
        assert not any("forward" in vars(module) for module in model.modules())


def test_two_threads_share_a_model():
    model = bare_model().requires_grad_(False)

    def enter(_) -> None:
        for _ in range(200):
            with frozen_norms(model):
                pass

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(enter, range(2)))
    finally:
        sys.setswitchinterval(before)
    assert not any("forward" in vars(module) for module in model.modules())
