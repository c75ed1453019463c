"""Seeded dropout's generator: the published test vectors, and that every backend drops the same elements."""

import numpy as np
import pytest
import torch

from tarp_kernels import lowrank_linear
from tarp_kernels.ops.philox import drop_threshold, first_word, keep_mask
from tests.lowrank_linear.backends import each_backend
from tests.philox import philox, uniform_words

SEEDS = (0, 1, 2**31, 2**32 - 1, 2**32, 0x0123456789ABCDEF, 2**63 - 1)
COUNTERS = (0, 1, 2, 7, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**32 + 5, 2**40 + 3, 2**62)


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_the_generator_of_the_tests_gives_the_published_words(counter, key, words):
    """Random123, tests/kat_vectors, philox4x32 with 10 rounds."""
    assert philox(counter, key) == words


@pytest.mark.parametrize("seed", SEEDS)
def test_words_are_those_of_philox(seed):
    index = torch.tensor(COUNTERS)
    expected = [philox((c & 0xFFFFFFFF, c >> 32, 0, 0), (seed & 0xFFFFFFFF, seed >> 32))[0] for c in COUNTERS]
    assert first_word(index, seed).tolist() == expected
    assert uniform_words(COUNTERS, seed) == expected


def test_counters_and_seeds_matter_in_all_their_bits():
    words = {(c, s): first_word(torch.tensor([c]), s).item() for c in COUNTERS for s in SEEDS}
    assert len(set(words.values())) == len(words)


@pytest.mark.parametrize("p", [0.0, 2**-32, 0.1, 0.5, 0.9, 1 - 2**-32])
def test_the_mask_drops_the_share_p(p):
    shape = (211, 307)
    count = shape[0] * shape[1]
    kept = keep_mask(shape, p, seed=7).sum().item()
    deviation = (count * p * (1 - p)) ** 0.5
    assert abs(kept - count * (1 - p)) <= 5 * deviation + 1e-3
    assert drop_threshold(p) == p * 2**32 or p in (0.1, 0.9)


def test_the_mask_counts_row_major_and_is_uncorrelated():
    mask = keep_mask((50, 40), 0.5, seed=3)
    words = uniform_words(range(2000), 3)
    assert mask.flatten().tolist() == [w >= 2**31 for w in words]
    signs = keep_mask((300, 300), 0.5, seed=3).double() * 2 - 1
    other = keep_mask((300, 300), 0.5, seed=4).double() * 2 - 1
    for a, b in ((signs[1:], signs[:-1]), (signs[:, 1:], signs[:, :-1]), (signs, other), (signs, signs.t())):
        assert abs((a * b).mean().item()) < 5 / a.numel() ** 0.5 * (2**0.5 if b.shape == a.t().shape else 1)


def test_a_mask_that_repeats_or_ignores_its_seed_would_fail():
    words = np.array(uniform_words(range(2000), 3))
    for wrong in (uniform_words(range(1, 2001), 3), uniform_words(range(2000), 4), words[::-1]):
        assert ((np.array(wrong) >= 2**31) == (words >= 2**31)).mean() < 0.6


@each_backend
@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (40, 33), (130, 70)])
@pytest.mark.parametrize("seed", [5, 2**40 + 1, 2**63 - 1])
def test_every_backend_drops_the_same_elements(backend, shape, seed):
    """With W = 0 and V = U = I the operator returns what it left of x, and dx what it left of dy."""
    rows, width = shape
    p = 0.25
    x, identity = torch.ones(shape, requires_grad=True), torch.eye(width)
    y = lowrank_linear(x, torch.zeros(width, width), None, identity, identity, None, dropout=(p, seed), backend=backend)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    kept = torch.tensor(uniform_words(range(rows * width), seed)).reshape(shape) >= 2**30
    expected = kept.float() / (1 - p)
    torch.testing.assert_close(y.detach(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(dx, expected, rtol=1e-6, atol=0)


@each_backend
def test_a_dropout_that_drops_everything_leaves_the_dense_product(backend):
    x, weight = torch.randn(5, 7), torch.randn(3, 7)
    V, U = torch.randn(2, 7), torch.randn(3, 2)
    y = lowrank_linear(x, weight, None, V, U, None, dropout=(1 - 2**-50, 1), backend=backend)
    torch.testing.assert_close(y, x @ weight.t(), rtol=1e-5, atol=1e-5)
