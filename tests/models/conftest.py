"""Tiny models: one thread, because at these sizes a second one only waits."""

import pytest
import torch
from torch.utils._device import _device_constructors

# `with torch.device("meta")` lists torch.empty among the functions that it redirects when it is first used, and keeps
# that list: it must see the function itself, not the one that poisons memory.
_device_constructors()


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
