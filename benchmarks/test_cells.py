"""One search cell under masked execution, against plain PyTorch that runs all six operations or the selected ones."""

import pytest

from mltd.bench.cells import KINDS, cell_case


@pytest.mark.parametrize("contender", ["mixture", "skipping", "masked"])
@pytest.mark.parametrize("kind", KINDS)
def test_cell(run, kind, contender):
    run((kind,), contender, lambda: cell_case(kind), 15)
