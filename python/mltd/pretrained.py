"""Pretrained models by the settings of a run."""

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from safetensors import SafetensorError
from transformers.utils import logging

from mltd.data.smollm2 import load_smollm2
from mltd.run_config import ModelConfig

SMOLLM2 = "smollm2"
CLASSES = {
    "causal": "AutoModelForCausalLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "classification": "AutoModelForSequenceClassification",
    "regression": "AutoModelForSequenceClassification",
}


class Pretrained(NamedTuple):
    """A model, and the names of its parameters that the directory lacks, as those of a new classification head are:
    they are random until something trains them."""

    model: Any
    random: tuple[str, ...]


def load_tokenizer(config: ModelConfig) -> Any:
    """The model's tokenizer; ValueError that says what is wrong with the directory."""
    if config.name == SMOLLM2:
        return load_smollm2(say=warnings.warn).tokenizer
    return _loaded(config, transformers.AutoTokenizer)


def load_model(
    config: ModelConfig, seed: int, classes: int | None = None, labels: Sequence[str] | None = None
) -> Pretrained:
    """The model in evaluation mode on its device.

    classes  outputs of a classification head; None: those of the model
    labels   their names
    seed     of what the directory lacks, such as a classification head

    ValueError that says what is wrong with the directory, or that there is no such device.
    """
    device = _device(config.device)
    options: dict[str, Any] = {"dtype": getattr(torch, config.dtype)}
    if config.attn_implementation is not None:
        options["attn_implementation"] = config.attn_implementation
    if classes is not None:
        options["num_labels"] = classes
    if labels is not None:
        options |= {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    if config.kind == "regression":
        options["num_labels"] = 1
    if config.name == SMOLLM2:
        config = ModelConfig(str(load_smollm2(say=warnings.warn).folder), config.kind)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        kind = getattr(transformers, CLASSES[config.kind])
        model, loading = _loaded(config, kind, output_loading_info=True, **options)
    lacked = set(loading["missing_keys"])
    random = tuple(name for name, _ in model.named_parameters() if name in lacked)
    return Pretrained(model.eval().to(device), random)


def _loaded(config: ModelConfig, kind: Any, **options: Any) -> Any:
    folder = Path(config.name)
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"model.name: {config.name!r} is no Hugging Face directory (it has no config.json), expected one, or "
            f"{SMOLLM2!r}"
        )
    logging.disable_progress_bar()  # of reading files, for a second or two
    try:
        return kind.from_pretrained(folder, local_files_only=True, **options)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        what = "tokenizer" if kind is transformers.AutoTokenizer else f"{config.kind} model"
        reason = str(error).partition("Model type should be one of")[0]  # a list of hundreds follows
        raise ValueError(f"model.name: the {what} in {config.name} cannot be loaded: {reason.strip()}") from None
    finally:
        logging.enable_progress_bar()


def _device(name: str) -> torch.device:
    if name == "auto":
        own = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # torchrun gives every process a GPU
        return torch.device(own if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"model.device: {name!r} cannot be used: {error}") from None
