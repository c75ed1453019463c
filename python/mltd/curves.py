"""Curves over adaptation steps and over shots as one table, with an interval at every point, and time to a target.

The table has a row for each measured value: columns task, seed, shots, step, metric, value, and further ones that keep
curves apart, such as method or data set.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import pandas as pd

from mltd.intervals import Interval, Unit, mean_interval, paired_difference

COLUMNS = ("task", "seed", "shots", "step", "metric", "value")
_AVERAGED = ("task", "seed", "value")


def curve_records(
    values: Mapping[str, Mapping[int, float]], metric: str, *, seed: int, shots: int, **keys: str
) -> pd.DataFrame:
    """The rows of an evaluation from task -> step -> value, as `Curve.per_task` is for perplexity.

    keys  further columns, the same in every row, such as method="mltd"
    """
    rows = [(task, seed, shots, step, metric, value) for task, own in values.items() for step, value in own.items()]
    return pd.DataFrame(rows, columns=list(COLUMNS)).assign(**keys)


def with_intervals(table: pd.DataFrame, level: float = 0.95, unit: Unit = "task") -> pd.DataFrame:
    """A row for each point of each curve: all columns but task, seed and value, then mean, low, high, tasks, seeds.

    level, unit  as `mltd.intervals.mean_interval` takes them; perplexities are averaged as they are, not by token

    Raises ValueError for a missing column, and names a task that some points of a metric lack: a curve whose points
    are means over different tasks shows the tasks.
    """
    check_table(table)
    return _points(table, lambda part: mean_interval(part, level, unit))


def differences(table: pd.DataFrame, first: str, second: str, level: float = 0.95, unit: Unit = "task") -> pd.DataFrame:
    """As `with_intervals`, for the paired differences first − second of two values of the column method.

    A second method of step 0 alone does not adapt (zero-shot): it is compared with at every step, and at every number
    of shots when it has one.
    """
    check_table(table)
    if "method" not in table:
        raise ValueError("table: lacks the column 'method', expected one to take the difference over")
    known = list(table["method"].unique())
    for name, method in (("first", first), ("second", second)):
        if method not in known:
            raise ValueError(f"{name}: got {method!r}, expected one of the methods {', '.join(map(str, known))}")
    one, other = (table[table["method"] == method].drop(columns="method") for method in (first, second))
    keys = _keys(other)
    if set(other["step"]) == {0}:
        keys.remove("step")
        if other["shots"].nunique() == 1:
            keys.remove("shots")

    def paired(part: pd.DataFrame) -> Interval:
        here = part[keys].iloc[0]
        beside = other[(other[keys] == here).all(axis=1)]
        if beside.empty:
            raise ValueError(f"{second!r} has no value there, expected one beside that of {first!r}; measure it")
        return paired_difference(part, beside, level, unit)

    return _points(one, paired)


def check_table(table: pd.DataFrame) -> None:
    """Raise ValueError for a missing column, no row, or a task that some point of a metric lacks."""
    missing = [column for column in COLUMNS if column not in table]
    if missing:
        raise ValueError(f"table: lacks the column {missing[0]!r}, expected {', '.join(COLUMNS)}")
    if table.empty:
        raise ValueError("table: got no row, expected at least one")
    for column in _keys(table):
        if table[column].isna().any():
            raise ValueError(f"table: got an empty cell in the column {column!r}, expected a value in every row")
    for metric, part in table.groupby("metric", sort=False):
        tasks = set(part["task"])
        for point, rows in part.groupby(_keys(part), sort=False):
            lacking = tasks - set(rows["task"])
            if lacking:
                raise ValueError(
                    f"table at {_where(_keys(part), point)}: lacks task {min(lacking)}, expected the same tasks at "
                    f"every point of {metric}; drop the task or measure it there"
                )


def time_to_target(
    seconds: Sequence[float], values: Sequence[float], target: float, *, higher_is_better: bool
) -> float | None:
    """The first of `seconds` at which `values` has reached the target; None when it never does.

    seconds  wall-clock times, ascending; a value counts from the moment when it was measured, nothing in between
    values   of a metric at these times; target: reached by a value as good or better
    """
    if len(seconds) != len(values) or not len(seconds):
        raise ValueError(
            f"values: got {len(values)} for {len(seconds)} seconds, expected one for each, and at least one"
        )
    if any(not earlier <= later for earlier, later in zip(seconds, seconds[1:], strict=False)):
        raise ValueError(f"seconds: got {list(seconds)}, expected ascending times")
    wrong = [value for value in (*values, target) if math.isnan(value)]
    if wrong:
        raise ValueError("values and target: got NaN, expected numbers; the run has failed there")
    reached = (value >= target if higher_is_better else value <= target for value in values)
    return next((float(time) for time, there in zip(seconds, reached, strict=True) if there), None)


def _keys(table: pd.DataFrame) -> list[str]:
    return [column for column in table if column not in _AVERAGED]


def _points(table: pd.DataFrame, interval: Callable[[pd.DataFrame], Interval]) -> pd.DataFrame:
    keys, rows = _keys(table), []
    for point, part in table.groupby(keys, sort=False):
        try:
            rows.append((*point, *interval(part)))
        except ValueError as error:
            raise ValueError(f"table at {_where(keys, point)}: {error}") from error
    return pd.DataFrame(rows, columns=[*keys, *Interval._fields])


def _where(keys: Sequence[str], point: Sequence[object]) -> str:
    return ", ".join(f"{key} {value}" for key, value in zip(keys, point, strict=True))
