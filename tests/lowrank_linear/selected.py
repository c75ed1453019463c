"""Calls of `lowrank_linear` on some rows, and what they must give: the numbers of the call on the rows alone."""

import random
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tarp_kernels import lowrank_linear
from tests.lowrank_linear.cases import Case, build, cotangent, lay_out
from tests.lowrank_linear.oracle import Oracle, bounds, excess

MODES = ("read", "write", "both")


def numbers(pattern: str, count: int) -> tuple[Tensor, int]:
    """`count` strictly rising row numbers, and how many rows there are."""
    chooser = random.Random(pattern + str(count))
    if pattern == "all":
        return torch.arange(count), count
    if pattern == "runs":  # of several lengths, as a mask by sequence or task has them; some begin inside a tile
        lines, at = [], 2
        while len(lines) < count:
            lines += range(at, at + chooser.choice((1, 4, 13)))
            at = lines[-1] + 1 + chooser.choice((1, 3, 40))
        return torch.tensor(lines[:count], dtype=torch.int64), at + 1
    most = 2 * count + 3
    return torch.tensor(sorted(chooser.sample(range(1, most), count)), dtype=torch.int64), most


class Selected(NamedTuple):
    """The call of a case on its rows alone, and where these lie among others, whose x is NaN."""

    case: Case
    mode: str
    index: Tensor
    call: Any
    dy: Tensor
    x: Tensor
    base: Tensor | None
    dout: Tensor
    compiled: Callable | None = None

    @property
    def reads(self) -> bool:
        return self.mode != "write"

    def run(self, backend: str | None) -> dict[str, Tensor]:
        """{"y" and the gradient of every tensor, "base" among them}."""
        return self._run(self.compiled or self.function, backend)

    def run_composed(self, backend: str | None) -> dict[str, Tensor]:
        """The same by what defines it."""
        return self._run(self.composed, backend)

    def _run(self, function: Callable, backend: str | None) -> dict[str, Tensor]:
        call = self.call.with_tensors({"x": self.x}).leaves()
        base = None if self.base is None else self.base.clone().requires_grad_()
        y = function(call, base, backend)
        inputs = call.tensors | ({} if base is None else {"base": base})
        gradients = torch.autograd.grad(y, list(inputs.values()), self.dout)
        with torch.no_grad():
            assert torch.equal(function(call, base, backend), y), "the value depends on gradients being asked for"
        return {"y": y.detach(), **dict(zip(inputs, gradients, strict=True))}

    def function(self, call, base: Tensor | None, backend: str | None) -> Tensor:
        chosen = {"rows": self.index if self.reads else None, "into": None if base is None else (base, self.index)}
        return lowrank_linear(*call[:6], **call.options, **chosen, backend=backend)

    def composed(self, call, base: Tensor | None, backend: str | None) -> Tensor:
        x = call.x.index_select(0, self.index) if self.reads else call.x
        y = lowrank_linear(x, *call[1:6], **call.options, backend=backend)
        return y if base is None else base.index_copy(0, self.index, y)


def select(case: Case, pattern: str, mode: str) -> Selected:
    call, dy = build(case), cotangent(case)
    index, total = numbers(pattern, case.rows)
    K, N = call.x.shape[1], dy.shape[1]
    x, base, dout = call.x, None, dy
    if mode != "write":
        x = torch.full((total, K), float("nan"), dtype=case.dtype)
        x[index] = call.x
        x = lay_out(x, case.x_layout)
    if mode != "read":
        base = torch.randn(total, N, generator=torch.Generator().manual_seed(5)).to(case.dtype)
        dout = torch.randn(total, N, generator=torch.Generator().manual_seed(6)).to(case.dtype)
        dout[index] = dy
        dout = lay_out(dout, ("contiguous", "padded", "transposed")[case.seed % 3])
    return Selected(case, mode, index, call, dy, x, base, dout)


def check(selected: Selected, found: dict[str, Tensor], oracle: type[Oracle] = Oracle) -> None:
    """Rows that are not selected to the bit, all else within the bounds of the oracle."""
    wanted, index = bounds(selected.call, selected.dy, oracle), selected.index
    elsewhere = torch.ones(found["y"].shape[0] if selected.base is not None else selected.x.shape[0], dtype=torch.bool)
    elsewhere[index] = False
    assert found.keys() - {"base"} == wanted.keys()
    for name, value in found.items():
        if name == "base":
            expected = selected.dout.clone()
            expected[index] = 0
            assert torch.equal(value, expected), f"base of {selected.case}"
            continue
        if name == "y" and selected.base is not None:
            assert torch.equal(value[elsewhere], selected.base[elsewhere]), f"passed through in {selected.case}"
            value = value[index]
        if name == "x" and selected.reads:
            assert not value[elsewhere].any(), f"x elsewhere in {selected.case}"
            value = value[index]
        assert excess(value, wanted[name]) <= 1, f"{name} of {selected.case}"
