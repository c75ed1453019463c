"""One thread and a fixed seed for every test of the machine itself."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread_fixed_seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def nan_tensor():
    """An output buffer in which every element that no thread wrote stays NaN."""

    def make(*shape, dtype=torch.float32):
        return torch.full(shape, float("nan"), dtype=dtype)

    return make
