"""Books in markdown, a folder for each author: one author is one domain of text."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

from mltd.data.files import DataError, decode, read_archive
from mltd.data.records import Record

_TITLE_PAGE = re.compile(r"\A# Title:.*?^-{3,}\n", re.DOTALL | re.MULTILINE)


def read_books(path: Path | str) -> dict[str, tuple[Record, ...]]:
    """Author -> books out of an archive of `author/title.md`, the page with title, author and year left out."""
    found: dict[str, list[Record]] = {}
    for name, data in read_archive(path, ".md").items():
        place = PurePosixPath(name)
        text = _TITLE_PAGE.sub("", decode(data, f"{path}: {name}")).strip()
        if not place.parent.name or not text:
            raise DataError(f"{path}: {name}: expected a book with text in the folder of its author")
        found.setdefault(place.parent.name, []).append(Record("", (text,), place.stem))
    return {author: tuple(books) for author, books in found.items()}
