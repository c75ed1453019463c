"""Tables of curves: an interval at every point, differences between methods, and the time to a target."""

import math

import pandas as pd
import pytest

from mltd import Curve
from mltd.curves import COLUMNS, curve_records, differences, time_to_target, with_intervals
from mltd.intervals import mean_interval, paired_difference

LOSSES = {0: {"a": 2.0, "b": 4.0, "c": 3.0}, 3: {"a": 1.0, "b": 2.0, "c": 2.5}}


def curve(shift=0.0, steps=(0, 3)):
    losses = {step: {task: loss + shift for task, loss in LOSSES[step].items()} for step in steps}
    return Curve.from_losses(losses, {"a": 3, "b": 1, "c": 2}, 1.0)


def per_task(curve, **where):
    return curve_records(curve.per_task, "perplexity", **where)


def table():
    parts = [
        per_task(curve(seed * 0.1 - shots * 0.05 + (method == "lora") * 0.3), seed=seed, shots=shots, method=method)
        for method in ("mltd", "lora")
        for seed in (0, 1)
        for shots in (1, 5)
    ]
    parts.append(per_task(curve(0.5, (0,)), seed=0, shots=0, method="zero-shot"))
    return pd.concat(parts, ignore_index=True).sample(frac=1, random_state=0)


def test_records_are_the_tasks_perplexities():
    records = per_task(curve(), seed=4, shots=5, method="mltd")
    assert list(records.columns) == [*COLUMNS, "method"] and len(records) == 6
    row = records[(records["task"] == "b") & (records["step"] == 3)].iloc[0]
    assert row["value"] == pytest.approx(math.exp(2)) and row["seed"] == 4 and row["shots"] == 5
    assert set(records["metric"]) == {"perplexity"}


def test_every_point_has_the_interval_of_its_own_rows():
    rows = table()
    points = with_intervals(rows)
    assert len(points) == 2 * 2 * 2 + 1
    for point in points.itertuples():
        here = rows[(rows["method"] == point.method) & (rows["shots"] == point.shots) & (rows["step"] == point.step)]
        expected = mean_interval(here)
        assert (point.mean, point.low, point.high, point.tasks, point.seeds) == pytest.approx(expected)
    assert points["mean"].nunique() == len(points)
    by_seed = with_intervals(rows[rows["method"] == "mltd"], unit="seed")
    assert not by_seed["low"].round(6).isin(points["low"].round(6)).any()


def test_metrics_are_kept_apart():
    rows = table()
    both = pd.concat([rows, rows.assign(metric="bleu", value=-rows["value"])])
    points = with_intervals(both).set_index("metric")
    assert sorted(-points.loc["bleu", "mean"]) == pytest.approx(sorted(points.loc["perplexity", "mean"]))


def test_differences_of_two_methods_are_paired_at_every_point():
    rows = table()
    found = differences(rows, "mltd", "lora")
    assert len(found) == 4 and (found["mean"] < 0).all()
    for point in found.itertuples():
        one, other = (
            rows[(rows["method"] == name) & (rows["shots"] == point.shots) & (rows["step"] == point.step)]
            for name in ("mltd", "lora")
        )
        assert (point.mean, point.low, point.high) == pytest.approx(paired_difference(one, other)[:3])


def test_a_method_that_does_not_adapt_is_compared_with_at_every_point():
    rows = table()
    found = differences(rows, "mltd", "zero-shot")
    assert sorted(zip(found["shots"], found["step"], strict=True)) == [(1, 0), (1, 3), (5, 0), (5, 3)]
    level = rows[rows["method"] == "zero-shot"]
    last = rows[(rows["method"] == "mltd") & (rows["shots"] == 5) & (rows["step"] == 3)]
    point = found[(found["shots"] == 5) & (found["step"] == 3)].iloc[0]
    assert point["mean"] == pytest.approx(paired_difference(last, level).mean)
    only_last = rows[(rows["method"] != "lora") | (rows["step"] == 3)]
    with pytest.raises(ValueError, match="table at shots ., step 0, .*: 'lora' has no value there"):
        differences(only_last, "mltd", "lora")


def test_what_is_wrong_with_a_table_is_named():
    rows = table()
    here = (rows["method"] == "lora") & (rows["shots"] == 5) & (rows["step"] == 3)
    for wrong, message in (
        (rows.drop(columns="shots"), "table: lacks the column 'shots'"),
        (rows.iloc[:0], "table: got no row"),
        (
            rows[~(here & (rows["task"] == "b"))],
            "table at shots 5, step 3, metric perplexity, method lora: lacks task b",
        ),
        (
            rows[~(here & (rows["task"] == "b") & (rows["seed"] == 1))],
            "table at shots 5, step 3, .*: values: lacks task b, seed 1",
        ),
        (pd.concat([rows, rows[here]]), "more than once"),
        (rows.assign(value=rows["value"].where(~here)), "got NaN for task"),
        (rows.assign(method=rows["method"].where(~here)), "an empty cell in the column 'method'"),
    ):
        with pytest.raises(ValueError, match=message):
            with_intervals(wrong)
    with pytest.raises(ValueError, match="second: got 'maml', expected one of the methods"):
        differences(rows, "mltd", "maml")
    with pytest.raises(ValueError, match="lacks the column 'method'"):
        differences(rows[rows["method"] == "mltd"].drop(columns="method"), "mltd", "lora")


def test_time_to_target_is_the_first_time_that_is_good_enough():
    seconds, bleu = [1.0, 2.0, 4.0, 8.0], [10.0, 30.0, 25.0, 40.0]
    for target, expected in ((30, 2.0), (30.1, 8.0), (5, 1.0), (41, None)):
        assert time_to_target(seconds, bleu, target, higher_is_better=True) == expected
    perplexity = [math.inf, 30.0, 35.0, 20.0]
    for target, expected in ((30, 2.0), (29.9, 8.0), (math.inf, 1.0), (19, None)):
        assert time_to_target(seconds, perplexity, target, higher_is_better=False) == expected


def test_wrong_times_and_values_are_named():
    for seconds, values, message in (
        ([1.0], [1.0, 2.0], "values: got 2 for 1 seconds"),
        ([], [], "values: got 0 for 0 seconds"),
        ([2.0, 1.0], [1.0, 2.0], "seconds: got .*, expected ascending"),
        ([1.0, math.nan], [1.0, 2.0], "seconds: got .*, expected ascending"),
        ([1.0, 2.0], [1.0, math.nan], "got NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            time_to_target(seconds, values, 1.0, higher_is_better=True)
