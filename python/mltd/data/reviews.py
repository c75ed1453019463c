"""Reviews and their sentiment, as the corpora that come with NLTK: whole documents, sentences, and products."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

from mltd.data.files import DataError, decode, lines, read_archive
from mltd.data.records import Record

POSITIVE, NEGATIVE = "positive", "negative"

_DOCUMENTS = {"pos": POSITIVE, "neg": NEGATIVE}
_SENTENCES = {
    "rt-polarity.pos": POSITIVE,
    "rt-polarity.neg": NEGATIVE,
    "quote.tok.gt9.5000": "subjective",
    "plot.tok.gt9.5000": "objective",
    "IntegratedPros.txt": POSITIVE,
    "IntegratedCons.txt": NEGATIVE,
}
_MARKED = re.compile(r"(?P<marks>[^#]*)##(?P<text>.*)|(?P<other>.*\])\s*#?(?P<rest>.*)")
_OPINION = re.compile(r"\[([+-])\d?\]")


def read_movie_reviews(path: Path | str) -> dict[str, tuple[Record, ...]]:
    """One group "movies": whole reviews, each positive or negative, from an archive of `pos/…txt` and `neg/…txt`."""
    records = []
    for name, data in read_archive(path, ".txt").items():
        label = _DOCUMENTS.get(PurePosixPath(name).parent.name)
        if label is not None:
            text = decode(data, f"{path}: {name}").strip()
            if not text:
                raise DataError(f"{path}: {name}: expected text")
            records.append(Record(text, (label,), PurePosixPath(name).stem))
    return _group(path, "movies", records)


def read_sentences(path: Path | str) -> dict[str, tuple[Record, ...]]:
    """One group, named after the archive, of sentences with two labels, a line each: the corpora sentence_polarity and
    pros_cons (positive, negative) and subjectivity (subjective, objective).

    Files that are not UTF-8 are read as Latin-1; lines without text, eight of pros_cons, are left out.
    """
    records = []
    for name, data in read_archive(path).items():
        label = _SENTENCES.get(PurePosixPath(name).name)
        if label is not None:
            for number, line in enumerate(lines(decode(data, f"{path}: {name}", otherwise="latin-1")), 1):
                text = re.sub(r"</?(Pros|Cons)>", "", line).strip()
                if text:
                    records.append(Record(text, (label,), f"{label}.{number}"))
    return _group(path, Path(path).stem, records)


def read_product_reviews(path: Path | str) -> dict[str, tuple[Record, ...]]:
    """Product -> sentences that say something positive or negative about it, from an archive of annotated reviews.

    A line is `feature[+2], other feature[-1]##sentence`; the signs are the label. Sentences with both signs or with
    none are left out, as are titles, the files' heads, and what a sentence goes on with after a line break.
    """
    found: dict[str, tuple[Record, ...]] = {}
    for name, data in read_archive(path, ".txt").items():
        product = PurePosixPath(name).stem
        if product == "README":
            continue
        records = []
        for number, line in enumerate(lines(decode(data, f"{path}: {name}", otherwise="latin-1")), 1):
            if not line.strip() or line.startswith(("*", "[t]")):
                continue
            parts = _MARKED.fullmatch(line)
            if parts is None:
                continue
            signs = set(_OPINION.findall(parts["marks"] or parts["other"] or ""))
            text = (parts["text"] or parts["rest"] or "").strip()
            if len(signs) == 1 and text:
                label = POSITIVE if signs == {"+"} else NEGATIVE
                records.append(Record(text, (label,), str(number)))
        found |= _group(f"{path}: {name}", product, records)
    return found


def _group(place: Path | str, name: str, records: list[Record]) -> dict[str, tuple[Record, ...]]:
    labels = {record.target for record in records}
    if len(labels) < 2:
        raise DataError(f"{place}: got the labels {sorted(labels)}, expected two; is it another file?")
    return {name: tuple(records)}
