"""What somebody wants, by label: BANKING77, CLINC150 with its ten domains, and SNIPS."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from mltd.data.files import DataError, decode, parse_json, read_archive, read_text
from mltd.data.records import Record
from mltd.data.tables import Columns, read_csv

CLINC150_PARTS = ("train", "val", "test")
SNIPS_PARTS = {"train": "_full.json", "validate": ".json"}


def read_banking77(path: Path | str) -> dict[str, tuple[Record, ...]]:
    """One group "banking77" from a table of text and category; `label_groups` makes tasks of its 77 labels."""
    return {"banking77": next(iter(read_csv(path, Columns(source="text", target="category")).values()))}


def read_clinc150(folder: Path | str, part: str) -> dict[str, tuple[Record, ...]]:
    """Domain -> queries with their intents, 15 a domain, from data_full.json.gz and domains.json.gz.

    part  "train", "val" or "test"; queries out of scope belong to no domain and are left out
    """
    if part not in CLINC150_PARTS:
        raise ValueError(f"part: got {part!r}, expected one of {', '.join(map(repr, CLINC150_PARTS))}")
    data, domains = (Path(folder) / name for name in ("data_full.json.gz", "domains.json.gz"))
    try:
        intents_of = parse_json(read_text(domains), str(domains))
        domain_of = {intent: domain for domain, intents in intents_of.items() for intent in intents}
        queries = parse_json(read_text(data), str(data))[part]
    except (AttributeError, KeyError, TypeError) as error:
        raise DataError(
            f"{folder}: expected domains.json.gz with domain -> intents, data_full.json.gz with {part!r} ({error!r})"
        ) from error
    found: dict[str, list[Record]] = {domain: [] for domain in domain_of.values()}
    for number, entry in enumerate(queries, 1):
        where = f"{data}: {part}, entry {number}"
        if not isinstance(entry, list) or len(entry) != 2 or not all(isinstance(x, str) and x.strip() for x in entry):
            raise DataError(f"{where}: got {entry!r}, expected [query, intent]")
        query, intent = entry
        if intent not in domain_of:
            raise DataError(f"{where}: got the intent {intent!r}, expected one that domains.json.gz has")
        found[domain_of[intent]].append(Record(query.strip(), (intent,), str(number)))
    return {domain: tuple(records) for domain, records in found.items() if records}


def read_snips(path: Path | str, part: str) -> dict[str, tuple[Record, ...]]:
    """One group "snips": queries with one of seven intents, from an archive of `intent/train_intent_full.json` and
    `intent/validate_intent.json`. Files that are not UTF-8, one of the published ones, are read as Latin-1.

    part  "train" or "validate"
    """
    if part not in SNIPS_PARTS:
        raise ValueError(f"part: got {part!r}, expected one of {', '.join(map(repr, SNIPS_PARTS))}")
    records = []
    for name, data in read_archive(path, SNIPS_PARTS[part]).items():
        place = PurePosixPath(name)
        if not place.name.startswith(f"{part}_"):
            continue
        where = f"{path}: {name}"
        intent = place.parent.name
        try:
            queries = parse_json(decode(data, where, otherwise="latin-1"), where)[intent]
            texts = ["".join(part["text"] for part in query["data"]).strip() for query in queries]
        except (KeyError, TypeError) as error:
            raise DataError(f"{where}: expected {{intent: [{{'data': [{{'text': …}}]}}]}} ({error!r})") from error
        for number, text in enumerate(texts, 1):
            if not text:
                raise DataError(f"{where}, entry {number}: expected a query with text")
            records.append(Record(text, (intent,), f"{intent}.{number}"))
    if not records:
        raise DataError(f"{path}: has no file named {part}_….json; is it another archive?")
    return {"snips": tuple(records)}
