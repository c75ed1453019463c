"""Only what is asked for is computed and kept: gradients, what autograd saves, nothing at all for a frozen weight."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from tests.lowrank_linear.backends import each_backend, each_fast_backend
from tests.lowrank_linear.cases import NAMES, Call, Case, basic_forms, build, cotangent, run_with_gradients
from tests.lowrank_linear.oracle import bounds, excess

FULL = Case(generator="mlp", b1=True, b2=True, shape=(19, 23, 29), rank=5, hidden=7, dropout=0.3)
FORMS = [
    FULL,
    FULL.with_(sigma="full"),
    FULL.with_(segments="ragged"),
    FULL.with_(generator="linear", dtype=torch.bfloat16),
]


@each_backend
@pytest.mark.parametrize("case", FORMS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_one_gradient_alone(backend, case, name):
    call, dy = build(case), cotangent(case)
    if name not in call.tensors:
        pytest.skip(f"this form has no {name}")
    wanted = bounds(call, dy)[name]
    call = call.leaves((name,))
    y = call.run(backend)
    y.backward(dy)
    assert excess(call.tensors[name].grad, wanted) <= 1
    assert [other for other, tensor in call.tensors.items() if tensor.grad is not None] == [name]


@each_backend
@pytest.mark.parametrize("case", FORMS, ids=str)
@pytest.mark.parametrize("frozen", NAMES)
def test_all_gradients_but_one(backend, case, frozen):
    """And they are the bits of all gradients together, because each is computed by itself."""
    call, dy = build(case), cotangent(case)
    together = run_with_gradients(call, dy, backend)
    names = tuple(name for name in NAMES if name != frozen)
    found = run_with_gradients(call, dy, backend, names)
    assert found.keys() == together.keys() - {frozen}
    for name, value in found.items():
        assert torch.equal(value, together[name]), name


@each_backend
def test_nothing_asked_for(backend):
    y = build(FULL).run(backend)
    assert not y.requires_grad and y.grad_fn is None


@each_backend
@pytest.mark.parametrize("case", basic_forms(), ids=str)
def test_gradients_accumulate(backend, case):
    call = build(case).leaves()
    dy = cotangent(case.with_(x_layout="contiguous")).reshape(*call.x.shape[:-1], case.shape[2])
    wanted = run_with_gradients(call, dy, backend)
    for _ in range(2):
        call.run(backend).backward(dy)
    for name, tensor in call.tensors.items():
        torch.testing.assert_close(tensor.grad, 2 * wanted[name])


@each_backend
def test_a_cotangent_without_memory_of_its_own(backend):
    """y.sum() sends back a single 1 with strides 0."""
    case = FULL.with_(shape=(19, 23, 29))
    call = build(case).leaves()
    wanted = run_with_gradients(call, torch.ones(19, 29), backend)
    found = torch.autograd.grad(call.run(backend).sum(), list(call.tensors.values()))
    for name, gradient in zip(call.tensors, found, strict=True):
        torch.testing.assert_close(gradient, wanted[name])


# --- what autograd keeps ----------------------------------------------------------------------------------------------


def kept_beyond_operands(call: Call, backend: str) -> int:
    """Numbers that the graph of one forward pass keeps alive, besides the arguments themselves."""
    own = {tensor.untyped_storage().data_ptr() for tensor in call.tensors.values()}
    found: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage().data_ptr()
        if storage not in own and tensor.is_floating_point():
            found[storage] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        call.run(backend)
    return sum(found.values())


@each_fast_backend
@pytest.mark.parametrize("generator", ["none", "linear", "mlp"])
@pytest.mark.parametrize("sigma", ["diag", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_keeps_the_middle_only(backend, generator, sigma, dtype):
    """h, s and an MLP's hidden layer: 2 r numbers a row, r + r² for a full Σ, m more for an MLP."""
    case = Case(generator=generator, sigma=sigma, shape=(50, 60, 70), rank=4, hidden=6, dtype=dtype)
    outputs = 0 if generator == "none" else 4 if sigma == "diag" else 16
    promised = 50 * (4 + outputs + (6 if generator == "mlp" else 0))
    assert kept_beyond_operands(build(case).leaves(), backend) <= promised


@each_fast_backend
def test_the_adapter_is_not_copied_for_backward(backend):
    case = Case(shape=(50, 60, 70), rank=4, adapter_layout="transposed", adapter_dtype=torch.bfloat16).with_(
        dtype=torch.bfloat16
    )
    assert kept_beyond_operands(build(case).leaves(), backend) <= 50 * 8


# --- what runs --------------------------------------------------------------------------------------------------------


def products(run) -> list[tuple[int, ...]]:
    """Shapes of the results of all matrix products that PyTorch runs."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as record:
        run()
    found = []
    for event in record.events():
        if event.name in ("aten::mm", "aten::addmm"):
            a, b = [shape for shape in event.input_shapes if len(shape) == 2][-2:]
            found.append((a[0], b[1]))
    return found


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_frozen_weight_costs_nothing(backend, dtype):
    case = Case(shape=(19, 23, 29), rank=5, dtype=dtype)
    dy = cotangent(case)
    dense = {(29, 23), (23, 29)}
    frozen = build(case).leaves(("x", "V", "U", "w1"))
    frozen_y = frozen.run(backend)
    assert not dense & set(products(lambda: frozen_y.backward(dy)))
    assert frozen.weight.grad is None and frozen.bias.grad is None
    trained = build(case).leaves()
    trained_y = trained.run(backend)
    assert dense & set(products(lambda: trained_y.backward(dy))), "the profiler does not see the product it looks for"


@each_fast_backend
def test_a_frozen_input_costs_no_dense_product(backend):
    """The first layer's input asks for no gradient: its kernel must not be asked for one."""
    from tarp_kernels import _C

    asked = []
    backward = _C.lowrank_linear_backward

    def spy(*arguments):
        asked.append(arguments)
        return backward(*arguments)

    case = Case(shape=(19, 23, 29), rank=5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_C, "lowrank_linear_backward", spy)
        run_with_gradients(build(case), cotangent(case), backend, ("V", "U", "w1"))
        run_with_gradients(build(case), cotangent(case), backend, ("x", "V", "U", "w1"))
        run_with_gradients(build(case), cotangent(case), backend, ("weight", "bias"))
    assert len(asked) == 2, "a trained weight alone needs no low-rank backward"
    without_x, with_x = (sum(argument == 0 for argument in call if type(argument) is int) for call in asked)
    assert without_x == with_x + 1  # the null pointer of dx
