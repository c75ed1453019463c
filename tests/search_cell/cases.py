"""Calls of `search_cell` for tests, with everything that the independent evaluation in dense.py needs."""

import dataclasses
import functools
import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tarp_kernels import CellWeights, search_cell
from tests.search_cell.dense import RIGHT, Mistakes, dense_cell
from tests.threads import one_thread

PUBLISHED = (5, 5, 0, 5, 1, 4, 5, 1, 1)  # the dominant cell for language modelling, as operation indices
ALPHAS = {
    "published": PUBLISHED,
    "none": (0,) * 9,
    "identity": (1,) * 9,
    "linear": (2,) * 9,
    "glu": (3,) * 9,
    "conv3": (4,) * 9,
    "conv5": (5,) * 9,
    "mixed": (2, 3, 4, 0, 5, 1, 3, 2, 4),
    "dead n0": (0, 0, 2, 3, 5, 0, 1, 4, 2),
    "dead n1": (1, 2, 0, 0, 0, 4, 0, 0, 5),
    "only n2": (0, 0, 0, 0, 0, 3, 0, 0, 0),
    "from nothing": (0, 0, 0, 0, 2, 0, 0, 3, 4),  # operations on zero nodes: constants
}


@dataclasses.dataclass(frozen=True)
class Case:
    d: int = 13
    width: int = 5
    batch: tuple[int, int] | None = (3, 11)  # B, S; None: packed rows
    lengths: tuple[int, ...] = ()  # of the packed sequences
    padding: tuple[tuple[str, int], ...] = ()  # (side, padding rows) for each sequence of the batch
    tasks: tuple[int, ...] | None = None  # rows of each task
    per_task_weights: bool = True
    per_task_alpha: bool = True
    alpha: str = "soft"
    norm: bool = False
    causal: bool = True
    dtype: torch.dtype = torch.float32
    weights_dtype: torch.dtype | None = None
    scale: float = 1.0  # of the cell's matrices
    seed: int = 0

    def with_(self, **changes: Any) -> "Case":
        return dataclasses.replace(self, **changes)

    def __str__(self) -> str:
        default = Case()
        fields = [field.name for field in dataclasses.fields(self)]
        changed = [f"{name}={getattr(self, name)}" for name in fields if getattr(self, name) != getattr(default, name)]
        return ",".join(changed).replace("torch.", "").replace(" ", "").replace("'", "") or "default"


class Call(NamedTuple):
    tensors: dict[str, Tensor]  # h, alpha, and the weights by name
    options: dict[str, Any]
    pieces: list[tuple[list[int], int]]
    dout: Tensor

    def run(self, backend: str | None, **tensors: Tensor) -> Tensor:
        given = self.tensors | tensors
        weights = CellWeights(**{name: tensor for name, tensor in given.items() if name not in ("h", "alpha")})
        return search_cell(given["h"], weights, given["alpha"], **self.options, backend=backend)

    def gradients(self, backend: str | None, names: tuple[str, ...] | None = None) -> dict[str, Tensor]:
        """out, and the gradient of every tensor, or of the named ones; zeros where there is none."""
        leaves = {
            name: tensor.detach().requires_grad_(names is None or name in names)
            for name, tensor in self.tensors.items()
        }
        out = self.run(backend, **leaves)
        return {"out": out.detach()} | gradients(out, leaves, self.dout)

    def double(self) -> "Call":
        return self._replace(tensors={n: t.detach().double() for n, t in self.tensors.items()}, dout=self.dout.double())

    def exact(self, wrong: Mistakes = RIGHT, bounds_of: Tensor | None = None) -> dict[str, Tensor]:
        """out and all gradients of the unfused mixture in float64."""
        call = self.double()
        leaves = {name: tensor.requires_grad_() for name, tensor in call.tensors.items()}
        weights = {name: tensor for name, tensor in leaves.items() if name not in ("h", "alpha")}
        rows = leaves["h"].flatten(0, -2)
        options = {"causal": self.options["causal"], "wrong": wrong, "bounds_of": bounds_of}
        out = dense_cell(rows, weights, leaves["alpha"], self.pieces, **options)
        out = out.reshape(leaves["h"].shape)
        return {"out": out.detach()} | gradients(out, leaves, call.dout)


def gradients(out: Tensor, leaves: dict[str, Tensor], dout: Tensor) -> dict[str, Tensor]:
    asked = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    if not out.requires_grad:
        return {name: torch.zeros_like(leaf) for name, leaf in asked.items()}
    found = torch.autograd.grad(out, list(asked.values()), dout, allow_unused=True)
    return {n: torch.zeros_like(t) if g is None else g for (n, t), g in zip(asked.items(), found, strict=True)}


def one_hot(operations: tuple[int, ...]) -> Tensor:
    return torch.eye(6, dtype=torch.float64)[list(operations)]


def build(case: Case) -> Call:
    random = torch.Generator().manual_seed(case.seed)

    def draw(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)

    rows = sum(case.lengths) if case.batch is None else case.batch[0] * case.batch[1]
    shape = (rows, case.d) if case.batch is None else (*case.batch, case.d)
    tensors = {"h": draw(*shape, dtype=case.dtype)}
    options: dict[str, Any] = {"causal": case.causal}

    lead = () if case.tasks is None else (len(case.tasks),)
    if case.tasks is not None:
        options["segments"] = torch.tensor((0, *itertools.accumulate(case.tasks)))
    count = (lead or (1,))[0]
    if case.alpha == "soft":
        alphas = [draw(9, 6).softmax(-1) for _ in range(count)]
    else:  # each task the same operations on other edges
        alphas = [one_hot(ALPHAS[case.alpha]).roll(i, 0) for i in range(count)]
    alpha = torch.stack(alphas) if lead and case.per_task_alpha else alphas[0]
    tensors["alpha"] = alpha if case.dtype == torch.float64 else alpha.float()

    lead = lead if case.per_task_weights else ()
    for name, size in CellWeights.shapes(case.d, case.width, case.norm).items():
        fan = case.d if name == "project" else case.width * (size[1] if name in ("conv3", "conv5") else 1)
        factor = 0.5 if name.endswith("bias") or name == "norm" else case.scale * fan**-0.5
        tensors[name] = (draw(*lead, *size) * factor + (name == "norm")).to(case.weights_dtype or case.dtype)

    sequences, mask = rows_of_sequences(case, rows)
    if mask is not None:
        options["attention_mask"] = mask
    if case.batch is None and len(case.lengths) > 1:
        options["cu_seqlens"] = torch.tensor((0, *itertools.accumulate(case.lengths)), dtype=torch.int32)
    return Call(tensors, options, pieces(sequences, case.tasks or (rows,)), draw(*shape, dtype=case.dtype))


def rows_of_sequences(case: Case, rows: int) -> tuple[list[list[int]], Tensor | None]:
    if case.batch is None:
        ends = (0, *itertools.accumulate(case.lengths))
        return [list(range(*pair)) for pair in itertools.pairwise(ends)], None
    B, S = case.batch
    if not case.padding:
        return [list(range(i * S, (i + 1) * S)) for i in range(B)], None
    mask = torch.ones(B, S, dtype=torch.int64)
    for i, (side, count) in enumerate(case.padding):
        mask[i, : count if side == "left" else 0] = 0
        mask[i, S - count if side == "right" else S :] = 0
    return [[i * S + j for j in range(S) if mask[i, j]] for i in range(B)], mask


def pieces(sequences: list[list[int]], tasks: tuple[int, ...]) -> list[tuple[list[int], int]]:
    """Sequences cut at the ends of tasks, each with its task."""
    ends = (0, *itertools.accumulate(tasks))
    found = []
    for rows in sequences:
        for task, (start, end) in enumerate(itertools.pairwise(ends)):
            own = [row for row in rows if start <= row < end]
            if own:
                found.append((own, task))
    return found


PADDING = (("left", 3), ("right", 9), ("left", 0))
LAYOUTS = [
    Case(),
    Case(causal=False),
    Case(norm=True, padding=PADDING),
    Case(causal=False, padding=PADDING, alpha="mixed"),
    Case(padding=(("left", 11), ("right", 11), ("right", 4)), tasks=(11, 22)),
    Case(batch=None, lengths=(9, 1, 0, 4, 17)),
    Case(batch=None, lengths=(9, 1, 0, 4, 17), causal=False, norm=True, tasks=(9, 5, 0, 17)),
    Case(batch=None, lengths=(21,), tasks=(8, 13), causal=False),  # the tasks cut the sequence
    Case(tasks=(11, 0, 22), per_task_alpha=False, padding=PADDING),
    Case(tasks=(11, 0, 22), per_task_weights=False),
    Case(batch=(1, 1), width=1, d=1),
    Case(batch=(2, 0)),
    Case(batch=None, lengths=(0,), tasks=(0, 0)),
]
CASES = LAYOUTS + [Case(alpha=name, causal=i % 2 == 0) for i, name in enumerate(ALPHAS)]


# --- float64 results and how far a kernel may be from them -----------------------------------------------------------


def bounds(call: Call, wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """How far each float32 result, rounded to its dtype, may lie from `exact`.

    Every result is a sum of products of sums. The mixture of the absolute values of everything is at least as large as
    all that is added and multiplied on the way, and every rounding on the way is at most u = 2⁻²⁴ of that. A
    path from an operand to a result runs through at most: a row of d and four of taps and channels (5 C + 1), twice
    where the gradient returns, one over all tokens, and the mixtures' few additions.
    """
    double = call.double()
    absolute = double._replace(
        tensors={name: tensor.abs() for name, tensor in double.tensors.items()}, dout=double.dout.abs()
    )
    size = absolute.exact(bounds_of=double.tensors["h"].flatten(0, -2))
    C, d = call.tensors["output"].shape[-1], call.tensors["h"].shape[-1]
    length = 2 * (d + 4 * (5 * C + 1)) + call.tensors["h"].shape[:-1].numel() + 100
    dtypes = {name: tensor.dtype for name, tensor in call.tensors.items()} | {"out": call.dout.dtype}
    found = {}
    for name, value in size.items():
        error = length * 2.0**-24 * value
        found[name] = error + torch.finfo(dtypes[name]).eps / 2 * (wanted[name].abs() + error) + 1e-30
    return found


@functools.cache
def expected(case: Case) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """`exact` and `bounds` of the case's call."""
    call = build(case)
    with one_thread():
        wanted = call.exact()
        return wanted, bounds(call, wanted)


def excesses(found: dict[str, Tensor], wanted: dict[str, Tensor], most: dict[str, Tensor]) -> dict[str, float]:
    """The largest error of each result in units of its bound."""
    ratios = {}
    for name, value in found.items():
        assert value.shape == wanted[name].shape, name
        ratio = (value.double() - wanted[name]).abs() / most[name]
        ratios[name] = float("inf") if ratio.isnan().any() else ratio.max().item() if ratio.numel() else 0.0
    return ratios


# --- on tensor cores -------------------------------------------------------------------------------------------------

# Roundings to bfloat16, 2⁻⁹ each on average less, of every factor along a chain of up to five products and back; and a
# relu whose argument is about zero may open instead of being shut, for a row or two of the few that there are.
TOLERANCE = 0.12


def deviations(found: dict[str, Tensor], wanted: dict[str, Tensor], h: Tensor) -> dict[str, float]:
    """Norm of the error over that of the result, of out over that of what the cell adds to h."""
    sizes = wanted | {"out": wanted["out"] - h.double()}
    return {
        name: ((found[name].double() - value).norm() / sizes[name].norm()).item()
        for name, value in wanted.items()
        if sizes[name].norm() > 0
    }


KERNEL_CASES = CASES + [
    Case(d=70, width=64, batch=(2, 50), alpha="published"),
    Case(d=33, width=50, batch=(2, 21), alpha="mixed", causal=False, norm=True, padding=(("left", 2), ("right", 5))),
    Case(d=40, width=33, batch=(1, 40), norm=True, tasks=(8, 32)),
    Case(d=40, width=7, batch=None, lengths=(5, 1, 30, 2), alpha="published", tasks=(6, 32), per_task_weights=False),
    Case(d=20, width=9, batch=None, lengths=(300, 2, 129)),  # sequences of several strips
    Case(d=20, width=9, batch=None, lengths=(129, 300), causal=False, tasks=(200, 229)),
]
