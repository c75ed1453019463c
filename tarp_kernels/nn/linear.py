"""`TarpLinear` and `TarpConv1D`: a frozen or trainable layer with a TARP adapter on top."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tarp_kernels.nn.adapter import ADAPTER_NAMES, adapter_shapes, written_out
from tarp_kernels.nn.config import TarpConfig
from tarp_kernels.nn.factor_cache import FactorCache
from tarp_kernels.ops.factor import kronecker, multiplied
from tarp_kernels.ops.hadamard_linear import hadamard_linear
from tarp_kernels.ops.lowrank_linear import Generator, lowrank_linear
from tarp_kernels.ops.matmul_linear import matmul_linear


def watched(module: nn.Module) -> bool:
    """Whether somebody sees or replaces the calls of a module."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in vars(module)


class TarpLayer(nn.Module):
    """What both layers share: the adapter, its start, and the call of the operator.

    weight and bias are the base layer's own parameters, so tied weights stay tied. `enabled = False` is the base layer.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    V: nn.Parameter | None
    U: nn.Parameter | None
    H: nn.Parameter | None
    w1: nn.Parameter | None
    b1: nn.Parameter | None
    w2: nn.Parameter | None
    b2: nn.Parameter | None
    P: nn.Parameter | None
    Q: nn.Parameter | None
    PH: nn.Parameter | None
    Pw1: nn.Parameter | None
    Pb1: nn.Parameter | None
    Pw2: nn.Parameter | None
    Pb2: nn.Parameter | None
    original: Tensor | None

    def __init__(self, base: Any, in_features: int, out_features: int, config: TarpConfig):
        super().__init__()
        self.in_features, self.out_features, self.config = in_features, out_features, config
        self.enabled = True
        # Set by task_parallel: the tensors of ADAPTER_NAMES with a leading task dimension, and the tasks' offsets.
        self.stacked: tuple[tuple[Tensor | None, ...], Any] | None = None
        # Set by cached_factors.
        self.cache: FactorCache | None = None
        # Set by merge: the weight without adapter, bit for bit. A buffer, so that it moves with the layer.
        self.register_buffer("original", None, persistent=False)
        self.weight, self.bias = base.weight, base.bias
        shapes = adapter_shapes(config, in_features, out_features)
        for name in ADAPTER_NAMES:
            made = nn.Parameter(base.weight.new_empty(shapes[name])) if name in shapes else None
            self.register_parameter(name, made)
        self.reset_adapter()
        self.train(base.training)  # a model in eval mode must not start to drop elements

    @torch.no_grad()
    def reset_adapter(self) -> None:
        """Start anew: exactly the base layer for init="identity", N(0, 0.02²) for init="paper" (method.md §2)."""
        for name in self.adapter_names():
            parameter = getattr(self, name)
            if name.endswith(("b1", "b2")):
                parameter.zero_()
            elif self.config.init == "paper" or name == "Q":
                parameter.normal_(std=0.02)
            elif name in ("U", "P") or self._ends_a_generator(name):
                parameter.zero_()
            else:
                bound = 1 / math.sqrt(parameter.shape[-1])
                parameter.uniform_(-bound, bound)

    def _ends_a_generator(self, name: str) -> bool:
        """U = 0 and g = 0 together would stop every gradient, unless s starts at 1."""
        last = "w2" if self.config.generator == "mlp" else "w1"
        return self.config.activation == "one_plus" and name in (last, "P" + last)

    def adapter_names(self) -> tuple[str, ...]:
        """Names of the adapter's parameters on this layer, for example ("V", "U", "w1")."""
        return tuple(name for name in ADAPTER_NAMES if getattr(self, name) is not None)

    @property
    def takes_rows(self) -> bool:
        """Whether `on_rows` may stand for calling the layer: an additive adapter is in force, and nobody looks on."""
        additive = self.V is not None and self.P is None and self.original is None
        ours = type(self).forward in (TarpLinear.forward, TarpConv1D.forward)
        return self.enabled and additive and ours and not watched(self)

    def on_rows(self, x: Tensor, rows: Tensor | None = None, into: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """The layer on rows of x, its result put into rows of a tensor, as in `lowrank_linear`; where `takes_rows`."""
        return self._adapt(x, self._matrix(self.weight), rows, into)

    def _adapt(
        self, x: Tensor, weight: Tensor, rows: Tensor | None = None, into: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """The layer's output for x [..., K] and the weight seen as [N, K]."""
        if not self.enabled:
            return F.linear(x, weight if self.original is None else self._matrix(self.original), self.bias)
        if self.original is not None and self.unmergeable is None:  # merged whole: the base layer's cost
            return F.linear(x, weight, self.bias)
        config, segments = self.config, None
        tensors: Any
        if self.stacked is None:
            tensors = tuple(getattr(self, name) for name in ADAPTER_NAMES)
        else:
            counted = x if rows is None else x[: len(rows)]  # as many rows as the tasks own
            tensors, segments = self.stacked[0], self.stacked[1].rows(counted)
        V, U, w1, b1, w2, b2, H, P, Q, PH, *factor = tensors
        if self.cache is not None and self.stacked is None and self.original is None:
            kept = self.cache.product((self.weight, P, Q, PH), self._multiplied)
            if kept is not None:
                weight, P, Q, PH = kept, None, None, None
        V, U, P, Q = self._static(V, U, H, P, Q, PH)
        if P is None and V is None:
            return F.linear(x, weight, self.bias)

        def generator(w1, b1, w2, b2) -> Generator | None:
            return None if w1 is None else Generator(w1, b1, w2, b2, config.hidden_activation, config.activation)

        additive = (V, U, generator(w1, b1, w2, b2))
        dropout = None
        if config.dropout and self.training:
            # Drawn from torch's generator: reproducible under manual_seed, and restored when checkpointing recomputes.
            dropout = (config.dropout, int(torch.randint(2**31, ())))
        options: Any = {"sigma": config.sigma, "scaling": config.scaling, "segments": segments, "dropout": dropout}
        if P is None:
            return lowrank_linear(x, weight, self.bias, *additive, rows=rows, into=into, **options)
        if config.product == "matmul":
            return matmul_linear(x, weight, self.bias, P, Q, *additive, **options)
        options |= {"activation": config.factor_activation, "factor_generator": generator(*factor)}
        return hadamard_linear(x, weight, self.bias, P, Q, *additive, **options)

    def _static(self, V, U, H, P, Q, PH) -> tuple[Any, Any, Any, Any]:
        """V, U, P, Q as the operators take them: Kronecker products written out, merged parts left out."""
        if self.original is not None:
            P = Q = PH = None
            if self.config.kind != "dynamic":
                V = U = H = None
        if H is not None:
            U, V = written_out(H, U, V)
        if PH is not None:
            P, Q = (written_out if self.config.product == "matmul" else kronecker)(PH, P, Q)
        return V, U, P, Q

    def _multiplied(self) -> Tensor:
        """Φ ⊙ W [N, K] of a static factor, in float32 or float64."""
        *_, P, Q = self._static(None, None, None, self.P, self.Q, self.PH)
        return multiplied(self._matrix(self.weight), P, Q, self.config.factor_activation)

    @staticmethod
    def _matrix(weight: Tensor) -> Tensor:
        """The stored weight seen as [N, K]."""
        return weight

    @property
    def has_static_factor(self) -> bool:
        """Whether there is a Φ that every token shares."""
        return self.config.multiplicative == "static" and self.config.product == "hadamard"

    @property
    def mergeable(self) -> bool:
        """Whether some part of the adapter can be folded: a factor Φ(x) would multiply what is added to W as well."""
        if self.config.multiplicative == "dynamic":
            return False
        return self.P is not None or (self.V is not None and self.config.kind != "dynamic")

    @property
    def unmergeable(self) -> str | None:
        """What merging leaves in force because it is made from the input, or None."""
        if self.config.multiplicative == "dynamic":
            return "Φ(x), made from the input" + ("" if self.V is None else ", and what is added to Φ(x) ⊙ W")
        if self.V is not None and self.config.kind == "dynamic":
            return "scaling · U Σ(x) V x, made from the input"
        return None

    def cannot_merge(self) -> str | None:
        """Why the weight cannot be merged now, or None."""
        if self.original is not None:
            return "is merged already; unmerge first"
        if self.stacked is not None:
            return "is inside task_parallel; close that block first"
        return None

    @torch.no_grad()
    def merge(self) -> None:
        """Fold the parts that do not depend on the input into the weight, and keep the weight as it was."""
        if (why := self.cannot_merge()) is not None:
            raise ValueError(f"merge: the weight {why}")
        if not self.mergeable:
            raise ValueError(f"merge: nothing can be folded; what stays is {self.unmergeable}")
        original = self.weight.detach().clone()
        V, U, P, Q = self._static(self.V, self.U, self.H, self.P, self.Q, self.PH)
        matrix = self._matrix(self.weight)
        wide = torch.float64 if matrix.dtype == torch.float64 else torch.float32
        merged = matrix.to(wide)
        if P is not None and self.config.product == "matmul":
            merged = merged + P.to(wide) @ (Q.to(wide) @ merged)
        elif P is not None:
            merged = self._multiplied()
        if V is not None and self.config.kind != "dynamic":
            merged = merged + self.config.scaling * U.to(wide) @ V.to(wide)
        matrix.copy_(merged)
        self.original = original

    @torch.no_grad()
    def unmerge(self) -> None:
        """Give the weight its original bits back."""
        if self.original is None:
            raise ValueError("unmerge: this layer is not merged")
        self.weight.copy_(self.original)
        self.original = None

    def extra_repr(self) -> str:
        form = f"{self.config.kind}, sigma={self.config.sigma}, r={self.config.r}"
        if self.config.multiplicative != "none":
            form += f", multiplicative={self.config.multiplicative}, product={self.config.product}"
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, {form}"


class TarpLinear(TarpLayer):
    """Drop-in for nn.Linear: y = x (Φ ⊙ W)ᵀ + b + scaling · U Σ(x) V x for x [..., in_features].

    weight [N, K] and bias [N] are the base layer's; V [r, K], U [N, r] and the generator's w1, b1, w2, b2 are new, and
    with a multiplicative part P [N, r], Q [r, K] (Q [r, N] for product="matmul"), whose own generator, where it is made
    from the input, is Pw1, Pb1, Pw2, Pb2.
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

    def _multiplied(self) -> Tensor:
        """Φ ⊙ W [N, K] of a static factor, in float32 or float64."""
        *_, P, Q = self._static(None, None, None, self.P, self.Q, self.PH)
        return multiplied(self._matrix(self.weight), P, Q, self.config.factor_activation)

    @staticmethod
    def _matrix(weight: Tensor) -> Tensor:
        return weight.t()

    def forward(self, x: Tensor) -> Tensor:
        return self._adapt(x, self._matrix(self.weight))
