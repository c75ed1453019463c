"""`TarpLinear` and `TarpConv1D`: a frozen or trainable layer with a TARP adapter on top."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tarp_kernels.nn.config import TarpConfig
from tarp_kernels.ops.lowrank_linear import Generator, lowrank_linear

ADAPTER_NAMES = ("V", "U", "w1", "b1", "w2", "b2")


class TarpLayer(nn.Module):
    """What both layers share: the adapter, its start, and the call of the operator.

    weight and bias are the base layer's own parameters, so tied weights stay tied. `enabled = False` is the base layer.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    V: nn.Parameter
    U: nn.Parameter
    w1: nn.Parameter | None
    b1: nn.Parameter | None
    w2: nn.Parameter | None
    b2: nn.Parameter | None

    def __init__(self, base: Any, in_features: int, out_features: int, config: TarpConfig):
        super().__init__()
        self.in_features, self.out_features, self.config = in_features, out_features, config
        self.enabled = True
        # Set by task_parallel: the tensors of ADAPTER_NAMES with a leading task dimension, and the tasks' offsets.
        self.stacked: tuple[tuple[Tensor | None, ...], Any] | None = None
        self.weight, self.bias = base.weight, base.bias
        rank, outputs = config.r, config.generator_outputs
        dynamic, mlp = config.kind == "dynamic", config.generator == "mlp"
        hidden = (config.generator_hidden or rank) if mlp else outputs
        shapes = {
            "V": (rank, in_features),
            "U": (out_features, rank),
            "w1": (hidden, in_features) if dynamic else None,
            "b1": (hidden,) if dynamic and config.generator_bias else None,
            "w2": (outputs, hidden) if dynamic and mlp else None,
            "b2": (outputs,) if dynamic and mlp and config.generator_bias else None,
        }
        for name, shape in shapes.items():
            self.register_parameter(name, None if shape is None else nn.Parameter(base.weight.new_empty(shape)))
        self.reset_adapter()
        self.train(base.training)  # a model in eval mode must not start to drop elements

    @torch.no_grad()
    def reset_adapter(self) -> None:
        """Start anew: exactly the base layer for init="identity", N(0, 0.02²) for init="paper" (method.md §2)."""
        for name in self.adapter_names():
            parameter = getattr(self, name)
            if name in ("b1", "b2"):
                parameter.zero_()
            elif self.config.init == "paper":
                parameter.normal_(std=0.02)
            elif name == "U" or self._generator_ends_in(name):
                parameter.zero_()
            else:
                bound = 1 / math.sqrt(parameter.shape[-1])
                parameter.uniform_(-bound, bound)

    def _generator_ends_in(self, name: str) -> bool:
        """U = 0 and g = 0 together would stop every gradient, unless s starts at 1."""
        return self.config.activation == "one_plus" and name == ("w1" if self.w2 is None else "w2")

    def adapter_names(self) -> tuple[str, ...]:
        """Names of the adapter's parameters on this layer, for example ("V", "U", "w1")."""
        return tuple(name for name in ADAPTER_NAMES if getattr(self, name) is not None)

    def _adapt(self, x: Tensor, weight: Tensor) -> Tensor:
        """The layer's output for x [..., K] and the weight seen as [N, K]."""
        if not self.enabled:
            return F.linear(x, weight, self.bias)
        config, segments = self.config, None
        tensors: Any = (self.V, self.U, self.w1, self.b1, self.w2, self.b2)
        if self.stacked is not None:
            tensors, segments = self.stacked[0], self.stacked[1].rows(x)
        V, U, w1, b1, w2, b2 = tensors
        generator = None
        if w1 is not None:
            generator = Generator(w1, b1, w2, b2, config.hidden_activation, config.activation)
        dropout = None
        if config.dropout and self.training:
            # Drawn from torch's generator: reproducible under manual_seed, and restored when checkpointing recomputes.
            dropout = (config.dropout, int(torch.randint(2**31, ())))
        return lowrank_linear(
            x,
            weight,
            self.bias,
            V,
            U,
            generator,
            sigma=config.sigma,
            scaling=config.scaling,
            segments=segments,
            dropout=dropout,
        )

    def extra_repr(self) -> str:
        form = f"{self.config.kind}, sigma={self.config.sigma}, r={self.config.r}"
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, {form}"


class TarpLinear(TarpLayer):
    """Drop-in for nn.Linear: y = x Wᵀ + b + scaling · U Σ(x) V x for x [..., in_features].

    weight [N, K] and bias [N] are the base layer's; V [r, K], U [N, r] and the generator's w1, b1, w2, b2 are new.
    """

    @classmethod
    def from_linear(cls, linear: nn.Linear, config: TarpConfig) -> "TarpLinear":
        """Wrap a linear layer; shares its weight and bias, and with init="identity" its outputs at the start."""
        if not isinstance(linear, nn.Linear):
            raise TypeError(
                f"linear: got {type(linear).__name__}, expected torch.nn.Linear; use TarpConv1D for a Conv1D"
            )
        return cls(linear, linear.in_features, linear.out_features, config)

    def forward(self, x: Tensor) -> Tensor:
        return self._adapt(x, self.weight)


class TarpConv1D(TarpLayer):
    """Drop-in for the Conv1D of GPT-2, a linear layer that stores its weight as [in_features, out_features]."""

    @classmethod
    def from_conv1d(cls, conv1d: nn.Module, config: TarpConfig) -> "TarpConv1D":
        """Wrap transformers' Conv1D (weight [K, N], bias [N]); shares both."""
        weight = getattr(conv1d, "weight", None)
        if not hasattr(conv1d, "nf") or not isinstance(weight, Tensor) or weight.dim() != 2:
            raise TypeError(f"conv1d: got {type(conv1d).__name__}, expected transformers.pytorch_utils.Conv1D")
        return cls(conv1d, weight.shape[0], weight.shape[1], config)

    @property
    def nf(self) -> int:
        return self.out_features

    def forward(self, x: Tensor) -> Tensor:
        return self._adapt(x, self.weight.t())
