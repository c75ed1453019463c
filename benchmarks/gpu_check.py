"""One command for a GPU: are the kernels right there, and what do they cost beside their peers?

    python benchmarks/gpu_check.py                  # everything, about ten minutes; runs/gpu_check
    python benchmarks/gpu_check.py --device cpu     # the parts that need no GPU, on small shapes: a check of this file

Correctness goes first, of every backend against the reference in float64; where it is not given nothing is timed.
Calls that a backend does not serve are listed as such, served ones are counted, and so are starts of CUDA kernels: one
that no call starts is an error. Then tuning, times against a plain linear layer, unfused PyTorch, torch.compile and
PEFT LoRA, those of the search cell against the mixture of all operations, memory, and replay as a CUDA graph, of an
operator and of mltd's inner steps. All is written to results.json, the layers' times also as a picture. What the time
limit cut off is listed there by name.
"""

import functools
import itertools
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import pandas as pd
import torch
import typer
from rich.console import Console
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script, this file finds its neighbours

from benchmarks import cell_check, inner_check, measuring, sublayer_check
from benchmarks.measuring import relative, row_of, timed
from mltd import machine, plots
from mltd.bench import tune
from mltd.bench.contenders import layer_contenders
from mltd.bench.layers import inference, training
from tarp_kernels import Generator, available_backends, hadamard_linear, lowrank_linear, tuning
from tarp_kernels.backends import DTYPES, why_unavailable

LAYERS = {  # in_features, out_features
    "GPT-2 medium attention": (1024, 3072),
    "GPT-2 medium MLP in": (1024, 4096),
    "GPT-2 medium MLP out": (4096, 1024),
    "BART-base attention": (768, 768),
    "BART-base MLP in": (768, 3072),
    "Llama-7B attention": (4096, 4096),
    "Llama-7B MLP in": (4096, 11008),
}
ROWS = (1, 16, 128, 1024, 4096, 16384)
RANKS = (16, 4, 64)
SMALL = {"layers": {"tiny": (48, 80)}, "rows": (1, 33), "ranks": (4,)}  # without a GPU

WIDE = (2200, 2056)  # rows and out_features for which wide tiles keep every multiprocessor busy

# Largest error of a result over its own size (Frobenius norms), for a rounding of 2⁻²⁴, 2⁻¹¹, 2⁻⁸ at each factor that
# enters a product; a wrong scaling, mask or neighbour is off by a tenth and more.
TOLERANCE = {torch.float32: 3e-6, torch.float16: 3e-3, torch.bfloat16: 2.5e-2}


# --- correctness -----------------------------------------------------------------------------------------------------


class Call(NamedTuple):
    """Arguments of `lowrank_linear`, or with P and Q of `hadamard_linear`, in float64, and the form of the call."""

    name: str
    tensors: dict[str, Tensor]
    options: dict[str, Any]
    dy: Tensor

    @property
    def operator(self) -> str:
        return "hadamard_linear" if "P" in self.tensors else "lowrank_linear"

    def to(self, dtype: torch.dtype) -> "Call":
        return self._replace(tensors={n: t.to(dtype) for n, t in self.tensors.items()}, dy=self.dy.to(dtype))

    def run(self, backend: str) -> dict[str, Tensor]:
        """y and the gradient of every tensor."""
        tensors = {name: tensor.detach().requires_grad_() for name, tensor in self.tensors.items()}
        options = dict(self.options)
        activations = {name: options.pop(name) for name in ("activation", "hidden_activation") if name in options}
        weights = [tensors.get(name) for name in ("w1", "b1", "w2", "b2")]
        generator = None if weights[0] is None else Generator(*weights, **activations)
        operator, names = lowrank_linear, ("x", "weight", "bias", "V", "U")
        if "P" in tensors:
            operator, names = hadamard_linear, ("x", "weight", "bias", "P", "Q", "V", "U")
            options["activation"] = options.pop("factor")
        arguments = (tensors.get(name) for name in names)
        y = operator(*arguments, generator, **options, backend=backend)
        gradients = torch.autograd.grad(y, list(tensors.values()), self.dy)
        return {"y": y.detach(), **dict(zip(tensors, gradients, strict=True))}


def calls(device: torch.device) -> Iterator[Call]:
    """Every kind of call on a ragged shape: Σ, generator, activations, segments, dropout, a transposed W."""
    forms: list[dict[str, Any]] = [{"generator": "none"}]
    for sigma, activation in itertools.product(("diag", "full"), ("one_plus", "sigmoid", "tanh", "softplus")):
        forms.append({"generator": "linear", "sigma": sigma, "activation": activation})
    for sigma, hidden in itertools.product(("diag", "full"), ("relu", "gelu", "silu", "tanh")):
        forms.append({"generator": "mlp", "sigma": sigma, "activation": "none", "hidden_activation": hidden})
    lengths = (None, (33, 0, 100, 1, 166), (7, 0, 1, 40))
    for i, (form, segments, p) in enumerate(itertools.product(forms, lengths, (0.0, 0.25))):
        yield make(form, segments, p, rows=300 if i % 3 else 13, seed=i, device=device)
    yield make(forms[1], None, 0.0, rows=WIDE[0], seed=0, device=device, outer=WIDE[1])
    factors = ("centred_softplus", "one_plus", "softplus")
    generators = ("none", "linear", None)  # None: no additive half
    for i, (factor, blocks, generator, segments) in enumerate(itertools.product(factors, (1, 4), generators, lengths)):
        form = {"generator": generator, "sigma": "diag", "factor": factor, "blocks": blocks}
        p = 0.25 if generator == "linear" else 0.0
        yield make(form, segments, p, rows=300 if i % 3 else 13, seed=i, device=device)


def make(
    form: dict[str, Any],
    lengths: tuple[int, ...] | None,
    p: float,
    rows: int,
    seed: int,
    device: torch.device,
    outer: int = 136,
) -> Call:
    """A call whose two terms are about equally large; `lengths` decide the number of rows where there are tasks."""
    random = torch.Generator().manual_seed(seed)
    rows, inner, rank, hidden = (rows if lengths is None else sum(lengths)), 264, 5 + seed % 3, 9
    lead = () if lengths is None else (len(lengths),)

    def draw(*shape: int, size: float = 1.0) -> Tensor:
        # numbers that every dtype holds exactly, so that only the arithmetic differs
        numbers = torch.randn(shape, generator=random, dtype=torch.float64) * size
        return numbers.bfloat16().double().to(device)

    weight = draw(inner, outer, size=inner**-0.5).t() if seed % 2 else draw(outer, inner, size=inner**-0.5)
    tensors = {"x": draw(rows, inner), "weight": weight, "bias": draw(outer)}
    options: dict[str, Any] = {"scaling": 1.5}
    if "factor" in form:
        blocks = form["blocks"]
        tensors["P"] = draw(*lead, *((blocks,) if blocks > 1 else ()), outer, rank, size=rank**-0.5)
        tensors["Q"] = draw(*lead, rank, inner // blocks)
        options["factor"] = form["factor"]
    if form["generator"] is not None:
        tensors |= {"V": draw(*lead, rank, inner, size=inner**-0.5), "U": draw(*lead, outer, rank, size=rank**-0.5)}
    if form["generator"] not in ("none", None):
        outputs = rank if form["sigma"] == "diag" else rank * rank
        first = outputs if form["generator"] == "linear" else hidden
        tensors |= {"w1": draw(*lead, first, inner, size=inner**-0.5), "b1": draw(*lead, first)}
        if form["generator"] == "mlp":
            tensors |= {"w2": draw(*lead, outputs, hidden, size=hidden**-0.5), "b2": draw(*lead, outputs)}
        options |= {name: form[name] for name in ("activation", "hidden_activation") if name in form}
        options["sigma"] = form["sigma"]
    if lengths is not None:
        options["segments"] = torch.tensor((0, *itertools.accumulate(lengths)), device=device)
    if p > 0:
        options["dropout"] = (p, 1234 + seed)
    name = " ".join(f"{key} {value}" if key in ("factor", "blocks") else str(value) for key, value in form.items())
    marks = (
        (f"{rows} rows", True),
        ("segments", lengths is not None),
        ("dropout", p > 0),
        ("transposed W", seed % 2 == 1),
    )
    return Call(", ".join([name, *(mark for mark, present in marks if present)]), tensors, options, draw(rows, outer))


def check(call: Call, dtype: torch.dtype, backend: str) -> dict[str, float]:
    """The error of y and of every gradient over its size; NaN and infinity stay what they are."""
    wanted, found = call.run("reference"), call.to(dtype).run(backend)
    return {name: relative(found[name], wanted[name]) for name in wanted}


def correctness(device: torch.device, backend: str) -> list[dict[str, Any]]:
    """A row for each call, dtype and variant: what `compared` finds, or why the backend does not serve the call."""
    rows = []
    variants = tuning.VARIANTS if backend == "triton" else (None,)
    for call, dtype, variant in itertools.product(
        list(calls(device)), measuring.dtypes_of(backend, TOLERANCE), variants
    ):
        facts = {"operator": call.operator, "call": call.name, "backend": backend, "dtype": str(dtype)}
        with tuning.forced(variant):
            measure = functools.partial(compared, call, dtype, backend)
            rows.append(row_of({**facts, "variant": variant}, measure))
    return rows


def compared(call: Call, dtype: torch.dtype, backend: str) -> dict[str, Any]:
    """The worst error, its bound, whether a second run has the same bits."""
    errors = check(call, dtype, backend)
    first, second = call.to(dtype).run(backend), call.to(dtype).run(backend)
    worst = max(errors, key=lambda name: float("inf") if errors[name] != errors[name] else errors[name])
    same = all(torch.equal(first[name], second[name]) for name in first)
    right = all(error <= TOLERANCE[dtype] for error in errors.values())
    found = {"worst": worst, "error": errors[worst], "bound": TOLERANCE[dtype]}
    return {**found, "same bits": same, "ok": right and same}


def second_order(device: torch.device, backend: str) -> dict[str, Any]:
    """Gradients of ⟨dL/dV, D⟩ in float32 against the reference in float64, with segments, dropout and an MLP."""
    form = {"generator": "mlp", "sigma": "full", "activation": "tanh", "hidden_activation": "silu"}
    call = make(form, (3, 0, 20, 11), 0.25, rows=0, seed=5, device=device)

    def gradients(call: Call, backend: str) -> list[Tensor]:
        tensors = {name: tensor.detach().requires_grad_() for name, tensor in call.tensors.items()}
        generator = Generator(*(tensors[name] for name in ("w1", "b1", "w2", "b2")), "silu", "tanh")
        options = {name: call.options[name] for name in ("scaling", "sigma", "segments", "dropout")}
        arguments = (tensors[name] for name in ("x", "weight", "bias", "V", "U"))
        y = lowrank_linear(*arguments, generator, **options, backend=backend)
        (first,) = torch.autograd.grad(y.square().sum(), tensors["V"], create_graph=True)
        return list(torch.autograd.grad(first.square().sum(), [tensors["x"], tensors["U"], tensors["w1"]]))

    pairs = zip(gradients(call.to(torch.float32), backend), gradients(call, "reference"), strict=True)
    error = max(relative(found, wanted) for found, wanted in pairs)
    bound = 20 * TOLERANCE[torch.float32]  # a chain of more products
    found = {"operator": "lowrank_linear, second order", "call": call.name, "backend": backend}
    return {**found, "error": error, "bound": bound, "ok": error <= bound}


# --- times -----------------------------------------------------------------------------------------------------------


def contenders(inner: int, outer: int, rank: int, device: torch.device, dtype: torch.dtype) -> dict[str, nn.Module]:
    made = {name: module.to(device, dtype) for name, module in layer_contenders(inner, outer, rank).items()}
    if device.type == "cuda":
        made["compiled"] = torch.compile(made["unfused"], dynamic=True)
    return made


def speed(grid: list[tuple[str, int, int, int, int]], device: torch.device, deadline: float) -> tuple[list, list[str]]:
    """Rows of times for (layer, in, out, rows, rank), and the names of the cases that the deadline cut off."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rows, left_out = [], []
    for layer, inner, outer, count, rank in grid:
        name = f"{layer}, {count} rows, rank {rank}"
        if time.monotonic() > deadline:
            left_out.append(name)
            continue
        modules = contenders(inner, outer, rank, device, dtype)
        x, dy = (torch.randn(count, width, device=device, dtype=dtype) for width in (inner, outer))
        for kind in ("forward", "forward+backward"):
            x.requires_grad_(kind != "forward")
            runs = {n: inference(m, x) if kind == "forward" else training(m, x, dy) for n, m in modules.items()}
            times = timed(runs, device)
            if kind == "forward" and device.type == "cuda":
                for variant in tuning.VARIANTS:
                    with tuning.forced(variant):
                        times |= timed({variant: runs["tarp"]}, device)
            on_each, refused = measuring.timed_on_each_backend(runs["tarp"], device)
            left_out += [f"{name}, {kind}: {reason}" for reason in refused.values()]
            times |= on_each
            for contender, milliseconds in times.items():
                row = {"kind": kind, "layer": layer, "in": inner, "out": outer, "rows": count, "rank": rank}
                ratio = milliseconds / times["linear"]
                rows.append({**row, "contender": contender, "ms": milliseconds, "ratio": ratio})
    return rows, left_out


def grid_of(layers: dict[str, tuple[int, int]], rows: tuple[int, ...], ranks: tuple[int, ...]) -> list:
    """The most telling cases first: what the time limit cuts off are further ranks."""
    return [
        (layer, *sizes, count, rank) for rank, (layer, sizes), count in itertools.product(ranks, layers.items(), rows)
    ]


# --- what only a GPU can show ----------------------------------------------------------------------------------------


def memory(device: torch.device) -> list[dict[str, Any]]:
    """Most bytes in use during forward and backward of one layer, beyond its arguments."""
    rows = []
    for name, module in contenders(1024, 4096, 16, device, torch.bfloat16).items():
        x = torch.randn(4096, 1024, device=device, dtype=torch.bfloat16, requires_grad=True)
        call = training(module, x, torch.randn(4096, 4096, device=device, dtype=torch.bfloat16))
        call()  # compile, and make room for gradients
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        rows.append({"contender": name, "bytes": torch.cuda.max_memory_allocated() - before})
    return rows


def graph_replays(device: torch.device) -> list[dict[str, Any]]:
    """`graph_replay` on each backend, of many rows with dropout and without, and of few."""
    rows = []
    many, few = ((40, 0, 60), (7, 90, 3)), ((20, 0, 30), (7, 40, 3))
    for backend, (lengths, p) in itertools.product(
        measuring.backends_of(device), ((many, 0.25), (many, 0.0), (few, 0.0))
    ):
        name = f"{sum(lengths[0])} rows{', dropout' * (p > 0)}"
        facts = {"operator": "lowrank_linear", "call": f"graph replay, {name}", "backend": backend}
        rows.append(row_of(facts, functools.partial(graph_replay, device, backend, lengths, p)))
    return rows


def graph_replay(device: torch.device, backend: str, lengths: tuple, p: float) -> dict[str, Any]:
    """Forward and backward captured once and replayed on other rows and other segments: the bits of an eager call."""
    form = {"generator": "linear", "sigma": "diag", "activation": "one_plus"}
    call, other = (make(form, each, p, 0, 4, device).to(torch.bfloat16) for each in lengths)
    held = call._replace(tensors={n: t.clone() for n, t in call.tensors.items()}, dy=call.dy.clone())
    held.options["segments"] = call.options["segments"].clone()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # compile outside the capture
        held.run(backend)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = held.run(backend)
    for name, tensor in held.tensors.items():
        tensor.copy_(other.tensors[name])
    held.dy.copy_(other.dy)
    held.options["segments"].copy_(other.options["segments"])
    graph.replay()
    torch.cuda.synchronize()
    wanted = other.run(backend)
    same = all(torch.equal(captured[name], wanted[name]) for name in wanted)
    eager, replayed = timed({"eager": lambda: held.run(backend), "replay": graph.replay}, device).values()
    return {"same bits": same, "ok": same, "eager ms": eager, "replay ms": replayed}


def tuned(device: torch.device, deadline: float, console: Console) -> dict[str, Any]:
    """Plans for the layers of the grid and the backends of cells beside them, kept for this GPU."""
    found = tuning.Table({}, {})
    left_out, widths = [], set()
    for layer, (inner, outer) in LAYERS.items():
        if time.monotonic() > deadline:
            left_out.append(f"tuning of {layer}")
            continue
        shape = f"{ROWS[-1]}x{inner}x{outer}x16"
        found.plans.update(tune.tune(shape, device, tune.gpu_seconds, console))
        if inner not in widths:
            found.cells.update(tune.tune_cell(shape, device, tune.gpu_seconds, console))
            widths.add(inner)
    path = tuning.write(torch.cuda.get_device_name(device), found)
    plans = {key: plan._asdict() for key, plan in found.plans.items()}
    return {"plans": plans, "cells": found.cells, "file": path.name, "left out": left_out}


# --- all of it -------------------------------------------------------------------------------------------------------


def run(out: Path, device: torch.device, minutes: float, console: Console) -> int:
    """Write results.json and pictures to `out`; 1 where something is wrong, else 0."""
    start = time.monotonic()
    on_gpu = device.type == "cuda"
    results: dict[str, Any] = {"facts": facts(device), "left out": []}
    out.mkdir(parents=True, exist_ok=True)

    def keep() -> None:
        (out / "results.json").write_text(json.dumps(results, indent=1))

    names = measuring.backends_of(device)
    widest = next(name for name in names if torch.float32 in DTYPES[name])
    with measuring.counted_launches() as launches:
        results["correctness"] = [row for name in names for row in correctness(device, name)]
        results["masked sublayer"] = [row for n in names for row in sublayer_check.correctness(device, n, TOLERANCE)]
        results["search cell"] = [row for name in names for row in cell_check.correctness(device, name)]
        results["second order"] = second_order(device, widest)
    parts = ("correctness", "masked sublayer", "search cell")
    checked = [*(row for part in parts for row in results[part]), results["second order"]]
    results["served"], results["launches"] = measuring.served(checked), launches
    checked += measuring.unserved(results["served"], ("lowrank_linear", "search_cell", "masked_sublayer"), names)
    if "cuda" in names:
        checked += measuring.unreached(launches, torch.cuda.get_device_capability(device))
    mistakes = measuring.wrong(checked)
    keep()
    for operator, of_operator in results["served"].items():
        for name, count in of_operator.items():
            console.print(f"{operator} on {name}: {count['served']} calls, {count['not served']} more not served")
    console.print(f"correctness: {len(mistakes)} calls wrong")
    if mistakes:
        console.print_json(data=mistakes[:10])
        return 1
    grid = grid_of(LAYERS, ROWS, RANKS) if on_gpu else grid_of(**SMALL)
    if on_gpu:
        results["graph"] = graph_replays(device)
        keep()
        results["graph"] += inner_check.inner_steps(device)
        results["memory"] = memory(device)
        keep()
        results["tuning"] = tuned(device, start + 60 * minutes * 0.5, console)
        results["left out"] += results["tuning"]["left out"]
    else:
        results["left out"] += [f"{part}: needs a CUDA device" for part in ("graph", "memory", "tuning")]
    sizes = cell_check.SIZES if on_gpu else cell_check.SMALL
    results["search cell speed"], late = cell_check.speed(sizes, device, start + 60 * minutes * 0.6)
    results["left out"] += late
    results["speed"], late = speed(grid, device, start + 60 * minutes * 0.95)
    results["left out"] += late
    keep()
    plots.grid(pd.DataFrame(results["speed"]), f"Time beside a plain linear layer, {results['facts']['device']}", out)
    console.print(f"{len(results['speed'])} times, {len(results['left out'])} cases left out, all in {out}")
    return 1 if measuring.wrong(results.get("graph", [])) else 0


def facts(device: torch.device) -> dict[str, Any]:
    found = {"device": "CPU", "backends": available_backends(), "versions": machine.versions()}
    if device.type == "cuda":
        found |= {"device": torch.cuda.get_device_name(device), "capability": torch.cuda.get_device_capability(device)}
        found["cuda"] = torch.version.cuda
    return found


def main(
    out: Annotated[Path, typer.Option(help="Folder for results.json and pictures.")] = Path("runs/gpu_check"),
    device: Annotated[str, typer.Option(help="cuda, or cpu for the parts that need no GPU.")] = "cuda",
    minutes: Annotated[float, typer.Option(min=0.1, help="When to stop starting new measurements.")] = 10.0,
) -> None:
    """Check the kernels on this machine's GPU and measure them beside their peers."""
    if device == "cuda" and "triton" not in available_backends():
        typer.echo(f"error: {why_unavailable('triton')}; --device cpu checks what needs none", err=True)
        raise typer.Exit(2)
    raise typer.Exit(run(out, torch.device(device), minutes, Console()))


if __name__ == "__main__":
    typer.run(main)
