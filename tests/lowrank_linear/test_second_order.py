"""Second-order gradients: gradcheck and gradgradcheck of the oracle, and every fast backend against it.

gradgradcheck alone sees float64 only, which is the reference; the fast backends have a double backward of their own.
"""

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from tests.lowrank_linear.backends import each_fast_backend, fast_backends, marked
from tests.lowrank_linear.cases import Call, Case, basic_forms, build, cotangent, forms
from tests.lowrank_linear.plain import LINEARISED, NO_SLOPE, evaluate, majorant
from tests.threads import one_thread

# --- the reference, in float64 ----------------------------------------------------------------------------------------


def check_derivatives(case: Case) -> None:
    call = build(case.with_(dtype=torch.float64, adapter_dtype=None)).leaves()
    names = list(call.tensors)

    def run(*tensors: Tensor) -> Tensor:
        return call.with_tensors(dict(zip(names, tensors, strict=True))).run("reference")

    with one_thread():
        assert gradcheck(run, tuple(call.tensors.values()))
        assert gradgradcheck(run, tuple(call.tensors.values()))


@pytest.mark.parametrize("case", basic_forms(), ids=str)
def test_derivatives_of_the_reference(case):
    check_derivatives(
        case.with_(
            shape=(2, 3, 2),
            rank=2,
            hidden=2,
            x_layout="padded",
            segments="few" if case.segments == "ragged" else "none",
        )
    )


@pytest.mark.proof
@pytest.mark.parametrize("form", forms(), ids=lambda form: str(Case(**form)))
@pytest.mark.parametrize("segments", ["none", "few"])
def test_derivatives_of_the_reference_in_every_form(form, segments):
    check_derivatives(Case(**form, shape=(3, 3, 2), rank=2, hidden=2, segments=segments, dropout=0.3))


# --- the fast backends ------------------------------------------------------------------------------------------------


def second_order(call: Call, dy: Tensor, directions: dict[str, Tensor], run) -> dict[str, Tensor | None]:
    """Gradients of Σ ⟨dL/dt, direction of t⟩ for every tensor t and for dy."""
    call, dy = call.leaves(), dy.detach().requires_grad_()
    first = torch.autograd.grad(run(call), list(call.tensors.values()), dy, create_graph=True, allow_unused=True)
    pairs = zip(first, directions.values(), strict=True)
    total = sum((grad * direction).sum() for grad, direction in pairs if grad is not None and grad.requires_grad)
    targets = {**call.tensors, "dy": dy}
    return dict(zip(targets, torch.autograd.grad(total, list(targets.values()), allow_unused=True), strict=True))


def directions_of(case: Case, call: Call) -> dict[str, Tensor]:
    random_numbers = torch.Generator().manual_seed(3000 + case.seed)
    return {
        name: torch.randn(tensor.shape, generator=random_numbers, dtype=torch.float64).to(tensor.dtype)
        for name, tensor in call.tensors.items()
    }


def exact_and_bounds(case: Case) -> tuple[dict[str, Tensor | None], dict[str, Tensor]]:
    """In float64, and how far the precision of the case may lie from it.

    float32: the lengths of all sums along a chain times the sums of magnitudes. bfloat16: besides, what leaves float32
    are up to four parts (the low-rank one, and of the dense one for each direction), each rounded and then added up.
    """
    call, dy = build(case), cotangent(case).double()
    directions = {name: d.double() for name, d in directions_of(case, call).items()}
    call = call.double()
    T, K, N, r = case.rows, case.shape[1], case.shape[2], case.rank
    length = 2 * (T + K + N + r * r + case.hidden) + 20
    share = (K + case.hidden + 10) / length  # of that the sums in front of an activation
    with one_thread():
        exact = second_order(call, dy, directions, evaluate)
        sizes = {name: d.abs() for name, d in directions.items()}
        magnitudes = second_order(call.map(torch.abs), dy.abs(), sizes, lambda c: majorant(c, call, share))
        parts = [] if case.dtype == torch.float32 else bfloat16_parts(call, dy, directions)
    bounds = {name: length * 2.0**-24 * size for name, size in magnitudes.items() if size is not None}
    for part in parts:
        for name, value in part.items():
            if value is not None:
                bounds[name] = bounds[name] + 4 * 2.0**-8 * value.abs()
    return exact, bounds


def bfloat16_parts(call: Call, dy: Tensor, directions: dict[str, Tensor]) -> list[dict[str, Tensor | None]]:
    found = [second_order(call, dy, directions, low_rank_term)]
    for name in ("x", "weight"):
        one = {other: d if other == name else torch.zeros_like(d) for other, d in directions.items()}
        found.append(second_order(call, dy, one, dense_product))
    if call.bias is not None:
        found.append({"dy": directions["bias"].expand_as(dy)})
    return found


def excesses(found: dict, exact: dict, bounds: dict) -> dict[str, float]:
    """The largest error of each gradient in units of its bound."""
    ratios = {}
    for name, wanted in exact.items():
        got = torch.zeros_like(wanted) if found[name] is None and wanted is not None else found[name]
        if wanted is None:  # nothing depends on it
            assert got is None or not got.any(), name
        elif wanted.numel():
            assert got.shape == wanted.shape
            ratio = ((got.double() - wanted).abs() / (bounds[name] + 1e-300)).max().item()
            ratios[name] = float("inf") if ratio != ratio else ratio
    return ratios


def second_order_cases() -> list[Case]:
    found = []
    for i, form in enumerate(forms()):
        if i % 7 == 0 or (form["generator"] != "mlp" and i % 2 == 0):
            case = Case(**form, shape=(13, 9, 7), rank=(1, 3, 4)[i % 3], dropout=(0.0, 0.3)[i % 2], seed=i)
            found.append(case.with_(segments=("none", "ragged", "one")[i % 3], x_layout=("batch", "strided")[i % 2]))
    return found


@pytest.mark.parametrize("case", second_order_cases(), ids=str)
@pytest.mark.parametrize("backend", [marked(b, b) for b in fast_backends])
def test_second_order_gradients(backend, case):
    call, dy = build(case), cotangent(case)
    exact, bounds = exact_and_bounds(case)
    found = second_order(call, dy, directions_of(case, call), lambda c: c.run(backend))
    wrong = {name: ratio for name, ratio in excesses(found, exact, bounds).items() if not ratio <= 1}
    assert wrong == {}
    assert all(found[name] is None or found[name].dtype == t.dtype for name, t in call.tensors.items())


@pytest.mark.parametrize("case", second_order_cases()[::3], ids=str)
@pytest.mark.parametrize("backend", [marked(b, b) for b in fast_backends])
@pytest.mark.parametrize("adapter_dtype", [torch.float32, None])
def test_second_order_gradients_in_bfloat16(backend, case, adapter_dtype):
    case = case.with_(dtype=torch.bfloat16, adapter_dtype=adapter_dtype)
    call, dy = build(case), cotangent(case)
    exact, bounds = exact_and_bounds(case)
    found = second_order(call, dy, directions_of(case, call), lambda c: c.run(backend))
    wrong = {name: ratio for name, ratio in excesses(found, exact, bounds).items() if not ratio <= 1}
    assert wrong == {}


# --- what these bounds must reject ------------------------------------------------------------------------------------


def dense_product(call: Call) -> Tensor:
    return torch.nn.functional.linear(call.x, call.weight, call.bias)


def low_rank_term(call: Call) -> Tensor:
    return evaluate(call) - dense_product(call)


SMOOTH = ("sigmoid", "tanh", "softplus")


def mutants(case: Case):
    """(name, run, changed call, the gradients that must be seen to be wrong)."""
    call = build(case).double()
    generated, mlp = case.generator != "none", case.generator == "mlp"
    adapter = "V U w1 w2"
    yield "zero", None, call, f"x weight dy {adapter}"
    yield "no low-rank term", dense_product, call, f"x dy {adapter}"
    yield "no dense product", low_rank_term, call, "x weight dy"
    yield "no scaling", evaluate, call._replace(scaling=1.0), f"x dy {adapter}"
    if generated:
        yield "the generator taken as constant", lambda c: evaluate(c, NO_SLOPE), call, "x w1 U"
        if case.activation in SMOOTH or (mlp and case.hidden_activation != "relu"):
            yield "no curvature", lambda c: evaluate(c, LINEARISED), call, "w1"
    if case.dropout:
        yield "no dropout", evaluate, call._replace(dropout=None), "x V U"
    if case.segments == "ragged":
        rolled = {name: t.roll(1, 0) for name, t in call.tensors.items() if t.dim() > 2 or name in ("b1", "b2")}
        yield "the neighbour's adapter", evaluate, call.with_tensors(rolled), "x dy"


@pytest.mark.parametrize("case", second_order_cases(), ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_bound_lets_a_mutant_pass(case, dtype):
    case = case.with_(dtype=dtype)
    exact, bounds = exact_and_bounds(case)
    call, dy = build(case), cotangent(case).double()
    directions = {name: d.double() for name, d in directions_of(case, call).items()}
    passed = []
    for name, run, changed, outputs in mutants(case):
        if run is None:
            found = dict.fromkeys(exact)
        else:
            found = second_order(changed, dy, directions, run)
        ratios = excesses(found, exact, bounds)
        passed += [f"{name}: {output}" for output in outputs.split() if output in ratios and not ratios[output] > 1]
    assert passed == []


def test_the_plain_evaluation_is_the_operator():
    for case in second_order_cases():
        call = build(case).double()
        torch.testing.assert_close(evaluate(call), call.run("reference"), rtol=1e-12, atol=1e-12)


# --- what asks for second order ---------------------------------------------------------------------------------------


@each_fast_backend
def test_an_inner_gradient_step_is_differentiated_through(backend):
    """The meta-gradient of one inner step, d/dV L(V - lr · dL/dV), against the float64 reference."""
    case = Case(generator="mlp", b1=True, shape=(11, 9, 7), activation="sigmoid")

    def meta_gradient(call: Call, backend: str) -> list[Tensor]:
        call = call.leaves(("V", "U", "w1"))
        start = {name: t for name, t in call.tensors.items() if t.requires_grad}
        inner = torch.autograd.grad(call.run(backend).square().mean(), list(start.values()), create_graph=True)
        stepped = {name: t - 0.3 * g for (name, t), g in zip(start.items(), inner, strict=True)}
        return list(torch.autograd.grad(call.with_tensors(stepped).run(backend).square().mean(), list(start.values())))

    call = build(case)
    wanted = meta_gradient(call.double(), "reference")
    for got, want in zip(meta_gradient(call, backend), wanted, strict=True):
        assert (got - want).norm() <= 1e-5 * want.norm() and want.norm() > 0


@each_fast_backend
def test_a_third_derivative_is_right_or_refused(backend):
    def third(backend: str) -> Tensor:
        call = build(Case(shape=(4, 5, 3), generator="mlp", dtype=torch.float32)).leaves()
        first = torch.autograd.grad(call.run(backend).square().sum(), call.x, create_graph=True)[0]
        second = torch.autograd.grad(first.square().sum(), call.x, create_graph=True)[0]
        return torch.autograd.grad(second.square().sum(), call.x)[0]

    wanted = third("reference")
    try:
        found = third(backend)
    except RuntimeError as error:
        assert "once_differentiable" in str(error) or "does not require grad" in str(error)
    else:
        assert (found - wanted).norm() <= 1e-3 * wanted.norm() and wanted.norm() > 0
