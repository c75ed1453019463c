"""`SearchCell` under torch.compile with fullgraph: exact values and gradients, and what does not compile anew."""

import pytest
import torch
import torch._dynamo
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

import tarp_kernels
from tarp_kernels import CellWeights, SearchCell, search_cell
from tests.lowrank_linear.backends import each_backend
from tests.lowrank_linear.triton_runs import on_ptx_machine
from tests.search_cell.cases import ALPHAS, PADDING, Call, Case, bounds, build, excesses, expected, one_hot

OPS = torch.ops.tarp_kernels
MODULES = [
    Case(),
    Case(causal=False, norm=True),
    Case(norm=True, padding=PADDING, alpha="published"),
    Case(causal=False, padding=PADDING, alpha="mixed"),
    Case(tasks=(11, 0, 22), per_task_weights=False, alpha="mixed"),
    Case(causal=False, norm=True, padding=PADDING, tasks=(22, 11), per_task_weights=False),
]
STACKS = [
    Case(tasks=(11, 22), norm=True, alpha="published"),
    Case(tasks=(11, 0, 22), causal=False, padding=PADDING, per_task_alpha=False),
    Case(batch=None, lengths=(9, 1, 0, 4, 17), causal=False, norm=True, tasks=(9, 5, 0, 17), alpha="mixed"),
]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def module_of(call: Call) -> SearchCell:
    """The cell with the call's weights."""
    d, width = call.tensors["output"].shape
    stem = "layernorm" if "norm" in call.tensors else "identity"
    cell = SearchCell(d, width, stem, call.options["causal"], dtype=call.tensors["output"].dtype)
    cell.load_state_dict({name: tensor for name, tensor in call.tensors.items() if name not in ("h", "alpha")})
    return cell


def leaves(call: Call, *names: str) -> dict[str, Tensor]:
    return {name: call.tensors[name].detach().requires_grad_() for name in names or call.tensors}


def with_gradients(out: Tensor, wanted: dict[str, Tensor], dout: Tensor) -> dict[str, Tensor]:
    """No gradient may be missing: a compiled graph has zeros where an eager call has None."""
    found = torch.autograd.grad(out, list(wanted.values()), dout)
    return {"out": out.detach(), **dict(zip(wanted, found, strict=True))}


def check(found: dict[str, Tensor], case: Case) -> None:
    """Against the unfused mixture in float64, within what rounding explains."""
    assert found.keys() == {"out", *build(case).tensors}
    assert {name: ratio for name, ratio in excesses(found, *expected(case)).items() if not ratio <= 1} == {}


@each_backend
@pytest.mark.parametrize("case", MODULES, ids=str)
def test_a_module(backend, case):
    call = build(case)
    cell, given = module_of(call), leaves(call, "h", "alpha")
    layout = {name: value for name, value in call.options.items() if name != "causal"}
    compiled = torch.compile(cell, backend="aot_eager", fullgraph=True)
    with tarp_kernels.backend(backend):
        out = compiled(given["h"], given["alpha"], **layout)
        check(with_gradients(out, given | dict(cell.named_parameters()), call.dout), case)


def stack_of_cells(h, alpha, tensors, options, backend):
    return search_cell(h, CellWeights(**tensors), alpha, **options, backend=backend)


@each_backend
@pytest.mark.parametrize("case", STACKS, ids=str)
def test_one_cell_for_each_task(backend, case):
    call = build(case)
    given = leaves(call)
    tensors = {name: tensor for name, tensor in given.items() if name not in ("h", "alpha")}
    compiled = torch.compile(stack_of_cells, backend="aot_eager", fullgraph=True)
    out = compiled(given["h"], given["alpha"], tensors, call.options, backend)
    check(with_gradients(out, given, call.dout), case)


@each_backend
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_new_alpha_compiles_nothing(backend, dynamic):
    """Neither forward nor backward, with gradients of everything."""
    call, graphs = build(Case(padding=PADDING)), []
    cell = module_of(call)
    compiled = torch.compile(cell, backend=keeping(graphs), fullgraph=True, dynamic=dynamic)
    alphas = [call.tensors["alpha"], *(one_hot(operations).float() for operations in ALPHAS.values())]
    for i, alpha in enumerate(alphas):
        own = call._replace(tensors=call.tensors | {"alpha": alpha})
        given = leaves(own, "h", "alpha")
        with tarp_kernels.backend(backend), torch._dynamo.config.patch(error_on_recompile=i > 0):
            out = compiled(given["h"], given["alpha"], call.options["attention_mask"])
            found = with_gradients(out, given | dict(cell.named_parameters()), call.dout)
        wanted = own.exact()
        ratios = excesses(found, wanted, bounds(own, wanted))
        assert {name: ratio for name, ratio in ratios.items() if not ratio <= 1} == {}
    assert len(graphs) == 2, "one forward, one backward"


@each_backend
def test_a_recompilation_would_be_seen(backend):
    call = build(Case())
    compiled = torch.compile(module_of(call), backend="aot_eager", fullgraph=True, dynamic=False)
    with tarp_kernels.backend(backend):
        compiled(call.tensors["h"], call.tensors["alpha"])
        with (
            torch._dynamo.config.patch(error_on_recompile=True),
            pytest.raises(torch._dynamo.exc.RecompileError),
        ):
            compiled(call.tensors["h"][:2], call.tensors["alpha"])


def keeping(graphs: list[torch.fx.GraphModule]):
    """A compiler that runs what AOTAutograd makes, forward and backward, as it is, and keeps it."""

    def keep(graph, _):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    return aot_autograd(fw_compiler=keep)


@each_backend
@pytest.mark.parametrize("wanted", [("h",), ("alpha",), ("h", "alpha")])
def test_frozen_weights_cost_nothing(backend, wanted):
    call, graphs = build(Case(alpha="published", norm=True)), []
    given = leaves(call, *wanted)
    cell = module_of(call).requires_grad_(False)
    compiled = torch.compile(cell, backend=keeping(graphs), fullgraph=True)
    with tarp_kernels.backend(backend):
        out = compiled(*({**call.tensors, **given}[name] for name in ("h", "alpha")))
        found = with_gradients(out, given, call.dout)
    ratios = excesses(found, *expected(Case(alpha="published", norm=True)))
    assert all(ratio <= 1 for ratio in ratios.values())
    _, backward = graphs
    (node,) = [n for n in backward.graph.nodes if n.target == OPS.search_cell_backward.default]
    assert list(node.args[-1]) == [name in wanted for name in ("h", "alpha", *CellWeights._fields[:-1])]


@each_backend
def test_weights_of_no_selected_operation_get_zeros(backend):
    """Which operations run is not known to the graph; an eager call leaves None."""
    call = build(Case(alpha="published"))
    cell, alpha = module_of(call), call.tensors["alpha"]
    with tarp_kernels.backend(backend):
        torch.compile(cell, backend="aot_eager", fullgraph=True)(call.tensors["h"], alpha).sum().backward()
    for name in ("linear", "linear_bias", "glu", "glu_bias"):
        assert torch.equal(cell.get_parameter(name).grad, torch.zeros_like(cell.get_parameter(name)))
    cell.zero_grad()
    with tarp_kernels.backend(backend):
        cell(call.tensors["h"], alpha).sum().backward()
    assert cell.linear.grad is None and cell.glu_bias.grad is None


@each_backend
def test_unselected_weights_may_hold_anything(backend):
    """Without alpha's gradient what nobody selected does not run, in backward either: its NaN goes nowhere."""
    case = Case(alpha="mixed")
    call = build(case)
    cell = module_of(call)
    with torch.no_grad():
        for name, m in (("linear", 2), ("glu", 3), ("conv3", 4), ("conv5", 5)):
            others = [edge for edge, own in enumerate(ALPHAS["mixed"]) if own != m]
            cell.get_parameter(name)[others] = float("nan")
    given = leaves(call, "h") | dict(cell.named_parameters())
    with tarp_kernels.backend(backend):
        out = torch.compile(cell, backend="aot_eager", fullgraph=True)(given["h"], call.tensors["alpha"])
        found = with_gradients(out, given, call.dout)
    assert all(ratio <= 1 for ratio in excesses(found, *expected(case)).values())


@each_backend
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (2, 0)])
def test_one_token_and_none(backend, shape):
    case = Case(batch=shape, norm=True)
    call = build(case)
    cell, given = module_of(call), leaves(call, "h", "alpha")
    with tarp_kernels.backend(backend):
        out = torch.compile(cell, backend="aot_eager", fullgraph=True)(given["h"], given["alpha"])
        check(with_gradients(out, given | dict(cell.named_parameters()), call.dout), case)


@each_backend
def test_bfloat16_with_float32_weights(backend):
    case = Case(dtype=torch.bfloat16, weights_dtype=torch.float32, norm=True, alpha="mixed")
    call = build(case)
    cell, given = module_of(call), leaves(call, "h", "alpha")
    with tarp_kernels.backend(backend):
        out = torch.compile(cell, backend="aot_eager", fullgraph=True)(given["h"], given["alpha"])
        found = with_gradients(out, given | dict(cell.named_parameters()), call.dout)
    assert {name: value.dtype for name, value in found.items()} == {
        "out": torch.bfloat16,
        **{name: tensor.dtype for name, tensor in call.tensors.items()},
    }
    check(found, case)


@each_backend
def test_inductor(backend):
    """Beside products of its own, which it may fuse and reorder around the operator."""
    case = Case(padding=PADDING, causal=False, alpha="published")
    call = build(case)
    cell, given = module_of(call), leaves(call, "h", "alpha")

    def run(h, alpha, mask):
        return cell(h * 2 - h, alpha * 1, mask).mul(3) / 3

    with tarp_kernels.backend(backend):
        out = torch.compile(run, fullgraph=True)(given["h"], given["alpha"], call.options["attention_mask"])
        found = with_gradients(out, given | dict(cell.named_parameters()), call.dout)
    for name, value in expected(case)[0].items():
        torch.testing.assert_close(found[name].double(), value, rtol=1e-4, atol=1e-4)


@each_backend
@pytest.mark.parametrize("norm", [False, True])
def test_export_with_a_dynamic_length(backend, norm):
    call = build(Case(norm=norm))
    cell, length = module_of(call), torch.export.Dim("length", min=2, max=512)
    alpha = one_hot(ALPHAS["mixed"]).float()
    with tarp_kernels.backend(backend):
        shapes = {"h": {1: length}, "alpha": None, "attention_mask": None, "segments": None}
        program = torch.export.export(cell, (call.tensors["h"], alpha, None, None), dynamic_shapes=shapes)
        graphs = [m.graph for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
        assert OPS.search_cell.default in [node.target for graph in graphs for node in graph.nodes]
        for tokens, name in ((2, "mixed"), (9, "published"), (40, "soft")):
            h = torch.randn(3, tokens, call.tensors["h"].shape[-1])
            alpha = torch.rand(9, 6) if name == "soft" else one_hot(ALPHAS[name]).float()
            assert torch.equal(program.module()(h, alpha, None, None), cell(h, alpha))


def test_triton_launches_of_a_compiled_graph():
    """The graph holds the two operators, and the launches inside are those of an eager call, whatever alpha is."""
    form = Case(d=8, width=6, batch=(2, 5), norm=True, causal=False, padding=(("left", 1), ("right", 2)))
    forms = [form.with_(dtype=torch.bfloat16, alpha=name) for name in ("published", "glu")]
    graphs: list[torch.fx.GraphModule] = []
    compiled = torch.compile(stack_of_cells, backend=keeping(graphs), fullgraph=True)
    for i, case in enumerate(forms):
        call = build(case)
        with on_ptx_machine(80) as eager:
            wanted = call.gradients("triton")
        given = leaves(call)
        tensors = {name: tensor for name, tensor in given.items() if name not in ("h", "alpha")}
        with on_ptx_machine(80) as reports, torch._dynamo.config.patch(error_on_recompile=i > 0):
            out = compiled(given["h"], given["alpha"], tensors, call.options, "triton")
            found = with_gradients(out, given, call.dout)
        assert all(torch.equal(value, wanted[name]) for name, value in found.items())
        forward, backward = (graph.graph.nodes for graph in graphs)
        assert [n.target for n in forward if n.op == "call_function"] == [OPS.search_cell.default]
        assert OPS.search_cell_backward.default in [n.target for n in backward]
        launches, alone = ([name for name, _ in each] for each in (reports, eager))
        assert launches == alone[:5] + alone, "forward runs once more in backward"
