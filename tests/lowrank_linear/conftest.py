"""Tests that run no compiled kernel stay on one thread.

Small PyTorch products are fastest there, most of all on a busy machine; threads are the subject of test_determinism.py.
"""

import pytest

from tests.threads import one_thread


@pytest.fixture(autouse=True)
def quiet(request):
    if request.node.get_closest_marker("native") is not None:
        yield
        return
    with one_thread():
        yield
