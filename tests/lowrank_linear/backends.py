"""Which kernels the tests run: every backend that can run here, the native one with each of its instruction sets."""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import pytest

import tarp_kernels


class Runner(NamedTuple):
    backend: str
    isa: str | None = None

    def __str__(self) -> str:
        return self.backend if self.isa is None else f"{self.backend}-{self.isa}"

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Within the block the native kernels are those of this instruction set."""
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

# For tests about one backend as users meet it: the best instruction set only.
each_backend = pytest.mark.parametrize("backend", [marked(b, b) for b in tarp_kernels.available_backends()])
fast_backends = [b for b in tarp_kernels.available_backends() if b != "reference"]
each_fast_backend = pytest.mark.parametrize("backend", [marked(b, b) for b in fast_backends])
