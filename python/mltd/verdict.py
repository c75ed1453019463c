"""Who won, in words: what the numbers say and, where MLtD did not win, what they show about why."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

Method = Mapping[str, Any]


def verdict(methods: Mapping[str, Method]) -> list[str]:
    """Sentences on the result of a comparison; ``methods`` as in report.json.

    Methods are compared where the validation topics said to stop. "mltd" must be among them.
    """
    reached = {name: _at_stop(method) for name, method in methods.items()}
    mine = reached["mltd"]
    rival = min((name for name in reached if name != "mltd"), key=lambda name: reached[name])
    lines = [_ranking(methods, reached, rival)]
    better, all_topics = _topics_won(methods["mltd"], methods[rival])
    lines.append(f"MLtD is ahead of {rival} on {better} of {all_topics} topics.")
    if mine > reached[rival]:
        lines += _reasons(methods, rival)
    drift = _drift(methods["mltd"])
    if drift:
        lines.append(drift)
    return lines


def _at_stop(method: Method) -> float:
    value = method["perplexity_at_stop"]
    return math.inf if value is None else float(value)


def _curve(method: Method) -> dict[int, float]:
    return {int(step): math.inf if value is None else value for step, value in method["perplexity_by_step"].items()}


def _ranking(methods: Mapping[str, Method], reached: Mapping[str, float], rival: str) -> str:
    steps, rival_steps = methods["mltd"]["stop_step"], methods[rival]["stop_step"]
    mine, other, start = reached["mltd"], reached[rival], _curve(methods["zero-shot"])[0]
    word = "wins" if mine < other else "does not win" if mine > other else "draws"
    return (
        f"MLtD {word}: perplexity {mine:.1f} after {steps} steps, the best other method is {rival} with {other:.1f} "
        f"after {rival_steps} ({100 * (mine / other - 1):+.0f} %); the model as it came has {start:.1f}."
    )


def _topics_won(mine: Method, other: Method) -> tuple[int, int]:
    def at_stop(method: Method, topic: str) -> float:
        value = method["per_task"][topic].get(str(method["stop_step"]))
        return math.inf if value is None else value

    topics = list(mine["per_task"])
    return sum(at_stop(mine, topic) < at_stop(other, topic) for topic in topics), len(topics)


def _reasons(methods: Mapping[str, Method], rival: str) -> list[str]:
    """What the curves show about a defeat; every sentence is there only where its numbers are."""
    mine, other = _curve(methods["mltd"]), _curve(methods[rival])
    found = []
    if other[0] < mine[0]:
        found.append(f"Why: {rival} starts lower, {other[0]:.1f} against {mine[0]:.1f} before any step.")
    gain, their_gain = mine[0] / min(mine.values()), other[0] / min(other.values())
    if gain < their_gain:
        found.append(
            f"Why: adaptation divides the perplexity of {rival} by {their_gain:.2f}, that of MLtD by {gain:.2f}."
        )
    best = min(mine, key=lambda step: mine[step])
    stop = methods["mltd"]["stop_step"]
    if best != stop:
        where = f"on the unseen topics step {best} was its best, {mine[best]:.1f}"
        found.append(f"Why: validation stopped MLtD at step {stop}; {where}.")
    return found or ["Why: the curves do not show it; both start and adapt alike."]


def _drift(method: Method) -> str | None:
    curve = _curve(method)
    best, last = min(curve, key=lambda step: curve[step]), max(curve)
    if best == last or curve[last] < 1.05 * curve[best]:
        return None
    return f"Past step {best} MLtD over-fits its five pairs: {curve[best]:.1f} there, {curve[last]:.1f} after {last}."
