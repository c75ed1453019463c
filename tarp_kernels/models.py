"""TARP on whole models: put adapters in, list them, count them, and switch them off.

Works on any model whose layers are nn.Linear or transformers' Conv1D. transformers itself is never imported.
Saving and loading are in `models_files`, the choice of layers is in `models_targets`.
"""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor, nn

from tarp_kernels.models_cells import build_cells, install_cells
from tarp_kernels.models_targets import layer_ranks, select_layers, select_norms
from tarp_kernels.nn import TarpConfig, TarpConv1D, TarpLinear
from tarp_kernels.nn.cell_beside import CellBeside
from tarp_kernels.nn.linear import TarpLayer

# The value that a trained LayerNorm weight had before, kept as a buffer so that disable_tarp can show the base model.
_BASE = "tarp_base_"


def apply_tarp(model: nn.Module, config: TarpConfig) -> nn.Module:
    """Freeze the model and give the chosen linear layers an adapter, in place; returns the model.

    Adapters take the dtype and device of the layer that they sit on (the meta device too). Names of the base parameters
    do not change, tied weights stay tied, and with init="identity" the outputs stay those of the base model.
    The configuration is remembered as `model.tarp_config`.

    Which layers: `config.target_modules`, `layers`, `rank_pattern` (see `TarpConfig`). A block's index is the first
    number in the layer's name; "all-linear" leaves out the output embeddings; defaults never leave the blocks.

    Raises ValueError when nothing matches or the model is adapted already, TypeError for layers that cannot be adapted
    (quantised, subclassed); the model is then as it was.
    """
    install(model, config, build(model, config))
    return model


class Parts(NamedTuple):
    """What an adapter consists of, by name."""

    layers: dict[str, TarpLayer]
    norms: dict[str, nn.Module]
    cells: dict[str, CellBeside]


def build(model: nn.Module, config: TarpConfig) -> Parts:
    """The adapted layers, the norms to train and the search cells; nothing in the model is changed yet."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected a torch.nn.Module")
    if not isinstance(config, TarpConfig):
        raise TypeError(f"config: got {type(config).__name__}, expected TarpConfig")
    twice = next((name for name, module in model.named_modules() if isinstance(module, TarpLayer)), None)
    if twice is not None:
        raise ValueError(
            f"model: {twice or 'it'} is adapted already; load the base model anew, or load_tarp into this one"
        )
    chosen, norms = select_layers(model, config), select_norms(model, config)
    layers: dict[str, TarpLayer] = {}
    for name, rank in layer_ranks(list(chosen), config).items():
        base, own = chosen[name], replace(config, r=rank)
        if isinstance(base, nn.Linear):
            layers[name] = TarpLinear.from_linear(base, own)
        else:
            layers[name] = TarpConv1D.from_conv1d(base, own)
    return Parts(layers, norms, build_cells(model, config))


def install(model: nn.Module, config: TarpConfig, parts: Parts) -> None:
    """Freeze the base and put in what `build` made."""
    layers, norms, cells = parts
    model.requires_grad_(False)
    replaced = {id(model.get_submodule(name)): layer for name, layer in layers.items()}
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if id(child) in replaced:  # wherever the layer is used, so a shared layer stays shared
                parent._modules[name] = replaced[id(child)]
    for norm in norms.values():
        vars(norm)["tarp_trained"] = names = tuple(name for name, _ in norm.named_parameters(recurse=False))
        for name in names:
            parameter = norm.get_parameter(name).requires_grad_(True)
            norm.register_buffer(_BASE + name, parameter.detach().clone())
    install_cells(model, cells)
    vars(model)["tarp_config"] = config


def tarp_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """{name: parameter} of everything that an adapter trains, in the model's order.

    For example "model.layers.0.self_attn.q_proj.V"; for a single TarpLinear "V", "U", "w1". Weights that
    train_layernorm trains and those of search cells are among them. Raises ValueError for a model without adapter.
    """
    found = {}
    for path, module in model.named_modules():
        swapped = vars(module).get("tarp_own", {})  # a norm inside disable_tarp
        for name in _trained_names(module):
            parameter = swapped[name] if name in swapped else module.get_parameter(name)
            found[f"{path}.{name}" if path else name] = parameter
    if not found:
        raise ValueError("model: has no adapter; call apply_tarp(model, TarpConfig(...)) first")
    return found


def _trained_names(module: nn.Module) -> tuple[str, ...]:
    if isinstance(module, TarpLayer | CellBeside):
        return module.adapter_names()
    return vars(module).get("tarp_trained", ())


@contextlib.contextmanager
def disable_tarp(model: nn.Module) -> Iterator[nn.Module]:
    """Within the block the model is exactly its base model; afterwards every layer is as it was before.

    Blocks may lie inside one another. Layers switched off by hand (`layer.enabled = False`) stay off. Norms that
    train_layernorm trains show their old weights. Raises ValueError for a model without adapter.
    """
    tarp_parameters(model)
    enabled = {layer: layer.enabled for layer in model.modules() if isinstance(layer, TarpLayer | CellBeside)}
    norms = [norm for norm in model.modules() if "tarp_trained" in vars(norm) and "tarp_own" not in vars(norm)]
    try:
        for layer in enabled:
            layer.enabled = False
        for norm in norms:  # another Parameter, not other values: graphs that hold the trained one stay valid
            vars(norm)["tarp_own"] = own = {name: norm._parameters[name] for name in _trained_names(norm)}
            for name in own:
                norm._parameters[name] = nn.Parameter(norm.get_buffer(_BASE + name), requires_grad=False)
        yield model
    finally:
        for layer, flag in enabled.items():
            layer.enabled = flag
        for norm in norms:
            norm._parameters.update(vars(norm).pop("tarp_own", {}))


def base_parameters(model: nn.Module) -> dict[str, Tensor]:
    """{name: parameter} of the base model: merged weights, and those of trained norms, as they were before."""
    trained = tarp_parameters(model) if is_adapted(model) else {}
    base: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        if isinstance(module, TarpLayer | CellBeside) and name in trained:
            continue
        merged = isinstance(module, TarpLayer) and leaf == "weight" and module.original is not None
        kept = "original" if merged else _BASE + leaf if name in trained else None
        base[name] = parameter if kept is None else module.get_buffer(kept)
    return base


def is_adapted(model: nn.Module) -> bool:
    return any(isinstance(module, TarpLayer) for module in model.modules())


# --- report -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerReport:
    """One adapted layer: name, form of its update, features, rank, and number of adapter parameters."""

    name: str
    form: str
    in_features: int
    out_features: int
    rank: int
    parameters: int


@dataclass(frozen=True)
class CellReport:
    """One search cell: name, whether it is causal, width of the layer and of the cell, and number of parameters."""

    name: str
    causal: bool
    hidden_size: int
    width: int
    parameters: int


@dataclass(frozen=True)
class TarpReport:
    """Exact parameter counts. `base` counts the base model with its norms, each tied weight once."""

    layers: tuple[LayerReport, ...]
    layernorm: int
    base: int
    cells: tuple[CellReport, ...] = ()

    @property
    def trained(self) -> int:
        """Adapter parameters plus those of search cells and of norms that train along."""
        adapters = sum(layer.parameters for layer in self.layers)
        return adapters + sum(cell.parameters for cell in self.cells) + self.layernorm

    @property
    def share(self) -> float:
        """Trained parameters as a share of the base model's."""
        return self.trained / self.base

    def __str__(self) -> str:
        groups: dict[tuple, list[LayerReport]] = {}
        for layer in self.layers:
            name = re.sub(r"\d+", "*", layer.name) or "(the layer itself)"
            groups.setdefault((name, *list(vars(layer).values())[1:]), []).append(layer)
        rows = [("layer", "count", "in → out", "form", "r", "parameters")]
        for (name, form, inputs, outputs, rank, parameters), members in groups.items():
            count = len(members)
            rows.append((name, str(count), f"{inputs} → {outputs}", form, str(rank), f"{count * parameters:,}"))
        beside: dict[str, list[CellReport]] = {}
        for cell in self.cells:
            beside.setdefault(re.sub(r"\d+", "*", cell.name), []).append(cell)
        for name, own in beside.items():
            form = "search cell, " + ("causal" if own[0].causal else "both sides")
            size, total = f"{own[0].hidden_size} → {own[0].width}", sum(cell.parameters for cell in own)
            rows.append((name, str(len(own)), size, form, "", f"{total:,}"))
        if self.layernorm:
            rows.append(("LayerNorm / RMSNorm", "", "", "", "", f"{self.layernorm:,}"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = []
        for row in rows:
            cells = [cell.ljust(width) for cell, width in zip(row[:-1], widths[:-1], strict=True)]
            lines.append("  ".join([*cells, row[-1].rjust(widths[-1])]))
        summary = f"trained {self.trained:,} of {self.base:,} base parameters ({self.share:.2%})"
        return "\n".join([*lines, summary])


def tarp_report(model: nn.Module) -> TarpReport:
    """Exact adapter parameter counts per layer and in all, and their share of the base model; prints as a table."""
    tarp_parameters(model)
    layers = tuple(
        LayerReport(
            name,
            _form(module.config),
            module.in_features,
            module.out_features,
            module.config.r,
            sum(module.get_parameter(parameter).numel() for parameter in module.adapter_names()),
        )
        for name, module in model.named_modules()
        if isinstance(module, TarpLayer)
    )
    layernorm = sum(
        module.get_parameter(name).numel()
        for module in model.modules()
        for name in vars(module).get("tarp_trained", ())
    )
    cells = tuple(
        CellReport(name, cell.causal, cell.hidden_size, cell.width, sum(p.numel() for p in cell.parameters()))
        for name, cell in model.named_modules()
        if isinstance(cell, CellBeside)
    )
    base = sum(parameter.numel() for parameter in base_parameters(model).values())
    return TarpReport(layers, layernorm, base, cells)


def _form(config: TarpConfig) -> str:
    """For example "dynamic diag linear", "bilinear × dynamic full mlp" or "× static" for a factor alone."""
    generator = f" {config.sigma} {config.generator}"
    form = config.kind + (generator if config.kind == "dynamic" else "")
    if config.multiplicative == "none":
        return form
    factor = f"× {config.multiplicative}" + (generator if config.multiplicative == "dynamic" else "")
    factor += " matmul" if config.product == "matmul" else ""
    if config.kind == "kronecker":  # of both halves
        return f"{form} {factor}"
    return f"{form} {factor}" if config.additive else factor
