"""Bad input never reaches a kernel: the error names the argument, what came, what was expected."""

import pytest
import torch

from tarp_kernels import search_cell, search_cell_step
from tarp_kernels.ops.search_cell import autograd
from tests.lowrank_linear.backends import cpu_backends, each_backend
from tests.search_cell.bad_input import BAD, good


def check(function, arguments, exception, parts: str) -> None:
    with pytest.raises(exception) as raised:
        function(**arguments)
    message, (name, *others) = str(raised.value), parts.split(" | ")
    missing = [part for part in others if part not in message]
    assert not missing, f"{message!r} lacks {missing}"
    assert message.startswith(name), f"{message!r} does not begin with the argument's name"


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("backend", [None, *cpu_backends])
def test_bad_input(name, backend, monkeypatch):
    form, mutate, exception, parts = BAD[name]
    arguments = good(**form)
    search_cell(**arguments, backend=backend)  # the good call is good
    monkeypatch.setattr(autograd, "apply", lambda *_: pytest.fail("a kernel ran on bad input"))
    check(search_cell, {"backend": backend} | mutate(arguments), exception, parts)


def test_bad_input_of_a_step():
    call = good()
    _, state = search_cell_step(**call)
    check(search_cell_step, call | {"h": torch.randn(12, 8)}, ValueError, "h | [12, 8] | [B, S, d]")
    check(search_cell_step, call | {"state": state[:1]}, ValueError, "state | [1, 4, 4, 4] | [2, 4, 4, 4] | None")
    check(search_cell_step, call | {"state": state.double()}, TypeError, "state | float64 | float32")
    check(search_cell_step, call | {"state": [state]}, TypeError, "state | list | Tensor")
    segments = torch.tensor([0, 7, 12])
    check(search_cell_step, call | {"segments": segments}, ValueError, "segments | [0, 7, 12] | multiples of S = 6")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_dtypes_that_the_cpu_kernels_lack(dtype):
    check(search_cell, good(dtype=dtype, backend="cpu"), TypeError, f"backend='cpu' | {dtype} | reference")


@each_backend
@pytest.mark.parametrize(
    "change",
    [
        {"segments": torch.tensor([0, 12], dtype=torch.int32)},
        {"attention_mask": torch.zeros(2, 6)},
        {"attention_mask": torch.ones(2, 6, dtype=torch.bool)},
        {"alpha": torch.full((9, 6), 1 / 6, dtype=torch.bfloat16)},
        {"h": good((6, 2, 8))["h"].transpose(0, 1)},
        {"h": good((2, 6, 16))["h"][..., ::2]},
        {"h": torch.randn(0, 6, 8)},
    ],
    ids=["segments", "float mask", "bool mask", "bf16 alpha", "transposed", "strided", "empty"],
)
def test_unusual_but_legal(backend, change):
    call = good() | change
    out = search_cell(**call, backend=backend)
    assert out.isfinite().all() and out.shape == call["h"].shape
    torch.testing.assert_close(out, search_cell(**call | {"h": call["h"].contiguous()}), rtol=1e-5, atol=1e-5)


@each_backend
def test_autocast_changes_nothing(backend):
    call = good(backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = search_cell(**call)
    assert inside.dtype == torch.float32 and torch.equal(inside, search_cell(**call))
