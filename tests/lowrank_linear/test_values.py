"""Values and first-order gradients of every backend against the oracle, within bounds that every mutant breaks."""

import pytest
import torch

from tests.lowrank_linear import mutants
from tests.lowrank_linear.backends import Runner, each_runner, marked, runners
from tests.lowrank_linear.cases import Case, build, cotangent, forms, of_form, pairwise, run_with_gradients
from tests.lowrank_linear.oracle import bounds, excess


def check(runner: Runner, case: Case) -> None:
    call, dy = build(case), cotangent(case)
    wanted = bounds(call, dy, runner.oracle)
    with runner.active():
        found = run_with_gradients(call, dy, runner.backend)
        alone = call.run(runner.backend)
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        assert value.dtype == (call.x.dtype if name == "y" else call.tensors[name].dtype), name
        assert excess(value, wanted[name]) <= 1, f"{name} of {case}"
    assert torch.equal(alone, found["y"]), "the value depends on whether gradients are asked for"


each_form = pytest.mark.parametrize("form", forms(), ids=lambda form: str(Case(**form)))


# A float32 adapter beside bfloat16 input is where precision is lost most easily.
MIXED = [
    Case(**form, rank=rank, dtype=torch.bfloat16, adapter_dtype=torch.float32, seed=rank)
    for form in ({"generator": "none"}, {"generator": "linear"}, {"generator": "mlp", "sigma": "full"})
    for rank in (3, 8)
]


@pytest.mark.parametrize(
    ("runner", "case"),
    [marked(r.backend, r, case, id=f"{r}-{case}") for r in runners() for case in pairwise(r.backend) + MIXED],
)
def test_values_and_gradients(runner, case):
    check(runner, case)


@pytest.mark.proof
@each_runner
@each_form
def test_values_and_gradients_of_every_form(runner, form):
    for case in of_form(form, runner.backend, 3):
        check(runner, case)


@each_runner
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["x", "x column", "weight", "weight column", "bias", "V", "U", "w1"])
def test_operands_that_repeat_memory(runner, dtype, name):
    """Strides of 0, as `expand` makes them."""
    case = Case(shape=(9, 33, 17), dtype=dtype)
    call, dy = build(case), cotangent(case)
    name, *column = name.split()
    tensor = call.tensors[name]
    repeated = (tensor[:, :1] if column else tensor[:1]).expand(tensor.shape)
    call, dy = call.with_tensors({name: repeated}), dy[:, :1].expand(dy.shape)
    wanted = bounds(call, dy, runner.oracle)
    with runner.active():
        found = run_with_gradients(call, dy, runner.backend)
    for key, value in found.items():
        assert excess(value, wanted[key]) <= 1, key


def tolerated(case: Case) -> list[str]:
    """The mutants that the tolerances of a case let pass."""
    call, dy = build(case), cotangent(case)
    wanted = bounds(call, dy)
    return mutants.undetected(call, dy, lambda name, value: excess(value, wanted[name]))


def telling(cases: list[Case]) -> list[Case]:
    """Cases in which a mistake can show: rows, numbers enough, and not one relu unit that may be on for every row."""
    return [
        case
        for case in cases
        if case.rows * case.shape[2] >= 15
        and not (case.generator == "mlp" and case.hidden_activation == "relu" and case.hidden == 1)
    ]


@pytest.mark.parametrize("case", telling([*pairwise("reference"), *pairwise("cpu"), *MIXED]), ids=str)
def test_no_tolerance_lets_a_mutant_pass(case):
    assert tolerated(case) == []


@pytest.mark.proof
@each_form
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_every_form_has_a_case_that_tells_each_mutant_apart(backend, form):
    """Not each case: drawn at random, some are too small or too coarse for one mistake or another.

    Besides, one case on which mistakes of precision show: sums that are short, and two terms about equally large.
    """
    survivors: dict[str, bool] = {}
    precise = Case(**form, dtype=torch.bfloat16, adapter_dtype=torch.float32, shape=(40, 37, 29), rank=5, scaling=-3.0)
    for case in telling([*of_form(form, backend, 3), precise]):
        passed = tolerated(case)
        for name in mutants.met(build(case)):
            survivors[name] = survivors.get(name, True) and name in passed
    assert [name for name, alive in survivors.items() if alive] == []


def test_every_mutant_is_met():
    calls = [build(case) for case in telling([*pairwise("reference"), *MIXED])]
    unmet = [m.name for m in mutants.MUTANTS if sum(m.applies(call) for call in calls) < 3]
    assert unmet == []
