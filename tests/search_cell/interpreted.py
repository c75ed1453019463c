"""The Triton kernels of `search_cell` in Triton's interpreter, started by test_triton.py."""

import functools

import pytest
import torch

from tests.interpreting import make, triton_on_the_cpu  # noqa: F401
from tests.search_cell.cases import KERNEL_CASES, Case, build, excesses, expected


def wrong_results(case: Case) -> dict[str, float]:
    call = build(case)
    found = call.gradients("triton")
    for name, value in found.items():
        assert value.dtype == (case.dtype if name == "out" else call.tensors[name].dtype), name
    return {name: ratio for name, ratio in excesses(found, *expected(case)).items() if not ratio <= 1}


@pytest.mark.parametrize("case", KERNEL_CASES, ids=str)
def test_values_and_gradients(case):
    assert wrong_results(case) == {}


ALONE = Case(norm=True, tasks=(11, 22))


@functools.cache
def all_gradients() -> dict[str, torch.Tensor]:
    return build(ALONE).gradients("triton")


@pytest.mark.parametrize("name", ["h", "alpha", "project", "conv5", "glu_bias", "output", "norm"])
def test_one_gradient_alone_has_the_bits_of_all_together(name):
    alone, together = build(ALONE).gradients("triton", (name,)), all_gradients()
    assert alone.keys() == {"out", name} and torch.equal(alone[name], together[name])


# Both tasks select every operation, each on other edges; a mixture of all would take five times as long to interpret.
SEEN_BY = Case(
    d=9,
    width=6,
    batch=(3, 24),
    tasks=(24, 48),
    causal=False,
    padding=(("left", 3), ("right", 5), ("left", 0)),
    alpha="mixed",
)
MISTAKES = {
    "a tap too far": ("place = position + (FIRST + j)", "place = position + (FIRST + j + 1)"),
    "sequences flow into each other": ("there = (row < end) & (place >= 0) & (place < length)", "there = row < end"),
    "the first task's alpha": ("chosen = alpha + task * alpha_task", "chosen = alpha + 0 * alpha_task"),
    "the first task's weights": ("edge += 9 * task", "edge += 0 * task"),
    "relu forgotten": ("total += a * tl.maximum(y, 0.0)", "total += a * y"),
    "no gate": ("total += a * value / (1 + tl.exp(-gate))", "total += a * value"),
    "the mean forgotten": ("* (1.0 / 3)", "* 1.0"),
    "the residual forgotten": ("acc += tl.load(h + place, mask=here, other=0.0).to(tl.float32)", "acc += 0"),
    "gradients through the wrong side": ("place = position - (FIRST + j)", "place = position + (FIRST + j)"),
    "a reader left out": ("tl.maximum(node - 1, 0), 3, num_stages", "tl.maximum(node - 1, 0), 2, num_stages"),
    "no gradient by the mean": ("tl.where(node >= 2, end, 0)", "tl.where(node >= 2, 0, 0)"),
    "the gate's slope": ("a * d * value * gate * (1 - gate)", "a * d * value * gate"),
    "taps swapped in the weights": ("shift = tap + (", "shift = SIZE - 1 - tap + ("),
    "the last chunk of alpha's sum": ("range(0, end - start, CHUNK)", "range(CHUNK, end - start, CHUNK)"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_the_kernels_is_seen(name, tmp_path, monkeypatch):
    make(MISTAKES[name], tmp_path, monkeypatch)
    assert wrong_results(SEEN_BY)


def test_without_a_mistake_there_is_none():
    assert wrong_results(SEEN_BY) == {}
