"""The one place that builds calls of `lowrank_linear` for tests: every form, shape, dtype, stride and segmentation."""

import dataclasses
import itertools
import random
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tarp_kernels import Generator, lowrank_linear

# Every differentiable argument, in the order of the contract.
NAMES = ("x", "weight", "bias", "V", "U", "w1", "b1", "w2", "b2")

HIDDEN_ACTIVATIONS = ("relu", "gelu", "silu", "tanh")
ACTIVATIONS = ("none", "one_plus", "sigmoid", "tanh", "softplus")
RANKS = (1, 3, 8, 17, 64)

# T, K, N: no multiples of a tile, a single row, column or feature, shapes on both sides of every kernel's threshold
# (dot products up to 96 rows; a second thread from 2¹⁷ multiplications on).
SHAPES = ((0, 8, 5), (1, 1, 1), (1, 300, 7), (5, 7, 3), (17, 33, 65), (33, 257, 1), (13, 16, 16), (101, 70, 130))

# Rows per task. 0 is an empty segment; the number of rows is their sum and replaces T.
SEGMENTS: dict[str, tuple[int, ...] | None] = {
    "none": None,
    "one": (9,),
    "ragged": (0, 1, 7, 0, 4, 13, 1),
    "many": (1, 0, 0, 2, 1, 1, 0, 5, 1, 0, 0, 0),
    "long": (60, 0, 45),
    "few": (2, 0, 1),
    "empty": (0, 0),
}


@dataclass(frozen=True)
class Case:
    """Everything that tells one call from another; `build` makes the tensors."""

    sigma: str = "diag"
    generator: str = "linear"  # "none" | "linear" | "mlp"
    activation: str = "one_plus"
    hidden_activation: str = "silu"
    bias: bool = True
    b1: bool = False
    b2: bool = False
    rank: int = 3
    hidden: int = 5
    shape: tuple[int, int, int] = (17, 33, 65)
    segments: str | tuple[int, ...] = "none"  # a name in SEGMENTS, or the rows per task
    scaling: float = 1.5
    dropout: float = 0.0
    x_layout: str = "contiguous"  # "padded": row stride > K, unaligned; "strided": inner stride 2; "batch": [.., .., K]
    weight_layout: str = "contiguous"  # "conv1d": transposed; "slice": of a wider one; "conv1d_slice"; "strided"
    adapter_layout: str = "contiguous"  # "transposed"
    dtype: torch.dtype = torch.float32
    adapter_dtype: torch.dtype | None = None  # None: x's dtype
    seed: int = 0

    def with_(self, **changes: Any) -> "Case":
        return dataclasses.replace(self, **changes)

    @property
    def lengths(self) -> tuple[int, ...] | None:
        """Rows per task; None without segments."""
        return SEGMENTS[self.segments] if isinstance(self.segments, str) else self.segments

    @property
    def rows(self) -> int:
        return self.shape[0] if self.lengths is None else sum(self.lengths)

    def __str__(self) -> str:
        default = Case()
        changed = [
            f"{field.name}={getattr(self, field.name)}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != getattr(default, field.name)
        ]
        return ",".join(changed).replace("torch.", "").replace(" ", "") or "default"


class Call(NamedTuple):
    """The arguments of one call. x is [..., K]."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    V: Tensor
    U: Tensor
    generator: Generator | None
    sigma: str
    scaling: float
    segments: Tensor | None
    dropout: tuple[float, int] | None

    def run(self, backend: str | None = None) -> Tensor:
        return lowrank_linear(*self[:6], **self.options, backend=backend)

    @property
    def options(self) -> dict[str, Any]:
        return {
            "sigma": self.sigma,
            "scaling": self.scaling,
            "segments": self.segments,
            "dropout": self.dropout,
        }

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The differentiable tensors that are there, by name."""
        generator = (None,) * 4 if self.generator is None else self.generator[:4]
        found = zip(NAMES, (*self[:5], *generator), strict=True)
        return {name: tensor for name, tensor in found if tensor is not None}

    def with_tensors(self, tensors: dict[str, Tensor]) -> "Call":
        """The same call with some differentiable tensors replaced."""
        fields = {name: tensors[name] for name in NAMES[:5] if name in tensors}
        inner = {name: tensors[name] for name in NAMES[5:] if name in tensors}
        if inner and self.generator is not None:
            fields["generator"] = self.generator._replace(**inner)
        return self._replace(**fields)

    def map(self, function) -> "Call":
        return self.with_tensors({name: function(tensor) for name, tensor in self.tensors.items()})

    def double(self) -> "Call":
        """The same numbers in contiguous float64."""
        return self.map(lambda tensor: tensor.detach().double().contiguous())

    def leaves(self, names: tuple[str, ...] = NAMES) -> "Call":
        """The same call with gradients asked for by the named tensors and no other; strides are kept."""
        return self.with_tensors({n: t.detach().requires_grad_(n in names) for n, t in self.tensors.items()})


def run_with_gradients(call: Call, dy: Tensor, backend: str | None, names=NAMES) -> dict[str, Tensor | None]:
    """{"y": ..., and the gradient of each tensor under its name}."""
    call = call.leaves(names)
    y = call.run(backend)
    wanted = {name: tensor for name, tensor in call.tensors.items() if tensor.requires_grad}
    gradients = torch.autograd.grad(y, list(wanted.values()), dy, allow_unused=True)
    return {"y": y.detach(), **dict(zip(wanted, gradients, strict=True))}


# --- building --------------------------------------------------------------------------------------------------------


def _nan(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


def lay_out(tensor: Tensor, layout: str) -> Tensor:
    """The same matrix with other strides. Whatever lies between its elements is NaN, so that reading it shows."""
    rows, columns = tensor.shape[-2:]
    dtype = tensor.dtype
    if layout == "contiguous":
        return tensor
    if layout == "transposed" or layout == "conv1d":
        return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "padded" or layout == "slice":
        target = _nan(rows + 1, columns + 5, dtype=dtype)[1:, 3 : 3 + columns]
    elif layout == "conv1d_slice":
        target = _nan(columns + 1, rows + 5, dtype=dtype)[1:, 3 : 3 + rows].t()
    elif layout == "strided":
        target = _nan(2 * rows + 1, 3 * columns + 1, dtype=dtype)[1::2, 1::3]
    else:
        raise ValueError(f"layout: got {layout!r}")
    target.copy_(tensor)
    return target


def build(case: Case) -> Call:
    """The call of a case: random numbers of a size at which the dense and the low-rank term weigh about the same."""
    random_numbers = torch.Generator().manual_seed(1000 + case.seed)
    _, K, N = case.shape
    T, rank = case.rows, case.rank
    lengths = case.lengths
    lead = () if lengths is None else (len(lengths),)
    adapter_dtype = case.adapter_dtype or case.dtype

    def normal(*shape: int, scale: float = 1.0, dtype=case.dtype) -> Tensor:
        return (torch.randn(*shape, generator=random_numbers, dtype=torch.float64) * scale).to(dtype)

    def adapter(*shape: int, scale: float = 1.0) -> Tensor:
        tensor = normal(*lead, *shape, scale=scale, dtype=adapter_dtype)
        return tensor if len(shape) == 1 else lay_out(tensor, case.adapter_layout)

    x = normal(T, K)
    if case.x_layout == "batch":
        x = x.reshape(1, T, 1, K) if T % 2 else x.reshape(T // 2, 2, K)
    else:
        x = lay_out(x, case.x_layout)
    weight = lay_out(normal(N, K, scale=K**-0.5), case.weight_layout)
    bias = normal(N) if case.bias else None
    V, U = adapter(rank, K, scale=K**-0.5), adapter(N, rank, scale=rank**-0.5)
    generator = None
    if case.generator != "none":
        outputs = rank if case.sigma == "diag" else rank * rank
        spread = 1.0 if case.sigma == "diag" else rank**-0.5  # a row of Σ sums rank of them
        mlp = case.generator == "mlp"
        width = case.hidden if mlp else outputs
        generator = Generator(
            adapter(width, K, scale=K**-0.5 * (1 if mlp else spread)),
            adapter(width) if case.b1 else None,
            adapter(outputs, width, scale=2 * width**-0.5 * spread) if mlp else None,
            adapter(outputs) if mlp and case.b2 else None,
            case.hidden_activation,
            case.activation,
        )
    segments = None
    if lengths is not None:
        offsets = list(itertools.accumulate(lengths, initial=0))
        segments = torch.tensor(offsets, dtype=torch.int32 if case.seed % 2 else torch.int64)
    dropout = (case.dropout, 12345 + case.seed) if case.dropout else None
    return Call(x, weight, bias, V, U, generator, case.sigma, case.scaling, segments, dropout)


def cotangent(case: Case) -> Tensor:
    """A dy for the call of a case, transposed in memory for every other one."""
    random_numbers = torch.Generator().manual_seed(2000 + case.seed)
    N = case.shape[2]
    dy = torch.randn(case.rows, N, generator=random_numbers, dtype=torch.float64).to(case.dtype)
    if case.x_layout == "batch":
        return dy.reshape(*build_x_lead(case), N)
    return lay_out(dy, ("contiguous", "padded", "transposed")[case.seed % 3])


def build_x_lead(case: Case) -> tuple[int, ...]:
    return (1, case.rows, 1) if case.rows % 2 else (case.rows // 2, 2)


# --- sets of cases ---------------------------------------------------------------------------------------------------

FACTORS: dict[str, tuple] = {
    "sigma": ("diag", "full"),
    "generator": ("none", "linear", "mlp"),
    "activation": ACTIVATIONS,
    "hidden_activation": HIDDEN_ACTIVATIONS,
    "bias": (True, False),
    "b1": (False, True),
    "b2": (False, True),
    "rank": RANKS,
    "hidden": (1, 5, 40),
    "shape": SHAPES,
    "segments": tuple(SEGMENTS),
    "scaling": (1.5, -0.25),
    "dropout": (0.0, 0.3),
    "x_layout": ("contiguous", "padded", "strided", "batch"),
    "weight_layout": ("contiguous", "conv1d", "slice", "conv1d_slice", "strided"),
    "adapter_layout": ("contiguous", "transposed"),
}
# dtype and adapter dtype that each backend takes
DTYPES = {
    "reference": (
        (torch.float32, None),
        (torch.float64, None),
        (torch.bfloat16, None),
        (torch.bfloat16, torch.float32),
        (torch.float16, None),
        (torch.float16, torch.float32),
    ),
    "cpu": ((torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, torch.float32)),
    # in its interpreter, which gets bfloat16 wrong
    "triton": ((torch.float32, None), (torch.float16, None), (torch.float16, torch.float32)),
    "cuda": (
        (torch.bfloat16, None),
        (torch.bfloat16, torch.float32),
        (torch.float16, None),
        (torch.float16, torch.float32),
    ),
}
# What a backend serves of other factors, where that is not all.
SERVED: dict[str, dict[str, tuple]] = {
    "cuda": {
        "shape": tuple((T, -(-K // 8) * 8, N) for T, K, N in SHAPES),
        "dropout": (0.0,),
        "weight_layout": ("contiguous",),
    }
}


def pairwise(backend: str, seed: int = 0) -> list[Case]:
    """Few cases in which every two values of any two factors meet."""
    factors = {**FACTORS, **SERVED.get(backend, {}), "dtypes": DTYPES[backend]}
    names = list(factors)
    missing = {
        (a, i, b, j)
        for a, b in itertools.combinations(range(len(names)), 2)
        for i in range(len(factors[names[a]]))
        for j in range(len(factors[names[b]]))
    }
    chooser = random.Random(seed)

    def covered(row: list[int]) -> set:
        return {(a, row[a], b, row[b]) for a, b in itertools.combinations(range(len(row)), 2)}

    cases: list[Case] = []
    while missing:
        a, i, b, j = min(missing)  # of many rows that contain this pair the one with the most missing pairs
        rows = []
        for _ in range(60):
            row = [chooser.randrange(len(values)) for values in factors.values()]
            row[a], row[b] = i, j
            rows.append(row)
        best = max(rows, key=lambda row: len(covered(row) & missing))
        missing -= covered(best)
        values = {name: factors[name][k] for name, k in zip(names, best, strict=True)}
        cases.append(_case(values, len(cases), factors["shape"]))
    return cases


def of_form(form: dict[str, Any], backend: str, count: int) -> list[Case]:
    """A form with every rank, each some times with the other factors drawn at random."""
    chooser = random.Random(repr(form) + backend)
    factors = FACTORS | SERVED.get(backend, {})
    cases = []
    for rank, _ in itertools.product(RANKS, range(count)):
        values = {name: chooser.choice(choices) for name, choices in factors.items()}
        values |= {**form, "rank": rank, "dtypes": chooser.choice(DTYPES[backend])}
        cases.append(_case(values, len(cases), factors["shape"]))
    return cases


def forms() -> list[dict[str, Any]]:
    """sigma × generator × biases × activation × hidden activation, without combinations that mean the same."""
    found: list[dict[str, Any]] = [{"generator": "none", "sigma": "diag", "b1": False, "b2": False}]
    flags = (False, True)
    for sigma, activation, b1 in itertools.product(("diag", "full"), ACTIVATIONS, flags):
        found.append({"generator": "linear", "sigma": sigma, "activation": activation, "b1": b1, "b2": False})
        for hidden_activation, b2 in itertools.product(HIDDEN_ACTIVATIONS, flags):
            form = {"generator": "mlp", "sigma": sigma, "activation": activation, "b1": b1, "b2": b2}
            found.append({**form, "hidden_activation": hidden_activation})
    return found


def basic_forms() -> list[Case]:
    """One case for every combination of sigma and generator, with biases: for what is costly to check."""
    return [
        Case(generator="none", shape=(6, 7, 5)),
        Case(generator="linear", b1=True, activation="one_plus", shape=(6, 7, 5)),
        Case(generator="mlp", b1=True, b2=True, activation="none", shape=(6, 7, 5), hidden=4),
        Case(generator="linear", sigma="full", activation="one_plus", shape=(6, 7, 5), bias=False),
        Case(generator="mlp", sigma="full", b2=True, activation="sigmoid", hidden_activation="gelu", shape=(6, 7, 5)),
        Case(
            generator="mlp", b1=True, activation="softplus", hidden_activation="tanh", segments="ragged", dropout=0.3
        ).with_(shape=(0, 7, 5)),
        Case(generator="linear", sigma="full", activation="tanh", segments="ragged", shape=(0, 7, 5)),
    ]


def _case(values: dict[str, Any], seed: int, shapes: tuple[tuple[int, int, int], ...]) -> Case:
    dtype, adapter_dtype = values.pop("dtypes")
    if values["sigma"] == "full" and values["generator"] != "none" and values["rank"] == 64:
        values["shape"] = shapes[4]  # 4096 generator outputs a row: large enough as it is
        values["segments"] = "none" if values["segments"] == "none" else "one"
    return Case(**values, dtype=dtype, adapter_dtype=adapter_dtype, seed=seed)
