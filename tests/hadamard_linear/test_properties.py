"""Calls that nobody thought of: shapes, blocks, segments and strides drawn by hypothesis, against the bounds."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.hadamard_linear.cases import ACTIVATIONS, Case, build, excesses
from tests.lowrank_linear.backends import Runner, each_cpu_runner

# The poisoned memory of every test is a fixture of the function, and fine to share between examples.
QUICK = settings(
    max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
THOROUGH = settings(QUICK, max_examples=1000)


@st.composite
def cases(draw) -> Case:
    blocks = draw(st.integers(1, 5))
    lengths = draw(st.one_of(st.none(), st.lists(st.integers(0, 40), min_size=1, max_size=5)))
    rows = draw(st.one_of(st.integers(0, 20), st.integers(90, 130)))
    return Case(
        shape=(rows, blocks * draw(st.one_of(st.integers(1, 60), st.integers(250, 270))), draw(st.integers(1, 80))),
        activation=draw(st.sampled_from(sorted(ACTIVATIONS))),
        factor_rank=draw(st.integers(1, 20)),
        blocks=blocks,
        rank=draw(st.integers(0, 4)),
        bias=draw(st.booleans()),
        segments=None if lengths is None else tuple(lengths),
        dropout=draw(st.sampled_from([0.0, 0.3])),
        weight_layout=draw(st.sampled_from(["contiguous", "conv1d", "slice"])),
        x_layout=draw(st.sampled_from(["contiguous", "padded", "strided"])),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16])),
        seed=draw(st.integers(0, 1000)),
    )


def agrees(runner: Runner, case: Case) -> None:
    call = build(case)
    with runner.active():
        found = call.gradients(runner.backend)
    wrong = {name: ratio for name, ratio in excesses(found, call).items() if not ratio <= 1}
    assert wrong == {}


@each_cpu_runner
def test_any_call(runner):
    @QUICK
    @given(case=cases())
    def run(case):
        agrees(runner, case)

    run()


@pytest.mark.proof
@each_cpu_runner
def test_many_calls(runner):
    @THOROUGH
    @given(case=cases())
    def run(case):
        agrees(runner, case)

    run()
