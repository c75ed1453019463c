"""``tarp bench``: run the cases, keep CSVs, draw pictures from them, print tables and the goals."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import pandas as pd
from rich.console import Console

from mltd import plots
from mltd.bench import table
from mltd.bench.cases import Case, GateError, Timing, measure
from mltd.bench.cell_models import cell_model_cases
from mltd.bench.cells import cell_cases
from mltd.bench.inner_loop import inner_cases
from mltd.bench.inner_memory import measure_inner_memory
from mltd.bench.layers import DECODE_SHAPES, SHAPES, layer_cases, parse_shape
from mltd.bench.memory import measure_memory
from mltd.bench.models import model_cases

Row = TypeVar("Row")

PARTS = ("layers", "cells", "models", "inner", "memory")

TITLES = {
    "layers": "A TARP layer beside the frozen layer that it wraps",
    "cells": "A search cell whose architecture is the paper's dominant one",
    "models": "Whole models: a forward pass, and inner steps of eight tasks",
    "inner": "The inner loop of eight tasks as a whole",
}


def run_bench(out: Path, shapes: Sequence[str] | None, rounds: int, parts: Sequence[str], console: Console) -> int:
    """Measure ``parts`` of PARTS and write speed.csv, memory.csv, inner_memory.csv and pictures to ``out``.

    shapes   layer shapes other than the standard ones; all but layers and their memory is left out with them
    Returns the exit status: 1 where a gate was red, else 0. A goal that is missed is said, but is no failure.
    """
    for shape in shapes or ():
        parse_shape(shape)
    red: list[str] = []
    timings: list[Timing] = []
    for case in _cases(shapes, rounds, parts):
        with console.status(f"measuring {case.name} …"):
            try:
                timings += measure(case)
            except GateError as error:
                red.append(f"{case.name}: {error}")
                console.print(f"[red]{case.name}: not reported, its gate is red: {error}")
    if timings:
        frame = table.speed_frame(timings)
        table.save(frame, out / "speed.csv")
        draw_speed(pd.read_csv(out / "speed.csv"), out)
        table.print_speed(frame, console)
    if "inner" in parts and not shapes:
        _inner_memory(out, console)
    if "memory" in parts:
        _memory(out, list(shapes or SHAPES), console)
    console.print(f"CSVs and pictures are in {out}")
    return 1 if red else 0


def _cases(shapes: Sequence[str] | None, rounds: int, parts: Sequence[str]) -> Iterator[Case]:
    if "layers" in parts:
        kinds = ("forward", "forward+backward", "multiplicative", "multiplicative cached")
        yield from layer_cases(shapes or SHAPES, () if shapes else DECODE_SHAPES, rounds, kinds)
    if "cells" in parts and not shapes:
        yield from cell_cases(rounds)
    if "models" in parts and not shapes:
        yield from model_cases(rounds=max(3, rounds // 2))
        yield from cell_model_cases(rounds=max(3, rounds // 2))
    if "inner" in parts and not shapes:
        yield from inner_cases(rounds=max(3, rounds // 2))


def _inner_memory(out: Path, console: Console) -> None:
    rows = _measured(measure_inner_memory, console)
    if rows is not None:
        frame = table.inner_memory_frame(rows)
        table.save(frame, out / "inner_memory.csv")
        table.print_inner_memory(frame, console)


def _memory(out: Path, shapes: list[str], console: Console) -> None:
    rows = _measured(partial(measure_memory, shapes), console)
    if rows is None:
        return
    frame = table.memory_frame(rows)
    table.save(frame, out / "memory.csv")
    table.print_memory(frame, console)
    title = "Memory that a layer's forward pass needs beside its output"
    plots.memory(pd.read_csv(out / "memory.csv"), title, out / "memory.png")


def _measured(measure_all: Callable[[], list[Row]], console: Console) -> list[Row] | None:
    """The rows, or None, and said why, where memory cannot be measured."""
    try:
        with console.status("measuring memory, in a process of its own …"):
            return measure_all()
    except RuntimeError as error:
        console.print(f"[yellow]memory is not measured: {error}")
        return None


def draw_speed(frame: pd.DataFrame, out: Path) -> None:
    """layers.png, cells.png, models.png and inner.png from the rows of speed.csv."""
    part = frame["baseline"].map({"linear": "layers", "mixture": "cells", "straightforward": "inner"}).fillna("models")
    goals = {kind: goal.ratio for kind, goal in table.GOALS.items()}
    for name, rows in frame.groupby(part, sort=False):
        plots.speed(rows, TITLES[str(name)], out / f"{name}.png", goals)
