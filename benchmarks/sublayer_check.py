"""The part of gpu_check.py about `masked_sublayer`: rows read and written where they lie, or gathered and put back."""

import copy
import functools
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.measuring import Row, dtypes_of, relative, row_of
from tarp_kernels import TarpConfig, TarpLinear, masked_sublayer
from tarp_kernels import backend as on_backend


class Sublayer(NamedTuple):
    """A call of `masked_sublayer` in float64."""

    name: str
    module: nn.Module
    x: Tensor
    mask: Tensor
    dout: Tensor

    def to(self, dtype: torch.dtype) -> "Sublayer":
        x, dout = self.x.to(dtype), self.dout.to(dtype)
        return self._replace(module=copy.deepcopy(self.module).to(dtype), x=x, dout=dout)

    def run(self, everything: bool) -> dict[str, Tensor]:
        """The result, and the gradients of x and of every adapter; `everything`: of all rows, some thrown away."""
        x = self.x.detach().requires_grad_()
        out = (
            torch.where(self.mask[:, None], self.module(x), x)
            if everything
            else masked_sublayer(self.module, x, self.mask)
        )
        tensors = {"x": x} | {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        found = torch.autograd.grad(out, list(tensors.values()), self.dout)
        return {"out": out.detach(), **dict(zip(tensors, found, strict=True))}


def calls(device: torch.device) -> Iterator[Sublayer]:
    """Layers that can read and write rows where they lie and such that cannot; few rows and many."""
    for i, (rows, name) in enumerate(itertools.product((60, 300), ("plain", "odd", "adapted", "behind", "between"))):
        random = torch.Generator().manual_seed(i)
        d, hidden = (201 if name == "odd" else 200), 136

        def draw(*shape: int, random: torch.Generator = random) -> Tensor:
            # numbers that every dtype holds exactly, so that only the arithmetic differs
            return torch.randn(shape, generator=random, dtype=torch.float64).bfloat16().double().to(device)

        layers: dict[str, list[nn.Module]] = {
            "plain": [nn.Linear(d, d)],
            "odd": [nn.Linear(d, d)],
            "adapted": [adapted(d, d)],
            "behind": [adapted(d, hidden), nn.GELU(), nn.Linear(hidden, d)],
            "between": [adapted(d, hidden), nn.Linear(hidden, hidden), nn.GELU(), adapted(hidden, d)],
        }
        module = nn.Sequential(*layers[name]).to(device, torch.float64)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_((draw(*parameter.shape) * parameter.shape[-1] ** -0.5).bfloat16())
        mask = torch.rand(rows, generator=random).to(device) < 0.6
        yield Sublayer(f"{name}, {rows} rows", module, draw(rows, d), mask, draw(rows, d))


def adapted(inner: int, outer: int) -> TarpLinear:
    return TarpLinear.from_linear(nn.Linear(inner, outer), TarpConfig(r=4))


def correctness(device: torch.device, backend: str, tolerance: dict[torch.dtype, float]) -> list[Row]:
    """A row for each call and dtype: the worst error, its bound; or why the backend does not serve the call."""
    rows = []
    for call, dtype in itertools.product(list(calls(device)), dtypes_of(backend, tolerance)):
        facts = {"operator": "masked_sublayer", "call": call.name, "backend": backend, "dtype": str(dtype)}
        rows.append(row_of(facts, functools.partial(compared, call, dtype, backend, tolerance[dtype])))
    return rows


def compared(call: Sublayer, dtype: torch.dtype, backend: str, bound: float) -> Row:
    with on_backend("reference"):
        wanted = call.run(everything=True)
    with on_backend(backend):
        found = call.to(dtype).run(everything=False)
    errors = {name: relative(found[name], wanted[name]) for name in wanted}
    worst = max(errors, key=lambda name: float("inf") if errors[name] != errors[name] else errors[name])
    untouched = torch.equal(found["out"][~call.mask], call.to(dtype).x[~call.mask])
    ok = untouched and all(error <= bound for error in errors.values())
    return {"worst": worst, "error": errors[worst], "bound": bound, "untouched": untouched, "ok": ok}
