"""What `tarp eval --metrics` measures beside perplexity, by name: of the texts, labels or numbers of a kind of task."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from mltd.data.episodes import Episodes
from mltd.data.records import Record
from mltd.kinds import IGNORED
from mltd.measures import LABEL, TEXT, Headed, Measure, Named, Written
from mltd.query_batches import query_id
from mltd.run_config import RunConfig
from mltd.tasks import Task

KNOWN: dict[str, tuple[str, ...]] = {
    "causal": (*TEXT, *LABEL),
    "seq2seq": (*TEXT, *LABEL),
    "classification": LABEL,
    "regression": ("pearson",),
}
"""By kind of task. Language models take a task's distinct targets for its labels."""


def measures_for(config: RunConfig, names: Sequence[str], episodes: Episodes, tokenizer: Any) -> list[Measure]:
    """The measures that give these metrics; ValueError for one that this kind of task does not have."""
    kind = config.model.kind
    strange = [name for name in names if name not in KNOWN[kind]]
    if strange:
        raise ValueError(f"metrics: got {strange[0]!r}, expected some of {', '.join(KNOWN[kind])} for {kind} tasks")
    if kind in ("classification", "regression"):
        return [Headed()] if names else []
    asked = {query_id(task, i): episodes.query[task.name][i] for task in episodes.tasks for i in range(len(task.query))}
    measures: list[Measure] = []
    written = [name for name in names if name in TEXT]
    if written:
        decode = partial(tokenizer.decode, skip_special_tokens=True)
        answers = {key: record.references for key, record in asked.items()}
        measures.append(Written(decode, config.decoding, answers, written))
    named = [name for name in names if name in LABEL]
    if named:
        candidates = {
            task.name: _candidates(task, (*episodes.support[task.name], *episodes.query[task.name]))
            for task in episodes.tasks
        }
        measures.append(Named(candidates, {key: record.target for key, record in asked.items()}, named))
    return measures


def _candidates(task: Task, records: Sequence[Record]) -> dict[str, tuple[int, ...]]:
    """Label -> the tokens that are scored where it is the target."""
    examples = (*task.support, *task.query)
    return {
        record.target: tuple(token for token in example.labels if token != IGNORED)
        for record, example in zip(records, examples, strict=True)
    }
