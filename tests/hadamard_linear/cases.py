"""Calls of `hadamard_linear` for tests, their float64 results with error bounds, and wrong versions to be rejected."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tarp_kernels import Generator, hadamard_linear
from tests.threads import one_thread

NAMES = ("x", "weight", "bias", "P", "Q", "V", "U", "w1")
PER_TASK = ("P", "Q", "V", "U", "w1")
CENTRE = 0.541324854612918
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "centred_softplus": lambda v: F.softplus(v + CENTRE),
    "one_plus": lambda v: 1 + v,
    "softplus": F.softplus,
}


@dataclasses.dataclass(frozen=True)
class Case:
    """x [T, K], W [N, K], a factor of rank R in C blocks, an additive half of rank r (0: none)."""

    shape: tuple[int, int, int] = (17, 36, 23)
    activation: str = "centred_softplus"
    factor_rank: int = 3
    blocks: int = 1
    rank: int = 2
    bias: bool = True
    segments: tuple[int, ...] | None = None  # rows per task, whose sum replaces T
    dropout: float = 0.0
    weight_layout: str = "contiguous"  # "conv1d": transposed; "slice": of a wider one
    x_layout: str = "contiguous"  # "padded": rows further apart; "strided": inner stride 2
    dtype: torch.dtype = torch.float32
    adapter_dtype: torch.dtype | None = None  # None: dtype
    seed: int = 0

    def with_(self, **changes: Any) -> "Case":
        return dataclasses.replace(self, **changes)

    def __str__(self) -> str:
        default = Case()
        fields = [field.name for field in dataclasses.fields(self)]
        changed = [f"{name}={getattr(self, name)}" for name in fields if getattr(self, name) != getattr(default, name)]
        return ",".join(changed).replace("torch.", "").replace(" ", "") or "default"


class Call(NamedTuple):
    tensors: dict[str, Tensor]
    options: dict[str, Any]
    dy: Tensor

    def run(self, backend: str | None, **tensors: Tensor) -> Tensor:
        given = self.tensors | tensors
        generator = Generator(given["w1"], activation="one_plus") if "w1" in given else None
        arguments = (given.get(name) for name in ("x", "weight", "bias", "P", "Q", "V", "U"))
        return hadamard_linear(*arguments, generator, **self.options, backend=backend)

    def gradients(self, backend: str | None, names: tuple[str, ...] = NAMES) -> dict[str, Tensor]:
        """y, and the gradient of each named tensor that is there."""
        leaves = {name: tensor.detach().requires_grad_(name in names) for name, tensor in self.tensors.items()}
        y = self.run(backend, **leaves)
        asked = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
        return {"y": y.detach()} | dict(zip(asked, torch.autograd.grad(y, list(asked.values()), self.dy), strict=True))

    def double(self) -> "Call":
        return self._replace(tensors={n: t.detach().double() for n, t in self.tensors.items()}, dy=self.dy.double())


def build(case: Case) -> Call:
    random = torch.Generator().manual_seed(case.seed)
    T, K, N = case.shape
    lead = ()
    if case.segments is not None:
        T, lead = sum(case.segments), (len(case.segments),)
    adapter = case.adapter_dtype or case.dtype

    def draw(*shape: int, dtype: torch.dtype = case.dtype) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)

    x = draw(T, K)
    if case.x_layout == "padded":
        x = draw(T, K + 3)[:, :K]
    elif case.x_layout == "strided":
        x = draw(T, 2 * K)[:, ::2]
    weight = draw(N, K)
    if case.weight_layout == "conv1d":
        weight = draw(K, N).t()
    elif case.weight_layout == "slice":
        weight = draw(N + 2, K + 5)[1:-1, 2:-3]
    block = () if case.blocks == 1 else (case.blocks,)
    tensors = {"x": x, "weight": weight}
    if case.bias:
        tensors["bias"] = draw(N)
    tensors["P"] = draw(*lead, *block, N, case.factor_rank, dtype=adapter)
    tensors["Q"] = draw(*lead, case.factor_rank, K // case.blocks, dtype=adapter)
    if case.rank:
        tensors["V"] = draw(*lead, case.rank, K, dtype=adapter)
        tensors["U"] = draw(*lead, N, case.rank, dtype=adapter)
        tensors["w1"] = draw(*lead, case.rank, K, dtype=adapter)
    options: dict[str, Any] = {"activation": case.activation, "scaling": -1.5}
    if case.segments is not None:
        options["segments"] = torch.tensor((0, *itertools.accumulate(case.segments)))
    if case.dropout:
        options["dropout"] = (case.dropout, 77 + case.seed)
    return Call(tensors, options, draw(T, N))


CASES = [
    Case(),
    Case(shape=(1, 1, 1), factor_rank=1, rank=0),
    Case(shape=(130, 70, 65), activation="softplus", factor_rank=8, rank=0, bias=False, weight_layout="conv1d"),
    Case(shape=(40, 300, 33), activation="one_plus", factor_rank=17, x_layout="padded", weight_layout="slice"),
    Case(shape=(9, 520, 12), factor_rank=20, rank=3, x_layout="strided"),
    Case(segments=(5, 0, 1, 12), activation="softplus", dropout=0.3),
    Case(segments=(0, 0), rank=0),
    Case(segments=(30, 70), shape=(0, 64, 40), factor_rank=4, weight_layout="conv1d"),
    Case(blocks=4, factor_rank=12, shape=(33, 36, 20)),
    Case(blocks=3, factor_rank=5, shape=(33, 51, 20), segments=(2, 9), activation="softplus", rank=0),
    Case(blocks=2, factor_rank=5, shape=(1100, 24, 20), activation="one_plus"),
    Case(shape=(0, 8, 5)),
]


# --- float64 results and their bounds --------------------------------------------------------------------------------


def parts(call: Call) -> list[slice]:
    if "segments" not in call.options:
        return [slice(0, call.tensors["x"].shape[0])]
    ends = call.options["segments"].tolist()
    return [slice(*pair) for pair in zip(ends[:-1], ends[1:], strict=True)]


def argument(P: Tensor, Q: Tensor) -> Tensor:
    """Column block after column block."""
    return P @ Q if P.dim() == 2 else torch.cat([block @ Q for block in P], dim=1)


class Mistakes(NamedTuple):
    """What a wrong version does differently."""

    activation: Callable[[Tensor], Tensor] | None = None
    neighbour: bool = False
    reversed_blocks: bool = False
    detached: bool = False  # Φ taken as a constant


RIGHT = Mistakes()


def evaluate(call: Call, wrong: Mistakes = RIGHT) -> Tensor:
    """y straight from the equation; the additive half comes from the operator, whose tests are elsewhere."""
    tensors, rows = call.tensors, []
    per_task = "segments" in call.options
    f = wrong.activation or ACTIVATIONS[call.options["activation"]]
    for i, own in enumerate(parts(call)):
        task = (i + 1) % len(parts(call)) if wrong.neighbour else i
        P, Q = (tensors[name][task] if per_task else tensors[name] for name in ("P", "Q"))
        P = P.flip(0) if wrong.reversed_blocks else P
        phi = f(argument(P, Q))
        rows.append(F.linear(tensors["x"][own], tensors["weight"] * (phi.detach() if wrong.detached else phi)))
    y = torch.cat(rows) if rows else tensors["x"].new_zeros(0, tensors["weight"].shape[0])
    return y + rest(call)


def rest(call: Call) -> Tensor:
    """Bias and additive half: the call with W = 0."""
    zero = {"weight": torch.zeros_like(call.tensors["weight"])}
    return call.run("reference", **zero)


def exact(call: Call, wrong: Mistakes = RIGHT) -> dict[str, Tensor]:
    """y and all gradients in float64."""
    call = call.double()
    leaves = {name: tensor.requires_grad_() for name, tensor in call.tensors.items()}
    with one_thread():
        y = evaluate(call._replace(tensors=leaves), wrong)
        found = torch.autograd.grad(y, list(leaves.values()), call.dy, allow_unused=True)
    zeros = (torch.zeros_like(t) if g is None else g for g, t in zip(found, leaves.values(), strict=True))
    return {"y": y.detach()} | dict(zip(leaves, zeros, strict=True))


SIGMAS = 5  # a sum of roundings lies within so many of their root sum of squares


def bounds(call: Call, tensor_cores: bool = False) -> dict[str, Tensor]:
    """How far each result in float32 (and rounded to its dtype) may lie from `exact`: lengths of sums times magnitudes.

    A factor is known to (R + 10) roundings of |P| |Q| times the slope, which is at most 1, and a few of its own.
    `tensor_cores`: P, Q, Φ ⊙ W and dyᵀx ⊙ W ⊙ f' are rounded to x's dtype where they enter a product, and so are the
    additive half's V, U, w1 and the two factors that lie between them.
    """
    dtypes = {name: tensor.dtype for name, tensor in call.tensors.items()} | {"y": call.dy.dtype}
    wanted, call = exact(call), call.double()
    size = {name: tensor.abs() for name, tensor in call.tensors.items()}
    per_task = "segments" in call.options
    T, K = call.tensors["x"].shape
    N, R = call.tensors["weight"].shape[0], call.tensors["P"].shape[-1]
    r = call.tensors["V"].shape[-2] if "V" in call.tensors else 0
    unit = 2.0**-24
    length = R + 10
    half = torch.finfo(dtypes["y"]).eps / 2 / unit if tensor_cores else 0  # its roundings, in units
    narrowed = dtypes["P"] != dtypes["y"]  # P and Q are rounded too
    f = ACTIVATIONS[call.options["activation"]]
    found = {name: torch.zeros_like(value) for name, value in wanted.items()}
    for i, own in enumerate(parts(call)):
        task = i if per_task else ...
        P, Q, P_size, Q_size = (tensors[name][task] for tensors in (call.tensors, size) for name in ("P", "Q"))
        v, spread = argument(P, Q), argument(P_size, Q_size)
        phi = f(v).abs() + spread + 1
        slope = torch.ones_like(phi)  # f' ≤ 1, f'' ≤ 1 / 4
        W, x, dy = size["weight"], size["x"][own], call.dy[own].abs()
        found["y"][own] = (K + length) * F.linear(x, W * phi)
        found["x"][own] = (N + length) * (dy @ (W * phi))
        product = dy.t() @ x
        found["weight"] += (T + length) * product * phi
        signed = (call.dy[own].t() @ call.tensors["x"][own]).abs()
        found["weight"] += 2 * narrowed * half * spread * signed
        factors = (W * (f(v).abs() + 2 * narrowed * spread)).square()  # roundings are independent of each other
        found["y"][own] += SIGMAS * half * F.linear(x.square(), factors).sqrt()
        found["x"][own] += SIGMAS * half * (dy.square() @ factors).sqrt()
        for name, sums in (("P", K), ("Q", N)):
            summed = (T + sums + 2 * length) * product * W * (slope + spread)
            rounded = (signed * W * (2 + narrowed * spread)).square()
            if P.dim() == 3:
                summed, rounded = (t.unflatten(1, (P.shape[0], -1)).transpose(0, 1) for t in (summed, rounded))
            if name == "P":
                found["P"][task] = summed @ Q_size.t() + SIGMAS * half * (rounded @ Q_size.t().square()).sqrt()
            else:
                left = P_size.transpose(-1, -2)
                whole, random = (t.reshape(-1, *Q.shape).sum(0) for t in (left @ summed, left.square() @ rounded))
                found["Q"][task] = whole + SIGMAS * half * random.sqrt()
    # the additive half, coarsely: all of its sums are shorter than this, and its magnitudes those of absolute values;
    # rounded factors are independent of each other, and squares of all tensors give the sum of the products' squares
    for power, factor_of in ((1, 2 * (T + K + N + 3 * r + 20)), (2, 3 * SIGMAS * half)):
        tensors = {name: tensor.abs() ** power for name, tensor in call.tensors.items()}
        options = call.options | {"scaling": 1.5**power, "activation": "one_plus"}
        if r or "bias" in size:
            powers = rest_gradients(Call(tensors, options, call.dy.abs() ** power))
            for name, value in powers.items():
                found[name] += factor_of * value.abs() ** (1 / power)
    small = {name: torch.finfo(dtype).eps / 2 for name, dtype in dtypes.items()}
    return {n: unit * value + small[n] * (wanted[n].abs() + unit * value) + 1e-30 for n, value in found.items()}


def rest_gradients(call: Call) -> dict[str, Tensor]:
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in call.tensors.items()}
    with one_thread():
        y = rest(call._replace(tensors=leaves))
        found = torch.autograd.grad(y, list(leaves.values()), call.dy, allow_unused=True)
    return {"y": y.detach()} | {n: g for n, g in zip(leaves, found, strict=True) if g is not None}


def excesses(found: dict[str, Tensor], call: Call, tensor_cores: bool = False) -> dict[str, float]:
    """The largest error of each result in units of its bound."""
    wanted, most = exact(call), bounds(call, tensor_cores)
    ratios = {}
    for name, value in found.items():
        assert value.shape == wanted[name].shape, name
        ratio = (value.double() - wanted[name]).abs() / most[name]
        ratios[name] = float("inf") if ratio.isnan().any() else ratio.max().item() if ratio.numel() else 0.0
    return ratios
