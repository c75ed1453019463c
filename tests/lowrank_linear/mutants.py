"""Wrong versions of `lowrank_linear`, each with one mistake that somebody could make.

A tolerance is worth something when it tells each of them from the truth: `undetected` lists those it does not.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tests.lowrank_linear.cases import Call
from tests.lowrank_linear.oracle import Bounded, Oracle, Task, exact
from tests.threads import one_thread


class Mutant(NamedTuple):
    name: str
    applies: Callable[[Call], bool]
    results: Callable[[Call, Tensor], dict[str, Tensor]]
    outputs: tuple[str, ...]  # of these, each that the call has must be seen to be wrong


ADAPTER = ("V", "U", "w1", "b1", "w2", "b2")
EVERYTHING = ("y", "x", "weight", "bias", *ADAPTER)
MUTANTS: list[Mutant] = []


def _values(found: dict[str, Bounded]) -> dict[str, Tensor]:
    return {name: bounded.value for name, bounded in found.items()}


def of_call(outputs: str, applies: Callable[[Call], bool] = lambda call: True):
    """Register a function Call -> Call: the right operator on the wrong arguments."""

    def register(change: Callable[[Call], Call]):
        MUTANTS.append(
            Mutant(change.__name__, applies, lambda call, dy: _values(Oracle(change(call), dy).run()), names(outputs))
        )
        return change

    return register


def of_oracle(outputs: str, applies: Callable[[Call], bool] = lambda call: True):
    """Register a subclass of Oracle: the right arguments, one wrong step."""

    def register(wrong: type[Oracle]):
        MUTANTS.append(Mutant(wrong.__name__, applies, lambda call, dy: _values(wrong(call, dy).run()), names(outputs)))
        return wrong

    return register


def names(text: str) -> tuple[str, ...]:
    return EVERYTHING if text == "everything" else tuple(text.split())


def rank(call: Call) -> int:
    return call.V.shape[-2]


def active_tasks(call: Call) -> int:
    return 1 if call.segments is None else int((call.segments.diff() > 0).sum())


def is_mlp(call: Call) -> bool:
    return call.generator is not None and call.generator.w2 is not None


def diagonal(call: Call) -> bool:
    return call.generator is not None and call.sigma == "diag"


def full(call: Call) -> bool:
    return call.generator is not None and call.sigma == "full"


# --- nothing, or one term less ----------------------------------------------------------------------------------------


@of_oracle("everything")
class Zero(Oracle):
    def run(self):
        return {name: exact(torch.zeros_like(value.value)) for name, value in super().run().items()}


@of_oracle("y x V U w1 b1 w2 b2")
class NoLowRankTerm(Oracle):
    def low(self, t):
        return exact(torch.zeros_like(super().low(t).value))

    def backward(self, t, dy):
        return {name: exact(torch.zeros_like(grad.value)) for name, grad in super().backward(t, dy).items()}


@of_oracle("y x weight")
class NoDenseProduct(Oracle):
    def __init__(self, call, dy):
        super().__init__(call, dy)
        self.weight = exact(torch.zeros_like(self.weight.value))

    def run(self):
        found = super().run()
        return found | {"weight": exact(torch.zeros_like(found["weight"].value))}


@of_call("y", lambda call: call.bias is not None)
def no_bias(call):
    return call._replace(bias=torch.zeros_like(call.bias))


@of_call("y x V U w1 b1 w2 b2", lambda call: call.scaling != 1)
def no_scaling(call):
    return call._replace(scaling=1.0)


@of_oracle("x")
class InputGradientWithoutLowRankTerm(Oracle):
    def dx(self, low):
        return super().dx([exact(torch.zeros_like(part.value)) for part in low])


@of_oracle("x", lambda call: call.generator is not None)
class InputGradientWithoutGenerator(Oracle):
    def dx_low(self, through_h, through_s):
        return through_h


@of_call("y", lambda call: call.generator is not None and call.generator.b1 is not None)
def no_generator_bias(call):
    return call._replace(generator=call.generator._replace(b1=None))


@of_call("y", lambda call: is_mlp(call) and call.generator.b2 is not None)
def no_second_generator_bias(call):
    return call._replace(generator=call.generator._replace(b2=None))


# --- the middle -------------------------------------------------------------------------------------------------------


@of_oracle("y x V U", lambda call: call.generator is not None)
class NoGenerator(Oracle):
    def middle(self, t):
        return t.h

    def middle_backward(self, t, dz):
        return dz, super().middle_backward(t, dz)[1]


def _changes_value(call: Call) -> bool:
    return call.generator is not None and call.generator.activation != "none"


@of_call("y", _changes_value)
def no_output_activation(call):
    return call._replace(generator=call.generator._replace(activation="none"))


@of_oracle(
    "w1", lambda call: call.generator is not None and call.generator.activation in ("sigmoid", "tanh", "softplus")
)
class NoSlopeOfOutputActivation(Oracle):
    def backward(self, t, dy):
        if t.g is None:
            return super().backward(t, dy)
        flat = self.a
        self.a = _WithoutSlope(self.a, self.call.generator.activation)
        try:
            return super().backward(t, dy)
        finally:
            self.a = flat


class _WithoutSlope:
    """An arithmetic in which one activation has slope 1."""

    def __init__(self, arithmetic, name):
        self._arithmetic, self._name = arithmetic, name

    def __getattr__(self, attribute):
        return getattr(self._arithmetic, attribute)

    def slope(self, name, a):
        return exact(torch.ones_like(a.value)) if name == self._name else self._arithmetic.slope(name, a)


@of_oracle("y w2", is_mlp)
class NoHiddenActivation(Oracle):
    def hidden(self, u):
        return u


@of_oracle("V", diagonal)
class SwappedRolesInBackward(Oracle):
    def middle_backward(self, t, dz):
        dh, ds = super().middle_backward(t, dz)
        return ds, dh


@of_oracle("y x V U", lambda call: full(call) and rank(call) > 1)
class TransposedSigma(Oracle):
    def matrix(self, s):
        return super().matrix(s).T


@of_oracle("V", lambda call: full(call) and rank(call) > 1)
class TransposedSigmaInBackward(Oracle):
    def middle_backward(self, t, dz):
        if t.s is None:
            return super().middle_backward(t, dz)
        dh = self.a.product(self.matrix(t.s), dz[..., None])[..., 0]
        return dh, super().middle_backward(t, dz)[1]


@of_oracle("y", lambda call: full(call) and rank(call) > 1 and call.generator.activation == "one_plus")
class OnesInsteadOfIdentity(Oracle):
    def output(self, g):
        return self.a.activated("one_plus", g)


@of_call("y x", lambda call: rank(call) > 1)
def last_rank_lost(call):
    kept = torch.arange(rank(call)) < rank(call) - 1
    return call._replace(U=call.U * kept)


# --- edges ------------------------------------------------------------------------------------------------------------


@of_call("y U V", lambda call: call.x.shape[-1] > 1)
def last_feature_lost(call):
    kept = torch.arange(call.x.shape[-1]) < call.x.shape[-1] - 1
    return call._replace(x=call.x.where(kept, torch.zeros_like(call.x)))


@of_oracle("y x")
class LastRowLost(Oracle):
    def run(self):
        found = super().run()
        for name in ("y", "x"):
            flat = found[name].value.clone()
            flat.reshape(-1, flat.shape[-1])[-1:] = 0
            found[name] = exact(flat)
        return found


@of_oracle("y x")
class LastColumnLost(Oracle):
    def run(self):
        found = super().run()
        for name in ("y", "x"):
            flat = found[name].value.clone()
            flat[..., -1] = 0
            found[name] = exact(flat)
        return found


@of_oracle("y", lambda call: call.weight.shape[0] == call.weight.shape[1] > 1)
class TransposedWeight(Oracle):
    def __init__(self, call, dy):
        super().__init__(call, dy)
        self.weight = self.weight.T


def _drops(call: Call) -> bool:
    """Dropout, and features enough that no row loses all of them."""
    return call.dropout is not None and call.x.shape[-1] > 8


# --- segments ---------------------------------------------------------------------------------------------------------


@of_call("y x", lambda call: active_tasks(call) > 1)
def neighbours_adapter(call):
    return call.with_tensors({name: t.roll(1, 0) for name, t in call.tensors.items() if name in ADAPTER})


@of_call("y U", lambda call: active_tasks(call) > 1 and (call.dropout is None or _drops(call)))
def offsets_off_by_one(call):
    ends = call.segments.tolist()
    moved = [0, *(min(end + 1, ends[-1]) for end in ends[1:-1]), ends[-1]]
    return call._replace(segments=torch.tensor(moved))


# --- dropout ----------------------------------------------------------------------------------------------------------


@of_call("y V", _drops)
def another_dropout_seed(call):
    return call._replace(dropout=(call.dropout[0], call.dropout[1] + 1))


@of_call("y V", lambda call: call.dropout is not None)
def no_dropout(call):
    return call._replace(dropout=None)


@of_oracle("y V", lambda call: call.dropout is not None and call.x.shape[-1] > 1)
class DropoutNotScaled(Oracle):
    def mask(self):
        return (super().mask() > 0).double()


@of_oracle("x", _drops)
class InputGradientPastDropout(Oracle):
    def backward(self, t: Task, dy):
        return super().backward(t._replace(mask=torch.ones_like(t.mask)), dy)


# --- precision --------------------------------------------------------------------------------------------------------


def _half(call: Call) -> bool:
    """Sums short enough that bfloat16's rounding dominates, elements enough that in some the terms nearly cancel."""
    rows, out = call.x.shape[:-1].numel(), call.weight.shape[0]
    return call.x.dtype == torch.bfloat16 and rows * out >= 200 and call.x.shape[-1] <= 100 and rank(call) <= 17


@of_oracle("y", _half)
class LowRankTermRoundedBeforeItJoins(Oracle):
    def low(self, t):
        return exact(super().low(t).value.to(self.dtype))


@of_oracle("y", _half)
class SmallFactorRounded(Oracle):
    def middle(self, t):
        return exact(super().middle(t).value.to(self.dtype))


@of_call("y", lambda call: _half(call) and call.V.dtype == torch.float32)
def adapter_rounded(call):
    return call.with_tensors({n: t.to(call.x.dtype).float() for n, t in call.tensors.items() if n in ADAPTER})


# --- checking ---------------------------------------------------------------------------------------------------------


def met(call: Call) -> list[str]:
    """The mutants that apply to a call, as `undetected` names them."""
    there = {"y", *call.tensors}
    return [f"{mutant.name}: {o}" for mutant in MUTANTS if mutant.applies(call) for o in mutant.outputs if o in there]


def undetected(call: Call, dy: Tensor, excess: Callable[[str, Tensor], float]) -> list[str]:
    """What is wrong and passes, as "mutant: output"; excess(output, value) is its error in units of the tolerance."""
    passed = []
    for mutant in MUTANTS:
        if not mutant.applies(call):
            continue
        with one_thread():
            found = mutant.results(call, dy)
        passed += [f"{mutant.name}: {o}" for o in mutant.outputs if o in found and not excess(o, found[o]) > 1]
    return passed
