"""PEFT's LoRA on the layers, and with the number of parameters, that a TARP adapter has: the fair static baseline."""

from collections.abc import Mapping
from typing import Any

import torch

from tarp_kernels import TarpConfig, TarpConv1D, apply_tarp, tarp_parameters
from tarp_kernels.nn.linear import TarpLayer

TOLERANCE = 0.05


def lora_ranks(sizes: Mapping[str, int], target: int) -> dict[str, int]:
    """A rank for each layer so that LoRA has `target` parameters to within 5 %.

    sizes  layer name -> parameters of one rank there, in_features + out_features

    One rank for all where that is close enough; else some layers, spread evenly over the model, get one more.
    Raises ValueError where no rank from 1 upwards is close enough.
    """
    one = sum(sizes.values())
    uniform = max(1, round(target / one))
    if abs(uniform * one - target) <= TOLERANCE * target:
        return dict.fromkeys(sizes, uniform)
    ranks = dict.fromkeys(sizes, max(1, target // one))
    short = target - sum(ranks[name] * size for name, size in sizes.items())
    share, owed = short / one, 0.0
    for name, size in sizes.items():
        owed += share * size
        if owed >= size / 2:
            ranks[name] += 1
            owed -= size
    got = sum(ranks[name] * size for name, size in sizes.items())
    if abs(got - target) > TOLERANCE * target:
        raise ValueError(
            f"target: {target} parameters cannot be met within 5 %, the closest is {got}; raise TarpConfig.r"
        )
    return ranks


def apply_lora(model: Any, tarp: TarpConfig) -> int:
    """Inject PEFT's LoRA into `model`, in place, on the layers that `apply_tarp(model, tarp)` would adapt.

    Scaling and dropout are TARP's. Returns the number of trained parameters, within 5 % of TARP's.
    """
    try:
        import peft
    except ImportError:
        raise ImportError("the method 'lora' needs the package peft; install it with `pip install peft`") from None
    target, layers = _tarp_layers(model, tarp)
    ranks = lora_ranks({name: layer.in_features + layer.out_features for name, layer in layers.items()}, target)
    config = peft.LoraConfig(
        r=next(iter(ranks.values())),
        lora_alpha=1,
        rank_pattern=ranks,
        alpha_pattern={name: rank * tarp.scaling for name, rank in ranks.items()},  # PEFT scales by alpha / rank
        lora_dropout=tarp.dropout,
        target_modules=list(ranks),
        fan_in_fan_out=all(isinstance(layer, TarpConv1D) for layer in layers.values()),
        bias="none",
    )
    model.requires_grad_(False)
    peft.inject_adapter_in_model(config, model)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _tarp_layers(model: Any, tarp: TarpConfig) -> tuple[int, dict[str, TarpLayer]]:
    """Parameters of the TARP adapter, and the layers that it lies on by name, from a copy without weights."""
    with torch.device("meta"):
        shell = type(model)(model.config)
    apply_tarp(shell, tarp)
    own = tarp_parameters(shell)
    names = dict.fromkeys(name.rpartition(".")[0] for name in own)
    return sum(parameter.numel() for parameter in own.values()), {name: shell.get_submodule(name) for name in names}
