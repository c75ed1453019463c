"""Launch configurations of the GPU kernels: estimates to start from, and tables of what was measured on a GPU.

A table is a JSON file per GPU name under `cache_directory()`, written by `tarp bench --tune`. Of a search cell, whose
launches have no tiles to choose, it holds which backend was the faster one. It holds for the kernels and the Triton
that it was measured with: one of another version is not used. Nothing is tuned while a model runs.
"""

import contextlib
import functools
import hashlib
import json
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tarp_kernels.files import write_atomically

VERSION = 2
VARIANTS = ("one_pass", "split")
BACKENDS = ("triton", "cuda")
ROWS = (1, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
"""Row counts between two of these share a plan: that of the greater. More rows run as the last."""


class Tile(NamedTuple):
    """One launch: the tile of a block, and what the compiler may use for it."""

    rows: int
    columns: int
    features: int  # of one k-step
    warps: int = 4
    stages: int = 3
    bulk: int = 0  # 1: whole tiles by the copy engine (TMA), on a GPU that has one and for a layout that it reads


class Plan(NamedTuple):
    """How a forward pass runs: "one_pass" launches `first` only, "split" `first` and then `dense`.

    That is how Triton's launches run it; backend "cuda" says that the CUDA C++ kernel is faster than these.
    """

    variant: str
    first: Tile
    dense: Tile
    backend: str = "triton"


class Key(NamedTuple):
    """What a plan is chosen by, besides the number of rows."""

    dtype: str
    inner: int
    outer: int
    transposed: bool  # W has adjacent elements along its outputs
    lanes: int  # of the rank, as the kernels pad it
    hidden: int  # lanes of an MLP's hidden layer
    form: str  # "static" | "diag" | "full", with "-mlp", "-dropout", "-segments", "-factor"

    def entry(self, rows: int) -> str:
        """The name of this key's plan for so many rows in a table."""
        return "/".join(map(str, (*self, rows)))


class CellKey(NamedTuple):
    """What the backend of a `search_cell` is chosen by, besides the number of rows: what its time depends on most."""

    dtype: str
    d: int
    width: int
    per_task: bool  # every task has a cell of its own

    def entry(self, rows: int) -> str:
        """The name of this key's backend for so many rows in a table."""
        return "/".join(map(str, (*self, rows)))


class Table(NamedTuple):
    """What was measured on one kind of GPU."""

    plans: dict[str, Plan]  # of `lowrank_linear`, by `Key.entry`
    cells: dict[str, str]  # the faster backend of `search_cell`, by `CellKey.entry`


def cache_directory() -> Path:
    """``$TARP_CACHE``, or ``~/.cache/tarp_kernels``: whatever this project keeps between runs lies there."""
    return Path(os.environ.get("TARP_CACHE") or Path.home() / ".cache" / "tarp_kernels").expanduser()


def path_of(gpu: str) -> Path:
    return cache_directory() / f"tuning-{re.sub('[^a-z0-9]+', '-', gpu.lower()).strip('-')}.json"


@functools.cache
def origin() -> dict[str, Any]:
    """What a table was measured with, apart from the GPU: another one makes it worthless."""
    import triton

    folder = Path(__file__).parent
    sources = [*sorted(folder.glob("ops/**/triton_*.py")), *sorted(folder.glob("ops/**/cuda_*.py"))]
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()
    return {"version": VERSION, "triton": triton.__version__, "kernels": digest[:16], "cuda": _cuda_sources()}


def _cuda_sources() -> str:
    """The digest of the sources that the extension's CUDA kernels were built from; empty where it has none."""
    try:
        from tarp_kernels import _C
    except ImportError:
        return ""
    return _C.build_info()["cuda_sources"][:16]


def read(gpu: str) -> Table:
    """The table of a GPU; raises ValueError with the reason where there is none to use."""
    path = path_of(gpu)
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"no table {path}") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from None
    expected = {**origin(), "gpu": gpu}
    if not isinstance(content, dict) or {name: content.get(name) for name in expected} != expected:
        raise ValueError(f"{path} was measured with other kernels, another Triton or another GPU")
    try:
        plans = {key: _plan(entry) for key, entry in content["plans"].items()}
        return Table(plans, {key: _backend(name) for key, name in content["cells"].items()})
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error!r}") from None


def _plan(entry: dict) -> Plan:
    first, dense = (Tile(*(int(size) for size in entry[name])) for name in ("first", "dense"))
    powers = (*first[:4], *dense[:4])
    if (
        entry["variant"] not in VARIANTS
        or any(size < 1 or size & (size - 1) for size in powers)
        or min(first.stages, dense.stages) < 1
    ):
        raise ValueError(f"no plan: {entry}")
    return Plan(entry["variant"], first, dense, _backend(entry["backend"]))


def _backend(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"no backend of a GPU: {name!r}")
    return name


def write(gpu: str, found: Table) -> Path:
    """Add to a GPU's table, in one step: a reader sees the old file or the new one."""
    path = path_of(gpu)
    with contextlib.suppress(ValueError):
        before = read(gpu)
        found = Table({**before.plans, **found.plans}, {**before.cells, **found.cells})
    plans = {key: plan._asdict() for key, plan in sorted(found.plans.items())}
    content = {**origin(), "gpu": gpu, "plans": plans, "cells": dict(sorted(found.cells.items()))}
    try:
        write_atomically(path, json.dumps(content, indent=1).encode())
    except OSError as error:
        raise OSError(f"cannot write {path}: {error}; set TARP_CACHE to a folder that can be written") from error
    table.cache_clear()
    _measured.cache_clear()
    _steps.cache_clear()
    return path


@functools.cache
def table(gpu: str) -> Table:
    """What was measured on this kind of GPU; nothing, with one warning, where nobody has measured."""
    try:
        return read(gpu)
    except ValueError as error:
        warnings.warn(
            f"launch configurations for {gpu} are estimates ({error}); `tarp bench --tune` measures and keeps them",
            RuntimeWarning,
            stacklevel=2,
        )
        return Table({}, {})


@functools.cache
def gpu_name(device: torch.device) -> str:
    """Asked for once: the answer takes longer than the rest of a choice."""
    return torch.cuda.get_device_name(device)


Estimate = Callable[[Key, int, str | None], Plan]  # key, rows, variant if one is forced


def plan(key: Key, rows: int, device: torch.device, estimate: Estimate) -> Plan:
    """The plan for a call: as `forced`, as measured, or else as estimated."""
    wanted = _forced[-1]
    if isinstance(wanted, Plan):
        return wanted
    gpu = None
    if wanted is None and _on_a_gpu(device):
        gpu = gpu_name(device)
    steps = _steps(key, gpu, estimate, wanted)
    return next((plan for most, plan in steps if rows <= most), steps[-1][1])


def has_measured(device: torch.device) -> bool:
    """Whether there is a table with plans of this GPU."""
    return _on_a_gpu(device) and bool(table(gpu_name(device)).plans)


def measured(key: Key, rows: int, device: torch.device) -> Plan | None:
    """The plan of a call where it was measured on this GPU, which has a table."""
    return _measured(key, _bucket(rows), gpu_name(device))


@functools.lru_cache(maxsize=4096)
def _measured(key: Key, bucket: int, gpu: str) -> Plan | None:
    return table(gpu).plans.get(key.entry(bucket))


def faster_for_cell(key: CellKey, rows: int, device: torch.device) -> str | None:
    """The backend that was the faster one for a `search_cell`; None where that was not measured on this GPU."""
    return table(gpu_name(device)).cells.get(key.entry(_bucket(rows))) if _on_a_gpu(device) else None


def _bucket(rows: int) -> int:
    return next((most for most in ROWS if rows <= most), ROWS[-1])


def _on_a_gpu(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_available()


@functools.lru_cache(maxsize=4096)
def _steps(key: Key, gpu: str | None, estimate: Estimate, variant: str | None) -> list[tuple[int, Plan]]:
    """(most rows, plan) in order, neighbours that agree made one: a compiler compiles once for each that it meets."""
    measured = {} if gpu is None else table(gpu).plans
    steps: list[tuple[int, Plan]] = []
    for rows in ROWS:
        found = measured.get(key.entry(rows)) or estimate(key, rows, variant)
        if steps and steps[-1][1] == found:
            steps.pop()
        steps.append((rows, found))
    return steps


_forced: list[Plan | str | None] = [None]


def is_forced() -> bool:
    """Whether a plan or variant of Triton's launches is forced: the automatic choice is theirs then."""
    return _forced[-1] is not None


@contextlib.contextmanager
def forced(choice: Plan | str | None) -> Iterator[None]:
    """Within the block every forward pass takes this plan, or this variant; None: the choice is free again."""
    if choice is not None and not isinstance(choice, Plan) and choice not in VARIANTS:
        raise ValueError(f"forced: got {choice!r}, expected 'one_pass', 'split', a Plan or None")
    _forced.append(choice)
    try:
        yield
    finally:
        _forced.pop()


def fastest(candidates: Iterable[Plan], seconds: Callable[[], float]) -> tuple[Plan, float]:
    """The plan under which `seconds()` is least, and that time; plans that the GPU has no room for are left out."""
    best: tuple[Plan, float] | None = None
    for candidate in candidates:
        with forced(candidate):
            try:
                time = seconds()
            except Exception as error:  # Triton raises several types of its own for too much shared memory
                if "out of resource" not in str(error):
                    raise
                continue
        if best is None or time < best[1]:
            best = candidate, time
    if best is None:
        raise ValueError("fastest: no candidate fits this GPU")
    return best
