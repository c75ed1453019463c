"""What tests of the readers share: small archives, a tokenizer that frames texts, and where the real corpora lie."""

import gzip
import io
import os
import tarfile
import zipfile
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from mltd.data.records import Record
from tests.mltd.demo_parts import LETTERS


def corpus(name: str) -> Path:
    """The folder of a real corpus; the test is skipped where it is not there."""
    root = Path(os.environ.get("TARP_DATA", Path(__file__).parents[2].parent / "shared" / "data"))
    if not (root / name).is_dir():
        pytest.skip(f"no real data at {root / name}")
    return root / name


def write_tar(path: Path, files: dict[str, str | bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            data = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def write_zip(path: Path, files: dict[str, str | bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def write(path: Path, text: str) -> Path:
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def pairs(*texts: tuple[str, str]) -> tuple[Record, ...]:
    return tuple(Record(source, (target,), str(i)) for i, (source, target) in enumerate(texts))


def framed_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """One token a letter; a text begins with <s> and ends with </s>, as encoders want it."""
    pieces = ["<unk>", "<s>", "</s>", *LETTERS]
    backend = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, **{"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", **special}
    )
