"""Intervals against a worked example and against what they promise: they hold the true mean 95 times in 100."""

import math

import numpy as np
import pandas as pd
import pytest

from mltd.intervals import mean_interval, paired_difference

# The 97.5 % points of Student's t with one and with three degrees of freedom, as tables print them.
T_1, T_3 = 12.706204736, 3.182446305


def values(rows):
    """{task: [value of seed 0, of seed 1, …]}."""
    flat = [(task, seed, value) for task, own in rows.items() for seed, value in enumerate(own)]
    return pd.DataFrame(flat, columns=["task", "seed", "value"])


FIRST = {"a": [1.0, 3.0], "b": [4.0, 4.0], "c": [5.0, 7.0], "d": [9.0, 7.0]}  # task means 2 4 6 8, seed means 4.75 5.25
SECOND = {"a": [1.0, 1.0], "b": [2.0, 4.0], "c": [5.0, 5.0], "d": [5.0, 7.0]}  # task means 1 3 5 6


def test_tasks_are_the_unit_and_seeds_are_averaged_within_them():
    found = mean_interval(values(FIRST).sample(frac=1, random_state=0))
    half = T_3 * math.sqrt(20 / 3) / 2  # 2 4 6 8: squared deviations 9 + 1 + 1 + 9
    assert found == pytest.approx((5, 5 - half, 5 + half, 4, 2))
    narrow = mean_interval(values(FIRST), level=0.5)
    assert narrow.mean == found.mean and found.low < narrow.low < narrow.high < found.high


def test_seeds_as_the_unit():
    found = mean_interval(values(FIRST), unit="seed")
    half = T_1 * math.sqrt(0.125) / math.sqrt(2)  # 4.75 5.25
    assert found == pytest.approx((5, 5 - half, 5 + half, 4, 2))


def test_pairs_are_compared_task_by_task():
    found = paired_difference(values(FIRST), values(SECOND).iloc[::-1])
    half = T_3 * math.sqrt(0.75 / 3) / 2  # 1 1 1 2: squared deviations 3 · 0.0625 + 0.5625
    assert found == pytest.approx((1.25, 1.25 - half, 1.25 + half, 4, 2))
    assert found.low > 0, "significant,"
    assert mean_interval(values(FIRST)).low < mean_interval(values(SECOND)).high, "although the intervals overlap"
    reverse = paired_difference(values(SECOND), values(FIRST))
    assert reverse[:3] == pytest.approx((-found.mean, -found.high, -found.low))


def test_pairs_with_other_seeds_are_compared_by_task_only():
    one_seed = values({task: own[:1] for task, own in SECOND.items()})
    found = paired_difference(values(FIRST), one_seed)
    assert found.mean == pytest.approx(5 - 13 / 4) and found.seeds == 1
    with pytest.raises(ValueError, match="second: lacks seed 1, expected the same seeds in both"):
        paired_difference(values(FIRST), one_seed, unit="seed")
    by_seed = paired_difference(values(FIRST), values(SECOND), unit="seed")
    half = T_1 * math.sqrt(0.125) / math.sqrt(2)  # 1.5 1.0
    assert by_seed == pytest.approx((1.25, 1.25 - half, 1.25 + half, 4, 2))


def test_the_interval_holds_the_mean_of_all_tasks_95_times_in_100():
    """Tasks differ with deviation 3, runs of a task with deviation 2: five tasks, four seeds."""
    draw, tasks, seeds, trials = np.random.default_rng(0), 5, 4, 400
    inside = 0
    for _ in range(trials):
        numbers = 7 + 3 * draw.standard_normal((tasks, 1)) + 2 * draw.standard_normal((tasks, seeds))
        found = mean_interval(values(dict(zip("abcde", numbers, strict=True))))
        inside += found.low <= 7 <= found.high
    # runs as units hold it in about 75 %, a normal instead of Student's interval in about 88 %
    assert 0.93 <= inside / trials <= 0.97


@pytest.mark.filterwarnings("error")
def test_one_task_and_infinite_means_have_no_interval():
    for rows, mean in (({"a": [1.0, 3.0]}, 2.0), ({"a": [math.inf], "b": [1.0]}, math.inf)):
        found = mean_interval(values(rows))
        assert found.mean == mean and math.isnan(found.low) and math.isnan(found.high)
    assert mean_interval(values({"a": [2.0], "b": [2.0]}))[:3] == (2, 2, 2)
    with pytest.raises(ValueError, match="both are infinite at task a"):
        paired_difference(values({"a": [math.inf]}), values({"a": [math.inf]}))


def test_what_is_missing_twice_or_nan_is_named():
    good = values(FIRST)
    for wrong, message in (
        (good.drop(columns="seed"), "values: lacks the column 'seed'"),
        (good.iloc[:0], "values: got no row"),
        (good.drop(index=3), "values: lacks task b, seed 1"),
        (pd.concat([good, good.iloc[[2]]]), "values: got task b, seed 0 more than once"),
        (good.assign(value=good["value"].where(good["value"] != 9)), "values: got NaN for task d, seed 0"),
    ):
        with pytest.raises(ValueError, match=message):
            mean_interval(wrong)
    with pytest.raises(ValueError, match="second: lacks task d, expected the same tasks"):
        paired_difference(good, good[good["task"] != "d"])
    with pytest.raises(ValueError, match="first: lacks task d, expected the same tasks"):
        paired_difference(good[good["task"] != "d"], good)
    with pytest.raises(ValueError, match="unit: got 'run'"):
        mean_interval(good, unit="run")
    with pytest.raises(ValueError, match="level: got 95"):
        mean_interval(good, level=95)
