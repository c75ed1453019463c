"""Two evaluations of `lowrank_linear` that share no code with the library.

`rowwise` is equation 1 of the paper, row by row, with the adapted weight written out: slow and beyond doubt.
`Oracle` evaluates values and gradients in float64 and carries beside every number a bound on what the same computation
may be off by in a given precision, so that tolerances follow from the dtype and the lengths of the sums.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tests.lowrank_linear.cases import Call
from tests.philox import uniform_words
from tests.threads import one_thread

# --- row by row ------------------------------------------------------------------------------------------------------

_SCALAR = {
    "none": lambda v: v,
    "relu": lambda v: max(v, 0.0),
    "gelu": lambda v: v * (1 + math.erf(v / math.sqrt(2))) / 2,
    "silu": lambda v: v / (1 + math.exp(-v)),
    "tanh": math.tanh,
    "sigmoid": lambda v: 1 / (1 + math.exp(-v)),
    "softplus": lambda v: math.log1p(math.exp(v)),
}


def _each(name: str, vector: np.ndarray) -> np.ndarray:
    return np.array([_SCALAR[name](float(v)) for v in vector])


def rowwise(call: Call) -> np.ndarray:
    """y [T, N] in float64: y_t = W_t x_t + b with W_t = W + scaling · U Σ(x_t) V, of the task that owns row t."""
    x = call.x.double().reshape(-1, call.x.shape[-1]).numpy()
    weight = call.weight.double().numpy()
    tensors = {name: tensor.double().numpy() for name, tensor in call.tensors.items()}
    rank = call.V.shape[-2]
    y = np.zeros((x.shape[0], weight.shape[0]))
    for t in range(x.shape[0]):
        seen = x[t]  # what the adapter sees of the row
        if call.dropout is not None:
            p, seed = call.dropout
            words = uniform_words(range(t * x.shape[1], (t + 1) * x.shape[1]), seed)
            seen = np.array([0.0 if w < round(p * 2**32) else v / (1 - p) for v, w in zip(seen, words, strict=True)])
        own = {name: tensors[name] for name in tensors if name in ("V", "U", "w1", "b1", "w2", "b2")}
        if call.segments is not None:
            ends = call.segments.tolist()
            task = next(i for i in range(len(ends) - 1) if ends[i] <= t < ends[i + 1])
            own = {name: array[task] for name, array in own.items()}
        middle = np.eye(rank)
        if call.generator is not None:
            g = own["w1"] @ seen + own.get("b1", 0)
            if "w2" in own:
                g = own["w2"] @ _each(call.generator.hidden_activation, g) + own.get("b2", 0)
            plus = call.generator.activation == "one_plus"
            g = _each("none" if plus else call.generator.activation, g)
            middle = np.diag(g) if call.sigma == "diag" else g.reshape(rank, rank)
            if plus:
                middle = middle + np.eye(rank)
        y[t] = weight @ x[t] + call.scaling * (own["U"] @ middle @ own["V"]) @ seen
        if call.bias is not None:
            y[t] += tensors["bias"]
    return y


# --- numbers with error bounds ---------------------------------------------------------------------------------------


class Bounded(NamedTuple):
    """float64 values, and how far the same computation in the precision under test may lie from them."""

    value: Tensor
    error: Tensor

    @property
    def T(self) -> "Bounded":
        return Bounded(self.value.transpose(-1, -2), self.error.transpose(-1, -2))

    def __getitem__(self, index) -> "Bounded":
        return Bounded(self.value[index], self.error[index])

    def reshape(self, *shape: int) -> "Bounded":
        return Bounded(self.value.reshape(*shape), self.error.reshape(*shape))


def exact(tensor: Tensor) -> Bounded:
    return Bounded(tensor.detach().double(), torch.zeros(tensor.shape, dtype=torch.float64))


def stack(parts: list[Bounded]) -> Bounded:
    return Bounded(torch.stack([p.value for p in parts]), torch.stack([p.error for p in parts]))


def rows_of(parts: list[Bounded]) -> Bounded:
    return Bounded(torch.cat([p.value for p in parts]), torch.cat([p.error for p in parts]))


class Arithmetic:
    """Operations whose every rounding is at most `unit`, relative (Higham, "Accuracy and Stability", ch. 3)."""

    def __init__(self, unit: float):
        self.unit = unit + 2.0**-53  # the oracle rounds as well

    def product(self, a: Bounded, b: Bounded) -> Bounded:
        """a @ b, summed in any order."""
        n = a.value.shape[-1] + 2
        gamma = n * self.unit / (1 - n * self.unit)
        size_a, size_b = a.value.abs(), b.value.abs()
        carried = size_a @ b.error + a.error @ (size_b + b.error)
        return Bounded(a.value @ b.value, carried + gamma * ((size_a + a.error) @ (size_b + b.error)))

    def times(self, a: Bounded, b: Bounded) -> Bounded:
        value = a.value * b.value
        carried = a.value.abs() * b.error + a.error * (b.value.abs() + b.error)
        return Bounded(value, carried + self.unit * (value.abs() + carried))

    def plus(self, a: Bounded, b: Bounded) -> Bounded:
        value, carried = a.value + b.value, a.error + b.error
        return Bounded(value, carried + self.unit * (value.abs() + carried))

    def joined(self, *sums: tuple[Bounded, int]) -> Bounded:
        """The total of some sums, each with its number of terms, that may run on in one accumulator in any order.

        Every step of one sum then rounds what the others have left there as well.
        """
        terms = sum(length for _, length in sums)
        value, error = sum(a.value for a, _ in sums), sum(a.error for a, _ in sums)
        for a, length in sums:
            error = error + (terms - length + 1) * self.unit * (a.value.abs() + a.error)
        return Bounded(value, error)

    def total(self, a: Bounded) -> Bounded:
        """The sum over rows."""
        return self.product(exact(torch.ones(1, a.value.shape[0])), a)[0]

    def scaled(self, a: Bounded, factor: float) -> Bounded:
        """Times a number that itself may be rounded."""
        value = a.value * factor
        carried = a.error * abs(factor)
        return Bounded(value, carried + 2 * self.unit * (value.abs() + carried))

    def activated(self, name: str, a: Bounded) -> Bounded:
        """No activation here is steeper than 1.13; each is computed to a few units of its argument and result."""
        value = _VALUES[name](a.value)
        return Bounded(value, 1.13 * a.error + 8 * self.unit * (value.abs() + a.value.abs()))

    def slope(self, name: str, a: Bounded) -> Bounded:
        """Derivative of an activation at a. Second derivatives are below 1; relu's slope jumps at 0."""
        value = _SLOPES[name](a.value)
        if name in ("none", "one_plus"):
            return exact(value)
        if name == "relu":
            return Bounded(value, (a.value.abs() <= a.error).double())
        return Bounded(value, 2 * a.error + 8 * self.unit)


_VALUES = {
    "none": lambda v: v,
    "one_plus": lambda v: 1 + v,
    "relu": lambda v: v.clamp(min=0),
    "gelu": lambda v: v * torch.special.ndtr(v),
    "silu": lambda v: v * torch.special.expit(v),
    "tanh": torch.tanh,
    "sigmoid": torch.special.expit,
    "softplus": lambda v: torch.logaddexp(v, torch.zeros_like(v)),
}
_SLOPES = {
    "none": torch.ones_like,
    "one_plus": torch.ones_like,
    "relu": lambda v: (v > 0).double(),
    "gelu": lambda v: torch.special.ndtr(v) + v * torch.exp(-v * v / 2) / math.sqrt(2 * math.pi),
    "silu": lambda v: torch.special.expit(v) * (1 + v * torch.special.expit(-v)),
    "tanh": lambda v: 1 / torch.cosh(v) ** 2,
    "sigmoid": lambda v: torch.special.expit(v) * torch.special.expit(-v),
    "softplus": torch.special.expit,
}


def rounded(a: Bounded, dtype: torch.dtype) -> Bounded:
    """One rounding to the output type."""
    info = torch.finfo(dtype)
    return Bounded(a.value, a.error + info.eps / 2 * (a.value.abs() + a.error) + info.smallest_normal * info.eps)


# --- the operator ----------------------------------------------------------------------------------------------------


class Task(NamedTuple):
    """What one task brings and what its forward pass leaves for backward."""

    x: Bounded  # after dropout
    mask: Tensor
    V: Bounded
    U: Bounded
    w1: Bounded | None = None
    b1: Bounded | None = None
    w2: Bounded | None = None
    b2: Bounded | None = None
    h: Bounded | None = None
    u: Bounded | None = None
    g: Bounded | None = None
    s: Bounded | None = None
    z: Bounded | None = None


class Oracle:
    """Value and first-order gradients of one call, each with its bound. The mutants override single steps."""

    def __init__(self, call: Call, dy: Tensor):
        self.call = call
        self.dtype = call.x.dtype
        self.a = Arithmetic(2.0**-53 if self.dtype == torch.float64 else 2.0**-24)
        self.x = exact(call.x.reshape(-1, call.x.shape[-1]))
        self.dy = exact(dy.reshape(-1, call.weight.shape[0]))
        self.weight = exact(call.weight)
        self.sigma, self.scaling = call.sigma, call.scaling
        self.rank = call.V.shape[-2]
        self.first = 0 if call.generator is None else call.generator.w1.shape[-2]

    def run(self) -> dict[str, Bounded]:
        """{"y", and a gradient under the name of every tensor of the call}, rounded to the dtypes of the contract."""
        tasks = [self.forward(task) for task in self.tasks()]
        found = {"y": self.value(tasks)}
        per_task = [self.backward(task, dy) for task, dy in zip(tasks, self.split(self.dy), strict=True)]
        found["x"] = self.dx([grads.pop("x") for grads in per_task])
        found["weight"] = self.a.product(self.dy.T, self.x)
        if self.call.bias is not None:
            found["bias"] = self.a.total(self.dy)
        if self.call.segments is None:
            found |= per_task[0]
        else:
            found |= {name: stack([grads[name] for grads in per_task]) for name in per_task[0]}
        dtypes = {"y": self.dtype, **{name: tensor.dtype for name, tensor in self.call.tensors.items()}}
        shapes = {"x": self.call.x.shape, "y": (*self.call.x.shape[:-1], self.weight.value.shape[0])}
        found = {name: rounded(value, dtypes[name]) for name, value in found.items()}
        return {name: value.reshape(*shapes.get(name, value.value.shape)) for name, value in found.items()}

    # Steps of the forward pass.

    def ends(self) -> list[int]:
        return [0, self.x.value.shape[0]] if self.call.segments is None else self.call.segments.tolist()

    def split(self, rows: Bounded) -> list[Bounded]:
        ends = self.ends()
        return [rows[start:end] for start, end in zip(ends[:-1], ends[1:], strict=True)]

    def mask(self) -> Tensor:
        """What dropout multiplies x by."""
        shape = self.x.value.shape
        if self.call.dropout is None:
            return torch.ones(shape, dtype=torch.float64)
        p, seed = self.call.dropout
        words = torch.tensor(uniform_words(range(math.prod(shape)), seed), dtype=torch.float64)
        return (words >= round(p * 2**32)).double().reshape(shape) / (1 - p)

    def tasks(self) -> list[Task]:
        mask = self.mask()
        seen = Bounded(self.x.value * mask, 3 * self.a.unit * (self.x.value * mask).abs() * (mask != 1))
        masks = self.split(exact(mask))
        names = [name for name in self.call.tensors if name in Task._fields and name != "x"]
        bound = {name: exact(self.call.tensors[name]) for name in names}
        if self.call.segments is None:
            return [Task(seen, mask, **bound)]
        return [
            Task(x, m.value, **{name: value[i] for name, value in bound.items()})
            for i, (x, m) in enumerate(zip(self.split(seen), masks, strict=True))
        ]

    def forward(self, t: Task) -> Task:
        t = t._replace(h=self.a.product(t.x, t.V.T))
        if t.w1 is not None:
            u = self.a.product(t.x, t.w1.T)
            u = u if t.b1 is None else self.a.plus(u, t.b1)
            g = u
            if t.w2 is not None:
                g = self.a.product(self.stored(self.hidden(u)), t.w2.T)
                g = g if t.b2 is None else self.a.plus(g, t.b2)
            t = t._replace(u=u, g=g, s=self.output(g))
        return t._replace(z=self.stored(self.middle(t)))

    def stored(self, a: Bounded) -> Bounded:
        """A factor of a later product; the contract keeps it in the precision of the sums."""
        return a

    def hidden(self, u: Bounded) -> Bounded:
        return self.a.activated(self.call.generator.hidden_activation, u)

    def output(self, g: Bounded) -> Bounded:
        if self.sigma == "full" and self.call.generator.activation == "one_plus":
            return self.a.plus(g, exact(torch.eye(self.rank).reshape(-1)))
        return self.a.activated(self.call.generator.activation, g)

    def matrix(self, s: Bounded) -> Bounded:
        return s.reshape(s.value.shape[0], self.rank, self.rank)

    def middle(self, t: Task) -> Bounded:
        if t.s is None:
            return t.h
        if self.sigma == "diag":
            return self.a.times(t.s, t.h)
        return self.a.product(self.matrix(t.s), t.h[..., None])[..., 0]

    def low(self, t: Task) -> Bounded:
        return self.a.scaled(self.a.product(t.z, t.U.T), self.scaling)

    def value(self, tasks: list[Task]) -> Bounded:
        N, K = self.weight.value.shape
        sums = [(self.a.product(self.x, self.weight.T), K), (rows_of([self.low(task) for task in tasks]), self.rank)]
        if self.call.bias is not None:
            sums.append((exact(self.call.bias.expand(self.x.value.shape[0], N)), 1))
        return self.a.joined(*sums)

    # Steps of the backward pass.

    def backward(self, t: Task, dy: Bounded) -> dict[str, Bounded]:
        """The task's gradients; "x" is the low-rank term's part of dx."""
        dz = self.a.scaled(self.a.product(dy, t.U), self.scaling)
        found = {"U": self.a.scaled(self.a.product(dy.T, t.z), self.scaling)}
        dh, ds = self.middle_backward(t, dz)
        dh = self.stored(dh)
        found["V"] = self.a.product(dh.T, t.x)
        dx = self.a.product(dh, t.V)
        if ds is not None:
            dg = self.a.times(ds, self.a.slope(self.call.generator.activation, t.g))
            du = dg = self.stored(dg)
            if t.w2 is not None:
                found["w2"] = self.a.product(dg.T, self.stored(self.hidden(t.u)))
                if t.b2 is not None:
                    found["b2"] = self.a.total(dg)
                du = self.a.times(self.a.product(dg, t.w2), self.a.slope(self.call.generator.hidden_activation, t.u))
                du = self.stored(du)
            found["w1"] = self.a.product(du.T, t.x)
            if t.b1 is not None:
                found["b1"] = self.a.total(du)
            dx = self.dx_low(dx, self.a.product(du, t.w1))
        found["x"] = self.a.times(dx, Bounded(t.mask, 2 * self.a.unit * t.mask * (t.mask != 1)))
        return found

    def middle_backward(self, t: Task, dz: Bounded) -> tuple[Bounded, Bounded | None]:
        """dh [T, r] and ds [T, r | r²]."""
        if t.s is None:
            return dz, None
        if self.sigma == "diag":
            return self.a.times(t.s, dz), self.a.times(t.h, dz)
        dh = self.a.product(self.matrix(t.s).T, dz[..., None])[..., 0]
        return dh, self.a.times(dz[..., :, None], t.h[..., None, :]).reshape(*t.s.value.shape)

    def dx_low(self, through_h: Bounded, through_s: Bounded) -> Bounded:
        return self.a.joined((through_h, self.rank), (through_s, self.first))

    def dx(self, low: list[Bounded]) -> Bounded:
        dense = self.a.product(self.dy, self.weight)
        return self.a.joined((dense, self.weight.value.shape[0]), (rows_of(low), self.rank + self.first))


class TensorCoreOracle(Oracle):
    """Factors of the low-rank products enter a tensor core in x's dtype; sums, and the dense product, lose nothing."""

    def stored(self, a: Bounded) -> Bounded:
        return a if self.dtype == torch.float32 else rounded(a, self.dtype)

    def tasks(self) -> list[Task]:
        matrices = ("V", "U", "w1", "w2")
        return [
            task._replace(**{name: self.stored(getattr(task, name)) for name in matrices if getattr(task, name)})
            for task in super().tasks()
        ]


def bounds(call: Call, dy: Tensor, oracle: type[Oracle] = Oracle) -> dict[str, Bounded]:
    """What the oracle says about a call."""
    with one_thread():
        return oracle(call, dy).run()


def excess(found: Tensor, wanted: Bounded) -> float:
    """The largest error in units of its bound: a result is right when this is at most 1. NaN counts as infinite."""
    if found.shape != wanted.value.shape:
        raise AssertionError(f"got shape {list(found.shape)}, expected {list(wanted.value.shape)}")
    if found.numel() == 0:
        return 0.0
    ratio = (found.double() - wanted.value).abs() / wanted.error.clamp(min=1e-300)
    return float("inf") if ratio.isnan().any() else ratio.max().item()
