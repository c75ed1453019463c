"""What holds for every test: no network, and uninitialised memory is poisoned.

An element that no kernel writes must fail its test, so every uninitialised tensor made from Python is filled with NaN
(integers: with their largest value).
"""

import functools
import os

os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TOKENIZERS_PARALLELISM="false",
    MPLBACKEND="Agg",
)

import pytest
import torch
import torch._dynamo  # lists torch.empty among the functions that it can trace, so before that is replaced
import torch.utils._device

torch.utils._device._device_constructors()  # likewise, among those that `with torch.device(...)` makes elsewhere

ALLOCATORS = (
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "empty_strided"),
    (torch, "empty_permuted"),
    (torch.Tensor, "new_empty"),
    (torch.Tensor, "new_empty_strided"),
)


def poison(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.layout is not torch.strided:
        return tensor
    if tensor.is_floating_point() or tensor.is_complex():
        value = float("nan")
    else:
        value = True if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).max
    with torch.no_grad():
        return tensor.fill_(value)


def poisoned(allocate):
    @functools.wraps(allocate)
    def allocate_poisoned(*args, **kwargs):
        return poison(allocate(*args, **kwargs))

    return allocate_poisoned


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    for owner, name in ALLOCATORS:
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


def pytest_report_header():
    try:
        from tarp_kernels import _C
    except ImportError as error:
        return f"native extension: none ({error})"
    features, info = _C.cpu_features(), _C.build_info()
    sanitizers = f", sanitizers: {info['sanitizers']}" if info["sanitizers"] else ""
    return f"native extension: {_C.__file__}, {features['active']}, {features['threads']} threads{sanitizers}"
