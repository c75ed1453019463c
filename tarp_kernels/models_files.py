"""Adapters on disk: a JSON description and the tensors that it names, written so that a crash leaves a whole pair."""

import contextlib
import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tarp_kernels.files import write_atomically
from tarp_kernels.models import base_parameters, build, install, is_adapted, tarp_parameters
from tarp_kernels.nn import TarpConfig
from tarp_kernels.nn.cell_beside import CellBeside
from tarp_kernels.nn.linear import TarpLayer

DESCRIPTION = "tarp.json"
FORMAT, FORMAT_VERSION = "tarp_kernels adapter", 1
_SAMPLES = 16  # per base parameter: the fingerprint of a model with 500 tensors reads 8,000 numbers
_ROUNDINGS = (torch.float32, torch.bfloat16, torch.float16)


def save_tarp(model: nn.Module, directory: str | os.PathLike) -> None:
    """Write the adapter of a model that `apply_tarp` adapted: tarp.json and one safetensors file that it names.

    The base model is not written, only a fingerprint of it: model type, names, shapes, and a hash of sampled weights.
    Atomic: the tensors get a name made from their content, and replacing tarp.json is the one step that makes them
    count. After a crash at any moment the directory holds the old adapter or the new one, whole. One writer at a time.

    Raises ValueError for a model without adapter or on the meta device. Warns when other parameters than the
    adapter's require a gradient, because those are not written.
    """
    from safetensors.torch import save

    model = _unwrap(model)
    config = vars(model).get("tarp_config")
    if config is None:
        raise ValueError("model: has no tarp_config; pass the model that was given to apply_tarp")
    parameters = tarp_parameters(model)
    _refuse_meta(model)
    others = [name for name, p in model.named_parameters() if p.requires_grad and name not in parameters]
    if others:
        warnings.warn(
            f"{len(others)} trainable parameters such as {others[0]!r} belong to the base model and are not saved with "
            "the adapter; save them yourself, and load them before load_tarp",
            stacklevel=2,
        )
    tensors = parameters | _architectures(model)
    data = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    digest = hashlib.sha256(data).hexdigest()
    file = f"tarp-{digest[:16]}.safetensors"
    description = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "library_version": _library_version(),
        "config": asdict(config),
        "tensors": {"file": file, "bytes": len(data), "sha256": digest},
        "base": fingerprint(model),
    }
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / file, data)
    write_atomically(folder / DESCRIPTION, json.dumps(description, indent=1).encode())
    for leftover in (*folder.glob("tarp-*.safetensors"), *folder.glob(".tarp*.tmp")):
        if leftover.name != file:
            with contextlib.suppress(OSError):  # the new pair counts already
                leftover.unlink()


def load_tarp(model: nn.Module, directory: str | os.PathLike, *, check_base: bool = True) -> nn.Module:
    """Load what `save_tarp` wrote, in place, and return the model.

    A model without adapter gets one with the saved configuration; an adapted one must have that same configuration.
    Tensors are converted to the model's dtype and device. check_base=False skips the comparison with the base model
    that the adapter was trained on (a base in another precision passes it anyway).

    Raises FileNotFoundError for missing files, ValueError for a truncated or foreign file, a newer format, another base
    model, another configuration, or tensors that do not fit. The model is then as it was.
    """
    inner = _unwrap(model)
    _refuse_meta(inner)
    description = read_description(Path(directory))
    tensors = read_tensors(Path(directory), description["tensors"])
    config = TarpConfig.from_dict(description["config"])
    if check_base:
        _compare_base(description["base"], fingerprint(inner))
    if is_adapted(inner):
        _refuse_merged(inner)
        _compare_config(config, inner)
        _fill(tarp_parameters(inner) | _architectures(inner), tensors)
    else:
        parts = build(inner, config)
        targets: dict[str, Tensor] = {}
        for path, layer in (parts.layers | parts.cells).items():
            targets |= {f"{path}.{name}": p for name, p in tarp_parameters(layer).items()}
        targets |= {f"{path}.{name}": p for path, norm in parts.norms.items() for name, p in norm.named_parameters()}
        targets |= {f"{path}.alpha": cell.alpha for path, cell in parts.cells.items()}
        _check_fit(targets, tensors)
        install(inner, config, parts)
        _fill(targets, tensors)
    return model


def _architectures(model: nn.Module) -> dict[str, Tensor]:
    """{name: alpha} of the search cells, which is part of what was found and no parameter."""
    return {f"{name}.alpha": cell.alpha for name, cell in model.named_modules() if isinstance(cell, CellBeside)}


def _refuse_merged(model: nn.Module) -> None:
    if any(isinstance(layer, TarpLayer) and layer.original is not None for layer in model.modules()):
        raise ValueError("model: its weights hold a merged adapter; call unmerge_tarp(model) before loading one")


# --- the base model ---------------------------------------------------------------------------------------------------


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """What identifies a base model: type, class, and per parameter its shape and a hash of a few of its weights.

    A weight is hashed as float32, bfloat16 and float16, because a model loaded in a lower precision is the same base.
    """
    config = getattr(model, "config", None)
    return {
        "model_type": getattr(config, "model_type", None),
        "class": type(model).__name__,
        "name": getattr(config, "_name_or_path", None) or None,
        "parameters": {name: _parameter_mark(tensor) for name, tensor in base_parameters(model).items()},
    }


def _parameter_mark(parameter: Tensor) -> str:
    """For example "768x2304 5d41402a bc4b2a76 b9719d91": shape, then one hash per rounding."""
    shape = "x".join(map(str, parameter.shape))
    flat = parameter.detach().reshape(-1)
    places = [i * (flat.numel() - 1) // max(_SAMPLES - 1, 1) for i in range(_SAMPLES if flat.numel() else 0)]
    samples = flat[torch.tensor(places, dtype=torch.int64, device=flat.device)].cpu()
    hashes = []
    for dtype in _ROUNDINGS:
        raw = bytes(samples.to(dtype).view(torch.uint8).tolist())
        hashes.append(hashlib.blake2b(raw, digest_size=4).hexdigest())
    return " ".join([shape, *hashes])


def _compare_base(saved: dict[str, Any], current: dict[str, Any]) -> None:
    other = f"{saved['class']} {saved['name'] or ''}".strip()
    advice = f"; load the base that it was trained on ({other}), or pass check_base=False to use it on this one"
    if saved["model_type"] != current["model_type"]:
        raise ValueError(
            f"base model: the adapter was saved for model type {saved['model_type']!r}, this model has "
            f"{current['model_type']!r}{advice}"
        )
    old, new = saved["parameters"], current["parameters"]
    unmatched = sorted(old.keys() ^ new.keys())
    if unmatched:
        where = "only the saved base" if unmatched[0] in old else "only this model"
        raise ValueError(
            f"base model: {where} has a parameter {unmatched[0]!r} (saved from {saved['class']}, loaded into "
            f"{current['class']}){advice}"
        )
    for name, mark in old.items():
        if mark.split()[0] != new[name].split()[0]:
            raise ValueError(f"base model: {name} was {mark.split()[0]}, here it is {new[name].split()[0]}{advice}")
    differing = [name for name, mark in old.items() if not set(mark.split()[1:]) & set(new[name].split()[1:])]
    if differing:
        raise ValueError(
            f"base model: same shapes, other weights: {len(differing)} of {len(old)} parameters differ, such as "
            f"{differing[0]!r}{advice}"
        )


# --- reading and writing ----------------------------------------------------------------------------------------------


def read_description(folder: Path) -> dict[str, Any]:
    """What tarp.json says of an adapter; errors as of `load_tarp`."""
    path = folder / DESCRIPTION
    if not path.is_file():
        raise FileNotFoundError(f"directory: {path} does not exist; expected a directory that save_tarp wrote")
    try:
        description = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: is no whole JSON file ({error}); save the adapter again") from error
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise ValueError(f"{path}: is no TARP adapter, expected a file that save_tarp wrote")
    version = description.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path}: has format version {version!r}, this library reads {FORMAT_VERSION}; it was written by "
            f"tarp_kernels {description.get('library_version')}, install that version or a newer one"
        )
    incomplete = [key for key in ("config", "tensors", "base") if not isinstance(description.get(key), dict)]
    if incomplete:
        raise ValueError(f"{path}: lacks {incomplete[0]!r}; save the adapter again")
    return description


def read_tensors(folder: Path, entry: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of the file that a description names, compared with its size and hash."""
    from safetensors.torch import load

    path = folder / Path(str(entry.get("file"))).name
    if not path.is_file():
        raise FileNotFoundError(f"{path}: does not exist, though {DESCRIPTION} names it; copy the whole directory")
    data = path.read_bytes()
    if len(data) != entry.get("bytes") or hashlib.sha256(data).hexdigest() != entry.get("sha256"):
        raise ValueError(
            f"{path}: has {len(data)} bytes, expected {entry.get('bytes')} with the hash that {DESCRIPTION} names; "
            "the file is truncated or changed, copy or save it again"
        )
    return load(data)


# --- filling a model --------------------------------------------------------------------------------------------------


def _compare_config(saved: TarpConfig, model: nn.Module) -> None:
    own = vars(model).get("tarp_config")
    if own is None:
        raise ValueError("model: has adapted layers but no tarp_config; pass the model that was given to apply_tarp")
    old, new = (json.loads(json.dumps(asdict(config))) for config in (saved, own))
    for field, value in old.items():
        if value != new[field]:
            raise ValueError(
                f"config: the saved adapter has {field}={value!r}, this model {field}={new[field]!r}; "
                "load into the base model without adapter, which then gets the saved configuration"
            )


def _check_fit(targets: Mapping[str, Tensor], tensors: dict[str, Tensor]) -> None:
    for name, target in targets.items():  # in the model's order: the file's differs from one saving to the next
        if name not in tensors:
            raise ValueError(f"tensors: {name!r} is missing in the file; it was saved from a model with other layers")
        if tensors[name].shape != target.shape:
            raise ValueError(
                f"tensors: {name!r} has shape {list(tensors[name].shape)}, expected {list(target.shape)} on this model"
            )
    foreign = sorted(set(tensors) - set(targets))
    if foreign:
        raise ValueError(f"tensors: the file holds {foreign[0]!r}, which this model's adapter does not have")


@torch.no_grad()
def _fill(targets: Mapping[str, Tensor], tensors: dict[str, Tensor]) -> None:
    _check_fit(targets, tensors)
    for name, parameter in targets.items():
        parameter.copy_(tensors[name])


def _unwrap(model: nn.Module) -> nn.Module:
    """The model itself inside torch.compile and data-parallel wrappers."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected a torch.nn.Module")
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(inner := model._modules.get("_orig_mod"), nn.Module):
            model = inner
        else:
            return model


def _refuse_meta(model: nn.Module) -> None:
    empty = next((name for name, parameter in model.named_parameters() if parameter.is_meta), None)
    if empty is not None:
        raise ValueError(f"model: {empty} is on the meta device and has no values; load the base model's weights first")


def _library_version() -> str:
    try:
        return metadata.version("tarp_kernels")
    except metadata.PackageNotFoundError:  # run from a source tree
        return "unknown"
