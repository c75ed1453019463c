"""``tarp doctor``: what runs on this machine, what does not, and why."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from mltd.data.chatterbot import find_corpus
from mltd.data.smollm2 import FOLDER, MANIFEST, find_gguf
from mltd.machine import compilers, facts, gpu, native_extension, versions
from tarp_kernels import Generator, lowrank_linear
from tarp_kernels.backends import BACKENDS, DTYPES, why_unavailable
from tarp_kernels.tuning import cache_directory

ENVIRONMENT = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "TARP_CPU_ISA")


def examine() -> dict[str, Any]:
    """Everything that ``tarp doctor`` shows, as JSON."""
    return {
        "machine": facts(),
        "gpu": gpu(),
        "backends": {name: why_unavailable(name) or _try(name) for name in BACKENDS},
        "native": native_extension(),
        "compilers": compilers(),
        "threads": {
            "torch": torch.get_num_threads(),
            **{name: os.environ.get(name, "not set") for name in ENVIRONMENT},
        },
        "demo": _demo(),
        "versions": versions(),
    }


def _try(name: str) -> str:
    """``works`` after the backend has really computed something right, else what happened."""
    device, dtype = (
        "cuda" if name in ("cuda", "triton") else "cpu",
        DTYPES[name][0] if name in DTYPES else torch.float32,
    )
    generator = torch.Generator().manual_seed(0)
    x, weight, V, U, w1 = (
        torch.randn(shape, generator=generator).to(device, dtype)
        for shape in ((5, 16), (24, 16), (3, 16), (24, 3), (3, 16))
    )
    try:
        got = lowrank_linear(x, weight, None, V, U, Generator(w1), backend=name)
    except Exception as error:  # whatever it is, it belongs on the list and must not end it
        return f"fails: {type(error).__name__}: {error}"
    x, weight, V, U, w1 = (tensor.float() for tensor in (x, weight, V, U, w1))
    expected = x @ weight.T + ((x @ V.T) * (x @ w1.T)) @ U.T
    worst = float((got - expected).abs().max() / expected.abs().max())
    return "works" if worst < torch.finfo(dtype).eps + 1e-4 else f"computes something wrong: off by {worst:.1e}"


def _demo() -> dict[str, str]:
    """What ``tarp demo`` needs, each with where it is or what is missing."""

    def locate(find: Callable[[], object]) -> str:
        try:
            return str(find())
        except FileNotFoundError as error:
            return f"missing: {error}"

    cache = cache_directory()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache):
            writable = "writable"
    except OSError as error:
        writable = f"not writable ({error.strerror or error}); the demo will keep the model in its run folder"
    state = "holds the converted model" if (cache / FOLDER / MANIFEST).is_file() else "does not hold the model yet"
    return {"model": locate(find_gguf), "corpus": locate(find_corpus), "cache": f"{cache}: {writable}, {state}"}


def show(found: dict[str, Any], console: Console) -> None:
    """Print what ``examine`` found."""
    machine, native = found["machine"], found["native"]
    table = _section("machine")
    gib = f", {machine['memory_gib']} GiB" if machine["memory_gib"] else ""
    table.add_row("processor", f"{machine['cpu']}, {machine['cores']} usable cores{gib}")
    table.add_row("GPU", found["gpu"])
    table.add_row("system", machine["system"])
    table.add_row("threads", ", ".join(f"{name} {value}" for name, value in found["threads"].items()))
    table.add_row("torch's instruction set", machine["torch_instruction_set"])
    console.print(table)

    table = _section("backends, the first that works is taken")
    for name, state in found["backends"].items():
        table.add_row(name, f"[green]{state}" if state == "works" else f"[yellow]{state}")
    console.print(table)

    table = _section("native extension")
    for name, value in native.items():
        if name != "isas":
            shown = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            table.add_row(name, shown or "none")
    console.print(table)

    for title, part in (("compilers", "compilers"), ("for the demo", "demo"), ("versions", "versions")):
        table = _section(title)
        for name, value in found[part].items():
            table.add_row(name, value)
        console.print(table)


def _section(title: str) -> Table:
    table = Table(title=title, title_justify="left", show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True, min_width=24)
    table.add_column(overflow="fold")
    return table
