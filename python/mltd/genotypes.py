"""An architecture as people read it: as equations, and as a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from torch import Tensor

from mltd.plots import FAINT, INK, STYLE, _figure, _save
from tarp_kernels.ops.search_cell import OPERATIONS

# Each node's inputs, in the order of the edges.
INPUTS = {"n0": ("s0", "s1"), "n1": ("s0", "s1", "n0"), "n2": ("s0", "s1", "n0", "n1")}
COLOURS = {
    "none": "#ffffff",
    "identity": "#e4e4e4",
    "linear": "#f6d9b0",
    "glu": "#f3b98f",
    "conv3": "#b9cfe6",
    "conv5": "#7aa6d6",
}


def selected(alpha: Tensor, operations: Sequence[str] = OPERATIONS) -> dict[tuple[str, str], str]:
    """{(input, node): operation} in the order of the edges; the largest value of each row counts.

    alpha  [9, len(operations)]; ValueError for another shape
    """
    if tuple(alpha.shape) != (9, len(operations)):
        raise ValueError(
            f"alpha: got shape {list(alpha.shape)}, expected [9, {len(operations)}] for the operations "
            f"{', '.join(operations)}; pick one task and layer"
        )
    edges = [(source, node) for node, sources in INPUTS.items() for source in sources]
    return dict(zip(edges, (operations[i] for i in alpha.argmax(-1).tolist()), strict=True))


def genotype(alpha: Tensor, operations: Sequence[str] = OPERATIONS) -> str:
    """The cell that alpha [9, len(operations)] selects, an equation a line; `none` is left out."""
    found = selected(alpha, operations)
    lines = []
    for node, sources in INPUTS.items():
        terms = [(found[source, node], source) for source in sources if found[source, node] != "none"]
        words = [source if name == "identity" else f"{name}({source})" for name, source in terms]
        lines.append(f"{node} = {' + '.join(words) or '0'}")
    return "\n".join([*lines, "out = h + Linear((n0 + n1 + n2) / 3)"])


def draw_genotype(
    alpha: Tensor, path: str | Path, operations: Sequence[str] = OPERATIONS, title: str = "search cell"
) -> None:
    """Draw what `genotype` says to a PNG or SVG file, by the path's ending.

    Values run along horizontal lines; a node adds up what the boxes above it make of the lines that they lie on.
    """
    found = selected(alpha, operations)
    rows = {"s0": 4.0, "s1": 3.0, "n0": 2.0, "n1": 1.0, "n2": 0.0}
    columns = {"n0": 2.0, "n1": 3.5, "n2": 5.0}
    end = 6.4
    with matplotlib.rc_context(STYLE):
        figure = _figure(8.0, 4.6)
        axes = figure.subplots()
        axes.set_axis_off()
        axes.set_xlim(-0.4, 8.3)
        axes.set_ylim(-0.5, 4.6)
        axes.set_aspect("equal")
        axes.set_title(title)
        for source in ("s0", "s1"):
            _arrow(axes, (0.2, 3.5), (0.78, rows[source]))
            _node(axes, 1.0, rows[source], source)
            axes.plot([1.24, columns["n2"]], [rows[source]] * 2, color=FAINT, linewidth=1.2, zorder=1)
        _node(axes, 0.0, 3.5, "h")
        for node, x in columns.items():
            sources = INPUTS[node]
            _arrow(axes, (x, rows[sources[0]]), (x, rows[node] + 0.24))
            for source in sources:
                _box(axes, x, rows[source], found[source, node])
            _node(axes, x, rows[node], node)
            axes.plot([x + 0.24, end], [rows[node]] * 2, color=FAINT, linewidth=1.2, zorder=1)
        axes.plot([end, end], [rows["n0"], rows["n2"]], color=FAINT, linewidth=1.2, zorder=1)
        _arrow(axes, (end, rows["n1"]), (6.83, rows["n1"]))
        axes.text(7.55, rows["n1"], "h + Linear(mean)", ha="center", va="center", color=INK, fontsize=9)
        _save(figure, Path(path))


def _node(axes: Any, x: float, y: float, name: str) -> None:
    style: Any = {"boxstyle": "circle,pad=0.3", "facecolor": "white", "edgecolor": INK}
    axes.text(x, y, name, ha="center", va="center", color=INK, fontsize=9, bbox=style, zorder=4)


def _box(axes: Any, x: float, y: float, operation: str) -> None:
    chosen = operation != "none"
    style: Any = {"boxstyle": "round,pad=0.3", "facecolor": COLOURS[operation], "edgecolor": INK if chosen else FAINT}
    style |= {} if chosen else {"linestyle": (0, (2, 2))}
    colour = INK if chosen else FAINT
    axes.text(x, y, operation, ha="center", va="center", color=colour, fontsize=8.5, bbox=style, zorder=3)


def _arrow(axes: Any, start: tuple[float, float], end: tuple[float, float]) -> None:
    style: Any = {"arrowstyle": "-|>", "color": FAINT, "linewidth": 1.2, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", end, start, arrowprops=style, zorder=2)
