"""Metrics against their definitions, written out, and what they say where there is little to say."""

import math
import random
from collections import Counter

import pytest

from mltd.metrics import accuracy, bleu, by_id, matthews, pearson, perplexity, rouge

WORDS = "the a cat dog sat ran on under mat tree and slept".split()


def ngrams(words, n):
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def bleu_by_definition(hypotheses, references):
    """Papineni et al. 2002: clipped counts of a whole corpus, the closest reference length, no smoothing."""
    hits, totals, ours, theirs = [0] * 4, [0] * 4, 0, 0
    for key, text in hypotheses.items():
        words, answers = text.split(), [answer.split() for answer in references[key]]
        ours += len(words)
        theirs += min((abs(len(answer) - len(words)), len(answer)) for answer in answers)[1]
        for n in range(1, 5):
            most = Counter()
            for answer in answers:
                most |= ngrams(answer, n)
            hits[n - 1] += (ngrams(words, n) & most).total()
            totals[n - 1] += ngrams(words, n).total()
    precision = math.exp(sum(math.log(hit / total) for hit, total in zip(hits, totals, strict=True)) / 4)
    return 100 * min(1.0, math.exp(1 - theirs / ours)) * precision


def corpus(seed, count=12):
    """Hypotheses with one to four references that share words with them, in another order of ids."""
    draw = random.Random(seed)

    def text():
        return " ".join(draw.choice(WORDS) for _ in range(draw.randint(5, 9)))

    references = {f"t/query[{i}]": [text() for _ in range(1 + i % 4)] for i in range(count)}
    hypotheses = {}
    for key in draw.sample(list(references), count):
        words = draw.choice(references[key]).split()
        words[draw.randrange(len(words))] = draw.choice(WORDS)
        hypotheses[key] = " ".join(words[: draw.randint(4, 9)])
    return hypotheses, references


@pytest.mark.parametrize("seed", range(4))
def test_bleu_is_its_definition_with_differing_numbers_of_references(seed):
    hypotheses, references = corpus(seed)
    expected = bleu_by_definition(hypotheses, references)
    assert bleu(hypotheses, references) == pytest.approx(expected, rel=1e-9)
    assert 5 < expected < 95
    first = {key: answers[0] for key, answers in references.items()}
    assert bleu(hypotheses, first) < expected - 1, "further references must matter"
    shifted = dict(zip(hypotheses, [*list(hypotheses.values())[1:], next(iter(hypotheses.values()))], strict=True))
    assert bleu(shifted, references) < expected - 1, "hypotheses of other ids must matter"


def test_bleu_of_nothing_everything_and_another_case():
    texts = {key: answers[0] for key, answers in corpus(0)[1].items()}
    assert bleu(texts, texts) == pytest.approx(100)
    assert bleu(dict.fromkeys(texts, ""), texts) == 0
    assert bleu({"x": "zzz yyy"}, {"x": "the cat sat on the mat"}) == 0
    shouted = {key: text.upper() for key, text in texts.items()}
    assert bleu(shouted, texts) == 0 and bleu(shouted, texts, lowercase=True) == pytest.approx(100)
    comma = {"x": "the cat, the dog and the mat"}
    apart = {"x": "the cat , the dog and the mat"}
    assert bleu(comma, apart) == pytest.approx(100) and bleu(comma, apart, tokenize="none") < 80


def longest_common(a, b):
    if not a or not b:
        return 0
    if a[-1] == b[-1]:
        return 1 + longest_common(a[:-1], b[:-1])
    return max(longest_common(a[:-1], b), longest_common(a, b[:-1]))


def f_measure(hits, found, expected):
    return 2 * hits / (found + expected) if hits else 0.0


@pytest.mark.parametrize("seed", range(2))
def test_rouge_is_its_definition_with_the_best_reference(seed):
    hypotheses, references = corpus(seed)
    sums = [0.0, 0.0, 0.0]
    for key, text in hypotheses.items():
        words, answers = text.split(), [answer.split() for answer in references[key]]
        for n in (1, 2):
            ours = ngrams(words, n)
            theirs = [ngrams(answer, n) for answer in answers]
            sums[n - 1] += max(f_measure((ours & them).total(), ours.total(), them.total()) for them in theirs)
        sums[2] += max(f_measure(longest_common(words, a), len(words), len(a)) for a in answers)
    found = rouge(hypotheses, references, stem=False)
    assert found == pytest.approx([100 * total / len(hypotheses) for total in sums], rel=1e-9)
    assert found.rouge1 > found.rougeL + 0.5 > found.rouge2 + 1, "three numbers that could not be mistaken for another"


def test_rouge_of_nothing_everything_and_stems():
    texts = {"x": "the cats were sleeping"}
    assert rouge(texts, texts) == (100, 100, 100)
    assert rouge({"x": ""}, texts) == (0, 0, 0)
    assert rouge({"x": "the cat were sleep"}, texts).rouge1 == 100
    assert rouge({"x": "the cat were sleep"}, texts, stem=False).rouge1 == 50


def test_accuracy_counts_equal_labels():
    references = {"a": "yes", "b": "no", "c": "yes", "d": "no"}
    assert accuracy({"d": "no", "c": "yes", "b": "yes", "a": "yes"}, references) == 0.75
    assert accuracy({"a": 1}, {"a": 1}) == 1 and accuracy({"a": 1}, {"a": 2}) == 0


def test_matthews_by_the_confusion_table():
    pairs = [(1, 1)] * 5 + [(0, 0)] * 7 + [(1, 0)] * 2 + [(0, 1)] * 3  # (found, expected)
    found = {str(i): pair[0] for i, pair in enumerate(pairs)}
    expected = {str(i): pair[1] for i, pair in enumerate(pairs)}
    by_hand = (5 * 7 - 2 * 3) / math.sqrt((5 + 2) * (5 + 3) * (7 + 2) * (7 + 3))
    assert matthews(found, expected) == pytest.approx(by_hand)
    inverted = {key: 1 - label for key, label in found.items()}
    assert matthews(inverted, expected) == pytest.approx(-by_hand)
    three = {str(i): "abc"[i % 3] for i in range(9)}
    assert matthews(three, three) == pytest.approx(1)


@pytest.mark.parametrize("found, expected", [("aaaa", "aaaa"), ("aaaa", "aabb"), ("aabb", "aaaa"), ("bbbb", "aaaa")])
@pytest.mark.filterwarnings("error")
def test_matthews_of_one_class_is_zero(found, expected):
    assert matthews(dict(zip("wxyz", found, strict=True)), dict(zip("wxyz", expected, strict=True))) == 0


def test_pearson_by_hand():
    x, y = [1.0, 2.0, 4.0, 7.0], [2.0, 1.0, 5.0, 6.0]
    mx, my = sum(x) / 4, sum(y) / 4
    products = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True))
    by_hand = products / math.sqrt(sum((a - mx) ** 2 for a in x) * sum((b - my) ** 2 for b in y))
    found = pearson(dict(zip("abcd", x, strict=True)), dict(reversed(list(zip("abcd", y, strict=True)))))
    assert found == pytest.approx(by_hand, rel=1e-12) and by_hand < 0.95


@pytest.mark.parametrize("found, expected", [([1, 1, 1], [1, 2, 3]), ([1, 2, 3], [2, 2, 2]), ([5], [3])])
@pytest.mark.filterwarnings("error")
def test_pearson_of_a_constant_is_zero(found, expected):
    ids = "xyz"[: len(found)]
    assert pearson(dict(zip(ids, found, strict=True)), dict(zip(ids, expected, strict=True))) == 0


def test_perplexity_weighs_tokens_alike():
    nats = {"a": 3 * math.log(2), "b": 1 * math.log(32)}
    assert perplexity(nats, {"b": 1, "a": 3}) == pytest.approx(4)  # (3·1 + 1·5) / 4 bits
    assert perplexity({"a": 0.0}, {"a": 2}) == 1
    assert perplexity({"a": 1e9}, {"a": 1}) == math.inf == perplexity({"a": math.inf}, {"a": 1})


METRICS = {
    "bleu": (bleu, "one two", "one two"),
    "rouge": (rouge, "one two", "one two"),
    "accuracy": (accuracy, "x", "x"),
    "matthews": (matthews, "x", "x"),
    "pearson": (pearson, 1.0, 2.0),
    "perplexity": (perplexity, 1.0, 2),
}


@pytest.mark.parametrize("metric", METRICS)
def test_ids_that_are_missing_or_twice_are_named(metric):
    function, one, other = METRICS[metric]
    with pytest.raises(ValueError, match=r"(hypotheses|nats): lacks 'late', which (references|tokens) has"):
        function({"a": one}, {"a": other, "late": other})
    with pytest.raises(ValueError, match=r"(references|tokens): lacks 'extra', which (hypotheses|nats) has"):
        function({"a": one, "extra": one}, {"a": other})
    with pytest.raises(ValueError, match=r"(hypotheses|nats): got 'a' more than once"):
        function([("a", one), ("a", one)], {"a": other})
    with pytest.raises(ValueError, match=r"(references|tokens): got 'a' more than once"):
        function({"a": one}, [("a", other), ("a", other)])
    with pytest.raises(ValueError, match=r"(hypotheses|nats): got no id"):
        function({}, {"a": other})
    assert function([("a", one)], [("a", other)]) == function({"a": one}, {"a": other})


def test_many_ids_are_not_all_listed():
    with pytest.raises(ValueError, match=r"'k0', 'k1', 'k2', 'k3', 'k4' and 3 more, which"):
        accuracy({"k": 1}, {f"k{i}": 1 for i in range(8)} | {"k": 1})
    assert by_id(iter([("b", 1), ("a", 2)])) == {"b": 1, "a": 2}


@pytest.mark.parametrize("metric", ["bleu", "rouge"])
@pytest.mark.parametrize("answer", ["", "  ", [], ["a text", ""], ["a text", None]], ids=repr)
def test_empty_references_are_named(metric, answer):
    with pytest.raises(ValueError, match=r"references\['x'\]: got"):
        METRICS[metric][0]({"x": "a text"}, {"x": answer})


def test_values_of_a_wrong_kind_are_named():
    with pytest.raises(ValueError, match=r"hypotheses\['x'\]: got NoneType, expected a text"):
        bleu({"x": None}, {"x": "a text"})
    with pytest.raises(ValueError, match="labels of type int, str"):
        accuracy({"x": "1"}, {"x": 1})
    with pytest.raises(ValueError, match=r"references\['x'\]: got nan"):
        pearson({"x": 1.0, "y": 2.0}, {"x": math.nan, "y": 1.0})
    with pytest.raises(ValueError, match=r"nats\['x'\]: got nan"):
        perplexity({"x": math.nan}, {"x": 1})
    with pytest.raises(ValueError, match=r"tokens\['x'\]: got 0"):
        perplexity({"x": 0.0}, {"x": 0})
