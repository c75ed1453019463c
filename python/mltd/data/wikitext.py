"""WikiText: articles one after another, each under a heading ` = title = `. One article is one task."""

from __future__ import annotations

import re
from pathlib import Path

from mltd.data.files import DataError, lines, read_text
from mltd.data.records import Record

_HEADING = re.compile(r" = ([^=].*?) = ?")


def read_wikitext(path: Path | str) -> dict[str, tuple[Record, ...]]:
    """Title -> the article, its headings and empty lines included; `pooled` makes one domain of them.

    A second article of one title is named `title (2)`. Raises DataError where text comes before the first heading.
    """
    found: dict[str, list[str]] = {}
    title: str | None = None
    text = lines(read_text(path))
    for number, line in enumerate(text, 1):
        heading = _HEADING.fullmatch(line)
        # a heading stands between empty lines, an equation does not
        if heading and all(not text[i].strip() for i in (number - 2, number) if 0 <= i < len(text)):
            title = heading[1]
            copies = sum(known == title or known.startswith(f"{title} (") for known in found)
            title = title if title not in found else f"{title} ({copies + 1})"
            found[title] = []
        if title is not None:
            found[title].append(line)
        elif line.strip():
            raise DataError(f"{path}, line {number}: got {line[:40]!r}, expected the heading of an article, ' = … = '")
    if not found:
        raise DataError(f"{path}: has no article, expected headings as ' = title = '")
    return {title: (Record("", ("\n".join(body).strip(),), title),) for title, body in found.items()}
