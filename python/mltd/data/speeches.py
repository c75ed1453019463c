"""Addresses of US presidents: plain text files `year-name.txt`. One speaker is one domain of text."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

from mltd.data.files import DataError, decode, read_archive
from mltd.data.records import Record


def read_speeches(path: Path | str) -> dict[str, tuple[Record, ...]]:
    """Speaker -> addresses out of an archive of `year-name.txt`.

    A name may stand for several people, as Roosevelt. Files that are not UTF-8, seven of the published ones, are read
    as Latin-1.
    """
    found: dict[str, list[Record]] = {}
    for name, data in read_archive(path, ".txt").items():
        stem = PurePosixPath(name).stem
        parts = re.fullmatch(r"\d{4}-([^-]+)(-\d)?", stem)
        text = decode(data, f"{path}: {name}", otherwise="latin-1").strip()
        if parts is None or not text:
            raise DataError(f"{path}: {name}: expected text in a file named as year-name.txt")
        found.setdefault(parts[1], []).append(Record("", (text,), stem))
    return {speaker: tuple(found[speaker]) for speaker in sorted(found)}
