"""Many tasks in one call equal one call per task; empty tasks cost and change nothing."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tarp_kernels import Generator
from tests.lowrank_linear.backends import each_backend
from tests.lowrank_linear.cases import Call, Case, build, cotangent, run_with_gradients
from tests.lowrank_linear.mutants import ADAPTER
from tests.lowrank_linear.oracle import bounds, excess

FORMS = [
    {"generator": "none"},
    {"generator": "linear", "b1": True},
    {"generator": "mlp", "b1": True, "b2": True, "activation": "softplus"},
    {"generator": "linear", "sigma": "full"},
    {"generator": "mlp", "sigma": "full", "activation": "tanh", "b2": True},
]
CASES = [
    Case(**form, segments=segments, shape=(0, 33, 40), rank=5)
    for form in FORMS
    for segments in ("one", "ragged", "many", "long")
]


def task(call: Call, i: int) -> Call:
    """Task i's own call. x must be [T, K]."""
    start, end = call.segments[i : i + 2].tolist()
    own = call.with_tensors({name: tensor[i] for name, tensor in call.tensors.items() if name in ADAPTER})
    return own._replace(x=call.x[start:end], segments=None)


@each_backend
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_segments_equal_separate_calls(backend, case, dtype):
    case = case.with_(dtype=dtype)
    call, dy = build(case), cotangent(case)
    wanted = bounds(call, dy)
    together = run_with_gradients(call, dy, backend)
    ends = call.segments.tolist()
    alone = [
        run_with_gradients(task(call, i), dy[start:end], backend)
        for i, (start, end) in enumerate(zip(ends[:-1], ends[1:], strict=True))
    ]
    joined = {
        name: torch.cat([one[name] for one in alone])
        if name in ("y", "x")
        else torch.stack([one[name] for one in alone])
        for name in together
        if name not in ("weight", "bias")
    }
    for name, value in joined.items():
        assert excess(value, wanted[name]) <= 1, name
        assert excess(together[name], wanted[name]) <= 1, name
        both = 2 * wanted[name].error + 1e-300
        assert ((value.double() - together[name].double()).abs() <= both).all(), name
    for name in ("weight", "bias"):
        total = sum(one[name].double() for one in alone)
        slack = 2 * wanted[name].error + sum(one[name].double().abs() * torch.finfo(dtype).eps for one in alone)
        assert ((total - together[name].double()).abs() <= slack).all(), name


@each_backend
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("places", [(0,), (2,), (3,), (0, 0, 1, 3, 3, 3)])
def test_empty_tasks_change_no_bit(backend, form, places):
    """Wherever they stand, and whatever their adapters hold."""
    full = build(Case(**form, segments="long", shape=(0, 33, 40), rank=5))
    start = torch.tensor([0, 60, 82, 105])
    three = {n: t[[0, 1, 2]] if n in ADAPTER else t for n, t in full.tensors.items()}
    call = full.with_tensors(three)._replace(segments=start)
    dy = torch.randn(105, 40)
    expected = run_with_gradients(call, dy, backend)
    tasks, ends = [0, 1, 2], start.tolist()
    for place in sorted(places, reverse=True):
        tasks.insert(place, -1)
        ends.insert(place, ends[place])

    def spread(tensor):
        return torch.stack([torch.full_like(tensor[0], float("nan")) if i < 0 else tensor[i] for i in tasks])

    wider = call.with_tensors({n: spread(t) if n in ADAPTER else t for n, t in call.tensors.items()})
    found = run_with_gradients(wider._replace(segments=torch.tensor(ends)), dy, backend)
    owners = torch.tensor([i >= 0 for i in tasks])
    for name, value in found.items():
        if name in ADAPTER:
            assert not value[~owners].any(), f"{name} of a task without rows must be zero"
            value = value[owners]
        assert torch.equal(value, expected[name]), name


@each_backend
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_both_integer_types_and_any_stride(backend, dtype):
    call = build(Case(segments="ragged", shape=(0, 9, 7)))
    expected = call.run(backend)
    offsets = call.segments.to(dtype)
    strided = torch.full((2 * len(offsets),), 99, dtype=dtype)[::2]
    strided.copy_(offsets)
    for segments in (offsets, strided):
        assert torch.equal(call._replace(segments=segments).run(backend), expected)


@each_backend
def test_no_tasks_and_no_rows(backend):
    """B = 0 is legal where there are no rows."""
    call = build(Case(segments="empty", shape=(0, 9, 7), generator="mlp", b1=True, b2=True))
    none = call.with_tensors({n: t[:0] for n, t in call.tensors.items() if n in ADAPTER})
    none = none._replace(segments=torch.tensor([0]))
    found = run_with_gradients(none, torch.zeros(0, 7), backend)
    assert found["y"].shape == (0, 7)
    assert found["V"] is None or found["V"].shape == none.V.shape  # nothing depends on a tensor of no tasks
    assert not found["weight"].any() and not found["bias"].any()


@each_backend
def test_no_tasks_through_the_registered_operator(backend):
    """A dispatch mode takes the path of compiled code."""

    class Pass(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    call = build(Case(segments="empty", shape=(0, 9, 7)))
    none = call.with_tensors({n: t[:0] for n, t in call.tensors.items() if n in ADAPTER})
    with Pass():
        found = run_with_gradients(none._replace(segments=torch.tensor([0])), torch.zeros(0, 7), backend)
    assert not found["weight"].any() and found["V"].shape == (0, 3, 9)


@each_backend
def test_one_task_of_segments_is_a_call_without(backend):
    plain = build(Case(shape=(23, 33, 40), generator="mlp", b1=True))
    lifted = {name: t[None] for name, t in plain.tensors.items() if name in ADAPTER}
    one = plain.with_tensors(lifted)._replace(segments=torch.tensor([0, 23]))
    dy = torch.randn(23, 40)
    expected, found = run_with_gradients(plain, dy, backend), run_with_gradients(one, dy, backend)
    for name, value in found.items():
        wanted = expected[name][None] if name in ADAPTER else expected[name]
        torch.testing.assert_close(value, wanted, rtol=1e-6, atol=1e-6)


@each_backend
def test_segments_count_rows_of_all_leading_dimensions(backend):
    call = build(Case(segments="long", shape=(0, 9, 7)))
    expected = call.run(backend)
    folded = call._replace(x=call.x.reshape(3, 35, 9)).run(backend)
    assert torch.equal(folded.reshape(105, 7), expected)


@each_backend
def test_a_task_learns_from_its_own_rows_only(backend):
    """The gradient of one task's adapter does not move when another task's rows and cotangents do."""
    call = build(Case(segments="long", shape=(0, 33, 40), generator="mlp"))
    dy = torch.randn(105, 40)
    expected = run_with_gradients(call, dy, backend, ADAPTER)
    x, other_dy = call.x.clone(), dy.clone()
    x[60:], other_dy[60:] = float("nan"), float("nan")
    found = run_with_gradients(call._replace(x=x), other_dy, backend, ADAPTER)
    for name in ("V", "U", "w1", "w2"):
        assert torch.equal(found[name][0], expected[name][0]) and expected[name][0].any(), name


@each_backend
def test_generators_of_segments_keep_their_form(backend):
    """A generator built by hand, one bias per task."""
    B, K, N, r = 3, 6, 5, 2
    torch.manual_seed(0)
    generator = Generator(torch.zeros(B, r, K), torch.tensor([[1.0, 1.0], [2.0, 2.0], [0.0, 0.0]]))
    x, V, U = torch.randn(6, K), torch.randn(B, r, K), torch.randn(B, N, r)
    call = Call(x, torch.zeros(N, K), None, V, U, generator, "diag", 1.0, torch.tensor([0, 2, 4, 6]), None)
    y = call.run(backend)
    for i, factor in enumerate((1, 2, 0)):
        torch.testing.assert_close(y[2 * i : 2 * i + 2], factor * x[2 * i : 2 * i + 2] @ V[i].t() @ U[i].t())
