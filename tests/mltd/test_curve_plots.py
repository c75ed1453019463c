"""Pictures of curves: a panel for each value of the other axis, every mean and its band where they belong."""

import math

import matplotlib.figure
import numpy as np
import pandas as pd
import pytest

from mltd.curve_plots import curve_bands
from mltd.plots import COLOURS, NAMES, speed

STEPS, SHOTS = (0, 1, 3), (1, 2, 5, 10)


def points(metric="bleu", methods=("mltd", "lora", "maml", "reptile")):
    rows = [
        (method, metric, shots, step, mean, mean - 2, mean + 1)
        for rank, method in enumerate(methods)
        for shots in SHOTS
        for step in STEPS
        for mean in [50 - 8 * rank + shots + step]
    ]
    rows.append(("zero-shot", metric, 0, 0, 20.0, 18.0, 21.0))
    return pd.DataFrame(rows, columns=["method", "metric", "shots", "step", "mean", "low", "high"])


@pytest.fixture
def figures(monkeypatch):
    saved, save = [], matplotlib.figure.Figure.savefig
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda own, path: (saved.append(own), save(own, path)))
    return saved


def line(axes, method):
    return next(line for line in axes.get_lines() if line.get_label() == NAMES.get(method, method))


def band(axes, method):
    """(low, high) at each x of a method's band."""
    colour = line(axes, method).get_color()
    rgb = matplotlib.colors.to_rgb(colour)
    own = next(one for one in axes.collections if np.allclose(one.get_facecolor()[0][:3], rgb))
    found = {}
    for x, y in own.get_paths()[0].vertices:
        low, high = found.get(x, (math.inf, -math.inf))
        found[x] = (min(low, y), max(high, y))
    return found


@pytest.mark.parametrize("x, other", [("step", "shots"), ("shots", "step")], ids=["steps", "shots"])
def test_every_point_is_in_its_panel(figures, tmp_path, x, other):
    table = points().sample(frac=1, random_state=0)
    curve_bands(table, "A title", tmp_path / "new" / "curves.png", x)
    assert (tmp_path / "new" / "curves.png").stat().st_size > 10_000
    shown = [axes for axes in figures[0].axes if axes.get_visible()]
    panels = SHOTS if other == "shots" else STEPS
    assert len(shown) == len(panels) and figures[0].get_suptitle() == "A title"
    for axes, panel in zip(shown, panels, strict=True):
        for method in ("mltd", "maml"):
            own = table[(table["method"] == method) & (table[other] == panel)].sort_values(x)
            drawn = line(axes, method)
            assert list(drawn.get_xdata()) == list(own[x]) and list(drawn.get_ydata()) == list(own["mean"])
            edges = {one[x]: (one["low"], one["high"]) for _, one in own.iterrows()}
            assert band(axes, method) == edges
        assert list(line(axes, "zero-shot").get_ydata()) == [20, 20], "a level in every panel"
        assert str(panel) in axes.get_title(loc="left")
    assert line(shown[0], "mltd").get_color() == COLOURS["mltd"]
    assert len({line(shown[0], method).get_color() for method in ("mltd", "lora", "maml", "reptile")}) == 4
    names = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert sorted(names) == sorted(NAMES.get(method, method) for method in table["method"].unique())


def test_methods_have_names_and_colours_of_their_own_and_a_layer_has_another(figures, tmp_path):
    table = points()
    methods = ["mltd", "tarp", "tarp-nometa", "tarp-multitask"]
    curve_bands(
        pd.concat([table[table["method"] == "mltd"].assign(method=m) for m in methods]), "t", tmp_path / "a.png"
    )
    shown = {text.get_text() for text in figures[0].legends[0].get_texts()}
    assert "TARP" in shown and len(shown) == 4 and not any("TarpLinear" in name for name in shown)
    assert len({line(figures[0].axes[0], method).get_color() for method in methods}) == 4
    timed = {
        "kind": "forward",
        "shape": "2x2",
        "contender": ["linear", "tarp"],
        "baseline": "linear",
        "ratio": [1.0, 1.1],
    }
    speed(pd.DataFrame(timed), "t", tmp_path / "b.png")
    assert [text.get_text() for text in figures[1].legends[0].get_texts()] == ["TarpLinear"]


def test_perplexity_has_a_log_axis_and_others_have_the_label_that_was_asked_for(figures, tmp_path):
    one = points("perplexity")
    one = one[one["shots"].isin([0, 5])]
    curve_bands(one, "t", tmp_path / "a.png")
    curve_bands(one.assign(metric="bleu"), "t", tmp_path / "b.png", label="BLEU")
    first, second = (figure.axes[0] for figure in figures)
    assert first.get_yscale() == "log" and first.get_ylabel() == "perplexity"
    assert second.get_yscale() == "linear" and second.get_ylabel() == "BLEU"


def test_points_without_an_interval_and_infinite_ones_are_drawn(figures, tmp_path):
    table = points("perplexity").assign(low=math.nan, high=math.nan)
    table.loc[table["step"] == 3, "mean"] = math.inf
    curve_bands(table, "t", tmp_path / "a.png")
    low, high = figures[0].axes[0].get_ylim()
    assert 0 < low < 20 and 60 < high < 100


def test_a_method_that_does_not_adapt_has_a_level_of_each_number_of_shots(figures, tmp_path):
    level = pd.DataFrame([("zero-shot", "bleu", k, 0, 10.0 + k, 9.0, 30.0) for k in SHOTS], columns=points().columns)
    table = pd.concat([points().query("method != 'zero-shot'"), level])
    for x in ("step", "shots"):
        curve_bands(table, "t", tmp_path / "a.png", x)
    for axes, k in zip(figures[0].axes, SHOTS, strict=False):
        assert set(line(axes, "zero-shot").get_ydata()) == {10 + k}
    assert list(line(figures[1].axes[0], "zero-shot").get_ydata()) == [10 + k for k in SHOTS]


def test_what_cannot_be_drawn_is_named(tmp_path):
    both = pd.concat([points(), points("rouge1")])
    with pytest.raises(ValueError, match=r"points: got the metrics \['bleu', 'rouge1'\], expected one"):
        curve_bands(both, "t", tmp_path / "a.png")
    with pytest.raises(ValueError, match="points: got 'mltd' at step 0, shots 1 more than once"):
        curve_bands(pd.concat([points(), points()]), "t", tmp_path / "a.png")
    with pytest.raises(ValueError, match="points: lacks the column 'method'"):
        curve_bands(points().drop(columns="method"), "t", tmp_path / "a.png")
    with pytest.raises(ValueError, match="x: got 'task'"):
        curve_bands(points(), "t", tmp_path / "a.png", x="task")
    with pytest.raises(ValueError, match="points: got step 0 alone"):
        curve_bands(points().query("step == 0"), "t", tmp_path / "a.png")
