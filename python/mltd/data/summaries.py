"""Summarisation in three domains: scientific abstracts (SciTLDR), contracts, and reviews of a product (FewSum)."""

from __future__ import annotations

from pathlib import Path

from mltd.data.files import DataError, parse_json, read_text
from mltd.data.records import Record
from mltd.data.tables import Columns, csv_rows, grouped, read_jsonl

REVIEWS = tuple(f"rev{i}" for i in range(1, 9))
SUMMARIES = tuple(f"summ{i}" for i in range(1, 4))


def read_scitldr(path: Path | str) -> dict[str, tuple[Record, ...]]:
    """One group "science": abstracts of papers, each with one or several summaries of a sentence (.jsonl, .gz)."""
    return {"science": next(iter(read_jsonl(path, Columns(source="source", target="target")).values()))}


def read_contracts(path: Path | str) -> dict[str, tuple[Record, ...]]:
    """One group "contracts": clauses and what they say in plain English, from a JSON object of objects."""
    path = Path(path)
    table = parse_json(read_text(path), str(path))
    if not isinstance(table, dict) or not all(isinstance(row, dict) for row in table.values()):
        raise DataError(f"{path}: got a {type(table).__name__}, expected a JSON object of objects")
    columns = Columns(source="original_text", target="reference_summary")
    rows = ((f"{path.name}:{name}", row) for name, row in table.items())
    return {"contracts": next(iter(grouped(rows, columns, path).values()))}


def read_fewsum(path: Path | str) -> dict[str, tuple[Record, ...]]:
    """Category -> products, each eight reviews, a line each, and three summaries, from a table with tabs."""
    path = Path(path)
    return grouped(csv_rows(path, "\t"), Columns(REVIEWS, SUMMARIES, "cat"), path)
