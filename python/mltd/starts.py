"""A trained start on disk: the adapter as `save_tarp` writes it, and one file for all that lies beside an adapter."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from mltd.checkpoint import CheckpointError
from mltd.controller import Controller
from tarp_kernels import load_tarp, save_tarp, tarp_parameters
from tarp_kernels.files import write_atomically
from tarp_kernels.models import is_adapted

ADAPTER, BESIDE = "adapter", "start.safetensors"


class Start(NamedTuple):
    """What adaptation begins with beside the model's own parameters; None for what there is not."""

    controller: Controller | None = None
    rates: Mapping[str, Tensor] | None = None


def save_start(model: Any, directory: str | Path, start: Start, parameters: Mapping[str, Tensor] | None = None) -> None:
    """Write the model's adapter, its `parameters` that are not the adapter's, the controller and the learned rates."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    adapter = tarp_parameters(model) if is_adapted(model) else {}
    if adapter:
        save_tarp(model, str(directory / ADAPTER))
    tensors = {f"model/{name}": value for name, value in (parameters or {}).items() if name not in adapter}
    tensors |= {f"rates/{name}": value for name, value in (start.rates or {}).items()}
    form = None
    if start.controller is not None:
        tensors |= {f"controller/{name}": value for name, value in start.controller.state_dict().items()}
        form = start.controller.form()
    plain = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    write_atomically(directory / BESIDE, save(plain, metadata={"mltd": json.dumps({"controller": form})}))


def read_beside(directory: str | Path) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """What a saved start holds beside the adapter: the form of its controller (None: it has none) under "controller",
    and the tensors by name in the groups "model", "rates" and "controller"; CheckpointError where it holds none."""
    path = Path(directory) / BESIDE
    try:
        with safe_open(path, framework="pt") as file:
            form = json.loads((file.metadata() or {}).get("mltd", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(
            f"{path}: cannot be read as a trained start ({error}); name a folder that training wrote"
        ) from None
    if not isinstance(form, dict) or "controller" not in form:
        raise CheckpointError(f"{path}: a safetensors file, but no trained start; name a folder that training wrote")
    parts: dict[str, dict[str, Tensor]] = {"model": {}, "rates": {}, "controller": {}}
    for key, value in tensors.items():
        kind, _, name = key.partition("/")
        parts[kind][name] = value
    return form, parts


def load_start(model: Any, directory: str | Path) -> Start:
    """Put a saved start into a pretrained model, whose adapter is added; returns what lies beside it.

    Raises CheckpointError for a folder that holds none, or one of another model; an adapter that is refused leaves the
    model with the start's own values of the base.
    """
    directory = Path(directory)
    path = directory / BESIDE
    form, parts = read_beside(directory)
    own = _fitting(model, parts["model"], path)
    with torch.no_grad():
        for name, value in parts["model"].items():
            own[name].copy_(value)
    if (directory / ADAPTER).exists():  # only now, because it wants the base that it was saved beside
        load_tarp(model, str(directory / ADAPTER))
    own = _fitting(model, parts["rates"], path)
    device = next(model.parameters()).device
    rates = {name: value.to(own[name]) for name, value in parts["rates"].items()} or None
    controller = None
    if form["controller"] is not None:
        controller = Controller(**form["controller"])
        controller.load_state_dict(parts["controller"])
        controller.check_fits(model)
        controller.to(device)
    return Start(controller, rates)


def _fitting(model: Any, values: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The model's parameters by name; CheckpointError where it has none for one of `values`."""
    own = dict(model.named_parameters())
    for name, value in values.items():
        if name not in own or own[name].shape != value.shape:
            raise CheckpointError(f"{path}: has {name!r} of shape {list(value.shape)}, which this model has not")
    return own
