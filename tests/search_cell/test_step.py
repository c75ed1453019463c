"""Token by token, chunk by chunk: what a cached decode computes is what one call computes."""

import pytest
import torch

from tarp_kernels import _C, CellWeights, search_cell_step
from tests.search_cell.cases import Case, build

CHUNKS = [(20,), (1,) * 20, (3, 0, 1, 16), (7, 6, 7), (16, 1, 1, 1, 1)]
CASES = [
    Case(batch=(3, 20), dtype=torch.float64),
    Case(batch=(3, 20), dtype=torch.float64, alpha="dead n1", norm=True),
    Case(batch=(3, 20), dtype=torch.float64, padding=(("left", 2), ("left", 19), ("left", 0))),
    Case(batch=(3, 20), dtype=torch.float64, padding=(("right", 6), ("left", 20), ("right", 0)), tasks=(40, 20)),
    Case(batch=(3, 20), dtype=torch.float64, tasks=(0, 20, 0, 40, 0)),
    Case(batch=(3, 20)),
    Case(batch=(3, 20), dtype=torch.bfloat16, padding=(("left", 2), ("left", 9), ("left", 0))),
]


def by_chunks(call, chunks, forget=False, backend=None):
    weights = CellWeights(**{name: tensor for name, tensor in call.tensors.items() if name not in ("h", "alpha")})
    h, alpha, mask = call.tensors["h"], call.tensors["alpha"], call.options.get("attention_mask")
    sequences = None
    if "segments" in call.options:
        sequences = call.options["segments"] // h.shape[1]
    outs, state, at = [], None, 0
    for size in chunks:
        chunk = slice(at, at + size)
        out, state = search_cell_step(
            h[:, chunk],
            weights,
            alpha,
            None if forget else state,
            attention_mask=None if mask is None else mask[:, chunk],
            segments=None if sequences is None else sequences * size,
            backend=backend,
        )
        outs.append(out)
        at += size
    return torch.cat(outs, 1)


@pytest.mark.parametrize("chunks", CHUNKS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_chunks_equal_the_whole(case, chunks):
    call = build(case)
    whole = call.run("reference")
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1.6e-2}[case.dtype]
    torch.testing.assert_close(by_chunks(call, chunks), whole, rtol=tolerance, atol=tolerance)
    if len(chunks) > 1 and any(chunks[1:]):
        assert (by_chunks(call, chunks, forget=True) - whole).abs().max() > 10 * tolerance


def test_the_state_is_the_last_four_tokens():
    call = build(Case(batch=(2, 9), dtype=torch.float64))
    t = call.tensors
    weights = CellWeights(**{name: tensor for name, tensor in t.items() if name not in ("h", "alpha")})
    _, state = search_cell_step(t["h"], weights, t["alpha"])
    s0 = torch.relu(t["h"] @ t["project"][0].t() + t["project_bias"][0])
    assert state.shape == (2, 4, 4, 5)
    torch.testing.assert_close(state[:, 0], s0[:, -4:])
    _, short = search_cell_step(t["h"][:, :2], weights, t["alpha"])
    assert (short[:, :, :2] == 0).all()
    torch.testing.assert_close(short[:, 0, 2:], s0[:, :2])


def test_beam_search_may_reorder_the_state():
    call = build(Case(batch=(2, 9), dtype=torch.float64))
    t, order = call.tensors, torch.tensor([1, 1, 0])
    weights = CellWeights(**{name: tensor for name, tensor in t.items() if name not in ("h", "alpha")})
    _, state = search_cell_step(t["h"][:, :8], weights, t["alpha"])
    out, _ = search_cell_step(t["h"][order, 8:], weights, t["alpha"], state[order])
    torch.testing.assert_close(out, call.run("reference")[order, 8:])


@pytest.mark.native
@pytest.mark.parametrize("chunks", [(300,), (140, 1, 1, 158), (2, 1, 297), (299, 1)], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case(batch=(2, 300), alpha="conv5"),
        Case(batch=(2, 300), norm=True, padding=(("left", 150), ("right", 3))),
        Case(batch=(2, 300), dtype=torch.bfloat16, tasks=(300, 300)),
    ],
    ids=str,
)
def test_chunks_on_the_cpu_kernels_have_the_bits_of_the_whole(case, chunks, monkeypatch):
    calls, kernel = [], _C.search_cell_forward
    monkeypatch.setattr(_C, "search_cell_forward", lambda *arguments: calls.append(1) or kernel(*arguments))
    call = build(case)
    found = by_chunks(call, chunks, backend="cpu")
    assert len(calls) == len(chunks)
    assert torch.equal(found, call.run("cpu"))
