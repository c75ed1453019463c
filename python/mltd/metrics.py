"""Metrics of generated texts, of predicted labels and of language models, by the libraries that define them.

Hypotheses and references meet by id, never by position: each side is a mapping from id to value, or pairs (id, value)
such as rows of a file. An id on one side only, or twice on one side, is a ValueError that names it.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple, TypeAlias, TypeVar

from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU
from scipy.stats import pearsonr
from sklearn.metrics import accuracy_score, matthews_corrcoef

Value = TypeVar("Value")
ById: TypeAlias = Mapping[str, Value] | Iterable[tuple[str, Value]]

_NAMED = 5  # ids in a message


class Rouge(NamedTuple):
    """Mean F-measures, 0 to 100."""

    rouge1: float
    rouge2: float
    rougeL: float


def bleu(
    hypotheses: ById[str],
    references: ById[str | Sequence[str]],
    *,
    lowercase: bool = False,
    tokenize: str = "13a",
) -> float:
    """Corpus BLEU-4 of sacrebleu, 0 to 100; an id may have any number of references, a lone text is one.

    lowercase  compare without case
    tokenize   "13a" (mteval's, the usual one), "intl", "char", "none" …, as sacrebleu names them

    An empty hypothesis counts as nothing said. 0 when no hypothesis has a word of its references, or four tokens.
    """
    texts, answers = _texts(hypotheses, references)
    # sacrebleu wants the first references of all, then the second ones, …; None where there is none
    streams = [list(stream) for stream in zip_longest(*answers)]
    metric = BLEU(lowercase=lowercase, tokenize=tokenize)
    return float(metric.corpus_score(texts, streams).score)


def rouge(hypotheses: ById[str], references: ById[str | Sequence[str]], *, stem: bool = True) -> Rouge:
    """ROUGE-1, -2 and -L: the mean over ids of the F-measure against the best of an id's references.

    stem  compare stems of English words (Porter's), as summarisation results are usually reported

    Words are runs of a-z and 0-9 after lower-casing: other alphabets are not seen. An empty hypothesis scores 0.
    """
    texts, answers = _texts(hypotheses, references)
    names = Rouge._fields
    scorer = RougeScorer(names, use_stemmer=stem)
    scores = [scorer.score_multi(answer, text) for text, answer in zip(texts, answers, strict=True)]
    return Rouge(*(100 * math.fsum(score[name].fmeasure for score in scores) / len(scores) for name in names))


def accuracy(hypotheses: ById[str | int], references: ById[str | int]) -> float:
    """The share of ids, 0 to 1, whose labels are equal."""
    found, expected = _labels(hypotheses, references)
    return float(accuracy_score(expected, found))


def matthews(hypotheses: ById[str | int], references: ById[str | int]) -> float:
    """Matthews correlation coefficient, −1 to 1, for two or more classes.

    0 where it is not defined: all hypotheses, or all references, are one class.
    """
    found, expected = _labels(hypotheses, references)
    if len(set(found)) == 1 or len(set(expected)) == 1:
        return 0.0
    return float(matthews_corrcoef(expected, found))


def pearson(hypotheses: ById[float], references: ById[float]) -> float:
    """Pearson correlation, −1 to 1. 0 where it is not defined: all hypotheses, or all references, are one number."""
    found, expected = by_id(hypotheses, "hypotheses"), by_id(references, "references")
    ids = _same_ids(found, expected, "hypotheses", "references")
    for name, values in (("hypotheses", found), ("references", expected)):
        for key in ids:
            _require(math.isfinite(values[key]), f"{name}[{key!r}]: got {values[key]}, expected a finite number")
    x, y = ([float(values[key]) for key in ids] for values in (found, expected))
    if len(set(x)) == 1 or len(set(y)) == 1:
        return 0.0
    return float(pearsonr(x, y).statistic)


def perplexity(nats: ById[float], tokens: ById[int]) -> float:
    """exp of the mean loss per token: summed cross-entropies in nats over numbers of scored tokens, each by id.

    Infinite when a loss is, or when it is too large for a float.
    """
    losses, counts = by_id(nats, "nats"), by_id(tokens, "tokens")
    ids = _same_ids(losses, counts, "nats", "tokens")
    for key in ids:
        _require(losses[key] >= 0, f"nats[{key!r}]: got {losses[key]}, expected 0 or more")
        _require(
            isinstance(counts[key], int) and counts[key] >= 1,
            f"tokens[{key!r}]: got {counts[key]!r}, expected a whole number of at least 1; leave the id out",
        )
    try:
        return math.exp(math.fsum(losses.values()) / sum(counts.values()))
    except OverflowError:
        return math.inf


def by_id(values: ById[Value], name: str = "values") -> dict[str, Value]:
    """{id: value}. Raises ValueError when an id comes twice, or there is none; `name` is for the message."""
    pairs = values.items() if isinstance(values, Mapping) else values
    found: dict[str, Value] = {}
    twice = []
    for key, value in pairs:
        if key in found:
            twice.append(key)
        found[key] = value
    _require(not twice, f"{name}: got {_some(twice)} more than once, expected every id once; drop the repetitions")
    _require(bool(found), f"{name}: got no id, expected at least one")
    return found


def _same_ids(one: Mapping[str, Any], other: Mapping[str, Any], first: str, second: str) -> list[str]:
    """The ids of both, sorted, so that no result depends on their order."""
    for holder, lacking, has, lacks in ((one, other, first, second), (other, one, second, first)):
        missing = [key for key in holder if key not in lacking]
        _require(not missing, f"{lacks}: lacks {_some(missing)}, which {has} has, expected the same ids on both sides")
    return sorted(one)


def _texts(hypotheses: ById[str], references: ById[str | Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    """Hypotheses and the references of each, in one order of ids."""
    found, expected = by_id(hypotheses, "hypotheses"), by_id(references, "references")
    ids = _same_ids(found, expected, "hypotheses", "references")
    answers = []
    for key in ids:
        came, answer = found[key], expected[key]
        _require(isinstance(came, str), f"hypotheses[{key!r}]: got {type(came).__name__}, expected a text")
        answers.append([answer] if isinstance(answer, str) else list(answer))
        # sacrebleu takes an empty reference for a missing one
        _require(
            bool(answers[-1]) and all(isinstance(text, str) and text.strip() for text in answers[-1]),
            f"references[{key!r}]: got {answer!r}, expected a text that is not empty, or several; leave the id out",
        )
    return [found[key] for key in ids], answers


def _labels(hypotheses: ById[Any], references: ById[Any]) -> tuple[list[Any], list[Any]]:
    """Hypotheses and references in one order of ids; ValueError for labels of several types, which never are equal."""
    found, expected = by_id(hypotheses, "hypotheses"), by_id(references, "references")
    ids = _same_ids(found, expected, "hypotheses", "references")
    kinds = {type(values[key]).__name__ for values in (found, expected) for key in ids}
    _require(
        kinds in ({"str"}, {"int"}, {"bool"}),
        f"hypotheses and references: got labels of type {', '.join(sorted(kinds))}, expected str or int on both sides; "
        "convert them",
    )
    return [found[key] for key in ids], [expected[key] for key in ids]


def _some(ids: Sequence[str]) -> str:
    more = f" and {len(ids) - _NAMED} more" if len(ids) > _NAMED else ""
    return ", ".join(repr(key) for key in ids[:_NAMED]) + more


def _require(good: bool, message: str) -> None:
    if not good:
        raise ValueError(message)
