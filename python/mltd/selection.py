"""Choosing learning rates and stopping on validation tasks, so that no choice is ever made on the test tasks."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

from mltd.checkpoint import CheckpointError, plain, read_json, write_json
from mltd.distributed import Processes
from mltd.evaluation import Curve
from mltd.inner_loop import DivergedError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Candidate = TypeVar("Candidate", bound="DataclassInstance")

CRITERIA: dict[str, Callable[[Curve], float]] = {
    "best": lambda curve: curve.perplexity_by_step[curve.best_step()],
    "mean": lambda curve: curve.geometric_mean([step for step in curve.steps if step] or curve.steps),
    "last": lambda curve: curve.perplexity_by_step[max(curve.steps)],
}
"""What is lowest for the best candidate: the perplexity at its own best step, the geometric mean over all steps that
adapt (good wherever one stops), or the perplexity at the last step."""


@dataclass(frozen=True)
class Selection(Generic[Candidate]):
    """The chosen candidate, its place among the candidates, the step at which to stop, and every candidate's score."""

    candidate: Candidate
    index: int
    stop_step: int
    scores: tuple[float, ...]
    curve: Curve
    seconds: float


def select(
    candidates: Sequence[Candidate],
    validate: Callable[[Candidate], Curve],
    criterion: str = "best",
    record: Path | None = None,
) -> Selection[Candidate]:
    """Validate every candidate (an InnerConfig, a MetaConfig or another dataclass) and keep the best.

    validate   the candidate's curve on the validation tasks; a DivergedError counts as an infinite perplexity
    criterion  "best" | "mean" | "last", see CRITERIA; the earlier candidate wins a tie
    record     a JSON file with the curves so far: a candidate found there is not validated again. Of several processes
               the first one reads and writes it, and all choose by what it measured

    Raises DivergedError when every candidate diverges.
    """
    if not candidates:
        raise ValueError("candidates: got none, expected at least one")
    if criterion not in CRITERIA:
        raise ValueError(f"criterion: got {criterion!r}, expected one of {', '.join(CRITERIA)}")
    processes = Processes.join()
    known = processes.from_first(lambda: read_json(record) if record is not None and record.exists() else [])
    if not isinstance(known, list) or any("candidate" not in entry for entry in known):
        raise CheckpointError(f"{record}: is not a record of `select`; delete it to have it made anew")
    curves: list[Curve | None] = []
    for candidate in candidates:
        values = plain(asdict(candidate))
        found = next((entry for entry in known if entry["candidate"] == values), None)
        if found is None:
            try:
                curve, trouble = validate(candidate), None
            except DivergedError as error:
                curve, trouble = None, str(error)
            found = {"candidate": values, "curve": None if curve is None else curve.to_json(), "trouble": trouble}
            found = processes.gather(found)[0]
            known.append(found)
            if record is not None and processes.first:
                write_json(record, known)
        curves.append(None if found["curve"] is None else Curve.from_json(found["curve"]))
    scores = tuple(math.inf if curve is None else CRITERIA[criterion](curve) for curve in curves)
    index = min(range(len(scores)), key=lambda i: (scores[i], i))
    best = curves[index]
    if best is None or not math.isfinite(scores[index]):
        raise DivergedError(
            f"candidates: all {len(candidates)} diverge on the validation tasks; offer lower learning rates"
        )
    spent = sum(curve.seconds for curve in curves if curve is not None)
    return Selection(candidates[index], index, best.best_step(), scores, best, spent)
