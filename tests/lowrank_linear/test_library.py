"""The registered operators: schemas, fake kernels, autograd registration, meta tensors, export."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from tests.lowrank_linear.backends import each_backend
from tests.lowrank_linear.cases import NAMES, Call, Case, basic_forms, build, run_with_gradients

OPS = torch.ops.tarp_kernels


def forward_arguments(call: Call, backend: str) -> tuple:
    """A call as the registered operator takes it: rows, then every tensor and option by itself."""
    tensors = [call.tensors.get(name) for name in NAMES]
    tensors[0] = call.x.reshape(-1, call.x.shape[-1])
    hidden, output = ("silu", "none") if call.generator is None else call.generator[4:]
    p, seed = call.dropout or (0.0, 0)
    (declared,) = [a for a in OPS.lowrank_linear.default._schema.arguments if a.name == "scaling"]
    scaling = torch.tensor(call.scaling, dtype=torch.float64) if str(declared.type) == "Tensor" else call.scaling
    factor = (None, None)  # of hadamard_linear, which has tests of its own
    return (*tensors, *factor, call.segments, call.sigma, hidden, output, "one_plus", scaling, p, seed, backend)


def backward_arguments(call: Call, dy: Tensor, needs: list[bool], backend: str) -> tuple:
    arguments = forward_arguments(call, backend)
    with torch.no_grad():
        _, *saved = OPS.lowrank_linear(*arguments)
    return (dy, *arguments[:12], *saved, [*needs, False, False], *arguments[12:])


def op_forms() -> list[Case]:
    return [case.with_(x_layout="padded", weight_layout="conv1d") for case in basic_forms()]


@each_backend
@pytest.mark.parametrize("case", op_forms(), ids=str)
def test_opcheck_of_the_forward_operator(backend, case):
    opcheck(OPS.lowrank_linear.default, forward_arguments(build(case).leaves(), backend))


@each_backend
@pytest.mark.parametrize("case", op_forms(), ids=str)
@pytest.mark.parametrize("needed", ["all", "adapter"])
def test_opcheck_of_the_backward_operator(backend, case, needed):
    call = build(case).leaves()
    names = NAMES if needed == "all" else ("x", "V", "U", "w1", "b1", "w2", "b2")
    needs = [name in call.tensors and name in names for name in NAMES]
    dy = torch.randn(case.rows, case.shape[2], requires_grad=True)
    # AOT tracing of a list output under double backward is what test_second_order and the compile tests run.
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    opcheck(OPS.lowrank_linear_backward.default, backward_arguments(call, dy, needs, backend), test_utils=utils)


@each_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_opcheck_in_every_dtype_and_without_rows(backend, dtype):
    for case in (
        Case(shape=(0, 5, 3)),
        Case(shape=(1, 5, 3), generator="mlp"),
        Case(shape=(0, 5, 3), segments="empty"),
    ):
        call = build(case.with_(dtype=dtype, adapter_dtype=torch.float32))
        opcheck(
            OPS.lowrank_linear.default, forward_arguments(call, backend), test_utils=("test_schema", "test_faketensor")
        )


@each_backend
@pytest.mark.parametrize("case", op_forms(), ids=str)
def test_the_operators_give_the_bits_of_the_function(backend, case):
    call = build(case)
    dy = torch.randn(case.rows, case.shape[2])
    expected = run_with_gradients(call, dy, backend)
    y = OPS.lowrank_linear(*forward_arguments(call, backend))[0]
    assert torch.equal(y, expected["y"])
    needs = [name in call.tensors for name in NAMES]
    gradients = OPS.lowrank_linear_backward(*backward_arguments(call, dy, needs, backend))
    for name, found in zip(call.tensors, gradients, strict=True):
        if backend == "reference":  # written out there, derived by autograd in eager calls
            torch.testing.assert_close(found, expected[name], rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(found, expected[name]), name


@each_backend
def test_the_forward_operator_checks_segments_by_value(backend):
    call = build(Case(segments="ragged", shape=(0, 5, 3)))
    wrong = call._replace(segments=call.segments.clone().index_fill_(0, torch.tensor([3]), 99))
    with pytest.raises(ValueError, match=r"segments: falls from 99"):
        OPS.lowrank_linear(*forward_arguments(wrong, backend))


@each_backend
@pytest.mark.parametrize("case", op_forms(), ids=str)
def test_fake_tensors_have_the_shapes_dtypes_and_devices_of_real_ones(backend, case):
    call = build(case.with_(dtype=torch.bfloat16, adapter_dtype=torch.float32))
    real = call.run(backend)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = call.map(mode.from_tensor)
        fake = fake if call.segments is None else fake._replace(segments=mode.from_tensor(call.segments))
        y = fake.leaves().run(backend)
        gradients = torch.autograd.grad(y.float().sum(), list(fake.leaves().tensors.values()), allow_unused=True)
    assert (y.shape, y.dtype, y.device) == (real.shape, real.dtype, real.device)
    assert len(gradients) == len(call.tensors)


@each_backend
@pytest.mark.parametrize("case", op_forms(), ids=str)
def test_gradients_of_fake_tensors(backend, case):
    call = build(case.with_(dtype=torch.bfloat16, adapter_dtype=torch.float32))
    with FakeTensorMode() as mode:
        fake = call.map(mode.from_tensor)
        fake = fake if call.segments is None else fake._replace(segments=mode.from_tensor(call.segments))
        fake = fake.leaves()
        y = fake.run(backend)
        gradients = torch.autograd.grad(y, list(fake.tensors.values()), torch.ones_like(y))
    for (name, tensor), gradient in zip(call.tensors.items(), gradients, strict=True):
        assert (gradient.shape, gradient.dtype) == (tensor.shape, tensor.dtype), name


@pytest.mark.parametrize("case", op_forms(), ids=str)
def test_meta_tensors(case):
    call = build(case)
    meta = call.map(lambda tensor: tensor.to("meta"))
    meta = (meta if call.segments is None else meta._replace(segments=call.segments.to("meta"))).leaves()
    y = meta.run()
    assert y.is_meta and y.shape == (*call.x.shape[:-1], case.shape[2]) and y.dtype == call.x.dtype
    y.sum().backward()
    assert all(tensor.grad.is_meta and tensor.grad.shape == tensor.shape for tensor in meta.tensors.values())


class Layer(torch.nn.Module):
    def __init__(self, call: Call, backend: str):
        super().__init__()
        for name, tensor in call.tensors.items():
            if name != "x":
                self.register_parameter(name, torch.nn.Parameter(tensor.contiguous()))
        self.call, self.backend = call, backend

    def forward(self, x: Tensor) -> Tensor:
        return self.call.with_tensors({**dict(self.named_parameters()), "x": x}).run(self.backend)


@each_backend
@pytest.mark.parametrize("case", basic_forms()[:5], ids=str)
def test_export_with_a_dynamic_number_of_rows(backend, case):
    layer = Layer(build(case), backend)
    rows = torch.export.Dim("rows", min=2, max=4096)
    program = torch.export.export(layer, (torch.randn(6, case.shape[1]),), dynamic_shapes={"x": {0: rows}})
    targets = [node.target for node in program.graph.nodes]
    assert OPS.lowrank_linear.default in targets
    for count in (2, 9, 40):
        x = torch.randn(count, case.shape[1])
        assert torch.equal(program.module()(x), layer(x))
