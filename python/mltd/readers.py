"""READERS by the names that `data.reader` has, and what each of them needs beside data.path."""

from collections.abc import Callable, Sequence
from pathlib import Path

from mltd.data.books import read_books
from mltd.data.chatterbot import has_words, read_topics
from mltd.data.dialogue import Dialogue, by_persona
from mltd.data.intents import CLINC150_PARTS, SNIPS_PARTS, read_banking77, read_clinc150, read_snips
from mltd.data.masc import read_masc
from mltd.data.meaning import RNNLG_PARTS, read_e2e, read_rnnlg
from mltd.data.persona_chat import read_convai2, read_personachat_csv, read_synthetic_persona_chat
from mltd.data.records import Groups, numbered
from mltd.data.reviews import read_movie_reviews, read_product_reviews, read_sentences
from mltd.data.speeches import read_speeches
from mltd.data.summaries import read_contracts, read_fewsum, read_scitldr
from mltd.data.tables import Columns, read_csv, read_dataset, read_jsonl
from mltd.data.triples import WEBNLG_PARTS, read_dart_json, read_dart_xml, read_webnlg
from mltd.data.wikitext import read_wikitext
from mltd.run_config import DataConfig

TABLES: dict[str, Callable[[Path, Columns], Groups]] = {"jsonl": read_jsonl, "csv": read_csv, "dataset": read_dataset}
"""Formats with named columns: `data.columns` says which are what."""

CORPORA: dict[str, Callable[[Path], Groups]] = {
    "banking77": read_banking77,
    "books": read_books,
    "contracts": read_contracts,
    "dart-json": read_dart_json,
    "dart-xml": read_dart_xml,
    "e2e": read_e2e,
    "fewsum": read_fewsum,
    "masc": read_masc,
    "movie-reviews": read_movie_reviews,
    "product-reviews": read_product_reviews,
    "scitldr": read_scitldr,
    "sentences": read_sentences,
    "speeches": read_speeches,
    "wikitext": read_wikitext,
}
"""Published corpora, each at data.path as its reader says."""

PARTED: dict[str, tuple[Callable[[Path, str], Groups], Sequence[str]]] = {
    "clinc150": (read_clinc150, CLINC150_PARTS),
    "rnnlg": (read_rnnlg, RNNLG_PARTS),
    "snips": (read_snips, tuple(SNIPS_PARTS)),
    "webnlg": (read_webnlg, tuple(WEBNLG_PARTS)),
}
"""Published corpora in parts, with the names of these: `data.part` chooses one."""

DIALOGUES: dict[str, Callable[[Path], Sequence[Dialogue]]] = {
    "convai2": read_convai2,
    "personachat-csv": read_personachat_csv,
    "synthetic-persona-chat": read_synthetic_persona_chat,
}
"""Persona-Chat: one persona is one task, one dialogue a unit, and `data.history` says how much of it is read.

In the synthetic one each conversation is in two personas' tasks, from either side: what a held-out persona says can be
read in training, though not learnt to be said."""


def _topics(folder: Path | None) -> Groups:
    return {name: tuple(filter(has_words, records)) for name, records in read_topics(folder).items()}


PACKAGED: dict[str, Callable[[Path | None], Groups]] = {"chatterbot": _topics}
"""Corpora out of a Python package; data.path is not needed."""

READERS = (*TABLES, *CORPORA, *PARTED, *DIALOGUES, *PACKAGED)


def read_groups(data: DataConfig) -> Groups:
    """The records that data.reader reads at data.path; ValueError or OSError that names the setting or the file."""
    if data.reader not in READERS:
        raise ValueError(f"data.reader: got {data.reader!r}, expected one of {', '.join(READERS)}")
    if data.history is not None and data.reader not in DIALOGUES:
        raise ValueError(
            f"data.history: got {data.history}, but the reader {data.reader!r} has no dialogues of personas, as "
            f"{', '.join(DIALOGUES)} have; leave it out"
        )
    if data.part is not None and data.reader not in PARTED:
        raise ValueError(
            f"data.part: got {data.part!r}, but the reader {data.reader!r} has no parts to choose from, as "
            f"{', '.join(PARTED)} have; leave it out"
        )
    path = None if data.path is None else Path(data.path)
    if data.reader in PACKAGED:
        return PACKAGED[data.reader](path)
    if path is None:
        raise ValueError("data.path: is missing; set it in the file or with --set data.path=...")
    if data.reader in TABLES:
        return TABLES[data.reader](path, columns_of(data))
    if data.reader in DIALOGUES:
        # numbers, as in the experiments: the names of tasks quote nobody's persona
        return numbered(by_persona(DIALOGUES[data.reader](path), history=data.history), "persona")
    if data.reader in PARTED:
        read, parts = PARTED[data.reader]
        if data.part is None or data.part not in parts:
            got = "is missing" if data.part is None else f"got {data.part!r}"
            raise ValueError(
                f"data.part: {got}, expected one of {', '.join(map(repr, parts))}, the parts that the reader "
                f"{data.reader!r} has"
            )
        return read(path, data.part)
    return CORPORA[data.reader](path)


def columns_of(data: DataConfig) -> Columns:
    columns = data.columns
    return Columns(columns.source, columns.target, columns.task, columns.unit)
