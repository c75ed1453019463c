"""The layers that compete: what a reader of the paper would write, and the peers' own layers."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mltd.bench.cases import GateError
from mltd.bench.unfused_cell import unfused_cells
from tarp_kernels import SearchCell, TarpConfig, TarpLinear, cached_factors
from tarp_kernels.ops.factor import CENTRE


class UnfusedTarp(TarpLinear):
    """TarpLinear in plain PyTorch, one call per symbol: y = x (Φ ⊙ W)ᵀ + b + U((1 + A x) ⊙ (V x)), Φ of W's size.

    The same parameters and the same start as TarpLinear. Inside ``task_parallel`` all tasks must own the same number of
    rows, and the rank-r products are batched matrix products.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            return F.linear(x, self.weight, self.bias)
        tensors: Any = (self.V, self.U, self.w1, self.P, self.Q)  # unfused_layer refuses forms without the first three
        V, U, w1, P, Q = tensors
        weight = self.weight if P is None else self.weight * F.softplus(P @ Q + CENTRE)
        y = F.linear(x, weight, self.bias)
        if self.stacked is None:
            return y + F.linear((1 + F.linear(x, w1)) * F.linear(x, V), U)
        if P is not None:
            raise ValueError("unfused: the multiplicative form knows one task only")
        stacked: Any = self.stacked[0]
        V, U, w1, *_ = stacked  # [B, r, K], [B, N, r], [B, r, K]
        rows = x.reshape(V.shape[0], -1, x.shape[-1])  # [B, rows of a task, K]
        z = (1 + rows @ w1.mT) * (rows @ V.mT)
        return y + (z @ U.mT).reshape(y.shape)


class Cached(nn.Module):
    """A layer in a `cached_factors` block that stays open for as long as this module is there."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.block = layer, contextlib.ExitStack()
        self.block.enter_context(cached_factors(layer))

    @property
    def keeps_something(self) -> bool:
        """Whether Φ ⊙ W is there to be used by the next call."""
        cache: Any = self.layer.cache
        return cache is not None and cache.kept is not None

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def unfused(model: nn.Module) -> nn.Module:
    """Let, in place, every TarpLinear and search cell of ``model`` run in plain PyTorch over the same parameters."""
    for name, layer in list(model.named_modules()):
        if type(layer) is TarpLinear:
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, unfused_layer(layer))
    return unfused_cells(model)


def unfused_layer(layer: TarpLinear) -> UnfusedTarp:
    """The plain PyTorch form of one layer, sharing its parameters."""
    config = layer.config
    form = (config.kind, config.sigma, config.generator, config.activation, config.scaling, config.additive)
    known = config.product == "hadamard" and config.multiplicative != "dynamic"
    if not known or form != ("dynamic", "diag", "linear", "one_plus", 1.0, True):
        raise ValueError(f"config: got {config}, expected the default form; the unfused contender knows no other")
    plain = UnfusedTarp(layer, layer.in_features, layer.out_features, config)
    for name in layer.adapter_names():
        setattr(plain, name, getattr(layer, name))
    return plain


def peft_lora(linear: nn.Linear, rank: int) -> nn.Module | None:
    """PEFT's LoRA layer over a copy of ``linear``, as PEFT itself would build it; None where PEFT is not installed."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        return None
    holder = nn.ModuleDict({"layer": copy.deepcopy(linear)})
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=["layer"])
    adapted: Any = get_peft_model(holder, config)
    return adapted.base_model.model["layer"]


def layer_contenders(in_features: int, out_features: int, rank: int, **config: Any) -> dict[str, nn.Module]:
    """nn.Linear, TarpLinear, unfused PyTorch and PEFT LoRA over equal frozen weights, no adapter at its idle start.

    TarpLinear and the unfused form have equal parameters, so their outputs can be compared. `config` is TarpConfig's.
    """
    torch.manual_seed(0)
    linear = nn.Linear(in_features, out_features).requires_grad_(False)
    tarp = TarpLinear.from_linear(copy.deepcopy(linear), TarpConfig(r=rank, **config))
    made: dict[str, nn.Module] = {"linear": linear, "tarp": tarp}
    # Of its own: a weight in common would lie warm in the cache for whoever comes second.
    made["unfused"] = unfused_layer(copy.deepcopy(tarp))
    lora = peft_lora(linear, rank)
    if lora is not None:
        made["peft_lora"] = lora
    for module in made.values():
        stir(module)
    return made


@torch.no_grad()
def stir(module: nn.Module, seed: int = 1) -> None:
    """Give every trainable parameter seeded random values: a layer at its identity start could skip work."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)


@torch.no_grad()
def stir_cells(module: nn.Module, seed: int = 1) -> None:
    """Take every search cell inside ``module`` off its identity start, every node of a size that a gate can see.

    Plain `stir` would leave a convolution of a convolution too small beside the biases for its absence to be noticed.
    """
    generator = torch.Generator().manual_seed(seed)
    cells = [cell for cell in module.modules() if isinstance(cell, SearchCell)]
    for name, parameter in (item for cell in cells for item in cell.named_parameters(recurse=False)):
        noise = torch.randn(parameter.shape, generator=generator)
        if name == "norm":
            parameter.copy_(1 + 0.1 * noise)
        elif name.endswith("_bias"):
            parameter.copy_(0.1 * noise)
        else:
            parameter.copy_(noise * (0.02 if name == "output" else parameter.shape[-1] ** -0.5))


def deviation(got: Tensor, expected: Tensor, without: Tensor, what: str, tolerance: float = 1e-3) -> float:
    """Largest error of ``got`` over the size of what the adapter adds, ``expected`` − ``without``, which must not be 0.

    Measured against that term and not against the whole output, so that a missing or wrong adapter cannot pass.
    Raises GateError above ``tolerance``.
    """
    size = float((expected - without).abs().max())
    error = float((got - expected).abs().max())
    if not size > 0 or not error <= tolerance * size:
        allowed = f"allowed is {tolerance:.0e} of that"
        raise GateError(f"{what}: off by {error:.1e} where the adapter adds {size:.1e}; {allowed}")
    return error / size
