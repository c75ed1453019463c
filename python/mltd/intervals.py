"""Means over tasks with an interval, and paired differences of two methods.

Method: values are averaged over seeds within each task, and the 95 % interval is Student's t over the task means: it
says how the mean would differ over other tasks of the same distribution. With unit="seed" it is the other way round,
over the seeds' means of the same tasks: how the result would differ had the training been repeated. Both are exact for
normal means, need no random numbers, and two methods on the same tasks are compared by the differences of each task.
"""

from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import t

Unit = Literal["task", "seed"]


class Interval(NamedTuple):
    """A mean between low and high, which are NaN where there are fewer than two units, or a mean is infinite."""

    mean: float
    low: float
    high: float
    tasks: int
    seeds: int


def mean_interval(values: pd.DataFrame, level: float = 0.95, unit: Unit = "task") -> Interval:
    """Mean over tasks and seeds; values has columns task, seed, value, with every seed in every task once.

    Raises ValueError that names what is twice, missing or NaN.
    """
    table = _by_task_and_seed(values, "values")
    return Interval(*_student(_unit_means(table, unit), level), *table.shape)


def paired_difference(first: pd.DataFrame, second: pd.DataFrame, level: float = 0.95, unit: Unit = "task") -> Interval:
    """Mean of first − second over the same tasks, paired by unit; both as `mean_interval` takes them.

    With unit="task" the two may have different seeds (a method without training has only one), as each is averaged
    over its own; `seeds` is then the smaller number. With unit="seed" they must be the same.

    Raises ValueError that names tasks, or seeds, that only one of them has.
    """
    tables = [_by_task_and_seed(values, name) for values, name in ((first, "first"), (second, "second"))]
    _same("tasks", tables[0].index, tables[1].index)
    if unit == "seed":
        _same("seeds", tables[0].columns, tables[1].columns)
    differences = _unit_means(tables[0], unit) - _unit_means(tables[1], unit)
    if differences.isna().any():
        where = differences.index[differences.isna()][0]
        raise ValueError(
            f"first and second: both are infinite at {unit} {where}, expected a difference; compare losses"
        )
    seeds = min(table.shape[1] for table in tables)
    return Interval(*_student(differences, level), len(tables[0]), seeds)


def _by_task_and_seed(values: pd.DataFrame, name: str) -> pd.DataFrame:
    """Tasks as rows, seeds as columns, every cell filled."""
    missing = [column for column in ("task", "seed", "value") if column not in values]
    if missing:
        raise ValueError(f"{name}: lacks the column {missing[0]!r}, expected task, seed and value")
    if values.empty:
        raise ValueError(f"{name}: got no row, expected at least one")
    bad = values[values["value"].isna()]
    if len(bad):
        raise ValueError(f"{name}: got NaN for {_place(bad)}, expected a number; that run has failed")
    twice = values[values.duplicated(["task", "seed"])]
    if len(twice):
        raise ValueError(f"{name}: got {_place(twice)} more than once, expected one value for each; select one point")
    table = values.pivot(index="task", columns="seed", values="value")
    for task, row in table.iterrows():
        if row.isna().any():
            seed = row.index[row.isna()][0]
            raise ValueError(f"{name}: lacks task {task}, seed {seed}, expected every task for every seed; run it")
    return table


def _place(rows: pd.DataFrame) -> str:
    return f"task {rows['task'].iloc[0]}, seed {rows['seed'].iloc[0]}"


def _unit_means(table: pd.DataFrame, unit: Unit) -> pd.Series:
    if unit not in ("task", "seed"):
        raise ValueError(f"unit: got {unit!r}, expected 'task' or 'seed'")
    return table.mean(axis=1 if unit == "task" else 0)


def _same(what: str, first: pd.Index, second: pd.Index) -> None:
    for name, lacking, having in (("second", second, first), ("first", first, second)):
        missing = having.difference(lacking)
        if len(missing):
            raise ValueError(f"{name}: lacks {what[:-1]} {missing[0]}, expected the same {what} in both")


def _student(means: pd.Series, level: float) -> tuple[float, float, float]:
    """Mean and the ends of its Student interval."""
    if not 0 < level < 1:
        raise ValueError(f"level: got {level}, expected between 0 and 1, such as 0.95")
    mean, count = float(means.mean()), len(means)
    if count < 2 or not np.isfinite(mean):
        return mean, float("nan"), float("nan")
    half = float(t.ppf((1 + level) / 2, count - 1) * means.std(ddof=1) / np.sqrt(count))
    return mean, mean - half, mean + half
