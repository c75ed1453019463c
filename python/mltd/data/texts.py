"""Plain text files: unlabelled text of a domain."""

from __future__ import annotations

from pathlib import Path

from mltd.data.files import DataError, read_text
from mltd.data.records import Record

ENDINGS = (".txt", ".txt.gz")


def read_texts(path: Path | str) -> dict[str, tuple[Record, ...]]:
    """One group "text" with a record for each file: the one at `path`, or those in that folder and below it whose names
    end in .txt or .txt.gz, in order of name. Files without text are left out.

    Raises DataError where there is none.
    """
    path = Path(path)
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.name.endswith(ENDINGS))
    texts = {file.relative_to(path).as_posix() if file != path else file.name: read_text(file) for file in files}
    records = tuple(Record("", (text,), name) for name, text in texts.items() if text.strip())
    if not records:
        raise DataError(f"{path}: has no text, expected a text file or a folder of files that end in .txt or .txt.gz")
    return {"text": records}
