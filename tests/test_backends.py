"""Which backend runs, and that asking for one by name means getting it or an error."""

import pytest
import torch

import tarp_kernels
from tarp_kernels import available_backends, backends, lowrank_linear
from tarp_kernels.ops.lowrank_linear import autograd
from tests.lowrank_linear.backends import cpu_backends

CPU = torch.device("cpu")
HERE = tuple(cpu_backends)  # what calls with CPU tensors can take
MISSING = tuple(name for name in backends.BACKENDS if name not in available_backends())


@pytest.fixture
def ran(monkeypatch):
    """The backends that calls of lowrank_linear took, in order."""
    taken = []
    apply = autograd.apply

    def record(operands, segments, form):
        taken.append(form.backend)
        return apply(operands, segments, form)

    monkeypatch.setattr(autograd, "apply", record)
    return taken


def call(dtype=torch.float32, **options):
    x, weight = torch.randn(4, 6, dtype=dtype), torch.randn(5, 6, dtype=dtype)
    return lowrank_linear(
        x, weight, None, torch.randn(2, 6, dtype=dtype), torch.randn(5, 2, dtype=dtype), None, **options
    )


def test_the_reference_is_always_there_and_last():
    assert HERE[-1] == "reference" and set(HERE) <= set(backends.BACKENDS)


def test_the_native_backend_was_built():
    """`make` builds it; a suite that quietly tests the reference alone would prove little."""
    assert "cpu" in HERE, backends.why_unavailable("cpu")


@pytest.mark.parametrize("name", HERE)
def test_asked_for_by_name(name, ran):
    call(backend=name)
    assert ran == [name]


@pytest.mark.parametrize("name", MISSING)
def test_a_backend_that_cannot_run_says_why(name, ran):
    """As an argument, in a block and in a nested block; and what would run instead."""
    reason = backends.why_unavailable(name)
    assert reason and "reference" in reason
    with pytest.raises(ValueError, match=rf"backend='{name}' cannot run here: ") as raised:
        call(backend=name)
    assert reason in str(raised.value)
    with pytest.raises(ValueError, match=rf"backend='{name}' cannot run here"), tarp_kernels.backend(name):
        pytest.fail("the block was entered")
    call()
    assert ran == [HERE[0]]


@pytest.mark.parametrize("name", ["", "CPU", "numpy", "native"])
def test_an_unknown_name_lists_the_known_ones(name):
    for ask in (lambda: call(backend=name), lambda: backends.why_unavailable(name)):
        with pytest.raises(ValueError) as raised:
            ask()
        message = str(raised.value)
        assert "backend" in message and repr(name) in message and all(known in message for known in backends.BACKENDS)
    with pytest.raises(ValueError, match="backend"), tarp_kernels.backend(name):
        pytest.fail("the block was entered")


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float32, HERE[0]),
        (torch.bfloat16, HERE[0]),
        (torch.float64, "reference"),
        (torch.float16, "reference"),
    ],
)
def test_the_automatic_choice(dtype, expected, ran, recwarn):
    call(dtype)
    assert ran == [expected]
    assert not recwarn.list, "the automatic choice is no reason to warn"


def test_tensors_elsewhere_take_the_reference():
    assert backends.choose(None, torch.float32, torch.device("meta")) == "reference"


@pytest.mark.skipif("cpu" not in HERE, reason="no cpu backend")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_a_named_backend_refuses_what_it_cannot_do(dtype):
    with pytest.raises(TypeError, match=rf"backend='cpu': x has dtype {dtype}, expected .*float32.*reference"):
        call(dtype, backend="cpu")
    with (
        pytest.raises(TypeError, match="backend='cpu'"),
        tarp_kernels.backend("cpu"),
    ):
        call(dtype)
    with pytest.raises(ValueError, match=r"backend='cpu': x lies on meta, expected the CPU"):
        backends.choose("cpu", torch.float32, torch.device("meta"))


def test_a_block_chooses_for_all_calls_in_it(ran):
    with tarp_kernels.backend("reference"):
        call()
        with tarp_kernels.backend(None):
            call()
        call()
        with tarp_kernels.backend(HERE[0]):
            call()
        call()
        call(backend=HERE[0])  # an argument beats the block
    call()
    assert ran == ["reference", HERE[0], "reference", HERE[0], "reference", HERE[0], HERE[0]]


def test_a_block_ends_when_an_exception_leaves_it(ran):
    with pytest.raises(RuntimeError, match="stop"), tarp_kernels.backend("reference"):
        raise RuntimeError("stop")
    call()
    assert ran == [HERE[0]]


def test_backward_runs_where_forward_ran():
    """Whatever the block is by then: what one backend saved the other could not read."""
    x = torch.randn(4, 6, requires_grad=True)
    weight, V, U = torch.randn(5, 6), torch.randn(2, 6), torch.randn(5, 2)
    wanted = torch.autograd.grad(lowrank_linear(x, weight, None, V, U, None).sum(), x)[0]
    y = lowrank_linear(x, weight, None, V, U, None, backend=HERE[0])
    with tarp_kernels.backend("reference"):
        found = torch.autograd.grad(y.sum(), x)[0]
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("reason", ["the native extension is missing (no module); build it"])
def test_without_the_native_extension(reason, monkeypatch, ran):
    """Automatic: the reference, with a warning that says why. By name: an error that says the same."""
    monkeypatch.setitem(backends._WHY_UNAVAILABLE, "cpu", reason)
    assert "cpu" not in available_backends()
    with pytest.warns(RuntimeWarning, match="slow reference backend runs: the native extension is missing"):
        call()
    with pytest.raises(ValueError, match=r"backend='cpu' cannot run here: the native extension is missing"):
        call(backend="cpu")
    assert ran == ["reference"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_what_only_the_reference_serves_warns_of_nothing(dtype, monkeypatch, recwarn):
    monkeypatch.setitem(backends._WHY_UNAVAILABLE, "cpu", "the native extension is missing")
    call(dtype)
    assert not recwarn.list


def test_an_old_extension_is_told_from_a_missing_one(monkeypatch):
    import importlib
    import types

    monkeypatch.setattr(importlib, "import_module", lambda name: types.ModuleType(name))
    assert "older sources" in backends._probe_cpu()

    def missing(name):
        raise ImportError("libgomp.so.1: cannot open shared object file")

    monkeypatch.setattr(importlib, "import_module", missing)
    assert "missing (libgomp.so.1" in backends._probe_cpu() and "pip install" in backends._probe_cpu()


class Extension:
    """What stands for tarp_kernels._C."""

    search_cell_forward = None

    def __init__(self, cuda, versions):
        self.build_info = lambda: {"cuda": cuda}
        self.cuda_versions = lambda: versions


@pytest.mark.parametrize(
    ("cuda", "versions", "reason"),
    [
        (["sm_90a"], (13000, 13010), None),
        (["sm_90a"], (12080, 12020), None),  # minor versions get along
        (False, (0, 0), "built without nvcc; put nvcc on PATH and build it again"),
        (["sm_90a"], (13000, 12080), "built with CUDA 13, the driver knows CUDA 12; update the driver"),
    ],
)
def test_the_cuda_backend_says_what_it_needs(monkeypatch, cuda, versions, reason):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(backends.importlib, "import_module", lambda name: Extension(cuda, versions))
    found = backends._probe_cuda()
    assert found is None if reason is None else reason in found and "backend='triton'" in found and "reference" in found
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert "8.0" in backends._probe_cuda()
