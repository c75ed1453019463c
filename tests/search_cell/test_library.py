"""`search_cell` as registered operators, and under torch.compile with one graph for every architecture and length."""

import pytest
import torch
import torch._dynamo
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

import tarp_kernels
from tarp_kernels import CellWeights, SearchCell, search_cell
from tarp_kernels.ops.search_cell import OPERATIONS, reference
from tests.lowrank_linear.backends import each_backend
from tests.search_cell.cases import LAYOUTS, PADDING, Call, Case, build, one_hot

OPS = torch.ops.tarp_kernels
NAMES = ("h", "alpha", *CellWeights._fields[:-1])
COMPILED = [
    Case(),
    Case(causal=False, norm=True, padding=PADDING),
    Case(tasks=(11, 22), alpha="mixed"),
    Case(batch=None, lengths=(9, 1, 0, 4, 17), per_task_weights=False, tasks=(10, 21), alpha="published"),
]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def leaves(call: Call) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().requires_grad_() for name, tensor in call.tensors.items()}


def forward_arguments(call: Call, tensors: dict[str, torch.Tensor], backend: str) -> tuple:
    layout = (call.options.get(name) for name in ("attention_mask", "cu_seqlens", "segments"))
    return (*(tensors.get(name) for name in NAMES), *layout, call.options["causal"], 1e-5, backend)


CHECKED = [
    *LAYOUTS,
    Case(alpha="none"),
    Case(alpha="dead n1", norm=True),
    Case(dtype=torch.bfloat16, norm=True, weights_dtype=torch.float32),
    Case(dtype=torch.bfloat16, tasks=(11, 22), padding=PADDING, alpha="published"),
]


@each_backend
@pytest.mark.parametrize("case", CHECKED, ids=str)
def test_opcheck(backend, case):
    call = build(case)
    arguments = forward_arguments(call, leaves(call), backend)
    opcheck(OPS.search_cell.default, arguments)
    needs = [name in call.tensors for name in NAMES]
    utils = ("test_schema", "test_faketensor")  # it has no derivative: second order is eager only
    detached = [a.detach() if isinstance(a, torch.Tensor) else a for a in arguments]
    opcheck(OPS.search_cell_backward.default, (call.dout, *detached, needs), test_utils=utils)


@each_backend
@pytest.mark.parametrize("case", CHECKED, ids=str)
def test_fake_tensors_have_the_shapes_dtypes_and_devices_of_real_ones(backend, case):
    call = build(case)
    with FakeTensorMode() as mode:
        fake = {name: mode.from_tensor(tensor).requires_grad_() for name, tensor in call.tensors.items()}
        moved = {name: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for name, v in call.options.items()}
        out = call._replace(options=moved).run(backend, **fake)
        found = torch.autograd.grad(out, list(fake.values()), torch.ones_like(out))
    assert (out.shape, out.dtype, out.device) == (call.dout.shape, call.dout.dtype, call.dout.device)
    for gradient, (name, tensor) in zip(found, call.tensors.items(), strict=True):
        assert (gradient.shape, gradient.dtype, gradient.device) == (tensor.shape, tensor.dtype, tensor.device), name


@pytest.mark.parametrize("case", CHECKED, ids=str)
def test_meta_tensors(case):
    call = build(case)
    meta = {name: tensor.to("meta").requires_grad_() for name, tensor in call.tensors.items()}
    moved = {name: v.to("meta") if isinstance(v, torch.Tensor) else v for name, v in call.options.items()}
    out = call._replace(options=moved).run(None, **meta)
    assert out.is_meta and (out.shape, out.dtype) == (call.dout.shape, call.dout.dtype)
    out.sum().backward()
    assert all(t.grad.is_meta and (t.grad.shape, t.grad.dtype) == (t.shape, t.dtype) for t in meta.values())


@each_backend
@pytest.mark.parametrize("wanted", [None, ("h",), ("alpha", "glu"), ("norm_bias", "output"), ("linear",)])
@pytest.mark.parametrize("alpha", ["mixed", "published"])
def test_the_operators_give_the_bits_of_the_function(backend, wanted, alpha):
    call = build(Case(norm=True, tasks=(11, 22), padding=PADDING, alpha=alpha))
    expected = call.gradients(backend, wanted)
    arguments = forward_arguments(call, call.tensors, backend)
    assert torch.equal(OPS.search_cell(*arguments), expected["out"])
    needs = [name in (wanted or call.tensors) for name in NAMES]
    gradients = OPS.search_cell_backward(call.dout, *arguments, needs)
    for name, found in zip([n for n, needed in zip(NAMES, needs, strict=True) if needed], gradients, strict=True):
        assert torch.equal(found, expected[name]), name


def test_backward_runs_unselected_operations_for_alpha_only(monkeypatch):
    """Counted in the formulas; the kernels count in test_masking.py."""
    call, ran = build(Case(alpha="published")), []
    operate = reference.operate
    monkeypatch.setattr(reference, "operate", lambda *given: (ran.append(given[0]), operate(*given))[1])
    arguments = forward_arguments(call, call.tensors, "reference")
    for wanted, expected in ((("h", "conv5"), 8), (("h", "alpha"), 45)):
        ran.clear()
        OPS.search_cell_backward(call.dout, *arguments, [name in wanted for name in NAMES])
        assert len(ran) == expected


@each_backend
def test_autocast_changes_nothing_in_backward_either(backend):
    call = build(Case(norm=True))
    arguments, needs = forward_arguments(call, call.tensors, backend), [name in call.tensors for name in NAMES]
    expected = OPS.search_cell_backward(call.dout, *arguments, needs)
    with torch.autocast("cpu", torch.bfloat16):
        found = OPS.search_cell_backward(call.dout, *arguments, needs)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_eager_calls_go_around_the_dispatcher():
    """And give the gradients of their own path: None for weights that nobody selected."""
    call, seen = build(Case(alpha="published")), []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    with torch.profiler.profile() as profile:
        call.gradients("reference")
    assert not any(event.key.startswith("tarp_kernels::") for event in profile.key_averages())
    with Seen():  # a mode must see one node
        call.run("reference")
    assert seen == ["tarp_kernels.search_cell.default"]


def compiled(backend: str, options: dict):
    def run(h, alpha, tensors, layout):
        return search_cell(h, CellWeights(**tensors), alpha, **options, **layout, backend=backend)

    return torch.compile(run, backend="aot_eager", fullgraph=True, dynamic=True)


@each_backend
@pytest.mark.parametrize("case", COMPILED, ids=str)
def test_compiled_calls_give_the_bits_of_eager_ones(backend, case):
    call = build(case)
    options = {"causal": call.options["causal"]}
    layout = {name: value for name, value in call.options.items() if name != "causal"}
    run = compiled(backend, options)
    expected = call.gradients(backend)
    own = leaves(call)
    tensors = {name: tensor for name, tensor in own.items() if name not in ("h", "alpha")}
    out = run(own["h"], own["alpha"], tensors, layout)
    gradients = torch.autograd.grad(out, list(own.values()), call.dout)
    assert torch.equal(out, expected["out"])
    for (name, _), gradient in zip(own.items(), gradients, strict=True):
        if backend == "reference":
            torch.testing.assert_close(gradient, expected[name])
        else:
            assert torch.equal(gradient, expected[name]), name


@each_backend
def test_one_graph_serves_every_architecture_and_length(backend):
    call = build(Case(batch=(3, 11)))
    tensors = {name: tensor for name, tensor in call.tensors.items() if name not in ("h", "alpha")}
    run = compiled(backend, {"causal": True})
    for i, (length, operation) in enumerate(((11, 5), (11, 0), (40, 3), (7, 2), (130, 4))):
        h, alpha = torch.randn(3, length, 13), one_hot((operation,) * 9).float()
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            out = run(h, alpha, tensors, {})
        wanted = search_cell(h, CellWeights(**tensors), alpha, backend=backend)
        assert torch.equal(out, wanted) and (operation == 0 or (out != h).any())


@each_backend
@pytest.mark.parametrize("operations", [OPERATIONS, ("none", "identity", "conv5")])
def test_modules_compile_whole(backend, operations):
    cell = SearchCell(13, 5, operations=operations)
    torch.nn.init.normal_(cell.output)
    h, alpha = torch.randn(2, 9, 13), torch.eye(len(operations))[[2, 2, 0, 2, 1, 2, 2, 1, 1]]
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[0, :4] = 0
    with tarp_kernels.backend(backend):
        for module, arguments in ((cell, (h, alpha, mask)), (cell.finalize(alpha), (h, mask))):
            expected = torch.autograd.grad(module(*arguments).square().sum(), module.output)
            found = torch.compile(module, backend="aot_eager", fullgraph=True)(*arguments)
            assert torch.equal(found, module(*arguments))
            torch.testing.assert_close(torch.autograd.grad(found.square().sum(), module.output), expected)


@each_backend
def test_compiled_calls_still_check_offsets(backend):
    call = build(Case(batch=None, lengths=(9, 4)))
    tensors = {name: tensor for name, tensor in call.tensors.items() if name not in ("h", "alpha")}
    run = compiled(backend, {"causal": True})
    with pytest.raises(ValueError, match="cu_seqlens: ends at 12, expected the number of rows of h, 13"):
        run(call.tensors["h"], call.tensors["alpha"], tensors, {"cu_seqlens": torch.tensor([0, 9, 12])})


@pytest.mark.parametrize("backend", ["reference"])
def test_second_derivatives_of_the_operator_are_refused(backend):
    call = build(Case())
    own = leaves(call)
    out = OPS.search_cell(*forward_arguments(call, own, backend))
    (gradient,) = torch.autograd.grad(out, own["h"], call.dout, create_graph=True)
    with pytest.raises(RuntimeError, match="autograd"):
        gradient.sum().backward()


@each_backend
def test_no_gradient_shares_the_memory_of_dout(backend):
    """Where nothing but h reaches out, its gradient is dout."""
    call = build(Case(alpha="none"))
    needs = [name == "h" for name in NAMES]
    (dh,) = OPS.search_cell_backward(call.dout, *forward_arguments(call, call.tensors, backend), needs)
    assert torch.equal(dh, call.dout) and dh.data_ptr() != call.dout.data_ptr()
