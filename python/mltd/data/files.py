"""Text files as they lie on disk: plain or gzipped, or in a tar or zip archive that is read in place."""

from __future__ import annotations

import gzip
import json
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class DataError(ValueError):
    """A data file that cannot be used; the message names the file, the place in it and what was expected there."""


def read_text(path: Path | str) -> str:
    """The text of a UTF-8 file, gunzipped where the name ends in .gz."""
    path = Path(path)
    try:
        data = path.read_bytes()
        if path.suffix == ".gz":
            data = gzip.decompress(data)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: expected a whole gzip file ({error}); fetch it again") from error
    return decode(data, str(path))


def read_archive(path: Path | str, ending: str = "") -> dict[str, bytes]:
    """Name -> content of the files in a .tar.gz or .zip whose names end so, in order of name; nothing is unpacked.

    Raises DataError where the archive is damaged or has no such file.
    """
    path = Path(path)
    try:
        found = dict(sorted(_zipped(path, ending) if path.suffix == ".zip" else _tarred(path, ending)))
    except (EOFError, gzip.BadGzipFile, zlib.error, tarfile.TarError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: expected a whole archive ({error}); fetch it again") from error
    if not found:
        raise DataError(f"{path}: has no file that ends in {ending!r}; is it another archive?")
    return found


def decode(data: bytes, place: str, otherwise: str | None = None) -> str:
    """UTF-8 text, or text in the encoding `otherwise` where the corpus is known to mix the two."""
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        if otherwise is not None:
            return data.decode(otherwise).replace("\r\n", "\n")
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{place}, line {line}: expected UTF-8 text ({error.reason}); convert the file") from error


def parse_json(text: str, place: str) -> Any:
    """Parsed JSON; DataError that names the place."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{place}, line {error.lineno}: expected JSON ({error.msg})") from error


def lines(text: str) -> list[str]:
    """The lines of a text, ended by line feeds only: str.splitlines also cuts at signs that stand within sentences."""
    return text.removesuffix("\n").split("\n") if text else []


def _zipped(path: Path, ending: str) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if not member.is_dir() and member.filename.endswith(ending):
                yield member.filename, archive.read(member)


def _tarred(path: Path, ending: str) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(path) as archive:
        for member in archive:
            file = archive.extractfile(member) if member.name.endswith(ending) else None
            if file is not None:
                yield member.name, file.read()
