"""Losses of scored tokens: the head is left out only where a model returns its output as it is."""

import copy

import pytest
import torch

from mltd import head
from mltd.head import token_losses
from tests.mltd.conftest import bare_model

TOLERANCE = 1e-5


class Capped(torch.nn.Module):
    """A model that does something with its logits, as Gemma does."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.calls = inner, 0

    def get_output_embeddings(self):
        return self.inner.get_output_embeddings()

    def forward(self, **given):
        self.calls += 1
        output = self.inner(**given)
        output.logits = 0.5 * torch.tanh(output.logits / 0.5)
        return output


@pytest.fixture
def fused(monkeypatch):
    """How often the head was left out and its loss fused."""
    seen, right = [], head.linear_cross_entropy
    monkeypatch.setattr(head, "linear_cross_entropy", lambda *a: seen.append(len(a[0])) or right(*a))
    return seen


def batch():
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(61, (3, 7), generator=draw)
    positions = torch.tensor([0, 2, 5, 8, 9, 15, 19])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    return inputs, positions, torch.randint(61, (7,), generator=draw)


def by_hand(model, inputs, positions, targets):
    logits = model(**inputs).logits.flatten(0, 1)[positions]
    return -logits.log_softmax(1)[range(len(targets)), targets]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_head_that_nothing_follows_is_left_out(family, fused):
    model = bare_model(family).requires_grad_(False)
    got = token_losses(model, *batch())
    torch.testing.assert_close(got, by_hand(model, *batch()), rtol=TOLERANCE, atol=TOLERANCE)
    assert fused == [7] and "forward" not in vars(model.get_output_embeddings())


def test_what_follows_the_head_is_not_forgotten(fused):
    model = Capped(bare_model().requires_grad_(False))
    bare = by_hand(model.inner, *batch())
    for calls in (2, 3):  # it is found out once
        got = token_losses(model, *batch())
        torch.testing.assert_close(got, by_hand(copy.deepcopy(model), *batch()), rtol=TOLERANCE, atol=TOLERANCE)
        assert float((got - bare).detach().abs().max()) > 0.1, "the cap cannot be seen"
        assert model.calls == calls
    assert not fused


def test_finding_out_draws_no_random_numbers():
    """Else a run that is resumed would find out anew, and drop other elements than one that was not interrupted."""
    model, drawn = Capped(bare_model("gpt2").train()), []
    for _ in range(2):
        torch.manual_seed(5)
        token_losses(model, *batch())
        drawn.append(torch.rand(()))
    assert drawn[0] == drawn[1] and model.inner.training


def test_a_head_that_somebody_watches_runs(fused):
    model, seen = bare_model(), []
    model.lm_head.register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape)))
    token_losses(model, *batch())
    assert seen == [(7, 61)] and not fused


def test_weights_that_are_trained_get_the_same_gradients():
    found = []
    for function in (token_losses, by_hand):
        model = bare_model()  # its head and its embedding are one tensor
        function(model, *batch()).sum().backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in found[1].items():
        torch.testing.assert_close(found[0][name], gradient, rtol=1e-4, atol=1e-4 * float(gradient.abs().max()))


def test_the_head_is_as_it_was_after_an_error():
    model = bare_model()
    inputs, positions, targets = batch()
    with pytest.raises(IndexError):
        token_losses(model, inputs, positions + 100, targets)
    assert "forward" not in vars(model.lm_head) and model(**inputs).logits.shape == (3, 7, 61)
