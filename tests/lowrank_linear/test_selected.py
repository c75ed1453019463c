"""`lowrank_linear` on some rows: the numbers of these rows alone, read and written where they lie."""

import functools

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from tarp_kernels import Generator, available_backends, lowrank_linear, tuning
from tests.lowrank_linear.backends import cpu_backends, each_backend, each_fast_backend, each_runner
from tests.lowrank_linear.cases import Case, build
from tests.lowrank_linear.oracle import TensorCoreOracle
from tests.lowrank_linear.selected import MODES, Selected, check, select
from tests.lowrank_linear.test_triton import ARCHITECTURES, BF16, FORMS, SHARED_BYTES
from tests.lowrank_linear.triton_runs import compiling, on_ptx_machine

each_mode = pytest.mark.parametrize("mode", MODES)
each_pattern = pytest.mark.parametrize("pattern", ["sparse", "runs", "all"])

BF = torch.bfloat16
# One row, none, fewer and more than the rows up to which W is read in place; every way the kernels read W.
CASES = [
    Case(shape=(0, 8, 5)),
    Case(shape=(1, 33, 65)),
    Case(shape=(17, 33, 65), b1=True, x_layout="padded"),
    Case(shape=(101, 70, 130), generator="mlp", b1=True, b2=True, seed=1),
    Case(shape=(130, 33, 65), weight_layout="conv1d", seed=2),
    Case(shape=(17, 33, 65), dtype=BF, seed=1),
    Case(shape=(101, 70, 130), dtype=BF, adapter_dtype=torch.float32, sigma="full", x_layout="padded"),
    Case(shape=(0, 33, 65), segments="ragged", dropout=0.3, seed=2),
    Case(shape=(0, 70, 130), segments="long", dtype=BF, generator="none", weight_layout="conv1d"),
]


@each_runner
@each_mode
@each_pattern
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(runner, mode, pattern, case):
    selected = select(case, pattern, mode)
    with runner.active():
        check(selected, selected.run(runner.backend), runner.oracle)


@each_fast_backend
@each_mode
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_bits_of_gathering_and_scattering(backend, mode, case):
    """But for the order in which PyTorch adds two gradients, what index_select and index_copy give."""
    selected = select(case, "sparse", mode)
    found, wanted = selected.run(backend), selected.run_composed(backend)
    for name, value in found.items():
        assert torch.equal(value, wanted[name]), name


# --- what the tolerances see -----------------------------------------------------------------------------------------

# The kernel, and which of its indices a mistake forgets: rows of x and dx, or rows of y and dy, behind the factor.
IGNORED = {
    "read": ("lowrank_linear_forward", 1),
    "write": ("lowrank_linear_forward", 2),
    "read in backward, dx": ("lowrank_linear_backward", 1),
    "dy": ("lowrank_linear_backward", 2),
}


@pytest.mark.skipif("cpu" not in available_backends(), reason="no cpu backend")
@pytest.mark.native
@pytest.mark.parametrize("name", IGNORED)
@pytest.mark.parametrize("case", [CASES[2], CASES[3], CASES[5], CASES[7]], ids=str)
@pytest.mark.parametrize("pattern", ["sparse", "runs"])
def test_an_index_that_the_kernels_ignore_is_seen(name, case, pattern, monkeypatch):
    from tarp_kernels import _C

    kernel, which = IGNORED[name]
    run = getattr(_C, kernel)

    def forgetful(*arguments):
        place = which + max(i for i, argument in enumerate(arguments) if isinstance(argument, tuple))
        assert arguments[place] == selected.index.data_ptr()
        return run(*arguments[:place], 0, *arguments[place + 1 :])

    selected = select(case, pattern, "both")
    check(selected, selected.run("cpu"))
    monkeypatch.setattr(_C, kernel, forgetful)
    with pytest.raises(AssertionError):
        check(selected, selected.run("cpu"))


@each_backend
@pytest.mark.parametrize("mode", ["read", "both"])
def test_rows_that_are_not_selected_are_not_read(backend, mode):
    """They are NaN in x, and here in the result's gradient too."""
    selected = select(CASES[2], "sparse", mode)
    if selected.base is not None:
        elsewhere = torch.ones(len(selected.dout), dtype=torch.bool)
        elsewhere[selected.index] = False
        selected.dout[elsewhere] = float("nan")
    found = selected.run(backend)
    assert all(value.isfinite().all() for name, value in found.items() if name != "base")


# --- what is held ----------------------------------------------------------------------------------------------------


def events(run) -> tuple[set[str], list[int]]:
    """Names of the operators of PyTorch that run, and how many bytes each allocation takes."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        kept = run()
    del kept
    found = record.profiler.kineto_results.events()
    return {e.name() for e in found}, [e.nbytes() for e in found if e.name() == "[memory]" and e.nbytes() > 0]


GATHERING = {"aten::index_select", "aten::index_copy", "aten::index", "aten::index_put_", "aten::gather"}


@pytest.mark.skipif("cpu" not in available_backends(), reason="no cpu backend")
@pytest.mark.native
@each_mode
@pytest.mark.parametrize("dtype", [torch.float32, BF])
def test_no_row_is_copied(mode, dtype, monkeypatch):
    """A step allocates the result, dx with all rows and r numbers a row, but nothing [T', K] or [T', N]."""
    monkeypatch.undo()  # the poison of uninitialised memory allocates by itself
    case = Case(shape=(199, 68, 76), rank=3, dtype=dtype, adapter_dtype=torch.float32)
    selected = select(case, "sparse", mode)
    frozen = ("x", "V", "U", "w1")
    count, T = len(selected.index), len(selected.x if mode == "read" else selected.dout)
    copies = {count * width * dtype.itemsize for width in case.shape[1:]}
    # What a result with these rows alone, a compact dx, is not.
    own = set()
    if mode == "read":
        own.add(count * 76 * dtype.itemsize)
    if mode == "write":
        own.add(count * 68 * dtype.itemsize)

    def step(run):
        call = selected.call.with_tensors({"x": selected.x}).leaves(frozen)
        y = run(call)
        return y, torch.autograd.grad(y, [t for t in call.tensors.values() if t.requires_grad], selected.dout)

    base = selected.base
    names, sizes = events(lambda: step(lambda call: selected.function(call, base, "cpu")))
    assert not names & GATHERING
    assert not (copies - own) & set(sizes), "a copy of the selected rows"
    assert max(sizes) <= T * 76 * dtype.itemsize
    names, sizes = events(lambda: step(lambda call: selected.composed(call, base, "cpu")))
    assert names & GATHERING and (copies - own) & set(sizes), "what is looked for would not be found"


# --- derivatives of derivatives, compilers, transforms ---------------------------------------------------------------


def twice(selected: Selected, function, backend: str, double: bool = False) -> list[torch.Tensor]:
    call = selected.call.with_tensors({"x": selected.x})
    call = (call.double() if double else call).leaves()
    base = selected.base
    if base is not None:
        base = (base.double() if double else base.clone()).requires_grad_()
    inputs = [*call.tensors.values(), *([] if base is None else [base])]
    first = torch.autograd.grad(function(call, base, backend).square().mean(), inputs, create_graph=True)
    return list(torch.autograd.grad(sum(g.square().sum() for g in first), inputs))


@each_backend
@each_mode
@pytest.mark.parametrize("case", [CASES[2], CASES[3], CASES[7]], ids=str)
def test_second_order(backend, mode, case):
    selected = select(case, "sparse", mode)
    selected = selected._replace(x=selected.x.nan_to_num(0.5))
    found = twice(selected, selected.function, backend)
    for value, wanted in zip(found, twice(selected, selected.composed, "reference", double=True), strict=True):
        assert (value - wanted).norm() <= 2e-5 * wanted.norm()
    other = selected._replace(index=selected.index - 1)
    wrong = twice(other, other.composed, "reference", double=True)
    assert any((a - b).norm() > 1e-2 * b.norm() for a, b in zip(found, wrong, strict=True))


@each_backend
@each_mode
def test_under_a_compiler(backend, mode):
    torch._dynamo.reset()
    selected = select(CASES[2], "sparse", mode)
    compiled = torch.compile(selected.function, backend="aot_eager", fullgraph=True)
    eager, found = selected.run(backend), selected._replace(compiled=compiled).run(backend)
    for name, value in found.items():
        torch.testing.assert_close(value, eager[name])
    torch._dynamo.reset()


@each_mode
def test_meta_tensors(mode):
    selected = select(CASES[2], "sparse", mode)
    call = selected.call.with_tensors({"x": selected.x}).map(lambda tensor: tensor.to("meta")).leaves()
    base = None if selected.base is None else selected.base.to("meta")
    y = selected._replace(index=selected.index.to("meta")).function(call, base, None)
    assert y.is_meta and y.shape == selected.dout.shape
    y.sum().backward()
    assert all(tensor.grad.shape == tensor.shape for tensor in call.tensors.values())


@each_backend
def test_autocast_gathers_and_promotes(backend):
    selected = select(CASES[2], "sparse", "both")
    call, rows = selected.call, selected.index
    with torch.autocast("cpu", BF):
        found = selected.function(call.with_tensors({"x": selected.x}), selected.base, backend)
        wanted = call.run(backend)
    assert found.dtype == torch.float32 and torch.equal(found[rows], wanted.float())


@each_backend
def test_leading_dimensions(backend):
    call = build(Case(shape=(6, 7, 5)))
    x, base = call.x.reshape(2, 3, 7), torch.randn(3, 2, 5)
    rows = torch.tensor([0, 3, 4])
    run = functools.partial(lowrank_linear, x, *call[1:6], **call.options, backend=backend)
    y = run(rows=rows)
    assert y.shape == (3, 5)
    put = run(rows=rows, into=(base, rows + 1))
    assert put.shape == base.shape and torch.equal(put.reshape(6, 5)[rows + 1], y)
    assert torch.equal(put.reshape(6, 5)[[0, 2, 3]], base.reshape(6, 5)[[0, 2, 3]])


# --- Triton as a GPU would run it: its interpreter is in interpreted.py ----------------------------------------------


@pytest.mark.parametrize("cc", ARCHITECTURES)
@pytest.mark.parametrize(("case", "mode"), [(FORMS[1], "both"), (FORMS[2], "read"), (FORMS[3], "write")], ids=str)
def test_ptx_computes_values_and_gradients_without_a_fault(cc, case, mode):
    selected = select(case, "sparse", mode)
    for variant in tuning.VARIANTS:
        with on_ptx_machine(cc) as reports, tuning.forced(variant):
            found = selected.run("triton")
        check(selected, found, TensorCoreOracle)
        assert all(report.atomics == 0 for _, report in reports)


@pytest.mark.parametrize("cc", [80, 90, 100])
@pytest.mark.parametrize("case", [*FORMS, BF16.with_(shape=(256, 256, 192), rank=16)], ids=str)
def test_binaries_spill_nothing(cc, case):
    selected = select(case, "sparse", "both")
    call = selected.call.with_tensors({"x": selected.x}).leaves()
    with compiling(cc) as kernels:
        for variant in tuning.VARIANTS:
            with tuning.forced(variant):
                y = selected.function(call, selected.base, "triton")
                torch.autograd.grad(y, list(call.tensors.values()), selected.dout)
    for kernel in kernels:
        assert kernel.stack_bytes == 0 and kernel.registers <= 255, kernel[2:]
        assert kernel.shared_bytes <= SHARED_BYTES[cc]


# --- bad input -------------------------------------------------------------------------------------------------------


def good() -> dict:
    rows = torch.tensor([0, 2, 5])
    generator = Generator(torch.randn(2, 7))
    tensors = {"x": torch.randn(6, 7), "weight": torch.randn(4, 7), "bias": None, "V": torch.randn(2, 7)}
    return tensors | {"U": torch.randn(4, 2), "generator": generator, "rows": rows, "into": (torch.randn(9, 4), rows)}


BASE, ROWS = torch.randn(9, 4), torch.tensor([0, 2, 5])
FIX = r"use mask.nonzero\(\).squeeze\(1\)"
BAD = {
    "bool rows": (
        {"rows": torch.ones(6, dtype=torch.bool)},
        TypeError,
        rf"rows: got torch.bool, expected an int64.*{FIX}",
    ),
    "int32 rows": ({"rows": ROWS.int()}, TypeError, "rows: got torch.int32, expected an int64 tensor"),
    "a list": ({"rows": [0, 2]}, TypeError, "rows: got list, expected an int64 tensor"),
    "2-d rows": ({"rows": ROWS[None]}, ValueError, r"rows: got shape \[1, 3\], expected \[T'\]"),
    "too many rows": ({"rows": torch.arange(7)}, ValueError, r"rows: got shape \[7\].* 6 rows of x once"),
    "below": (
        {"rows": torch.tensor([-1, 2, 5])},
        ValueError,
        rf"rows: goes from -1 to 5, expected .* 6 rows of x; {FIX}",
    ),
    "beyond": ({"rows": torch.tensor([0, 2, 6])}, ValueError, "rows: goes from 0 to 6, expected numbers of the 6 rows"),
    "falling": (
        {"rows": torch.tensor([0, 5, 2])},
        ValueError,
        r"rows: goes from 5 to 2 at 2, .* rising.* index.unique\(\)",
    ),
    "repeated": (
        {"rows": torch.tensor([2, 2, 5])},
        ValueError,
        "rows: goes from 2 to 2 at 1, expected strictly rising",
    ),
    "elsewhere": ({"rows": ROWS.to("meta")}, ValueError, "rows: lies on meta, expected cpu like x; move it"),
    "no pair": (
        {"into": BASE},
        TypeError,
        r"into: got .*expected \(base \[..., N\], index int64 \[T'\]\), two tensors",
    ),
    "no tensor": ({"into": (None, ROWS)}, TypeError, r"into: got \(NoneType, Tensor\), expected \(base"),
    "dtype": (
        {"into": (BASE.double(), ROWS)},
        TypeError,
        r"into\[0\]: got dtype torch.float64, expected torch.float32",
    ),
    "width": ({"into": (BASE[:, :3], ROWS)}, ValueError, r"into\[0\]: got shape \[9, 3\], expected \[..., N\]"),
    "base on meta": ({"into": (BASE.to("meta"), ROWS)}, ValueError, r"into\[0\]: lies on meta, expected cpu like x"),
    "other count": ({"into": (BASE, ROWS[:2])}, ValueError, r"into\[1\]: got 2 row numbers, expected 3, one for each"),
    "out of base": ({"into": (BASE, ROWS + 4)}, ValueError, r"into\[1\]: goes from 4 to 9, .* the 9 rows of into\[0\]"),
    "index int32": ({"into": (BASE, ROWS.int())}, TypeError, r"into\[1\]: got torch.int32, expected an int64 tensor"),
    "x": ({"x": None}, TypeError, "x: got NoneType, expected a torch.Tensor"),
    "weight": ({"weight": torch.randn(4)}, ValueError, r"weight: got shape \[4\]"),
    "V": ({"V": torch.randn(2, 8)}, ValueError, r"V: got shape \[2, 8\]"),
    "segments of all rows": ({"segments": torch.tensor([0, 6])}, ValueError, "segments: ends at 6, expected .* 3"),
}


@pytest.mark.parametrize("backend", [None, *cpu_backends])
@pytest.mark.parametrize("name", BAD)
def test_bad_input(name, backend):
    change, error, words = BAD[name]
    assert lowrank_linear(**good(), backend=backend).shape == (9, 4)
    with pytest.raises(error, match=words):
        lowrank_linear(**(good() | change), backend=backend)


def test_segments_must_end_with_the_selected_rows():
    arguments = good() | {"V": torch.randn(1, 2, 7), "U": torch.randn(1, 4, 2), "generator": None}
    assert lowrank_linear(**arguments, segments=torch.tensor([0, 3])).shape == (9, 4)
    with pytest.raises(ValueError, match="segments: ends at 6, expected the number of rows of x, 3"):
        lowrank_linear(**arguments, segments=torch.tensor([0, 6]))
