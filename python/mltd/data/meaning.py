"""Meaning representations to text: E2E restaurants, and the four domains of RNNLG."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from mltd.data.files import DataError, decode, lines, parse_json, read_archive
from mltd.data.records import Record, merged
from mltd.data.tables import Columns, read_csv

RNNLG_PARTS = ("train", "valid", "test")


def read_e2e(path: Path | str) -> dict[str, tuple[Record, ...]]:
    """One group "e2e" from a table of mr and ref: each meaning once, with all its texts as references."""
    return merged({"e2e": next(iter(read_csv(path, Columns(source="mr", target="ref")).values()))})


def read_rnnlg(path: Path | str, part: str) -> dict[str, tuple[Record, ...]]:
    """Domain ("hotel", "laptop", "restaurant", "tv") -> dialogue acts, each with the texts for it as references.

    part  "train", "valid" or "test" of the archive's `domain/part.json`: comment lines that begin with #, then a list
          of [act, text, text of a baseline system]
    """
    if part not in RNNLG_PARTS:
        raise ValueError(f"part: got {part!r}, expected one of {', '.join(map(repr, RNNLG_PARTS))}")
    found = {}
    for name, data in read_archive(path, f"/{part}.json").items():
        where = f"{path}: {name}"
        text = "\n".join("" if line.startswith("#") else line for line in lines(decode(data, where)))
        records = []
        for number, entry in enumerate(parse_json(text, where), 1):
            act, said = entry[:2] if isinstance(entry, list) and len(entry) >= 2 else ("", "")
            if not isinstance(act, str) or not isinstance(said, str) or not act.strip() or not said.strip():
                raise DataError(f"{where}, entry {number}: got {entry!r}, expected [act, text, …]")
            records.append(Record(act.strip(), (said.strip(),), str(number)))
        if not records:
            raise DataError(f"{where}: has no entry, expected a list of them")
        found[PurePosixPath(name).parent.name] = tuple(records)
    return merged(found)
