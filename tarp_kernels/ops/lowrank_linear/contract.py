"""What `lowrank_linear` accepts, checked before any kernel runs: every error names the argument and the fix."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tarp_kernels.ops.factor import FACTORS
from tarp_kernels.ops.lowrank_linear.reference import HIDDEN_ACTIVATIONS, OUTPUT_ACTIVATIONS

SIGMAS = ("diag", "full")
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Generator(NamedTuple):
    """Weights of g in s = g(x) (method.md §2): linear, or an MLP with one hidden layer of width m.

    w1  [S, K] for a linear generator, [m, K] for an MLP; S = r for a diagonal Σ, r² for a full one (row-major)
    b1  [S] or [m], or None
    w2  [S, m], or None for a linear generator
    b2  [S], or None
    hidden_activation  "relu" | "gelu" (erf form) | "silu" | "tanh"; used by an MLP only
    activation         "none" | "one_plus" (1 + g, for a full Σ: I + g) | "sigmoid" | "tanh" | "softplus"

    With segments every tensor has a leading task dimension B.
    """

    w1: Tensor
    b1: Tensor | None = None
    w2: Tensor | None = None
    b2: Tensor | None = None
    hidden_activation: str = "silu"
    activation: str = "none"

    def map(self, function: Callable[[Tensor], Tensor]) -> "Generator":
        """The same generator with `function` applied to each of its tensors."""

        def each(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else function(tensor)

        return self._replace(w1=function(self.w1), b1=each(self.b1), w2=each(self.w2), b2=each(self.b2))


class Operands(NamedTuple):
    """The differentiable arguments of a call, x as rows [T, K]. Gradient lists follow this order."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    V: Tensor
    U: Tensor
    w1: Tensor | None = None
    b1: Tensor | None = None
    w2: Tensor | None = None
    b2: Tensor | None = None
    P: Tensor | None = None
    Q: Tensor | None = None


class Form(NamedTuple):
    """Everything about a call that is not a tensor."""

    sigma: str
    hidden_activation: str
    activation: str
    multiplicative: str  # f of the factor f(P Q), where there is one
    scaling: Any  # a number; a 0-d tensor inside the registered operators
    dropout_p: float
    dropout_seed: int
    backend: str

    def generator(self, operands: Operands) -> Generator | None:
        """The generator that a call's operands make up."""
        if operands.w1 is None:
            return None
        return Generator(operands.w1, operands.b1, operands.w2, operands.b2, self.hidden_activation, self.activation)

    def outputs(self, operands: Operands) -> int:
        """S, the numbers that the generator makes for each row: r, r² for a full Σ, 0 without generator."""
        rank = int(operands.V.shape[-2])
        return 0 if operands.w1 is None else rank if self.sigma == "diag" else rank * rank

    def reference_options(self, operands: Operands, segments: Tensor | None) -> dict:
        """The keyword arguments of the reference."""
        dropout = (self.dropout_p, self.dropout_seed) if self.dropout_p > 0 else None
        options = {"sigma": self.sigma, "scaling": self.scaling, "segments": segments, "dropout": dropout}
        return options | {"P": operands.P, "Q": operands.Q, "multiplicative": self.multiplicative}


# Signatures of calls that passed `check`; looking one up takes a tenth of the time of checking, which was half of the
# overhead of a small call.
_PASSED: set[tuple] = set()
_MOST_PASSED = 4096


def check(x, weight, bias, V, U, generator, sigma, scaling, segments, dropout, least_rank=1) -> None:
    """Raise TypeError or ValueError for input that breaks the contract of `lowrank_linear`."""
    if torch.compiler.is_compiling():
        return _check(x, weight, bias, V, U, generator, sigma, scaling, segments, dropout, least_rank)
    try:
        tensors = (weight, bias, V, U) if generator is None else (weight, bias, V, U, *generator)
        signature = (
            x.layout,
            x.dtype,
            x.device,
            x.shape[-1],
            sigma,
            type(scaling),
            type(generator),
            least_rank,
            None if segments is None else (segments.dtype, segments.device, segments.shape),
            *[(t.layout, t.dtype, t.device, t.shape) if isinstance(t, Tensor) else t for t in tensors],
        )
        passed = signature in _PASSED
    except (AttributeError, IndexError, TypeError):  # no tensors, no last dimension, nothing hashable
        return _check(x, weight, bias, V, U, generator, sigma, scaling, segments, dropout, least_rank)
    if not passed:
        _check(x, weight, bias, V, U, generator, sigma, scaling, segments, dropout, least_rank)
        if len(_PASSED) >= _MOST_PASSED:
            _PASSED.clear()
        _PASSED.add(signature)
        return None
    if segments is not None:
        _check_segments(segments, x)
    if dropout is not None:
        _check_dropout(dropout)
    return None


def _check(x, weight, bias, V, U, generator, sigma, scaling, segments, dropout, least_rank) -> None:
    for name, tensor in (("x", x), ("weight", weight), ("V", V), ("U", U)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: got {type(tensor).__name__}, expected a torch.Tensor")
    _strided("x", x)
    if x.dtype not in FLOATS:
        raise TypeError(
            f"x: got dtype {x.dtype}, expected one of {', '.join(map(str, FLOATS))}; convert it with x.float()"
        )
    if x.dim() < 1:
        raise ValueError("x: got a scalar, expected [..., K]; add a dimension")
    if sigma not in SIGMAS:
        raise ValueError(f"sigma: got {sigma!r}, expected 'diag' or 'full'")
    if isinstance(scaling, bool) or not isinstance(scaling, int | float | torch.SymFloat | torch.SymInt):
        raise TypeError(f"scaling: got {type(scaling).__name__}, expected a number; pass tensor.item() for a tensor")

    _shape(
        "weight", weight, (None, x.shape[-1]), "[N, K] with K = x.shape[-1]; pass a transposed view for a Conv1D weight"
    )
    out_features, in_features = weight.shape
    _placed("weight", weight, x, (x.dtype,))
    if bias is not None:
        _shape("bias", bias, (out_features,), "[N] with N = weight.shape[0]")
        _placed("bias", bias, x, (x.dtype,))

    tasks = () if segments is None else (_check_segments(segments, x),)
    lead = "" if segments is None else "B, "
    _shape("V", V, (*tasks, None, in_features), f"[{lead}r, K] with K = x.shape[-1]" + _segment_hint(V, segments, 2))
    rank = V.shape[-2]
    if rank < least_rank:
        raise ValueError(
            "V: got rank r = 0, expected r ≥ 1; call torch.nn.functional.linear for a layer without adapter"
        )
    _shape("U", U, (*tasks, out_features, rank), f"[{lead}N, r] with N = weight.shape[0], r = V.shape[-2]")
    _placed("V", V, x, _adapter_dtypes(x))
    _placed("U", U, x, _adapter_dtypes(x))
    if generator is not None:
        check_generator(generator, x, rank, sigma, segments)
    if dropout is not None:
        _check_dropout(dropout)


def check_factor(x, weight, P, Q, activation, V, U, generator, segments) -> None:
    """What `hadamard_linear` takes beyond `lowrank_linear`: the tensors of the factor, and V and U together or not."""
    for name, tensor in (("x", x), ("weight", weight), ("P", P), ("Q", Q)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: got {type(tensor).__name__}, expected a torch.Tensor")
    if activation not in FACTORS:
        raise ValueError(f"activation: got {activation!r}, expected one of {', '.join(FACTORS)}")
    if V is None and U is None and generator is not None:
        raise ValueError("generator: got one without V and U, expected None; it makes the middle between those")
    if (V is None) != (U is None):
        missing, there = ("V", "U") if V is None else ("U", "V")
        raise ValueError(f"{missing}: got None beside a {there}, expected both, or neither for no additive half")
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"weight: got shape {list(weight.shape)}, expected [N, K] with K = x.shape[-1]")
    N, K = weight.shape
    tasks = 0 if segments is None or not isinstance(segments, Tensor) else 1
    lead = "B, " if tasks else ""
    blocked = P.dim() == tasks + 3
    if P.dim() not in (tasks + 2, tasks + 3) or P.shape[-2] != N or P.shape[-1] < 1:
        raise ValueError(
            f"P: got shape {list(P.shape)}, expected [{lead}N, R] or [{lead}C, N, R] with N = {N}, R ≥ 1"
            + ("" if tasks else "; factors with a leading task dimension need segments")
        )
    blocks = P.shape[-3] if blocked else 1
    if blocks < 1 or K % blocks:
        raise ValueError(f"P: got C = {blocks} blocks of columns, expected a divisor of K = {K}")
    shape = (*P.shape[:tasks], P.shape[-1], K // blocks)
    if tuple(Q.shape) != shape:
        raise ValueError(f"Q: got shape {list(Q.shape)}, expected {list(shape)}, that is [{lead}R, K / C]")
    if tasks and P.shape[0] != segments.shape[0] - 1:
        raise ValueError(f"P: got {P.shape[0]} tasks, expected {segments.shape[0] - 1} like segments")
    for name, tensor in (("P", P), ("Q", Q)):
        _placed(name, tensor, x, _adapter_dtypes(x))


def check_generator(generator, x, rank, sigma, segments, argument="generator") -> None:
    """What a generator of Σ [rank, rank] for rows of x must be; `argument` is its name in errors."""
    tasks = () if segments is None else (segments.shape[0] - 1,)
    lead, in_features, size = "B, " * len(tasks), x.shape[-1], rank if sigma == "diag" else rank * rank
    if not isinstance(generator, Generator):
        raise TypeError(
            f"{argument}: got {type(generator).__name__}, expected tarp_kernels.Generator or None (static, s = 1)"
        )
    if generator.activation not in OUTPUT_ACTIVATIONS:
        raise ValueError(
            f"{argument}.activation: got {generator.activation!r}, expected one of {', '.join(OUTPUT_ACTIVATIONS)}"
        )
    if generator.hidden_activation not in HIDDEN_ACTIVATIONS:
        raise ValueError(
            f"{argument}.hidden_activation: got {generator.hidden_activation!r}, "
            f"expected one of {', '.join(HIDDEN_ACTIVATIONS)}"
        )
    mlp = generator.w2 is not None
    what = "S = r for sigma='diag', r² for sigma='full'"
    _shape(
        f"{argument}.w1",
        generator.w1,
        (*tasks, None if mlp else size, in_features),
        f"[{lead}m, K] with K = x.shape[-1]" if mlp else f"[{lead}S, K] with {what}",
    )
    hidden = generator.w1.shape[-2]
    if generator.b1 is not None:
        _shape(f"{argument}.b1", generator.b1, (*tasks, hidden), f"[{lead}rows of w1]")
    if mlp:
        if hidden < 1:
            raise ValueError(f"{argument}.w1: got hidden width m = 0, expected m ≥ 1; drop w2 for a linear generator")
        _shape(f"{argument}.w2", generator.w2, (*tasks, size, hidden), f"[{lead}S, m] with {what}")
        if generator.b2 is not None:
            _shape(f"{argument}.b2", generator.b2, (*tasks, size), f"[{lead}S] with {what}")
    elif generator.b2 is not None:
        raise ValueError(
            f"{argument}.b2: got a tensor without w2, expected None; a linear generator has its bias in b1"
        )
    for name, tensor in zip(("w1", "b1", "w2", "b2"), generator[:4], strict=True):
        if tensor is not None:
            _placed(f"{argument}.{name}", tensor, x, _adapter_dtypes(x))


def _check_segments(segments, x) -> int:
    """The number of tasks B."""
    if not isinstance(segments, Tensor) or segments.dtype not in (torch.int32, torch.int64):
        came = segments.dtype if isinstance(segments, Tensor) else type(segments).__name__
        raise TypeError(f"segments: got {came}, expected an int32 or int64 tensor [B+1]; use torch.tensor(offsets)")
    if segments.dim() != 1 or segments.shape[0] < 1:
        raise ValueError(f"segments: got shape {list(segments.shape)}, expected [B+1] row offsets, starting with 0")
    if segments.device.type == "cpu" and type(segments) is Tensor and not torch.compiler.is_compiling():
        check_offsets(segments.tolist(), x.shape[:-1].numel())
    return segments.shape[0] - 1


def check_offsets(offsets: list[int], rows: int) -> None:
    """Row offsets must start at 0, never fall and end at the number of rows."""
    if offsets[0] != 0:
        raise ValueError(f"segments: starts at {offsets[0]}, expected 0, so that every row belongs to a task")
    for i, (start, end) in enumerate(zip(offsets[:-1], offsets[1:], strict=True)):
        if end < start:
            raise ValueError(f"segments: falls from {start} to {end} at task {i}, expected offsets that never fall")
    if offsets[-1] != rows:
        raise ValueError(f"segments: ends at {offsets[-1]}, expected the number of rows of x, {rows}")


def check_index(name: str, index, among: Tensor, owner: str) -> None:
    """Numbers of rows of `among`, which errors call `owner`: int64 [T'], strictly rising, none beyond the last.

    By value on the CPU; kernels clamp what lies on another device, so that nothing waits for it.
    """
    fix = "use mask.nonzero().squeeze(1)"
    if not isinstance(index, Tensor) or index.dtype != torch.int64:
        came = index.dtype if isinstance(index, Tensor) else type(index).__name__
        raise TypeError(f"{name}: got {came}, expected an int64 tensor [T'] of row numbers; {fix}")
    if index.device != among.device:
        raise ValueError(f"{name}: lies on {index.device}, expected {among.device} like {owner}; move it")
    if index.layout is not torch.strided or index.dim() != 1 or index.shape[0] > among.shape[0]:
        raise ValueError(
            f"{name}: got shape {list(index.shape)}, expected [T'], each of the {among.shape[0]} rows of {owner} once "
            f"at most; {fix}"
        )
    if index.device.type != "cpu" or type(index) is not Tensor or torch.compiler.is_compiling() or not index.numel():
        return
    first, last = int(index[0]), int(index[-1])
    fallen = (index[1:] <= index[:-1]).nonzero()
    if len(fallen):
        i = int(fallen[0])
        raise ValueError(
            f"{name}: goes from {int(index[i])} to {int(index[i + 1])} at {i + 1}, expected strictly rising row "
            "numbers; use index.unique()"
        )
    if first < 0 or last >= among.shape[0]:
        raise ValueError(
            f"{name}: goes from {first} to {last}, expected numbers of the {among.shape[0]} rows of {owner}; {fix}"
        )


def _check_dropout(dropout) -> None:
    if not isinstance(dropout, tuple | list) or len(dropout) != 2:
        raise TypeError(f"dropout: got {dropout!r}, expected (p, seed) or None")
    p, seed = dropout
    if not isinstance(p, int | float) or not 0 <= p < 1:
        raise ValueError(f"dropout: got p = {p!r}, expected 0 ≤ p < 1")
    if isinstance(seed, bool) or not isinstance(seed, int | torch.SymInt):
        raise TypeError(f"dropout: got a seed of type {type(seed).__name__}, expected an int")
    if not isinstance(seed, torch.SymInt) and not 0 <= seed < 2**63:
        raise ValueError(f"dropout: got seed {seed}, expected 0 ≤ seed < 2**63")


def _shape(name: str, tensor: Tensor | None, expected: tuple[int | None, ...], words: str) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: got {type(tensor).__name__}, expected a torch.Tensor")
    shape = tensor.shape
    if len(shape) != len(expected) or any(e is not None and e != s for e, s in zip(expected, shape, strict=True)):
        sizes = ", ".join("any" if size is None else str(size) for size in expected)
        raise ValueError(f"{name}: got shape {list(shape)}, expected [{sizes}], that is {words}")


def _adapter_dtypes(x: Tensor) -> tuple[torch.dtype, ...]:
    return (x.dtype,) if x.dtype == torch.float64 else (x.dtype, torch.float32)


def _strided(name: str, tensor: Tensor) -> None:
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name}: got layout {tensor.layout}, expected torch.strided; convert it with .to_dense()")


def _segment_hint(V: Tensor, segments, dims: int) -> str:
    if segments is None and V.dim() == dims + 1:
        return "; adapters with a leading task dimension need segments"
    return ""


def _placed(name: str, tensor: Tensor, x: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    _strided(name, tensor)
    if tensor.device != x.device:
        raise ValueError(f"{name}: lies on {tensor.device}, expected {x.device} like x; move it with .to(x.device)")
    if tensor.dtype not in dtypes:
        wanted = " or ".join(dict.fromkeys(map(str, dtypes)))
        raise TypeError(f"{name}: got dtype {tensor.dtype}, expected {wanted} to go with x; convert it or use autocast")
