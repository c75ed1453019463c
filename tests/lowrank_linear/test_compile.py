"""Under torch.compile with fullgraph: the same results, one graph for every number of rows and every scaling."""

from collections.abc import Sequence

import pytest
import torch
import torch._dynamo
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

from tarp_kernels import Generator, lowrank_linear
from tests.lowrank_linear.backends import each_backend
from tests.lowrank_linear.cases import Call, Case, basic_forms, build

ROWS = (2, 17, 130)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(backend: str, compiler, fullgraph: bool = True):
    """(x, tensors by name, scaling, segments, the rest of a call) -> y, compiled."""

    def run(x, tensors, scaling, segments, call):
        generator = None
        if "w1" in tensors:
            weights = (tensors.get(name) for name in ("w1", "b1", "w2", "b2"))
            generator = Generator(*weights, call["hidden"], call["activation"])
        return lowrank_linear(
            x,
            tensors["weight"],
            tensors.get("bias"),
            tensors["V"],
            tensors["U"],
            generator,
            sigma=call["sigma"],
            scaling=scaling,
            segments=segments,
            dropout=call["dropout"],
            backend=backend,
        )

    return torch.compile(run, backend=compiler, fullgraph=fullgraph, dynamic=True)


def arguments(call: Call, x: torch.Tensor, scaling: float, segments) -> tuple:
    tensors = {name: tensor for name, tensor in call.tensors.items() if name != "x"}
    hidden, activation = ("silu", "none") if call.generator is None else call.generator[4:]
    rest = {"hidden": hidden, "activation": activation, "sigma": call.sigma, "dropout": call.dropout}
    return x, tensors, scaling, segments, rest


def check(backend: str, case: Case, compiler, points: Sequence[tuple[int, float]], once: bool = True) -> None:
    """Values and gradients of compiled calls with these numbers of rows and scalings."""
    call, exact = build(case).leaves(), backend != "reference"
    run = compiled(backend, compiler)
    for i, (rows, scaling) in enumerate(points):
        x = torch.randn(rows, case.shape[1], requires_grad=True)
        segments = None
        if call.segments is not None:
            tasks = call.segments.shape[0] - 1
            segments = torch.tensor([0] * (tasks // 2) + [rows // 2] + [rows] * (tasks - tasks // 2))
        wanted = [t for name, t in call.tensors.items() if name != "x"] + [x]
        eager = call.with_tensors({"x": x})._replace(scaling=scaling, segments=segments).run(backend)
        with torch._dynamo.config.patch(error_on_recompile=once and i > 0):
            y = run(*arguments(call, x, scaling, segments))
        dy = torch.randn_like(y)
        expected = (eager, *torch.autograd.grad(eager, wanted, dy))
        for got, want in zip((y, *torch.autograd.grad(y, wanted, dy)), expected, strict=True):
            if exact:
                assert torch.equal(got, want)
            else:
                torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)


@each_backend
@pytest.mark.parametrize("case", [basic_forms()[i] for i in (0, 2, 3, 5)], ids=str)
def test_one_graph_equals_eager_for_all_numbers_of_rows(backend, case):
    check(backend, case, "aot_eager", [(rows, 1.5) for rows in ROWS])


@each_backend
def test_one_graph_serves_every_scaling(backend):
    check(backend, basic_forms()[1], "aot_eager", [(9, 0.5), (9, 1.5), (9, -3.0), (9, 0.125), (9, 2.0)])


@each_backend
def test_a_recompilation_would_be_seen(backend):
    with pytest.raises(torch._dynamo.exc.RecompileError):
        call = build(Case(shape=(9, 7, 5)))
        run = compiled(backend, "aot_eager")
        run(*arguments(call, call.x, 1.5, None))
        with torch._dynamo.config.patch(error_on_recompile=True):
            run(*arguments(build(Case(shape=(9, 7, 5), dtype=torch.bfloat16)), call.x.bfloat16(), 1.5, None))


@each_backend
def test_inductor(backend):
    check(backend, basic_forms()[2], "inductor", [(9, 1.5), (33, 1.5)])


@each_backend
@pytest.mark.parametrize("rows", [0, 1])
def test_none_and_one_row(backend, rows):
    """PyTorch compiles again for these two."""
    check(backend, basic_forms()[1], "aot_eager", [(rows, 1.5), (9, 1.5)], once=False)


@each_backend
def test_a_compiled_call_still_checks_segments_by_value(backend):
    case = Case(segments="ragged", shape=(0, 7, 5))
    call = build(case)
    run = compiled(backend, "aot_eager")
    wrong = call.segments.clone()
    wrong[2] = 25
    run(*arguments(call, call.x, 1.0, call.segments))
    with pytest.raises(ValueError, match="segments: falls from 25"):
        run(*arguments(call, call.x, 1.0, wrong))


@each_backend
@pytest.mark.parametrize("fullgraph", [False, True])
def test_a_compiled_call_still_checks_shapes(backend, fullgraph):
    """With fullgraph the compiler raises its own exception instead; without, the operator's comes through."""
    call = build(Case(shape=(4, 7, 5)))
    run = compiled(backend, "aot_eager", fullgraph)
    expected = torch._dynamo.exc.Unsupported if fullgraph else ValueError
    with pytest.raises(expected, match=None if fullgraph else "V: got shape"):
        run(*arguments(call._replace(V=call.V[:, :-1]), call.x, 1.0, None))


@each_backend
def test_bfloat16_with_a_float32_adapter(backend):
    call = build(Case(shape=(9, 33, 17), dtype=torch.bfloat16, adapter_dtype=torch.float32, generator="mlp")).leaves()
    run = compiled(backend, "aot_eager")
    y = run(*arguments(call, call.x, 1.5, None))
    assert torch.equal(y, call.run(backend))
    gradients = torch.autograd.grad(y.float().square().sum(), list(call.tensors.values()))
    assert [g.dtype for g in gradients] == [t.dtype for t in call.tensors.values()]


@each_backend
def test_a_frozen_weight_stays_frozen(backend):
    """The compiled backward asks for the adapter's gradients only."""
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph

    compiler = aot_autograd(
        fw_compiler=lambda graph, _: make_boxed_func(graph.forward),
        bw_compiler=lambda graph, _: make_boxed_func(keep(graph, _).forward),
    )
    case = Case(shape=(6, 7, 5))
    call = build(case).leaves(("V", "U", "w1"))
    y = compiled(backend, compiler)(*arguments(call, call.x, 1.0, None))
    gradients = torch.autograd.grad(y.sum(), [call.V, call.U, call.generator.w1])
    assert [g.shape for g in gradients] == [call.V.shape, call.U.shape, call.generator.w1.shape]
    (graph,) = graphs
    (node,) = [n for n in graph.graph.nodes if n.target == torch.ops.tarp_kernels.lowrank_linear_backward.default]
    needs = next(a for a in node.args if isinstance(a, list | tuple) and a and isinstance(a[0], bool))
    assert list(needs) == [False, False, False, True, True, True, *[False] * 5]
