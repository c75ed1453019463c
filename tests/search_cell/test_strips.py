"""The CPU kernels take a sequence in strips, with a halo of rows that are computed twice: nobody may see the cuts."""

import pytest
import torch

from tarp_kernels import _C
from tests.search_cell.cases import ALPHAS, Case, build

pytestmark = pytest.mark.native
STRIP = 128
ALPHAS_WITH_A_HALO = ("soft", "published", "conv5", "conv3", "mixed", "dead n0")


def cell(case: Case, length: int):
    """The call of the case's first `length` tokens."""
    call = build(case)
    return call._replace(tensors=call.tensors | {"h": call.tensors["h"][:length]}, options={"causal": case.causal})


@pytest.mark.parametrize("alpha", ALPHAS_WITH_A_HALO)
def test_tokens_do_not_know_where_strips_end(alpha):
    """Another length cuts the sequence at other places; to the bit the same tokens come out."""
    case = Case(d=20, width=33, batch=None, lengths=(400,), alpha=alpha)
    whole = cell(case, 400).run("cpu")
    for length in (1, STRIP - 1, STRIP, STRIP + 1, 200, 2 * STRIP, 2 * STRIP + 1, 399):
        assert torch.equal(cell(case, length).run("cpu"), whole[:length]), length


@pytest.mark.parametrize("alpha", ALPHAS_WITH_A_HALO)
def test_both_sides_of_a_cut_are_seen(alpha):
    """Not causal: away from the ends, a sequence that starts later and ends earlier gives the same bits."""
    case = Case(d=20, width=33, batch=None, lengths=(400,), alpha=alpha, causal=False)
    call = cell(case, 400)
    whole, reach = call.run("cpu"), 6  # three convolutions of five taps
    for start, end in ((0, 250), (1, 400), (37, 300), (100, 360)):
        part = call._replace(tensors=call.tensors | {"h": call.tensors["h"][start:end]}).run("cpu")
        inner = slice(reach if start else 0, -reach if end < 400 else None)
        assert torch.equal(part[inner], whole[start:end][inner])
    moved = call.tensors["h"].clone()
    moved[133:] += 1  # a strip of 400 tokens is 100 long
    seen = (call._replace(tensors=call.tensors | {"h": moved}).run("cpu") != whole).any(1).nonzero()
    assert int(seen.min()) == 133 - {"soft": 6, "published": 2, "conv5": 6, "conv3": 3, "mixed": 3, "dead n0": 0}[alpha]


@pytest.mark.parametrize(
    "name, extra",
    [
        ("identity", 0),
        ("linear", 0),
        ("published", 0),  # its convolutions read s0 and s1 alone
        ("conv5", 2 * (2 * 8 * 5 + 3 * 4 * 5)),  # for each of two cuts: n0 of eight rows, n1 of four
        ("conv3", 2 * (2 * 4 * 3 + 3 * 2 * 3)),
    ],
)
def test_only_what_a_halo_needs_is_computed_twice(name, extra, monkeypatch):
    counts, kernel = [], _C.search_cell_forward
    monkeypatch.setattr(_C, "search_cell_forward", lambda *arguments: counts.append(kernel(*arguments)))
    build(Case(d=20, width=9, batch=None, lengths=(300,), alpha=name)).run("cpu")
    assert counts == [300 * sum((0, 0, 1, 2, 3, 5)[m] for m in ALPHAS[name]) + extra]
