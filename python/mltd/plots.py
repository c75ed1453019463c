"""Pictures of the demo and of the benchmarks, each drawn from a CSV and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

INK, FAINT, GRID = "#222222", "#8a8a8a", "#e4e4e4"
# One colour a method and contender in every picture: this project's own is red, its relatives warm, the others cold.
COLOURS = {
    "mltd": "#c8102e",
    "tarp": "#8c564b",
    "tarp-multitask": "#e8871e",
    "tarp-nometa": "#f2b65a",
    "lora": "#2a6fbb",
    "finetune": "#5b4a9e",
    "zero-shot": FAINT,
}
NAMES = {
    "mltd": "MLtD (meta-trained TARP)",
    "tarp": "TARP",
    "tarp-multitask": "TARP, multitask start",
    "tarp-nometa": "TARP, not meta-trained",
    "lora": "LoRA",
    "finetune": "all weights",
    "zero-shot": "not adapted",
}
"""Of methods. What benchmarks time has names and colours of its own, as "tarp" is a layer there."""
CONTENDER_COLOURS = {
    "tarp": "#c8102e",
    "tarp at once": "#c8102e",
    "tarp task by task": "#e8a0a9",
    "unfused": "#7aa6d6",
    "unfused at once": "#4d86c1",
    "unfused task by task": "#b9cfe6",
    "batched PyTorch": "#4d86c1",
    "straightforward": "#b5b5b5",
    "peft_lora": "#2a6fbb",
    "tarp + cells": "#c8102e",
    "masked": "#c8102e",
    "all live": "#e8871e",
    "unfused all live": "#b5b5b5",
    "without cells": "#e8a0a9",
    "mixture": "#b5b5b5",
    "skipping": "#7aa6d6",
    "compiled": "#3c9d6b",
    "one_pass": "#e8871e",
    "split": "#f2b65a",
    "linear": "#b5b5b5",
    "base": "#b5b5b5",
}
CONTENDERS = {
    "tarp": "TarpLinear",
    "unfused": "unfused PyTorch",
    "peft_lora": "PEFT LoRA (static)",
    "linear": "nn.Linear",
    "masked": "masked execution",
    "tarp + cells": "TarpLinear and search cells",
    "all live": "all six operations in our kernels",
    "unfused all live": "unfused PyTorch, all six operations",
    "mixture": "unfused PyTorch, all operations",
    "skipping": "unfused PyTorch, selected operations",
}
STYLE: Any = {
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": GRID,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "figure.dpi": 150,
}


def _figure(width: float, height: float) -> Figure:
    # No pyplot: it would want a display and keeps every figure alive.
    with matplotlib.rc_context(STYLE):
        return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def adaptation_curves(curves: pd.DataFrame, title: str, path: Path) -> None:
    """Held-out perplexity over adaptation steps, a line a method; columns method, step, perplexity."""
    with matplotlib.rc_context(STYLE):
        figure = _figure(8.4, 4.8)
        axes = figure.subplots()
        ends = []
        for method, part in curves.groupby("method", sort=False):
            part, colour = part.sort_values("step"), COLOURS.get(str(method), INK)
            bold = method == "mltd"
            if len(part) == 1:  # zero-shot has no steps: a level to compare with
                axes.axhline(part["perplexity"].iloc[0], color=colour, linestyle=(0, (2, 3)), linewidth=1.2)
            else:
                axes.plot(
                    part["step"],
                    part["perplexity"],
                    marker="o",
                    markersize=6 if bold else 4,
                    linewidth=2.6 if bold else 1.5,
                    color=colour,
                    zorder=3 if bold else 2,
                )
            ends.append((float(part["perplexity"].iloc[-1]), str(method), colour))
        steps = sorted(curves["step"].unique())
        _log_perplexity(axes, curves["perplexity"])
        axes.set_xticks(steps)
        axes.set_xlim(-0.3, max(steps) * 1.02)
        axes.set_xlabel("adaptation steps on 5 examples of the new topic")
        axes.set_ylabel("perplexity of held-out replies (log scale)")
        axes.set_title(title)
        _label_ends(axes, ends)
        _save(figure, path)


def _log_perplexity(axes: Axes, values: pd.Series) -> None:
    """A log axis with round numbers where there is something to read."""
    axes.set_yscale("log")
    low, high = float(values.min()) * 0.92, float(values[values < float("inf")].max()) * 1.12
    axes.set_ylim(low, high)
    rounds = [m * 10**e for e in range(6) for m in (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8)]
    axes.yaxis.set_major_locator(FixedLocator([tick for tick in rounds if low <= tick <= high]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _label_ends(axes: Axes, ends: list[tuple[float, str, str]]) -> None:
    """Names at the right end of their lines, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    gap = (high / low) ** 0.055
    placed = 0.0
    for value, method, colour in sorted(ends):
        at = max(value, placed * gap)
        placed = at
        axes.annotate(
            f"{NAMES.get(method, method)}  {value:.1f}",
            xy=(1, at),
            xycoords=("axes fraction", "data"),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            color=colour,
            fontweight="bold" if method == "mltd" else "normal",
            annotation_clip=False,
        )


def topics(per_topic: pd.DataFrame, title: str, path: Path) -> None:
    """Perplexity topic by topic, a dot a method; columns method, topic, perplexity (each at the method's own stop)."""
    with matplotlib.rc_context(STYLE):
        table = per_topic.pivot(index="topic", columns="method", values="perplexity")
        table = table.sort_values("mltd" if "mltd" in table else table.columns[0])
        figure = _figure(8.4, 1.6 + 0.5 * len(table))
        axes = figure.subplots()
        for place, (_, row) in enumerate(table.iterrows()):
            axes.plot([row.min(), row.max()], [place, place], color=GRID, linewidth=3, zorder=1)
        for method in per_topic["method"].unique():
            bold = method == "mltd"
            axes.scatter(
                table[method],
                range(len(table)),
                s=90 if bold else 46,
                color=COLOURS.get(method, INK),
                edgecolor="white",
                linewidth=0.8,
                label=NAMES.get(method, method),
                zorder=3 if bold else 2,
            )
        axes.set_xscale("log")
        low, high = float(table.min().min()) * 0.9, float(table.max().max()) * 1.1
        axes.set_xlim(low, high)
        rounds = [m * 10**e for e in range(6) for m in (1, 2, 3, 5, 7)]
        axes.xaxis.set_major_locator(FixedLocator([tick for tick in rounds if low <= tick <= high]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_yticks(range(len(table)), [str(name).replace("_", " ") for name in table.index])
        axes.set_ylim(-0.6, len(table) - 0.4)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("perplexity of held-out replies (log scale; further left is better)")
        axes.set_title(title)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
        _save(figure, path)


def training(progress: pd.DataFrame, title: str, path: Path) -> None:
    """Outer training; columns method, iteration, loss (the objective), score (validation perplexity, or nothing).

    Losses above; below, where a run validated its starts, their scores with a circle around the one that was kept.
    """
    scored = progress.dropna(subset=["score"])
    with matplotlib.rc_context(STYLE):
        figure = _figure(8.4, 6.0 if len(scored) else 3.6)
        panels = figure.subplots(2 if len(scored) else 1, 1, squeeze=False, sharex=True)[:, 0]
        panels[0].set_title(title)
        _training_panel(panels[0], progress.dropna(subset=["loss"]), "loss")
        panels[0].set_ylabel("loss of the objective (nats)")
        if len(scored):
            _training_panel(panels[1], scored, "score")
            panels[1].set_ylabel("validation perplexity")
        panels[-1].set_xlabel("outer iterations" + (" (the circled start is kept)" if len(scored) else ""))
        _save(figure, path)


def _training_panel(axes: Axes, progress: pd.DataFrame, column: str) -> None:
    ends = []
    for method, part in progress.groupby("method", sort=False):
        colour = COLOURS.get(str(method), INK)
        axes.plot(part["iteration"], part[column], marker="o", color=colour, linewidth=2, markersize=4)
        ends.append((float(part[column].iloc[-1]), str(method), colour))
        if column == "score":
            best = part.loc[part["score"].idxmin()]
            axes.scatter([best["iteration"]], [best["score"]], s=140, facecolor="none", edgecolor=colour, linewidth=1.6)
    _label_ends(axes, ends)


def speed(frame: pd.DataFrame, title: str, path: Path, goals: dict[str, float] | None = None) -> None:
    """Ratios to each case's baseline, a panel a kind; columns kind, shape, contender, baseline, ratio.

    A dashed line marks the goal of a kind, where it has one; the solid line is the baseline.
    """
    goals = goals or {}
    with matplotlib.rc_context(STYLE):
        kinds = list(frame["kind"].unique())
        heights = [_bars(frame, kind)[1] for kind in kinds]
        figure = _figure(8.4, 1.0 + sum(heights) * 0.19 + 0.5 * len(kinds))
        panels = figure.subplots(len(kinds), 1, squeeze=False, sharex=True, height_ratios=[h + 0.5 for h in heights])[
            :, 0
        ]
        high = min(2.2, max(1.0, float(frame["ratio"].max())) * 1.05)
        for axes, kind in zip(panels, kinds, strict=True):
            _speed_panel(axes, frame, kind, goals.get(kind), high)
        panels[-1].set_xlabel("time as a multiple of the baseline (shorter is better)")
        figure.suptitle(title, x=0.01, ha="left", fontsize=12)
        handles: dict[str, Any] = {}
        for axes in panels:
            handles |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
        figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=4)
        _save(figure, path)


def _bars(frame: pd.DataFrame, kind: str) -> tuple[pd.DataFrame, int]:
    part = frame[(frame["kind"] == kind) & (frame["contender"] != frame["baseline"])]
    return part, len(part) + part["shape"].nunique()


def _speed_panel(axes: Axes, frame: pd.DataFrame, kind: str, goal: float | None, high: float) -> None:
    part, _ = _bars(frame, kind)
    place, ticks, labels = 0.0, [], []
    for shape, case in part.groupby("shape", sort=False):
        ticks.append(place + (len(case) - 1) / 2)
        labels.append(str(shape).replace("x", "×") if shape[0].isdigit() and " " not in shape else str(shape))
        for row in case.itertuples():
            colour, width = CONTENDER_COLOURS.get(row.contender, INK), min(row.ratio, high)
            axes.barh(place, width, height=0.86, color=colour, label=CONTENDERS.get(row.contender, row.contender))
            beyond = " →" if row.ratio > high else ""
            axes.text(
                width - 0.01 * high,
                place,
                f"{row.ratio:.2f}{beyond}",
                va="center",
                ha="right",
                fontsize=7.5,
                color="white",
            )
            place += 1
        place += 0.7
    baseline = part["baseline"].iloc[0]
    axes.axvline(1, color=INK, linewidth=1)
    if goal is not None and goal != 1:
        axes.axvline(goal, color=INK, linewidth=1, linestyle=(0, (3, 2)))
    said = f", goal ≤ {goal:.2f}" if goal is not None else ""
    axes.set_title(f"{kind}   (1 = {CONTENDERS.get(baseline, baseline)}{said})", fontsize=10)
    axes.set_yticks(ticks, labels, fontsize=8)
    axes.set_ylim(place - 1.1, -0.6)
    axes.set_xlim(0, high)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)


def memory(frame: pd.DataFrame, title: str, path: Path) -> None:
    """Memory beside the output at inference, a group a shape and kind.

    Columns shape, kind, contender, output_mib, peak_mib.
    """
    with matplotlib.rc_context(STYLE):
        cases, contenders = frame.groupby(["shape", "kind"], sort=False), list(frame["contender"].unique())
        figure = _figure(8.4, 0.9 + 0.26 * (len(contenders) + 1) * len(cases))
        axes = figure.subplots()
        place, ticks, names = 0.0, [], []
        for (shape, kind), case in cases:
            names.append(f"{shape.replace('x', '×')}\n{kind}")
            ticks.append(place + (len(case) - 1) / 2)
            for row in case.itertuples():
                multiple = row.peak_mib / row.output_mib
                label = CONTENDERS.get(row.contender, row.contender)
                axes.barh(place, multiple, height=0.82, color=CONTENDER_COLOURS.get(row.contender, INK), label=label)
                axes.text(multiple + 0.02, place, f"{row.peak_mib:.1f} MiB", va="center", fontsize=8)
                place += 1
            place += 0.7
        axes.set_yticks(ticks, names, fontsize=8)
        axes.invert_yaxis()
        axes.set_xlim(0, max(1.0, float((frame["peak_mib"] / frame["output_mib"]).max()) * 1.2))
        axes.set_xlabel("peak memory beside the output y, as a multiple of y")
        axes.grid(axis="y", visible=False)
        axes.set_title(title)
        unique = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        figure.legend(unique.values(), unique.keys(), loc="outside lower center", ncols=4)
        _save(figure, path)


def grid(frame: pd.DataFrame, title: str, folder: Path) -> None:
    """Times over the number of rows, a panel a layer and kind, a picture a rank: grid-r16.png, ….

    Columns kind, layer, in, out, rows, rank, contender, ratio (to a plain linear layer).
    """
    for rank, part in frame.groupby("rank", sort=False):
        with matplotlib.rc_context(STYLE):
            layers, kinds = list(part["layer"].unique()), list(part["kind"].unique())
            figure = _figure(8.4, 0.9 + 1.9 * len(layers))
            panels = figure.subplots(len(layers), len(kinds), squeeze=False, sharex=True, sharey=True)
            for (layer, kind), case in part.groupby(["layer", "kind"], sort=False):
                axes = panels[layers.index(layer)][kinds.index(kind)]
                _grid_panel(axes, case)
                axes.set_title(f"{layer} {case['in'].iloc[0]} → {case['out'].iloc[0]}, {kind}", fontsize=9)
            for axes in panels[-1]:
                axes.set_xlabel("rows")
            for axes in panels[:, 0]:
                axes.set_ylabel("× linear")
            figure.suptitle(f"{title}, rank {rank}", x=0.01, ha="left", fontsize=12)
            handles: dict[str, Any] = {}
            for axes in panels.flat:
                handles |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
            figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=4)
            _save(figure, folder / f"grid-r{rank}.png")


def _grid_panel(axes: Axes, case: pd.DataFrame) -> None:
    for contender, line in case[case["contender"] != "linear"].groupby("contender", sort=False):
        colour, label = CONTENDER_COLOURS.get(str(contender), INK), CONTENDERS.get(str(contender), str(contender))
        axes.plot(line["rows"], line["ratio"], color=colour, label=label, marker="o", markersize=3)
    axes.axhline(1, color=INK, linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(sorted(case["rows"].unique())))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
