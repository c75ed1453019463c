"""One thread: small products are fastest there, by far so on a busy machine; threads have tests of their own."""

import contextlib
from collections.abc import Iterator

import pytest
import torch


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="module")
def on_one_thread():
    """For a conftest.py to import: every test of its folder, and what a module makes once, runs on one thread."""
    with one_thread():
        yield
