"""`search_cell` as registered operators, and under torch.compile with one graph for every architecture and length."""

import pytest
import torch
import torch._dynamo
from torch.library import opcheck

import tarp_kernels
from tarp_kernels import CellWeights, SearchCell, search_cell
from tarp_kernels.ops.search_cell import OPERATIONS
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


@each_backend
@pytest.mark.parametrize("case", [*LAYOUTS, Case(alpha="none"), Case(alpha="dead n1", norm=True)], ids=str)
def test_opcheck(backend, case):
    call = build(case)
    arguments = forward_arguments(call, leaves(call), backend)
    opcheck(OPS.search_cell.default, arguments)
    needs = [name in call.tensors for name in NAMES]
    utils = ("test_schema", "test_faketensor")  # it has no derivative: second order is eager only
    detached = [a.detach() if isinstance(a, torch.Tensor) else a for a in arguments]
    opcheck(OPS.search_cell_backward.default, (call.dout, *detached, needs), test_utils=utils)


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
