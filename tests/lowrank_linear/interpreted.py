"""The Triton kernels in Triton's interpreter, which must be chosen before Triton is imported: see test_triton.py.

The interpreter multiplies the raw bits of bfloat16 and so is used for float32 and float16 only.
"""

import importlib.util
from pathlib import Path

import pytest
import torch
import triton

from tarp_kernels import backends
from tarp_kernels.ops.lowrank_linear import autograd, triton_kernels
from tests.lowrank_linear.cases import Case, build, cotangent, forms, of_form, pairwise, run_with_gradients
from tests.lowrank_linear.oracle import TensorCoreOracle, bounds, excess

assert triton.knobs.runtime.interpret, "set TRITON_INTERPRET=1"


@pytest.fixture(autouse=True)
def triton_on_the_cpu(monkeypatch):
    monkeypatch.setattr(backends, "choose", lambda requested, dtype, device: requested)


def check(case: Case) -> None:
    call, dy = build(case), cotangent(case)
    wanted = bounds(call, dy, TensorCoreOracle)
    found = run_with_gradients(call, dy, "triton")
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        assert value.dtype == (call.x.dtype if name == "y" else call.tensors[name].dtype), name
        assert excess(value, wanted[name]) <= 1, f"{name} of {case}"
    kernels = autograd.kernels("triton")
    for variant in kernels.VARIANTS:
        with kernels.forced(variant):
            alone, y = call.run("triton"), call.leaves().run("triton").detach()
        assert excess(y, wanted["y"]) <= 1, f"y of {case}, {variant}"
        assert torch.equal(alone, y), "the value depends on whether gradients are asked for"


@pytest.mark.parametrize("case", pairwise("triton"), ids=str)
def test_values_and_gradients(case):
    check(case)


@pytest.mark.proof
@pytest.mark.parametrize("form", forms(), ids=lambda form: str(Case(**form)))
def test_values_and_gradients_of_every_form(form):
    for case in of_form(form, "triton", 1):
        check(case)


SEGMENTED = Case(shape=(0, 70, 40), segments="long", rank=3, b1=True, dropout=0.3)
MISTAKES = {
    "the last row of a task left out": ("here = (row < end)", "here = (row < end - 1)"),
    "no scaling in forward": ("middle = scaling * _middle(", "middle = _middle("),
    "no scaling in backward": ("    dz *= scaling\n", ""),
    "h and s swapped": ("middle, dh = s * h, s * dz", "middle, dh = s * h, h * dz"),
    "the neighbour's V": ("V += task.to(tl.int64) * r * width", "V += (2 - task).to(tl.int64) * r * width"),
    "tiles counted without the task's number": ("(tile - start // BT - low) * BT", "(tile - start // BT) * BT"),
    "columns past the last": ("if not EVEN:\n            in_x", "if False:\n            in_x"),
    "no dropout": ("a = tl.where(_kept(row, feature, width, threshold, seed), a, 0.0)", "a = a"),
    "dx past dropout": ("tl.where(_kept(row, column, outer, threshold, seed), low * inverse_keep, 0.0)", "low"),
"the last chunk left out": ("range(0, end - start, CHUNK)", "range(CHUNK, end - start, CHUNK)"),
    "no bias": ("    if BIAS:\n", "    if False:\n"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_the_kernels_is_seen(name, tmp_path, monkeypatch):
    old, new = MISTAKES[name]
    source = Path(triton_kernels.__file__).read_text()
    assert old in source, "the kernels have changed: describe this mistake anew"
    file = tmp_path / "mistaken.py"
    file.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location("mistaken", file)
    assert spec is not None and spec.loader is not None
    mistaken = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mistaken)
    monkeypatch.setattr(autograd, "kernels", lambda backend: mistaken)
    with pytest.raises(AssertionError):
        check(SEGMENTED)
