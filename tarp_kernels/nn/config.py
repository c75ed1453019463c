"""`TarpConfig`: what an adapter computes, how it starts, and which layers get one; `SearchCellConfig`: cells beside."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from tarp_kernels.ops.lowrank_linear.contract import SIGMAS
from tarp_kernels.ops.lowrank_linear.reference import HIDDEN_ACTIVATIONS, OUTPUT_ACTIVATIONS
from tarp_kernels.ops.search_cell.weights import OPERATIONS

_CHOICES = {
    "kind": ("dynamic", "bilinear", "kronecker"),
    "sigma": SIGMAS,
    "generator": ("linear", "mlp"),
    "hidden_activation": tuple(HIDDEN_ACTIVATIONS),
    "activation": tuple(OUTPUT_ACTIVATIONS),
    "multiplicative": ("none", "static", "dynamic"),
    "multiplicative_activation": ("centred_softplus", "one_plus", "softplus"),
    "product": ("hadamard", "matmul"),
    "init": ("identity", "paper"),
}


def check_operations(operations: Sequence[str]) -> tuple[str, ...]:
    """The names as a tuple, some of OPERATIONS in their order; TypeError or ValueError for anything else."""
    if isinstance(operations, str) or not isinstance(operations, Sequence):
        raise TypeError(f"operations: got {operations!r}, expected a tuple of names; one is ({operations!r},)")
    unknown = next((name for name in operations if name not in OPERATIONS), None)
    if unknown is not None or not operations:
        came = "none" if unknown is None else repr(unknown)
        raise ValueError(f"operations: got {came}, expected some of {', '.join(OPERATIONS)}")
    ordered = tuple(name for name in OPERATIONS if name in operations)
    if tuple(operations) != ordered:
        raise ValueError(f"operations: got {tuple(operations)}, expected each once in this order: {ordered}")
    return ordered


@dataclass(frozen=True)
class SearchCellConfig:
    """Configuration of the search cells that `apply_tarp` puts beside the feed-forward blocks (see `SearchCell`).

    width       C, width inside the cell
    stem        "layernorm" or "identity"
    operations  names of the candidates, in the order of OPERATIONS
    per_layer   False: one architecture for all layers; True: one for each

    Raises TypeError or ValueError for values outside these.
    """

    width: int = 64
    stem: str = "layernorm"
    operations: tuple[str, ...] = OPERATIONS
    per_layer: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.width, bool) or not isinstance(self.width, int) or self.width < 1:
            raise ValueError(f"width: got {self.width!r}, expected an integer ≥ 1")
        if self.stem not in ("layernorm", "identity"):
            raise ValueError(f"stem: got {self.stem!r}, expected 'layernorm' or 'identity'")
        if not isinstance(self.per_layer, bool):
            raise TypeError(f"per_layer: got {self.per_layer!r}, expected True or False")
        object.__setattr__(self, "operations", check_operations(self.operations))  # a list comes out of a file


@dataclass(frozen=True)
class TarpConfig:
    """Configuration of a TARP adapter (method.md §2): W_task x = (Φ ⊙ W) x + scaling · U Σ(x) V x.

    r                   rank, ≥ 1
    kind                "dynamic": Σ made from the input; "bilinear": Σ = I (LoRA); "kronecker": Σ_k H_k ⊗ (U_k V_k) in
                        place of U V and of P Q
    kronecker_terms     number n of Kronecker products, and rows of each H_k [n, n]; must divide both sizes of the layer
    sigma               "diag" or "full" Σ(x)
    generator           "linear", or "mlp" with one hidden layer (width generator_hidden, None: r; hidden_activation)
    activation          on the generator's output; "one_plus" starts as static LoRA, "none" is the published form
    generator_bias      gives the generator trainable biases
    scaling             factor of the update
    dropout             probability of dropping an element of the adapter's input in training mode
    init                "identity": the layer starts exactly as its base; "paper": N(0, 0.02²) for every adapter weight
    target_modules      None: the defaults of the model's family; "all-linear"; a regular expression for the whole
                        module name; or a list of name endings
    layers              indices of the transformer blocks to adapt; None: all
    rank_pattern        {regular expression of the module name: rank} for exceptions from r
    train_layernorm     also train the LayerNorm / RMSNorm weights
    multiplicative      "none": Φ = 1; "static": Φ = f(P Q) of rank r, the same for every token; "dynamic": Φ made from
                        each token by a generator of its own, of the same form as the additive half's; r further
                        products with W, for small r
    multiplicative_activation
                        f: "centred_softplus" or "one_plus", 1 at the start, or "softplus", the published form.
                        A dynamic Φ must split into products with W, which no softplus does: there the first two both
                        mean 1 + P Σ(x) Q, and "softplus" means P Σ(x) Q alone, the published form
    product             "hadamard": Φ ⊙ W; "matmul": (I + P Q) W, Q [r, N], for a static factor (the paper's ablation)
    additive            False: no U Σ(x) V x; then there must be a multiplicative part
    search_cell         None, or a `SearchCellConfig`: a search cell beside the feed-forward block of each adapted block

    Raises TypeError or ValueError for values outside these.
    """

    r: int = 8
    kind: str = "dynamic"
    sigma: str = "diag"
    generator: str = "linear"
    generator_hidden: int | None = None
    hidden_activation: str = "silu"
    activation: str = "one_plus"
    generator_bias: bool = False
    multiplicative: str = "none"
    multiplicative_activation: str = "centred_softplus"
    product: str = "hadamard"
    kronecker_terms: int = 4
    additive: bool = True
    scaling: float = 1.0
    dropout: float = 0.0
    init: str = "identity"
    target_modules: str | list[str] | None = None
    layers: list[int] | None = None
    rank_pattern: dict[str, int] | None = None
    train_layernorm: bool = False
    search_cell: SearchCellConfig | None = None

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name}: got {getattr(self, name)!r}, expected one of {', '.join(map(repr, choices))}"
                )
        if self.search_cell is not None and not isinstance(self.search_cell, SearchCellConfig):
            came = type(self.search_cell).__name__
            raise TypeError(f"search_cell: got {came}, expected None or SearchCellConfig(width=..., stem=...)")
        if not isinstance(self.additive, bool):
            raise TypeError(f"additive: got {self.additive!r}, expected True or False")
        if not self.additive and self.multiplicative == "none":
            raise ValueError("additive: got False without a multiplicative part, expected True; nothing would be left")
        self._check_factor()
        ranks = {"r": self.r, "generator_hidden": self.generator_hidden, "kronecker_terms": self.kronecker_terms}
        ranks |= {f"rank_pattern[{key!r}]": value for key, value in (self.rank_pattern or {}).items()}
        for name, value in ranks.items():
            if value is None and name == "generator_hidden":
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name}: got {value!r}, expected an integer ≥ 1")
            if value < 1:
                raise ValueError(f"{name}: got {value}, expected an integer ≥ 1")
        if not isinstance(self.dropout, int | float) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: got {self.dropout!r}, expected a probability, 0 ≤ dropout < 1")
        if isinstance(self.scaling, bool) or not isinstance(self.scaling, int | float):
            raise TypeError(f"scaling: got {self.scaling!r}, expected a number")

    def _check_factor(self) -> None:
        published = self.multiplicative != "none" and self.multiplicative_activation == "softplus"
        if self.product == "matmul" and (self.multiplicative != "static" or published):
            came = f"multiplicative={self.multiplicative!r}, {self.multiplicative_activation!r}"
            raise ValueError(
                f"product: got 'matmul' with {came}, expected multiplicative='static' and "
                "multiplicative_activation='centred_softplus' or 'one_plus': it computes (I + P Q) W"
            )
        if self.kind == "kronecker" and self.multiplicative == "dynamic":
            raise ValueError(
                "multiplicative: got 'dynamic' with kind='kronecker', expected 'none' or 'static'; a factor made from "
                "the input goes with kind='dynamic' or 'bilinear'"
            )
        if published and self.init == "identity":
            what = "softplus(0) = 0.693 shrinks every weight" if self.multiplicative == "static" else "Φ(x) = 0"
            raise ValueError(
                f"multiplicative_activation: got 'softplus' with init='identity', but {what} at the start; "
                "use 'centred_softplus', or init='paper' for the published form"
            )

    @property
    def factor_activation(self) -> str:
        """The activation of `hadamard_linear` that multiplicative_activation means."""
        if self.multiplicative != "dynamic":
            return self.multiplicative_activation
        return "none" if self.multiplicative_activation == "softplus" else "one_plus"

    @property
    def generator_outputs(self) -> int:
        """Numbers that the generator makes per row: r for a diagonal Σ, r² for a full one."""
        return self.r if self.sigma == "diag" else self.r * self.r

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TarpConfig":
        """The configuration that `dataclasses.asdict` wrote; an unknown field is an error that names it."""
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(f"TarpConfig: unknown field {unknown[0]!r}; it was written by another version")
        if values.get("search_cell") is not None:
            values = values | {"search_cell": SearchCellConfig(**values["search_cell"])}
        return cls(**values)
