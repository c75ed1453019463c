"""Pictures of curves with their intervals, over adaptation steps or over shots, from `mltd.curves.with_intervals`."""

import itertools
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from mltd.plots import COLOURS, NAMES, STYLE, _figure, _log_perplexity, _save

_COLUMNS = ("method", "metric", "step", "shots", "mean", "low", "high")
_AXES = {"step": "adaptation steps", "shots": "support examples (shots)"}
_OTHERS = ("#3c9d6b", "#17a2b8", "#a05195", "#7f7f2a")  # of methods without a colour of their own
_WIDTH, _PANELS = 8.4, 3  # inches; most panels beside one another


def curve_bands(
    points: pd.DataFrame, title: str, path: Path, x: Literal["step", "shots"] = "step", label: str | None = None
) -> None:
    """A line with a band, low to high, for each method, and a panel for each value of the other axis.

    points  columns method, metric, step, shots, mean, low, high; one metric; no band where low is NaN
    x       the axis: over steps there is a panel for each number of shots, over shots one for each step
    label   of the vertical axis; default: the metric's name. Perplexity is on a log scale

    A method of step 0 alone does not adapt: it is in every panel, as a level unless it is known for several shots.
    """
    if x not in _AXES:
        raise ValueError(f"x: got {x!r}, expected 'step' or 'shots'")
    metric = _only_metric(points)
    other = "shots" if x == "step" else "step"
    steps = points.groupby("method", sort=False)["step"].agg(set)
    levels = [method for method in steps.index if steps[method] == {0}]
    curves = points[~points["method"].isin(levels)]
    if curves.empty:
        raise ValueError("points: got step 0 alone, expected adaptation steps to draw a curve over")
    panels, colours = sorted(curves[other].unique()), _colours(list(steps.index))
    with matplotlib.rc_context(STYLE):
        rows = -(-len(panels) // _PANELS)
        columns = -(-len(panels) // rows)
        figure = _figure(_WIDTH, 1.3 + 3.2 * rows)
        grid = list(figure.subplots(rows, columns, squeeze=False, sharey=True).flat)
        for axes, panel in zip(grid, panels, strict=False):
            for method in steps.index:
                part = points[points["method"] == method]
                if method not in levels or (x == "step" and len(part) > 1):
                    part = part[part[other] == panel]
                draw = _level if method in levels and len(part) == 1 else _curve
                draw(axes, part.sort_values(x), x, str(method), colours[method])
            _horizontal(axes, curves[x], x)
            if len(panels) > 1:
                plural = "" if panel == 1 else "s"
                axes.set_title(f"{panel} shot{plural}" if x == "step" else f"after {panel} step{plural}", fontsize=10)
        for axes in grid[len(panels) :]:
            axes.set_visible(False)
        if metric == "perplexity":
            _log_perplexity(grid[0], pd.concat([points["mean"], points["low"][points["low"] > 0], points["high"]]))
        for axes in grid[::columns]:
            axes.set_ylabel(label or metric)
        figure.suptitle(title, x=0.01, ha="left", fontsize=12)
        handles: dict[str, Any] = {}
        for axes in grid:
            handles |= {name: handle for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)}
        figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=min(len(handles), 3))
        _save(figure, path)


def _only_metric(points: pd.DataFrame) -> str:
    """The metric's name. Raises ValueError for points that would lie on one line though they do not belong together."""
    missing = [column for column in _COLUMNS if column not in points]
    if missing:
        raise ValueError(f"points: lacks the column {missing[0]!r}, expected {', '.join(_COLUMNS)}")
    metrics = list(points["metric"].unique())
    if len(metrics) != 1:
        raise ValueError(f"points: got the metrics {metrics}, expected one; select it before")
    twice = points[points.duplicated(["method", "step", "shots"])]
    if len(twice):
        method, step, shots = twice[["method", "step", "shots"]].iloc[0]
        raise ValueError(f"points: got {method!r} at step {step}, shots {shots} more than once; select one data set")
    return str(metrics[0])


def _curve(axes: Axes, part: pd.DataFrame, x: str, method: str, colour: Any) -> None:
    bold = method == "mltd"
    width, size, order = (2.6, 6, 3) if bold else (1.5, 4, 2)
    name = NAMES.get(method, method)
    axes.plot(
        part[x], part["mean"], marker="o", markersize=size, linewidth=width, color=colour, zorder=order, label=name
    )
    axes.fill_between(part[x], part["low"], part["high"], color=colour, alpha=0.15, linewidth=0, zorder=order - 1)


def _level(axes: Axes, part: pd.DataFrame, _: str, method: str, colour: Any) -> None:
    row, name = part.iloc[0], NAMES.get(method, method)
    axes.axhline(row["mean"], color=colour, linestyle=(0, (2, 3)), linewidth=1.2, label=name)
    if not np.isnan(row["low"]):
        axes.axhspan(row["low"], row["high"], color=colour, alpha=0.1, linewidth=0, zorder=0)


def _horizontal(axes: Axes, values: pd.Series, x: str) -> None:
    ticks = sorted(values.unique())
    if x == "shots" and ticks[0] > 0:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xlabel(_AXES[x])


def _colours(methods: list[str]) -> dict[str, Any]:
    """The project's colour of each method that has one; others in turn for the rest."""
    rest = itertools.cycle(_OTHERS)
    return {method: COLOURS[method] if method in COLOURS else next(rest) for method in methods}
