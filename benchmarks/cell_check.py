"""The part of gpu_check.py about `search_cell`: right against float64, and what masked execution costs and saves."""

import functools
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.measuring import Row, dtypes_of, relative, row_of, timed, timed_on_each_backend
from mltd.bench.cells import DOMINANT, UnfusedCell, architecture
from mltd.bench.contenders import stir
from tarp_kernels import CellWeights, SearchCell, search_cell, search_cell_step
from tarp_kernels.ops.search_cell import OPERATIONS

# Largest error of out, over what the cell adds to h, and of a gradient, over its own size. Factors are rounded along a
# chain of up to five products; in gradients a relu whose argument is about zero may open instead of being shut.
TOLERANCE = {torch.float32: (1e-5, 2e-2), torch.float16: (4e-3, 5e-2), torch.bfloat16: (2e-2, 0.12)}
MIXED = ("linear", "glu", "conv3", "none", "conv5", "identity", "glu", "linear", "conv3")
WIDTH = 24


class CellCall(NamedTuple):
    """Arguments of `search_cell` in float64."""

    name: str
    tensors: dict[str, Tensor]  # h, alpha, and the weights by name
    options: dict[str, Any]
    dout: Tensor

    def to(self, dtype: torch.dtype) -> "CellCall":
        return self._replace(tensors={n: t.to(dtype) for n, t in self.tensors.items()}, dout=self.dout.to(dtype))

    def run(self, backend: str) -> dict[str, Tensor]:
        """out, and the gradient of every tensor that has one."""
        tensors = {name: tensor.detach().requires_grad_() for name, tensor in self.tensors.items()}
        out = search_cell(tensors["h"], weights_of(tensors), tensors["alpha"], **self.options, backend=backend)
        return {"out": out.detach()} | gradients(out, tensors, self.dout)

    def steps(self, backend: str, chunks: tuple[int, ...]) -> Tensor:
        """out of [B, S, d] chunk by chunk, as a cached decode computes it."""
        h, mask, segments = (self.tensors["h"], *(self.options.get(n) for n in ("attention_mask", "segments")))
        weights, outs, state, at = weights_of(self.tensors), [], None, 0
        for size in chunks:
            options = {"attention_mask": None if mask is None else mask[:, at : at + size]}
            options["segments"] = None if segments is None else segments // h.shape[1] * size
            here = h[:, at : at + size]
            out, state = search_cell_step(here, weights, self.tensors["alpha"], state, **options, backend=backend)
            outs.append(out)
            at += size
        return torch.cat(outs, 1)


def weights_of(tensors: dict[str, Tensor]) -> CellWeights:
    return CellWeights(**{name: tensor for name, tensor in tensors.items() if name not in ("h", "alpha")})


def gradients(out: Tensor, tensors: dict[str, Tensor], dout: Tensor) -> dict[str, Tensor]:
    found = torch.autograd.grad(out, list(tensors.values()), dout, allow_unused=True)
    return {name: gradient for name, gradient in zip(tensors, found, strict=True) if gradient is not None}


# --- correctness -----------------------------------------------------------------------------------------------------


def calls(device: torch.device) -> Iterator[CellCall]:
    """Every operation alone, architectures and a soft alpha; whole, padded and packed sequences; one cell or many."""
    alphas = [*((name,) * 9 for name in OPERATIONS), DOMINANT, MIXED, None]
    for i, (operations, layout) in enumerate(itertools.product(alphas, ("whole", "padded", "packed", "tasks"))):
        yield make(operations, layout, causal=i % 3 > 0, norm=i % 2 == 0, seed=i, device=device)
    yield make(None, "tasks", causal=True, norm=False, seed=1, device=device, shared=True)


def make(
    operations: tuple[str, ...] | None,
    layout: str,
    causal: bool,
    norm: bool,
    seed: int,
    device: torch.device,
    shared: bool = False,
) -> CellCall:
    """A call with one operation an edge, or a soft alpha; with "tasks" each has its alpha and, unless shared, cell."""
    random = torch.Generator().manual_seed(seed)
    d, lengths = 56, (0, 9, 37, 1, 28)
    ends = torch.tensor((0, *itertools.accumulate(lengths)), device=device)
    batch = layout in ("whole", "padded")
    tasks = (len(lengths),) if layout == "tasks" else ()

    def draw(*shape: int, size: float = 1.0, mean: float = 0.0) -> Tensor:
        # numbers that every dtype holds exactly, so that only the arithmetic differs
        numbers = torch.randn(shape, generator=random, dtype=torch.float64) * size + mean
        return numbers.bfloat16().double().to(device)

    tensors = {"h": draw(*((3, 25) if batch else (sum(lengths),)), d)}
    alpha = draw(*tasks, 9, 6).softmax(-1).bfloat16().double()
    if operations is not None:
        chosen = architecture(operations).double().to(device)
        alpha = torch.stack([chosen.roll(task, 0) for task in range(len(lengths))]) if tasks else chosen
    tensors["alpha"] = alpha
    for name, shape in CellWeights.shapes(d, WIDTH, norm).items():
        fan = d if name == "project" else WIDTH * {"conv3": 3, "conv5": 5}.get(name, 1)
        size = 0.3 if name.endswith("bias") or name == "norm" else fan**-0.5
        tensors[name] = draw(*(() if shared else tasks), *shape, size=size, mean=float(name == "norm"))
    options: dict[str, Any] = {"causal": causal}
    if layout == "padded":
        options["attention_mask"] = torch.ones(3, 25, dtype=torch.int64, device=device)
        options["attention_mask"][0, :4] = options["attention_mask"][2, 8:] = 0
    elif layout == "packed":
        options["cu_seqlens"] = ends
    elif layout == "tasks":
        options["segments"] = ends
    what = "soft alpha" if operations is None else "mixed" if len(set(operations)) > 1 else operations[0]
    what = "dominant cell" if operations == DOMINANT else what
    marks = (("causal", causal), ("LayerNorm", norm), ("one cell for all", shared))
    name = ", ".join([what, layout, *(mark for mark, present in marks if present)])
    return CellCall(name, tensors, options, draw(*tensors["h"].shape))


def errors(found: dict[str, Tensor], wanted: dict[str, Tensor], h: Tensor) -> dict[str, float]:
    """Of out over what the cell adds, and of gradients; one that is zero may be missing, else it counts as wrong."""
    rows = {"out": relative(found["out"].double() - h, wanted["out"] - h)}
    for name in wanted.keys() - {"out"}:
        there = found.get(name, torch.zeros_like(wanted[name]))
        rows[name] = relative(there, wanted[name]) if wanted[name].any() else float(there.norm())
    return rows


def right(found: dict[str, float], dtype: torch.dtype) -> bool:
    values, slopes = TOLERANCE[dtype]
    return all(error <= (values if name == "out" else slopes) for name, error in found.items())


def correctness(device: torch.device, backend: str) -> list[Row]:
    """A row for each call and dtype, for the unfused mixture and for steps: the worst error, whether it is allowed.

    Or why the backend does not serve the call.
    """
    rows: list[Row] = []
    dtypes = dtypes_of(backend, TOLERANCE)

    def add(operator: str, name: str, dtype: torch.dtype, measure: Callable[[], tuple[dict[str, float], bool]]) -> None:
        def measured() -> Row:
            found, same = measure()
            worst = max(found, key=lambda n: float("inf") if found[n] != found[n] else found[n])
            row = {"worst": worst, "error": found[worst], "bound": TOLERANCE[dtype], "same bits": same}
            return {**row, "ok": same and right(found, dtype)}

        facts = {"operator": operator, "call": f"search_cell {name}", "backend": backend, "dtype": str(dtype)}
        rows.append(row_of(facts, measured))

    def twice(call: CellCall, dtype: torch.dtype) -> tuple[dict[str, float], bool]:
        wanted, (first, second) = call.run("reference"), (call.to(dtype).run(backend) for _ in range(2))
        same = all(torch.equal(first[name], second[name]) for name in first)
        return errors(first, wanted, call.tensors["h"]), same

    def beside_the_mixture(call: CellCall, dtype: torch.dtype) -> tuple[dict[str, float], bool]:
        return errors(call.to(dtype).run(backend), mixture(call), call.tensors["h"]), True

    def by_steps(call: CellCall, dtype: torch.dtype) -> tuple[dict[str, float], bool]:
        out = call.to(dtype).steps(backend, (5, 1, 0, 1, 18))
        return errors({"out": out}, {"out": call.run("reference")["out"]}, call.tensors["h"]), True

    for call, dtype in itertools.product(list(calls(device)), dtypes):
        add("search_cell", call.name, dtype, functools.partial(twice, call, dtype))
    for operations, dtype in itertools.product((DOMINANT, MIXED, None), dtypes):
        call = make(operations, "whole", causal=True, norm=False, seed=2, device=device)
        measure = functools.partial(beside_the_mixture, call, dtype)
        add("search_cell", f"{call.name}, beside the mixture", dtype, measure)
    for layout, dtype in itertools.product(("whole", "padded"), dtypes):
        call = make(MIXED, layout, causal=True, norm=True, seed=3, device=device)
        add("search_cell_step", f"{call.name}, by steps", dtype, functools.partial(by_steps, call, dtype))
    return rows


def mixture(call: CellCall) -> dict[str, Tensor]:
    """What plain PyTorch computes from all six operations of every edge."""
    h, alpha = (call.tensors[name].detach().requires_grad_() for name in ("h", "alpha"))
    cell = SearchCell(h.shape[-1], WIDTH, stem="identity").to(h)
    cell.load_state_dict({name: tensor for name, tensor in call.tensors.items() if name not in ("h", "alpha")})
    cell = UnfusedCell(cell, skipping=False).to(h)
    out = cell(h, alpha)
    return {"out": out.detach()} | gradients(out, {"h": h, "alpha": alpha} | dict(cell.named_parameters()), call.dout)


# --- times -----------------------------------------------------------------------------------------------------------

SIZES = ((8, 256, 768, 64), (32, 1024, 768, 64), (8, 256, 1024, 64), (1, 256, 768, 128))  # B, S, d, C
SMALL = ((2, 24, 48, 16),)  # without a GPU


def speed(sizes: tuple[tuple[int, ...], ...], device: torch.device, deadline: float) -> tuple[list, list[str]]:
    """Times of the dominant cell beside PyTorch's mixture of all six operations, and what is missing.

    That is what the deadline cut off, and what a backend does not serve.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rows, left_out = [], []
    for batch, length, d, width in sizes:
        name = f"search_cell {batch} x {length} tokens, d = {d}, C = {width}"
        if time.monotonic() > deadline:
            left_out.append(name)
            continue
        cell = SearchCell(d, width, stem="identity")
        with torch.no_grad():
            stir(cell)
        modules: dict[str, nn.Module] = {
            "mixture": UnfusedCell(cell, skipping=False),
            "skipping": UnfusedCell(cell, skipping=True),
            "masked": cell,
        }
        modules = {contender: module.to(device, dtype) for contender, module in modules.items()}
        h, dout = (torch.randn(batch, length, d, device=device, dtype=dtype) for _ in range(2))
        alpha = architecture()
        runs: dict[str, dict[str, Callable[[], object]]] = {
            "forward": {n: forward(m, h, alpha) for n, m in modules.items()},
            "forward+backward": {n: training(m, h, alpha, dout) for n, m in modules.items()},
            "one token a sequence": {
                n: token(cell, h, alpha, b) for n, b in (("reference", "reference"), ("step", None))
            },
        }
        for kind, calls_of_kind in runs.items():
            times = timed(calls_of_kind, device)
            first = next(iter(times.values()))
            on_each, refused = timed_on_each_backend(list(calls_of_kind.values())[-1], device)
            left_out += [f"{name}, {kind}: {reason}" for reason in refused.values()]
            times |= on_each
            for contender, milliseconds in times.items():
                row = {"kind": kind, "batch": batch, "length": length, "d": d, "width": width, "contender": contender}
                rows.append({**row, "ms": milliseconds, "ratio": milliseconds / first})
    return rows, left_out


def forward(module: nn.Module, h: Tensor, alpha: Tensor) -> Callable[[], object]:
    def call() -> Tensor:
        with torch.no_grad():
            return module(h, alpha)

    return call


def training(module: nn.Module, h: Tensor, alpha: Tensor, dout: Tensor) -> Callable[[], object]:
    leaf = h.detach().requires_grad_()
    tensors = [leaf, *module.parameters()]
    return lambda: torch.autograd.grad(module(leaf, alpha), tensors, dout, allow_unused=True)


def token(cell: SearchCell, h: Tensor, alpha: Tensor, backend: str | None) -> Callable[[], object]:
    """The next token of every sequence, after one chunk."""

    @torch.no_grad()
    def call() -> Tensor:
        return search_cell_step(h[:, -1:], cell.weights(), alpha, state, backend=backend)[0]

    with torch.no_grad():
        state = search_cell_step(h[:, :-1], cell.weights(), alpha, backend=backend)[1]
    return call
