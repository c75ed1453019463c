"""The Triton kernels of `search_cell` in Triton's interpreter, started by test_triton.py."""

import functools

import pytest
import torch

from tarp_kernels import CellWeights, search_cell_step
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


def test_weights_of_two_dtypes():
    """The kernels choose among an edge's weights as they run."""
    call = build(Case(dtype=torch.float16, alpha="mixed", tasks=(11, 22)))
    tensors = {n: t.float() if n in ("glu", "conv3", "conv5_bias") else t for n, t in call.tensors.items()}
    call = call._replace(tensors=tensors)
    found, wanted = call.gradients("triton"), call.exact()
    assert all(found[name].dtype == tensor.dtype for name, tensor in tensors.items())
    for name, value in found.items():
        assert (value.double() - wanted[name]).norm() <= 1e-2 * wanted[name].norm(), name


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
    "a tap too far": ("place = position + shift", "place = position + shift + 1"),
    "sequences flow into each other": ("there = (place >= 0) & (place < length)", "there = length > 0"),
    "the first task's alpha": ("chosen = alpha + task * alpha_task", "chosen = alpha + 0 * alpha_task"),
    "the first task's weights": ("edge += 9 * task", "edge += 0 * task"),
    "relu forgotten": ("total += a * tl.maximum(y, 0.0)", "total += a * y"),
    "no gate": ("total += a * value / (1 + tl.exp(-y))", "total += a * value"),
    "the mean forgotten": ("* (1.0 / 3)", "* 1.0"),
    "the residual forgotten": ("acc += tl.load(h + place, mask=here, other=0.0).to(tl.float32)", "acc += 0"),
    "gradients through the wrong side": ("place = position - shift", "place = position + shift"),
    "a reader left out": ("tl.maximum(node - 1, 0), 3, num_stages", "tl.maximum(node - 1, 0), 2, num_stages"),
    "no gradient by the mean": ("tl.where(node >= 2, end, 0)", "tl.where(node >= 2, 0, 0)"),
    "the gate's slope": ("g = a * g * (1 - gate)", "g = a * g"),
    "taps swapped in the weights": ("shift = tap + (", "shift = SIZE - 1 - tap + ("),
    "the last chunk of alpha's sum": ("range(0, end - start, CHUNK)", "range(CHUNK, end - start, CHUNK)"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_the_kernels_is_seen(name, tmp_path, monkeypatch):
    make(MISTAKES[name], tmp_path, monkeypatch)
    assert wrong_results(SEEN_BY)


def test_without_a_mistake_there_is_none():
    assert wrong_results(SEEN_BY) == {}


# --- the next tokens of sequences -------------------------------------------------------------------------------------


def wrong_steps(case: Case, chunks: tuple[int, ...], order: tuple[int, ...] | None = None) -> list[str]:
    """Which chunks' out or state is not what the reference makes of the same state in float64.

    order  beams: from which sequence each goes on after a chunk
    """
    call, state, at, wrong = build(case), None, 0, []
    exact, mask, segments = call.double(), call.options.get("attention_mask"), call.options.get("segments")
    for size in chunks:
        chunk, options = slice(at, at + size), {}
        if mask is not None:
            options["attention_mask"] = mask[:, chunk]
        if segments is not None:
            options["segments"] = segments // case.batch[1] * size
        found, wanted = (
            search_cell_step(
                given.tensors["h"][:, chunk],
                CellWeights(**{name: t for name, t in given.tensors.items() if name not in ("h", "alpha")}),
                given.tensors["alpha"],
                before,
                **options,
                backend=backend,
            )
            for given, before, backend in (
                (call, state, "triton"),
                (exact, None if state is None else state.double(), "reference"),
            )
        )
        assert found[1].dtype == torch.float32 and not found[1].requires_grad
        for name, got, want in zip(("out", "state"), found, wanted, strict=True):
            tolerance = 1e-5 if case.dtype == torch.float32 else 1e-2
            if not torch.allclose(got.double(), want, rtol=tolerance, atol=tolerance):
                wrong.append(f"{name} after {at} + {size}")
        state, at = found[1], at + size
        if order is not None:
            state = state[list(order)]
    return wrong


STEPS = Case(batch=(3, 20), d=9, width=6, alpha="mixed")
LEFT = (("left", 2), ("left", 19), ("left", 0))
BOTH = (("right", 6), ("left", 20), ("right", 0))


@pytest.mark.parametrize("chunks", [(20,), (1, 1, 1, 1, 1, 15), (3, 0, 1, 16), (17, 1, 2)], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        STEPS.with_(padding=LEFT, norm=True),
        STEPS.with_(padding=BOTH, tasks=(40, 0, 20)),
        STEPS.with_(tasks=(0, 20, 40), per_task_weights=False, alpha="published"),
        STEPS.with_(alpha="from nothing", width=33),
        STEPS.with_(dtype=torch.float16, weights_dtype=torch.float32),
    ],
    ids=str,
)
def test_steps(case, chunks):
    assert wrong_steps(case, chunks) == []


def test_steps_of_soft_alpha_and_beams():
    assert wrong_steps(STEPS.with_(alpha="soft"), (2, 3), order=(2, 2, 0)) == []


STEP_MISTAKES = {
    "the state ignored": ("        if STATE:\n            at = (past", "        if False:\n            at = (past"),
    "the row before": ("- sequence) * 16 + 4", "- sequence) * 16 + 3"),
    "the first sequence's state": ("other=sequence) - sequence) * 16", "other=sequence) - sequence) * 0"),
    "the state of s0": ("before = state + i * 4 * width", "before = state + 0 * i * width"),
    "the past beside the first token": ("mask=(place < 0)[:, None]", "mask=(place < 1)[:, None]"),
    "nothing carried on": ("tl.where(fresh, new, old)", "tl.where(fresh, new, 0.0)"),
    "the state of the token before": ("place = end - start - 4 + slot % 4", "place = end - start - 5 + slot % 4"),
}


@pytest.mark.parametrize("name", STEP_MISTAKES)
def test_a_mistake_in_a_step_is_seen(name, tmp_path, monkeypatch):
    make(STEP_MISTAKES[name], tmp_path, monkeypatch)
    assert wrong_steps(STEPS.with_(padding=LEFT), (3, 1, 2))


def test_a_step_that_asks_for_a_gradient_is_differentiable():
    call = build(STEPS)
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in call.tensors.items()}
    weights = CellWeights(**{name: leaf for name, leaf in leaves.items() if name not in ("h", "alpha")})
    out, state = search_cell_step(leaves["h"], weights, leaves["alpha"], backend="triton")
    found = torch.autograd.grad(out, list(leaves.values()), call.dout, allow_unused=True)
    wanted = call.exact()
    assert not state.requires_grad
    for name, gradient in zip(leaves, found, strict=True):
        if gradient is not None:
            torch.testing.assert_close(gradient.double(), wanted[name], rtol=1e-5, atol=1e-4)
