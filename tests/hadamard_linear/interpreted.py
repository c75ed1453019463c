"""The Triton kernels of `hadamard_linear` in Triton's interpreter, started by test_triton.py."""

import importlib
import re
from unittest import mock

import pytest
import torch

from tests.hadamard_linear.cases import CASES, NAMES, Case, build, evaluate, excesses
from tests.hadamard_linear.test_derivatives import FORMS, second_order
from tests.interpreting import make, triton_on_the_cpu  # noqa: F401


def check(case: Case) -> None:
    """With the gradients of P and Q by many blocks, and by one that takes several tiles."""
    call = build(case)
    launches = importlib.import_module("tarp_kernels.ops.hadamard_linear.triton_kernels")
    for most_blocks in (launches.MOST_BLOCKS, 1):
        with mock.patch.object(launches, "MOST_BLOCKS", most_blocks):
            found = call.gradients("triton")
        for name, value in found.items():
            assert value.dtype == (case.dtype if name == "y" else call.tensors[name].dtype), name
        wrong = {name: ratio for name, ratio in excesses(found, call, tensor_cores=True).items() if not ratio <= 1}
        assert wrong == {}, str(case)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_values_and_gradients(case, dtype):
    check(case.with_(dtype=dtype, adapter_dtype=torch.float32 if case.factor_rank % 2 else None))


ALONE = Case(segments=(5, 0, 12), blocks=3)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "bias"])
def test_one_gradient_alone_has_the_bits_of_all_together(name):
    call = build(ALONE)
    alone, together = call.gradients("triton", (name,)), call.gradients("triton")
    assert alone.keys() == {"y", name} and torch.equal(alone[name], together[name])


@pytest.mark.parametrize("case", [*FORMS, Case(segments=(5, 12), blocks=3, shape=(0, 15, 8))], ids=str)
def test_second_order_gradients(case):
    call = build(case)
    exact = call.double()
    wanted = second_order(exact, lambda leaves: evaluate(exact._replace(tensors=leaves)))
    found = second_order(call, lambda leaves: call.run("triton", **leaves))
    for got, want in zip(found, wanted, strict=True):
        assert (got - want).norm() <= 3e-4 * want.norm() and want.norm() > 0


SEEN_BY = Case(shape=(0, 150, 70), segments=(70, 3, 40), blocks=2, factor_rank=18, activation="softplus", dropout=0.3)
MISTAKES = {
    "no factor": ("(bt * phi).to(kind)", "bt"),
    "the first task's P and Q in the dense product": ("left += task.to(tl.int64) * left_task", "left += 0"),
    "the first block's P": ("at_right = i * right_block", "at_right = 0"),
    "the first block's P in dx": ("left += block.to(tl.int64) * left_block", "left += 0"),
    "columns counted through the blocks": ("tile % across * BN", "tile * BN"),
    "no slope": ("(product * w * factor_slope(argument, FACTOR)).to(kind)", "(product * w).to(kind)"),
    "W left out of the gradients": ("(product * w * factor_slope", "(product * factor_slope"),
    "the last row of a task left out of the gradients": (
        "(row < end)[None, :] & (output < outer)[:, None], (row < end)[:, None]",
        "(row < end - 1)[None, :] & (output < outer)[:, None], (row < end)[:, None]",
    ),
    "only the last outputs count for Q": ("if n > first_n:", "if n > first_n + 10000:"),
    "only the last columns count for P": ("if k > first_k:", "if k > first_k + 10000:"),
    "the first ranks of P twice": ("p, at_P, in_P = tile_of_P(P, first,", "p, at_P, in_P = tile_of_P(P, 0,"),
    "the first task's gradients": ("(shift + task).to(tl.int64) * count", "task.to(tl.int64) * count"),
    "the gradient of W without the factor": ("product * factor(argument, FACTOR)", "product"),
    "one part less for P": ("end - start, CHUNK):", "end - start - 1, CHUNK):"),
    "no bias": ("    if BIAS:\n", "    if False:\n"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_the_kernels_is_seen(name, tmp_path, monkeypatch):
    make(MISTAKES[name], tmp_path, monkeypatch)
    with pytest.raises(AssertionError, match=re.escape(str(SEEN_BY))):
        check(SEEN_BY)
