"""Nothing of size T×N or N×K is allocated beyond y, forward and backward: the resident set says so."""

import ctypes
import gc
from collections.abc import Callable

import pytest
import torch

from tarp_kernels import Generator
from tests.lowrank_linear.backends import each_fast_backend
from tests.lowrank_linear.cases import NAMES, Call
from tests.lowrank_linear.mutants import ADAPTER

MiB = 1 << 20
# Each large product has 10 Mi elements: 40 MiB of float32, 20 of bfloat16. Everything else may take 6 MiB altogether:
# what is saved, r floats a row, and the threads' panels.
TALL = (4096, 48, 2560)  # T×N is large
WIDE = (48, 4096, 2560)  # N×K is large
DEEP = (4096, 2560, 48)  # T×K is large: x and dx
SLACK = 6 * MiB


def resident(field: str) -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))


def peak(run: Callable[[], object]) -> int:
    """Bytes by which the resident set grows at most while `run` runs."""
    gc.collect()
    if hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)  # what tests before left free and resident would be taken first
    try:
        with open("/proc/self/clear_refs", "w") as control:
            control.write("5")
    except OSError:
        pytest.skip("this system does not reset the peak of the resident set")
    before = resident("VmRSS")
    kept = run()
    grown = resident("VmHWM") - before
    del kept
    return grown


@pytest.fixture(autouse=True)
def undisturbed():
    from tarp_kernels import _C

    if _C.build_info()["sanitizers"]:
        pytest.skip("the sanitizers keep freed memory")


def test_the_measure_sees_what_is_allocated():
    assert 39 * MiB <= peak(lambda: torch.full((4096, 2560), 1.0)) <= 42 * MiB
    assert peak(lambda: [torch.full((4096, 2560), 1.0).sum() for _ in range(4)]) <= 42 * MiB
    assert peak(lambda: None) <= MiB


def size(shape: tuple[int, int], dtype: torch.dtype) -> int:
    return shape[0] * shape[1] * dtype.itemsize


def large(shape, generator: str, dtype: torch.dtype, weight_layout: str, needs=()) -> Call:
    """A call whose numbers do not matter, made without the detours of `build`."""
    T, K, N = shape
    r, m = 8, 8

    def full(*sizes: int, dtype=torch.float32) -> torch.Tensor:
        return torch.full(sizes, 0.01, dtype=dtype)

    made = Generator(full(r, K)) if generator == "linear" else Generator(full(m, K), full(m), full(r, m))
    weight = full(N, K, dtype=dtype) if weight_layout == "contiguous" else full(K, N, dtype=dtype).t()
    x, bias = full(T, K, dtype=dtype), full(N, dtype=dtype)
    call = Call(x, weight, bias, full(r, K), full(N, r), made, "diag", 1.5, None, None)
    return call.leaves(needs) if needs else call


def warm_up(backend: str, dtype: torch.dtype) -> None:
    """One small call: its libraries and threads stay resident."""
    call = large((300, 200, 100), "mlp", dtype, "contiguous", NAMES)
    call.run(backend).float().sum().backward()


DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [
    pytest.param(TALL, "contiguous", id="tall"),
    pytest.param(WIDE, "contiguous", id="wide"),
    pytest.param(WIDE, "conv1d", id="wide-conv1d"),
    pytest.param(DEEP, "contiguous", id="deep"),
]
ADAPTED = ("x", "V", "U", "w1", "b1", "w2")


@each_fast_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "weight_layout"), SHAPES)
def test_forward_allocates_its_result_and_little_more(backend, dtype, weight_layout, shape):
    warm_up(backend, dtype)
    call = large(shape, "mlp", dtype, weight_layout)
    for run in (call, call.leaves(ADAPTED)):  # inference, training
        assert peak(lambda run=run: run.run(backend)) <= size((shape[0], shape[2]), dtype) + SLACK


@each_fast_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "weight_layout"), SHAPES)
def test_backward_with_a_frozen_weight_allocates_dx_and_little_more(backend, dtype, weight_layout, shape):
    warm_up(backend, dtype)
    dropout = (0.1, 3) if shape == WIDE else None  # costly where there are many rows of many features
    call = large(shape, "linear", dtype, weight_layout, ADAPTED)._replace(dropout=dropout)
    y, dy = call.run(backend), torch.full((shape[0], shape[2]), 0.01, dtype=dtype)
    wanted = [t for t in call.tensors.values() if t.requires_grad]
    assert peak(lambda: torch.autograd.grad(y, wanted, dy)) <= size(shape[:2], dtype) + SLACK


@each_fast_backend
def test_segments_allocate_no_more(backend):
    warm_up(backend, torch.float32)
    call = large(TALL, "mlp", torch.float32, "contiguous")
    many = {name: torch.stack([t] * 4) for name, t in call.tensors.items() if name in ADAPTER}
    call = call.with_tensors(many)._replace(segments=torch.tensor([0, 1000, 1000, 3000, 4096])).leaves(ADAPTED)
    assert peak(lambda: call.run(backend)) <= size((4096, 2560), torch.float32) + SLACK
    y, dy = call.run(backend), torch.full((4096, 2560), 0.01)
    wanted = [t for t in call.tensors.values() if t.requires_grad]
    assert peak(lambda: torch.autograd.grad(y, wanted, dy)) <= size(TALL[:2], torch.float32) + SLACK
