"""Sets of triples to text, as XML of the WebNLG challenge and as JSON of DART."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from mltd.data.files import DataError, decode, parse_json, read_archive, read_text
from mltd.data.records import Record

WEBNLG_PARTS = {
    "train": ("train/", ""),
    "dev": ("dev/", ""),
    "test": ("test/", "testdata_with_lex.xml"),
    "test_unseen": ("test/", "testdata_unseen_with_lex.xml"),
}


def read_webnlg(path: Path | str, part: str) -> dict[str, tuple[Record, ...]]:
    """Category -> entries of one part of the challenge's archive, with all texts of an entry as its references.

    part  "train", "dev", "test", or "test_unseen", the entries of "test" whose categories are not in "train"
    """
    if part not in WEBNLG_PARTS:
        raise ValueError(f"part: got {part!r}, expected one of {', '.join(map(repr, WEBNLG_PARTS))}")
    folder, file = WEBNLG_PARTS[part]
    found: dict[str, list[Record]] = {}
    for name, data in read_archive(path, file or ".xml").items():
        place = PurePosixPath(name)
        if f"{folder}" in f"{place.parent}/":
            for category, _, record in _entries(decode(data, f"{path}: {name}"), f"{path}: {name}", place.stem):
                found.setdefault(category, []).append(record)
    if not found:
        raise DataError(f"{path}: has no entry of {part!r}; is it another archive?")
    return {category: tuple(found[category]) for category in sorted(found)}


def read_dart_xml(path: Path | str) -> dict[str, tuple[Record, ...]]:
    """Source of the texts ("e2e", "WikiSQL_lily", …) -> entries, from XML in WebNLG's format.

    An entry with texts from several sources is in each of them with the texts from there.
    """
    found: dict[str, list[Record]] = {}
    for _, comments, record in _entries(read_text(path), str(path), ""):
        for source in dict.fromkeys(comments):
            own = tuple(text for text, comment in zip(record.references, comments, strict=True) if comment == source)
            found.setdefault(source, []).append(record._replace(references=own))
    return {source: tuple(records) for source, records in found.items()}


def read_dart_json(path: Path | str) -> dict[str, tuple[Record, ...]]:
    """Source of the texts -> entries, as `read_dart_xml`, from a list of {"tripleset", "annotations"}."""
    entries = parse_json(read_text(path), str(path))
    found: dict[str, list[Record]] = {}
    for number, entry in enumerate(entries if isinstance(entries, list) else [entries], 1):
        where = f"{path}, entry {number}"
        try:
            triples = [[str(part) for part in triple] for triple in entry["tripleset"]]
            annotations = [(str(one["source"]), one["text"].strip()) for one in entry["annotations"]]
        except (AttributeError, KeyError, TypeError) as error:
            raise DataError(
                f"{where}: expected an object with tripleset and annotations of source and text ({error!r})"
            ) from error
        everything = _record(linearised(triples, where), tuple(text for _, text in annotations), str(number), where)
        for name in dict.fromkeys(name for name, _ in annotations):
            references = tuple(text for other, text in annotations if other == name)
            found.setdefault(name, []).append(everything._replace(references=references))
    if not found:
        raise DataError(f"{path}: has no entry, expected a list of them")
    return {name: tuple(records) for name, records in found.items()}


def linearised(triples: Iterable[Sequence[str]], where: str) -> str:
    """Triples as a line of text, `subject : predicate : object | …`, as in the published comparisons on these data."""
    parts = [[part.strip() for part in triple] for triple in triples]
    if not parts or not all(len(triple) == 3 and all(triple) for triple in parts):
        raise DataError(f"{where}: got the triples {parts}, expected at least one, each of three texts")
    return " | ".join(" : ".join(triple) for triple in parts)


def _entries(text: str, place: str, prefix: str) -> list[tuple[str, tuple[str, ...], Record]]:
    """(category, comments on the references, record) of each entry."""
    try:
        root = ElementTree.fromstring(text.encode())
    except ElementTree.ParseError as error:
        raise DataError(f"{place}: expected XML ({error})") from error
    made = []
    for number, entry in enumerate(root.iter("entry"), 1):
        where = f"{place}, entry {number}"
        triples = [(triple.text or "").split(" | ") for triple in entry.iterfind("modifiedtripleset/mtriple")]
        said = [(_plain(lex), lex.get("comment", "")) for lex in entry.iterfind("lex")]
        said = [(text, comment) for text, comment in said if text] or said  # one text of DART's test part is empty
        id = f"{prefix}.{number}" if prefix else str(number)
        record = _record(linearised(triples, where), tuple(text for text, _ in said), id, where)
        made.append((_category(entry, where), tuple(comment for _, comment in said), record))
    if not made:
        raise DataError(f"{place}: has no entry, expected <entry> elements")
    return made


def _plain(element: Any) -> str:
    return " ".join((element.text or "").split())


def _category(entry: Any, where: str) -> str:
    category = entry.get("category")
    if not category:
        raise DataError(f"{where}: has no category, expected one to name the task")
    return category


def _record(source: str, references: tuple[str, ...], id: str, where: str) -> Record:
    if not references or not all(references):
        raise DataError(f"{where}: got the texts {references}, expected at least one and none of them empty")
    return Record(source, references, id)
