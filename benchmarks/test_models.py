"""A whole language model, and the inner steps of a meta-batch: all tasks at once against task by task."""

import pytest

from mltd.bench.cell_models import inner_step_with_cells_case, whole_model_with_cells_case
from mltd.bench.inner_loop import inner_case
from mltd.bench.models import inner_steps_case, whole_model_case


@pytest.mark.parametrize("contender", ["base", "tarp", "unfused"])
def test_whole_model(run, contender):
    run(("whole model",), contender, whole_model_case, 5)


@pytest.mark.parametrize("contender", ["tarp task by task", "tarp at once", "unfused task by task", "unfused at once"])
@pytest.mark.parametrize("shots", [5, 1])
def test_inner_steps(run, shots, contender):
    run(("inner steps", shots), contender, lambda: inner_steps_case(shots), 3)


@pytest.mark.parametrize("contender", ["base", "tarp + cells", "unfused"])
def test_whole_model_with_cells(run, contender):
    run(("whole model TAMS",), contender, whole_model_with_cells_case, 5)


@pytest.mark.parametrize("contender", ["all live", "masked", "without cells", "unfused all live"])
@pytest.mark.parametrize("shots", [5, 1])
def test_inner_step_with_cells(run, shots, contender):
    run(("inner step with cells", shots), contender, lambda: inner_step_with_cells_case(shots), 5)


@pytest.mark.parametrize("contender", ["mltd", "batched PyTorch", "straightforward"])
@pytest.mark.parametrize(("shots", "with_cells"), [(5, False), (1, False), (5, True)])
def test_inner_loop(run, shots, with_cells, contender):
    run(("inner loop", shots, with_cells), contender, lambda: inner_case(shots, with_cells), 3)
