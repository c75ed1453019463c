"""`SearchCell`: its start, its size, subsets of operations, and the cell that `finalize` leaves."""

import pytest
import torch
import torch.nn.functional as F

from tarp_kernels import SearchCell, search_cell
from tarp_kernels.ops.search_cell import OPERATIONS
from tests.search_cell.cases import ALPHAS, one_hot
from tests.search_cell.dense import dense_cell

D, C = 12, 5


def stirred(cell: SearchCell, seed: int = 0) -> SearchCell:
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=draw, dtype=torch.float64).to(parameter))
    return cell


def example(dtype=torch.float32):
    draw = torch.Generator().manual_seed(5)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 0], [1] * 7])
    return torch.randn(3, 7, D, generator=draw, dtype=torch.float64).to(dtype), mask


def by_hand(cell: SearchCell, h: torch.Tensor, alpha: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """What the cell must give, as the unfused mixture of all six operations, in float64; gradients flow."""
    mask = torch.ones(h.shape[:2]) if mask is None else mask
    pieces = [(row.nonzero().squeeze(1).add(i * h.shape[1]).tolist(), 0) for i, row in enumerate(mask)]
    weights = {name: parameter.double() for name, parameter in cell.named_parameters()}
    return dense_cell(h.double().flatten(0, 1), weights, alpha.double(), pieces, causal=cell.causal).reshape(h.shape)


@pytest.mark.parametrize("stem", ["layernorm", "identity"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("causal", [True, False])
def test_starts_as_exactly_the_identity(stem, dtype, causal):
    cell = SearchCell(D, C, stem, causal, dtype=dtype)
    h, mask = example(dtype)
    for alpha in (torch.rand(9, 6), one_hot(ALPHAS["published"]).float()):
        assert torch.equal(cell(h, alpha), h) and torch.equal(cell(h, alpha, mask), h)
        moved = stirred(SearchCell(D, C, stem, causal, dtype=dtype))
        found, expected = moved(h, alpha, mask), by_hand(moved, h, alpha, mask)
        assert (expected - h).abs().max() > 0.1, "a cell that stays the identity would go unnoticed"
        tolerance = {torch.bfloat16: 2e-2, torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
        torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


def test_published_size():
    cell = SearchCell(768, 64, "identity")
    assert sum(parameter.numel() for parameter in cell.parameters()) == 556_736
    assert sum(parameter.numel() for parameter in SearchCell(768, 64).parameters()) == 556_736 + 2 * 768


def test_one_state_dict_for_encoders_and_decoders():
    encoder, decoder = stirred(SearchCell(D, C, causal=False)), SearchCell(D, C)
    decoder.load_state_dict(encoder.state_dict())
    h, alpha = example()[0], torch.rand(9, 6)
    assert torch.equal(decoder(h, alpha), search_cell(h, encoder.weights(), alpha))
    assert not torch.allclose(decoder(h, alpha), encoder(h, alpha), atol=1e-2)


def test_starts_like_linear_and_conv1d():
    torch.manual_seed(0)
    cell = SearchCell(64, 32)
    for name, inputs in {"project": 64, "linear": 32, "glu": 32, "conv3": 96, "conv5": 160}.items():
        for parameter in (getattr(cell, name), getattr(cell, name + "_bias")):
            largest = parameter.abs().max() * inputs**0.5
            assert 0.9 < largest <= 1, name


def test_the_operator_gets_the_parameters_themselves():
    cell = SearchCell(D, C)
    given = cell.weights().tensors
    assert all(given[name] is parameter for name, parameter in cell.named_parameters())


@pytest.mark.parametrize("operations", [("none", "conv3"), ("identity", "linear", "glu"), ("conv5",)])
def test_a_subset_of_operations(operations):
    whole, cell = stirred(SearchCell(D, C).double()), SearchCell(D, C, operations=operations).double()
    own = dict(cell.named_parameters())
    assert {name.removesuffix("_bias") for name in own} & set(OPERATIONS) == set(operations) - {"none", "identity"}
    cell.load_state_dict({name: whole.state_dict()[name] for name in own})
    h, mask = example(torch.float64)
    alpha = torch.rand(9, len(operations), dtype=torch.float64, requires_grad=True)
    full = torch.zeros(9, 6, dtype=torch.float64)
    full[:, [OPERATIONS.index(name) for name in operations]] = alpha.detach()
    full.requires_grad_()
    out, wanted = cell(h, alpha, mask), whole(h, full, mask)
    torch.testing.assert_close(out, wanted)
    assert (out - whole(h, full.roll(1, 1), mask)).abs().max() > 1e-2, "other operations would go unnoticed"
    (found,) = torch.autograd.grad(out.sin().sum(), alpha)
    (expected,) = torch.autograd.grad(wanted.sin().sum(), full)
    torch.testing.assert_close(found, expected[:, [OPERATIONS.index(name) for name in operations]])


def test_tasks():
    cell, h = stirred(SearchCell(D, C)), example()[0]
    alpha = torch.rand(2, 9, 6)
    together = cell(h, alpha, segments=torch.tensor([0, 7, 21]))
    torch.testing.assert_close(together, torch.cat([cell(h[:1], alpha[0]), cell(h[1:], alpha[1])]))
    assert not torch.allclose(together, cell(h, alpha[0]), atol=1e-2)


@pytest.mark.parametrize("name", ALPHAS)
@pytest.mark.parametrize("causal", [True, False])
def test_finalize_keeps_the_outputs_and_only_the_selected_weights(name, causal):
    cell, alpha = stirred(SearchCell(D, C, causal=causal)).double(), one_hot(ALPHAS[name])
    h, mask = example(torch.float64)
    final = cell.finalize(alpha)
    assert torch.equal(final(h), cell(h, alpha)) and torch.equal(final(h, mask), cell(h, alpha, mask))
    if name != "none":  # that one has no edge to move
        other = cell.finalize(alpha.roll(1, 0) if alpha.roll(1, 0).ne(alpha).any() else one_hot((0,) * 9))
        assert not torch.allclose(other(h), cell(h, alpha), atol=1e-2)
    sizes = {"linear": C * C + C, "glu": 2 * (C * C + C), "conv3": 3 * C * C + C, "conv5": 5 * C * C + C}
    shared = 2 * C * D + 2 * C + D * C + D + 2 * D
    selected = sum(sizes.get(OPERATIONS[i], 0) for i in ALPHAS[name])
    assert sum(parameter.numel() for parameter in final.parameters()) == shared + selected
    again = SearchCell(D, C, causal=causal).double().finalize(alpha)
    again.load_state_dict(final.state_dict())
    assert torch.equal(again(h), final(h))


@pytest.mark.parametrize("name", ALPHAS)
@pytest.mark.parametrize("causal", [True, False])
def test_a_finalized_cell_trains_like_the_whole_one(name, causal):
    """Its gradients are those of the unpruned mixture, written out in the test, at the selected edges."""
    cell, alpha = stirred(SearchCell(D, C, causal=causal).double(), 1), one_hot(ALPHAS[name])
    (h, mask), final = example(torch.float64), cell.finalize(alpha)
    h.requires_grad_()
    probe = torch.randn(h.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    own, whole = dict(final.named_parameters()), dict(cell.named_parameters())
    found = torch.autograd.grad(final(h, mask), [h, *own.values()], probe, allow_unused=True)
    expected = torch.autograd.grad(by_hand(cell, h, alpha, mask), [h, *whole.values()], probe)
    wanted = dict(zip(whole, expected[1:], strict=True))
    torch.testing.assert_close(found[0], expected[0])
    for parameter, gradient in zip(own, found[1:], strict=True):
        selected = parameter.removesuffix("_bias") in OPERATIONS
        at_edges = wanted[parameter][final.edges(parameter)] if selected else wanted[parameter]
        got = torch.zeros_like(at_edges) if gradient is None else gradient  # nothing reaches the output of `none`
        torch.testing.assert_close(got, at_edges, msg=lambda m, p=parameter: f"{p}: {m}")
    assert expected[0].any() and wanted["output"].any() == (name != "none")


def test_a_finalized_cell_and_the_whole_one_stay_together_as_they_train():
    cell, alpha = stirred(SearchCell(D, C).double(), 1), one_hot(ALPHAS["mixed"])
    (h, mask), final = example(torch.float64), cell.finalize(alpha)
    before = final(h, mask)
    for module, call in ((cell, lambda: cell(h, alpha, mask)), (final, lambda: final(h, mask))):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.02)
        for _ in range(4):
            optimizer.zero_grad()
            call().square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(final(h, mask), by_hand(cell, h, alpha, mask))
    assert (final(h, mask) - before).abs().max() > 1e-2, "cells that do not train would go unnoticed"


def test_finalize_with_a_subset():
    cell = stirred(SearchCell(D, C, operations=("identity", "conv3")))
    alpha = F.one_hot(torch.tensor([0, 1] * 4 + [1]), 2).float()
    assert torch.equal(cell.finalize(alpha)(example()[0]), cell(example()[0], alpha))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: SearchCell(0), ValueError, "hidden_size: got 0"),
        (lambda: SearchCell(4, True), ValueError, "width: got True"),
        (lambda: SearchCell(4, stem="norm"), ValueError, "stem: got 'norm', expected one of 'layernorm', 'identity'"),
        (lambda: SearchCell(4, causal=1), TypeError, "causal: got 1"),
        (lambda: SearchCell(4, operations=("conv9",)), ValueError, "operations: got 'conv9', expected some of none"),
        (lambda: SearchCell(4).finalize(torch.rand(9, 6)), ValueError, "alpha: .*not one-hot.*argmax"),
        (lambda: SearchCell(4).finalize(torch.zeros(9, 6)), ValueError, "alpha: .*not one-hot"),
        (lambda: SearchCell(4).finalize(torch.ones(2, 9, 6)), ValueError, r"alpha: got shape \[2, 9, 6\]"),
        (lambda: SearchCell(4, operations=("none", "glu")).full_alpha(torch.rand(9, 6)), ValueError, r"\[9, 2\].*glu"),
        (lambda: SearchCell(4).full_alpha([1]), TypeError, "alpha: got list"),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()
