"""`hadamard_linear` in Triton without a GPU: logic interpreted, PTX executed, binaries inspected."""

import re
from pathlib import Path
from unittest import mock

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

from tarp_kernels.ops.hadamard_linear import triton_kernels
from tests import interpreting
from tests.hadamard_linear.cases import Case, build, evaluate, excesses
from tests.hadamard_linear.test_derivatives import allocations, second_order
from tests.hadamard_linear.test_values import mistakes_that_pass
from tests.lowrank_linear.test_triton import compiled_launches_on_ptx_machine
from tests.lowrank_linear.triton_runs import compiling, on_ptx_machine

BF16 = Case(dtype=torch.bfloat16, shape=(37, 72, 50))
FORMS = [
    BF16,
    BF16.with_(segments=(0, 1, 19, 0, 17), activation="softplus", adapter_dtype=torch.float32, x_layout="padded"),
    BF16.with_(blocks=3, factor_rank=21, rank=0, activation="one_plus", weight_layout="conv1d", bias=False),
    BF16.with_(blocks=2, shape=(0, 70, 75), segments=(15, 4), dropout=0.3, weight_layout="slice"),
]
ARCHITECTURES = (80, 90)


def test_in_the_interpreter():
    done = interpreting.run(Path(__file__).with_name("interpreted.py"))
    assert done.returncode == 0 and int(re.findall(r"(\d+) passed", done.stdout)[0]) >= 45, done.stdout[-4000:]


@pytest.mark.parametrize("most_blocks", [1, 256])
@pytest.mark.parametrize("cc", ARCHITECTURES)
@pytest.mark.parametrize("case", FORMS, ids=str)
def test_ptx_computes_values_and_gradients_without_a_fault(cc, case, most_blocks):
    call = build(case)
    with on_ptx_machine(cc) as reports, mock.patch.object(triton_kernels, "MOST_BLOCKS", most_blocks):
        found = call.gradients("triton")
    wrong = {name: ratio for name, ratio in excesses(found, call, tensor_cores=True).items() if not ratio <= 1}
    assert wrong == {}
    ran = [name for name, _ in reports]
    assert ran.count("weighed_dense_kernel") == 2 and "dense_kernel" not in ran, "both halves share a launch"
    assert ran.count("factor_gradients_kernel") == len(case.segments or (0,))
    assert all(report.atomics == 0 for _, report in reports)


@pytest.mark.parametrize("case", FORMS, ids=str)
def test_the_tolerances_see_every_mistake(case):
    assert mistakes_that_pass(case, tensor_cores=True) == []


@pytest.mark.parametrize("cc", [80, 90, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_binaries_spill_nothing_and_use_tensor_cores(cc, dtype):
    for rows, case in (
        (16, Case(shape=(16, 256, 192), factor_rank=8)),
        (64, Case(shape=(0, 250, 190), factor_rank=40, segments=(57, 7), blocks=2, weight_layout="conv1d")),
        (256, Case(shape=(256, 256, 192), factor_rank=16, dropout=0.3)),
    ):
        with compiling(cc) as kernels:
            build(case.with_(dtype=dtype)).gradients("triton")
        own = [kernel for kernel in kernels if kernel.name in ("weighed_dense_kernel", "factor_gradients_kernel")]
        assert len(own) >= 3
        for kernel in own:
            assert kernel.stack_bytes == 0 and kernel.registers <= 255, (rows, kernel[2:])
            assert kernel.shared_bytes <= 163 * 1024
            if dtype == torch.bfloat16:
                assert kernel.count(r"mma\.sync|wgmma\.mma_async|tcgen05\.mma"), kernel.name


def test_the_number_of_rows_tasks_and_the_scaling_compile_nothing_anew():
    sources = set()
    for segments in ((20, 17), (1, 40, 3, 0, 15), (64,), (1,) * 31):
        with compiling(80) as kernels:
            call = build(BF16.with_(segments=segments))
            call._replace(options=call.options | {"scaling": float(len(segments))}).gradients("triton")
        sources.add(frozenset(kernel.ptx for kernel in kernels))
    assert len(sources) == 1


def test_nothing_of_the_weights_size_is_allocated():
    call = build(Case(shape=(64, 4096, 2048), factor_rank=8, rank=4, dtype=torch.bfloat16))
    names, W = ("x", "P", "Q", "V", "U", "w1"), 4096 * 2048 * 2
    with compiling(80):
        assert allocations(lambda: call.run("triton")) <= W // 20
        assert allocations(lambda: call.gradients("triton", names)) <= W // 4  # parts of P's and Q's sums, in float32
        assert allocations(lambda: call.gradients("triton")) >= W, "the profiler does not see what it looks for"


def test_a_compiler_sees_the_launches():
    torch._dynamo.reset()
    call = build(FORMS[1])
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return make_boxed_func(graph)

    leaves = {name: tensor.detach().requires_grad_() for name, tensor in call.tensors.items()}
    with compiled_launches_on_ptx_machine() as ran:
        compiled = torch.compile(
            lambda tensors: call.run("triton", **tensors), backend=aot_autograd(fw_compiler=keep), fullgraph=True
        )
        y = compiled(leaves)
        found = dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), call.dy), strict=True))
    wrong = {n: r for n, r in excesses({"y": y.detach()} | found, call, tensor_cores=True).items() if not r <= 1}
    assert wrong == {} and len(graphs) == 2
    assert {"weighed_dense_kernel", "factor_gradients_kernel"} <= set(ran)
    torch._dynamo.reset()


def test_second_order_gradients():
    call = build(BF16.with_(shape=(0, 24, 20), segments=(5, 12), dtype=torch.float32))
    exact = call.double()
    wanted = second_order(exact, lambda leaves: evaluate(exact._replace(tensors=leaves)))
    with on_ptx_machine(80):
        found = second_order(call, lambda leaves: call.run("triton", **leaves))
    for got, want in zip(found, wanted, strict=True):
        assert (got - want).norm() <= 3e-4 * want.norm() and want.norm() > 0
