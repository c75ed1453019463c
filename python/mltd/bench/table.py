"""Rows as CSV, geometric means against the goals, and printed tables. Pictures are made from the CSV alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from rich.console import Console
from rich.table import Table

from mltd.bench.cases import Timing
from mltd.bench.inner_memory import InnerMemory
from mltd.bench.memory import Memory
from mltd.machine import facts, versions


class Goal(NamedTuple):
    """Largest ratio of a contender's time to the baseline of its kind, geometric mean over the shapes of that kind."""

    ratio: float
    contender: str = "tarp"


GOALS = {
    "forward": Goal(1.00),
    "forward+backward": Goal(1.05),
    "multiplicative": Goal(1.35),
    "multiplicative cached": Goal(1.05),
    "decode": Goal(1.20),
    "search cell": Goal(0.18, "masked"),
    "search cell forward+backward": Goal(0.18, "masked"),
    "whole model": Goal(1.05),
    "whole model TAMS": Goal(1.10, "tarp + cells"),
    "inner step with cells": Goal(0.50, "masked"),
}


class Speedup(NamedTuple):
    """Least speed of a contender over another one, geometric mean over the shapes of that kind."""

    least: float
    contender: str = "tarp at once"
    over: str = "unfused task by task"


# A whole meta-batch at once over one task after the other. Plain batching is measured against the same; the fused
# kernels alone, task by task, are a part of the way and stand in the table.
SPEEDUPS = {
    "inner steps 5-shot": Speedup(1.5),
    "inner steps 1-shot": Speedup(3.0),
    "inner loop 5-shot": Speedup(2.6, "mltd", "straightforward"),
    "inner loop 1-shot": Speedup(5.5, "mltd", "straightforward"),
    "inner loop with cells 5-shot": Speedup(4.0, "mltd", "straightforward"),
}


def speed_frame(rows: Iterable[Timing]) -> pd.DataFrame:
    """One line for each contender of each case, with the machine and the versions on every line."""
    return _frame(rows)


def memory_frame(rows: Iterable[Memory]) -> pd.DataFrame:
    """One line for each contender of each shape, with the machine and the versions on every line."""
    return _frame(rows)


def inner_memory_frame(rows: Iterable[InnerMemory]) -> pd.DataFrame:
    """One line for each contender of the inner loop, with the machine and the versions on every line."""
    return _frame(rows)


def _frame(rows: Iterable[Any]) -> pd.DataFrame:
    frame = pd.DataFrame([asdict(row) for row in rows])
    here = facts()
    for name in ("cpu", "cores", "threads", "instruction_set", "backends", "time"):
        frame[name] = " ".join(here[name]) if isinstance(here[name], list) else here[name]
    for name, version in versions().items():
        if name in ("python", "tarp_kernels", "torch", "transformers", "peft"):
            frame[name] = version
    return frame


def geometric_means(frame: pd.DataFrame) -> pd.DataFrame:
    """Mean ratio of every contender (columns) for every kind (rows), in order of appearance."""
    logs = frame.assign(ratio=frame["ratio"].map(float)).groupby(["kind", "contender"], sort=False)["ratio"]
    means = logs.agg(lambda ratios: float(ratios.prod() ** (1 / len(ratios)))).unstack("contender")
    return means.reindex(index=frame["kind"].unique(), columns=frame["contender"].unique())


def verdicts(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Every goal that the rows can be held against: what was measured, what was wanted, whether it was reached."""
    means = geometric_means(frame)
    found = []
    for kind in means.index:
        if kind in GOALS:
            goal, contender = GOALS[kind]
            value = float(means.loc[kind, contender])
            found.append({"kind": kind, "what": "ratio", "measured": value, "goal": goal, "ok": value <= goal})
        elif kind in SPEEDUPS:
            goal, contender, over = SPEEDUPS[kind]
            value = float(means.loc[kind, over] / means.loc[kind, contender])
            found.append({"kind": kind, "what": "speed-up", "measured": value, "goal": goal, "ok": value >= goal})
    return found


def print_speed(frame: pd.DataFrame, console: Console) -> None:
    """The ratios of every case, a line of geometric means a kind, and the verdicts."""
    for baseline, part in frame.groupby("baseline", sort=False):
        contenders = list(part["contender"].unique())
        table = Table(title=f"time as a multiple of {baseline!r} (medians, interleaved)", title_justify="left")
        table.add_column("kind")
        table.add_column("shape")
        table.add_column(f"{baseline} ms", justify="right")
        for name in contenders:
            if name != baseline:
                table.add_column(name, justify="right")
        means = geometric_means(part)
        for kind, cases in part.groupby("kind", sort=False):
            for shape, case in cases.groupby("shape", sort=False):
                by_name = case.set_index("contender")
                ratios = [_ratio(by_name["ratio"].get(name)) for name in contenders if name != baseline]
                table.add_row(str(kind), str(shape), f"{by_name.loc[baseline, 'p50_ms']:.2f}", *ratios)
            if cases["shape"].nunique() > 1:
                ratios = [f"[bold]{_ratio(means.loc[kind, name])}" for name in contenders if name != baseline]
                table.add_row(f"[bold]{kind}", "[bold]geometric mean", "", *ratios)
            table.add_section()
        console.print(table)
    for verdict in verdicts(frame):
        sign = "≤" if verdict["what"] == "ratio" else "≥"
        mark = "[green]reached" if verdict["ok"] else "[red]missed"
        goal = f"{sign} {verdict['goal']:.2f}"
        console.print(f"{verdict['kind']:28s} {verdict['what']} {verdict['measured']:.3f}, goal {goal}: {mark}")


def _ratio(value: float | None) -> str:
    return "-" if value is None or pd.isna(value) else f"{value:.3f}"


def print_memory(frame: pd.DataFrame, console: Console) -> None:
    """Memory beside the output, contender by contender."""
    table = Table(
        title="MiB beside y: peak at inference, saved for backward, staying after the first call", title_justify="left"
    )
    for name, justify in (
        ("shape", "left"),
        ("kind", "left"),
        ("contender", "left"),
        ("y", "right"),
        ("peak", "right"),
        ("saved", "right"),
        ("stays", "right"),
    ):
        table.add_column(name, justify=justify, no_wrap=name in ("shape", "kind", "contender"))  # type: ignore[arg-type]
    for (shape, kind), case in frame.groupby(["shape", "kind"], sort=False):
        for row in case.itertuples():
            sizes = (row.output_mib, row.peak_mib, row.saved_mib, row.kept_mib)
            table.add_row(str(shape), str(kind), row.contender, *(f"{size:.1f}" for size in sizes))
        table.add_section()
    console.print(table)


def print_inner_memory(frame: pd.DataFrame, console: Console) -> None:
    """Peak memory of three inner steps, and what a task more adds to it."""
    table = Table(title="MiB beside the model: three inner steps of eight tasks", title_justify="left")
    for name in ("contender", "base model", "a task's adapter", "peak", "each task more"):
        table.add_column(name, justify="left" if name == "contender" else "right")
    for row in frame.itertuples():
        sizes = (row.model_mib, row.adapter_mib, row.peak_mib, row.task_mib)
        table.add_row(row.contender, *(f"{size:.1f}" for size in sizes))
    console.print(table)


def save(frame: pd.DataFrame, path: Path) -> None:
    """Write CSV, making the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    frame.to_csv(path, index=False, float_format="%.6g")
