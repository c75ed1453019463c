"""MASC, tagged: documents of many genres, spoken and written. One genre is one domain of text."""

from __future__ import annotations

from pathlib import Path

from mltd.data.files import DataError, decode, lines, read_archive
from mltd.data.records import Record

CATEGORIES = "categories.txt"


def read_masc(path: Path | str) -> dict[str, tuple[Record, ...]]:
    """Genre -> documents out of an archive with `word_TAG` tokens and the genre of each file in categories.txt.

    The words are joined by spaces, as they were tokenised; lines stay.
    """
    files = {name: decode(data, f"{path}: {name}") for name, data in read_archive(path, ".txt").items()}
    if CATEGORIES not in files:
        raise DataError(f"{path}: has no {CATEGORIES}, expected it to name the genre of each file")
    found: dict[str, list[Record]] = {}
    for number, line in enumerate(lines(files[CATEGORIES]), 1):
        name, _, genre = line.strip().rpartition(" ")
        if name not in files:
            raise DataError(f"{path}: {CATEGORIES}, line {number}: got {line!r}, expected a file and its genre")
        text = "\n".join(_words(line) for line in lines(files[name]) if line.strip())
        if not text.strip():
            raise DataError(f"{path}: {name}: expected text")
        found.setdefault(genre, []).append(Record("", (text,), name))
    return {genre: tuple(found[genre]) for genre in sorted(found)}


def _words(line: str) -> str:
    # a few tokens have no tag, and a few tags no word
    words = (token.rpartition("_")[0] if "_" in token else token for token in line.split())
    return " ".join(word for word in words if word)
