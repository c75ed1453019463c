"""Calls that nobody thought of: shapes, segments, strides, forms drawn by hypothesis, against the oracle's bounds."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.lowrank_linear.backends import Runner, each_cpu_runner
from tests.lowrank_linear.cases import DTYPES, FACTORS, Case, build, cotangent, run_with_gradients
from tests.lowrank_linear.mutants import ADAPTER
from tests.lowrank_linear.oracle import bounds, excess

# The poisoned memory of every test is a fixture of the function, and fine to share between examples.
QUICK = settings(
    max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
THOROUGH = settings(QUICK, max_examples=1500)

NORMAL = st.floats(2**-30, 4, width=32)  # the bounds are relative, and say nothing about results that underflow


@st.composite
def cases(draw, backend: str) -> Case:
    values = {
        name: draw(st.sampled_from(choices))
        for name, choices in FACTORS.items()
        if name not in ("rank", "hidden", "shape", "segments", "scaling", "dropout")
    }
    rows = draw(st.one_of(st.integers(0, 20), st.integers(90, 130)))
    width, out = draw(st.integers(1, 80)), draw(st.integers(1, 80))
    lengths = draw(st.one_of(st.none(), st.lists(st.integers(0, 15), min_size=1, max_size=9)))
    dtype, adapter_dtype = draw(st.sampled_from(DTYPES[backend]))
    return Case(
        **values,
        rank=draw(st.integers(1, 12 if values["sigma"] == "full" else 40)),
        hidden=draw(st.integers(1, 40)),
        shape=(rows, width, out),
        segments="none" if lengths is None else tuple(lengths),
        scaling=draw(st.sampled_from([-1, 1])) * draw(st.one_of(st.just(0.0), NORMAL)),
        dropout=draw(st.one_of(st.just(0.0), st.floats(2**-20, 0.9375, width=32))),
        dtype=dtype,
        adapter_dtype=adapter_dtype,
        seed=draw(st.integers(0, 1000)),
    )


def agrees(runner: Runner, case: Case) -> None:
    call, dy = build(case), cotangent(case)
    wanted = bounds(call, dy)
    with runner.active():
        found = run_with_gradients(call, dy, runner.backend)
    for name, value in found.items():
        assert excess(value, wanted[name]) <= 1, name


@each_cpu_runner
def test_any_call(runner):
    @QUICK
    @given(case=cases(runner.backend))
    def run(case):
        agrees(runner, case)

    run()


@pytest.mark.proof
@each_cpu_runner
def test_many_calls(runner):
    @THOROUGH
    @given(case=cases(runner.backend))
    def run(case):
        agrees(runner, case)

    run()


@each_cpu_runner
def test_a_permutation_of_tasks_permutes_the_results(runner):
    """Whatever the order in which tasks stand, each gets its own rows and its own adapter."""

    @settings(QUICK, max_examples=10)
    @given(data=st.data(), lengths=st.lists(st.integers(0, 9), min_size=2, max_size=6))
    def run(data, lengths):
        order = data.draw(st.permutations(range(len(lengths))))
        case = Case(segments=tuple(lengths), shape=(0, 19, 23), generator="mlp", b1=True, rank=4)
        call, dy = build(case), cotangent(case)
        parts, dy_parts = call.x.split(lengths), dy.split(lengths)
        ends = torch.tensor([0, *(lengths[i] for i in order)]).cumsum(0)
        moved = call.with_tensors(
            {"x": torch.cat([parts[i] for i in order])}
            | {name: t[list(order)] for name, t in call.tensors.items() if name in ADAPTER}
        )._replace(segments=ends)
        wanted = bounds(call, dy)
        with runner.active():
            found = run_with_gradients(moved, torch.cat([dy_parts[i] for i in order]), runner.backend)
        back = [order.index(i) for i in range(len(lengths))]
        for name, value in found.items():
            if name in ("y", "x"):
                pieces = value.split([lengths[i] for i in order])
                value = torch.cat([pieces[i] for i in back])
            elif name in ADAPTER:
                value = value[back]
            assert excess(value, wanted[name]) <= 1, name

    run()


@each_cpu_runner
def test_scaling_is_linear(runner):
    """y(scaling) - y(0) is scaling times y(1) - y(0); scaling 0 is the dense layer."""

    @QUICK
    @given(scaling=st.floats(-100, 100, width=32), seed=st.integers(0, 100))
    def run(scaling, seed):
        call = build(Case(shape=(7, 19, 23), seed=seed, generator="mlp"))
        with runner.active():
            nothing, one, scaled = (call._replace(scaling=s).run(runner.backend) for s in (0.0, 1.0, scaling))
        torch.testing.assert_close(nothing, torch.nn.functional.linear(call.x, call.weight, call.bias))
        torch.testing.assert_close(
            scaled - nothing, scaling * (one - nothing), rtol=1e-4, atol=1e-5 * (1 + abs(scaling))
        )

    run()
