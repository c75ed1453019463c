"""Tables with named columns as groups of records: JSON lines, CSV and TSV, Hugging Face data sets.

A column's value is text, a number, a truth value or a list of texts; an empty one is an error that names its place.
CSV is read by the standard library, because pandas and `datasets` take words such as NA and None for missing values.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mltd.data.files import DataError, lines, parse_json, read_text
from mltd.data.records import Record

if TYPE_CHECKING:
    from datasets import Dataset

csv.field_size_limit(2**31 - 1)  # a field may hold a whole document


class Columns(NamedTuple):
    """Which columns are what.

    source  the column that is read; several are joined by line breaks, the texts of a list by spaces. None: no source,
            as for language modelling
    target  the column to be predicted; several, or a list, are several references
    group   the column whose value names the task; None: all rows are one task, named after the file
    unit    the column whose value says what must stay together, as the number of a dialogue; None: every row alone
    """

    source: str | Sequence[str] | None
    target: str | Sequence[str]
    group: str | None = None
    unit: str | None = None


Row = tuple[str, Mapping[str, Any]]
"""Where a row stands, "file:line", and its values by column."""


def read_jsonl(path: Path | str, columns: Columns) -> dict[str, tuple[Record, ...]]:
    """A file of one JSON object a line (.jsonl, .jsonl.gz) as groups of records. Raises DataError."""
    return grouped(jsonl_rows(Path(path)), columns, Path(path))


def read_csv(
    path: Path | str, columns: Columns, delimiter: str | None = None, quoting: bool = True
) -> dict[str, tuple[Record, ...]]:
    """A table with a line of headings (.csv, .tsv, also .gz) as groups of records. Raises DataError.

    delimiter  default: a tab where the name says .tsv, otherwise a comma
    quoting    False: a quotation mark is a sign like any other
    """
    return grouped(csv_rows(Path(path), delimiter, quoting), columns, Path(path))


def read_dataset(data: Dataset | Path | str, columns: Columns) -> dict[str, tuple[Record, ...]]:
    """A Hugging Face `datasets.Dataset`, or the folder of one that `save_to_disk` wrote, as groups of records.

    A column of class labels gives their names. Raises DataError, also for a DatasetDict: choose a split of it.
    """
    from datasets import ClassLabel, Dataset, load_from_disk

    place = Path(data) if isinstance(data, (str, Path)) else Path("dataset")
    table = load_from_disk(str(data)) if isinstance(data, (str, Path)) else data
    if not isinstance(table, Dataset):
        splits = f" with the splits {', '.join(map(repr, table))}" if isinstance(table, dict) else ""
        raise DataError(f"{place}: got a {type(table).__name__}{splits}, expected a Dataset; choose a split")
    names = {column: feature for column, feature in table.features.items() if isinstance(feature, ClassLabel)}

    def rows() -> Iterator[Row]:
        for i, row in enumerate(table):
            # -1 is the label that `datasets` gives to rows of a test set without one
            named = {column: names[column].int2str(row[column]) for column in names if row[column] not in (None, -1)}
            yield f"{place.name}:{i}", {**row, **dict.fromkeys(names), **named}

    return grouped(rows(), columns, place)


def jsonl_rows(path: Path) -> Iterator[Row]:
    for number, line in enumerate(lines(read_text(path)), 1):
        row = parse_json(line, f"{path}, line {number}") if line.strip() else None
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: got {line[:40]!r}, expected a JSON object {{...}}")
        yield f"{path.name}:{number}", row


def csv_rows(path: Path, delimiter: str | None = None, quoting: bool = True) -> Iterator[Row]:
    if delimiter is None:
        delimiter = "\t" if ".tsv" in path.suffixes else ","
    reader = csv.reader(
        io.StringIO(read_text(path), newline=""),
        delimiter=delimiter,
        quoting=csv.QUOTE_MINIMAL if quoting else csv.QUOTE_NONE,
        strict=True,
    )
    headings: list[str] | None = None
    began = 1
    try:
        for values in reader:
            if headings is None:
                headings = values
            elif values:  # the reader's word for an empty line is no value at all
                if len(values) != len(headings):
                    raise DataError(
                        f"{path}, line {began}: got {len(values)} values, expected {len(headings)}, one for each of "
                        f"{headings}; quote values that hold a {delimiter!r}"
                    )
                yield f"{path.name}:{began}", dict(zip(headings, values, strict=True))
            began = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}, line {began}: expected CSV ({error})") from error


def grouped(rows: Iterable[Row], columns: Columns, path: Path) -> dict[str, tuple[Record, ...]]:
    """Rows as records by task; DataError that names the place and the column for a value that is missing or empty."""
    sources = _several(columns.source)
    targets = _several(columns.target)
    found: dict[str, list[Record]] = {}
    for place, row in rows:
        where = f"{path.parent / place}"
        source = "\n".join(_joined(row, column, where) for column in sources)
        references = tuple(text for column in targets for text in texts(row, column, where))
        name = path.name.partition(".")[0] if columns.group is None else one_text(row, columns.group, where)
        unit = "" if columns.unit is None else one_text(row, columns.unit, where)
        found.setdefault(name, []).append(Record(source, references, place, unit))
    if not found:
        raise DataError(f"{path}: has no row, expected at least one")
    return {name: tuple(records) for name, records in found.items()}


def texts(row: Mapping[str, Any], column: str, where: str) -> list[str]:
    """The texts of one value, at least one and none of them empty."""
    if column not in row:
        raise DataError(f"{where}: no column {column!r}, expected one; the columns are {list(row)}")
    value = row[column]
    found = [_text(item) for item in value] if isinstance(value, (list, tuple)) else [_text(value)]
    if not found or not all(found):
        raise DataError(f"{where}: column {column!r} is {value!r}, expected text; repair the row or leave it out")
    return found


def _joined(row: Mapping[str, Any], column: str, where: str) -> str:
    """The texts of a value that is read, the empty ones of a list of sentences left out."""
    value = row.get(column)
    if isinstance(value, (list, tuple)):
        row = {column: [item for item in value if _text(item)]}
    return " ".join(texts(row, column, where))


def one_text(row: Mapping[str, Any], column: str, where: str) -> str:
    """The text of a value that is not a list."""
    found = texts(row, column, where)
    if isinstance(row[column], (list, tuple)):
        raise DataError(f"{where}: column {column!r} is a list, expected one text")
    return found[0]


def _text(value: Any) -> str:
    """A plain value as text; "" for what is none."""
    if isinstance(value, float) and math.isnan(value):
        return ""
    return str(value).strip() if isinstance(value, (str, int, float)) else ""


def _several(columns: str | Sequence[str] | None) -> Sequence[str]:
    if columns is None:
        return ()
    return (columns,) if isinstance(columns, str) else columns
