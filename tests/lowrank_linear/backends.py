"""Which kernels the tests run: every backend that can run here, the native one with each of its instruction sets.

Tensors of the tests lie on the CPU. `Runner.active` has a GPU's kernels take them, and skips what these do not serve.
"""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch

import tarp_kernels
from tarp_kernels.backends import DEVICES, NotServed
from tests.lowrank_linear.on_a_gpu import taking_cpu_tensors
from tests.lowrank_linear.oracle import Oracle, TensorCoreOracle

GPU = torch.device("cuda")


class Runner(NamedTuple):
    backend: str
    isa: str | None = None

    def __str__(self) -> str:
        return self.backend if self.isa is None else f"{self.backend}-{self.isa}"

    @property
    def on_a_gpu(self) -> bool:
        return not takes_cpu_tensors(self.backend)

    @property
    def oracle(self) -> type[Oracle]:
        return TensorCoreOracle if self.on_a_gpu else Oracle

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Within the block the backend takes CPU tensors, the native one by the kernels of this instruction set.

        A call that a GPU's backend does not serve skips the test, with the reason.
        """
        if self.on_a_gpu:
            try:
                with taking_cpu_tensors(GPU):
                    yield
            except NotServed as reason:
                pytest.skip(str(reason))
            return
        if self.isa is None:
            yield
            return
        from tarp_kernels import _C

        before = _C.cpu_features()["active"]
        _C.set_isa(self.isa)
        try:
            yield
        finally:
            _C.set_isa(before)


def takes_cpu_tensors(backend: str) -> bool:
    return backend not in DEVICES or DEVICES[backend][0] == "cpu"


def runners() -> list[Runner]:
    found = []
    for backend in tarp_kernels.available_backends():
        if backend == "cpu":
            from tarp_kernels import _C

            found += [Runner(backend, isa) for isa in reversed(_C.cpu_features()["usable"])]
        else:
            found.append(Runner(backend))
    return found


def marked(backend: str, *values, id: str | None = None):
    """A parameter set that carries the marker `native` where the compiled kernels run."""
    marks = [pytest.mark.native] if backend == "cpu" else []
    return pytest.param(*values, marks=marks, id=id)


each_runner = pytest.mark.parametrize("runner", [marked(r.backend, r, id=str(r)) for r in runners()])
# What draws shapes at random would compile a GPU's kernels anew for each.
each_cpu_runner = pytest.mark.parametrize(
    "runner", [marked(r.backend, r, id=str(r)) for r in runners() if not r.on_a_gpu]
)

# For tests about one backend as users meet it: with CPU tensors, and the best instruction set only.
cpu_backends = [b for b in tarp_kernels.available_backends() if takes_cpu_tensors(b)]
each_backend = pytest.mark.parametrize("backend", [marked(b, b) for b in cpu_backends])
fast_backends = [b for b in cpu_backends if b != "reference"]
each_fast_backend = pytest.mark.parametrize("backend", [marked(b, b) for b in fast_backends])
