"""Search cells on a device that notices who waits for it, started by test_no_waiting.py; Triton's are interpreted."""

import pytest
import torch

from tarp_kernels import CellWeights, SearchCell, architecture, backends, tarp_parameters, task_parallel
from tarp_kernels.nn.task_parallel import Offsets
from tarp_kernels.ops import constants
from tarp_kernels.ops.lowrank_linear import autograd as lowrank_linear
from tarp_kernels.ops.lowrank_linear import cuda_gradients, triton_products
from tarp_kernels.ops.search_cell import autograd as search_cell
from tarp_kernels.ops.search_cell import cuda_kernels, search_cell_with_layouts
from tarp_kernels.ops.search_cell.layout import Layouts
from tests.models.cell_models import MIXED, PUBLISHED, cell_model, one_hot
from tests.models.test_training import NO_DROPOUT
from tests.models.tiny import inputs
from tests.pretend_gpu import GPU, OnGpu, pretending, to_gpu
from tests.search_cell.cases import Case, build


@pytest.fixture(autouse=True)
def on_the_pretended_gpu(monkeypatch):
    """Triton's kernels run in the interpreter, the CUDA kernels not at all: what matters is who calls them."""
    launch = triton_products.launch

    def launch_inside(kernel, grid, *arguments, **options):
        launch(kernel, grid, *(one.inside if isinstance(one, OnGpu) else one for one in arguments), **options)

    monkeypatch.setattr(triton_products, "launch", launch_inside)
    monkeypatch.setattr(cuda_kernels, "launch", lambda *arguments: None)
    for name in ("launch_tall", "launch_add_parts"):
        monkeypatch.setattr(cuda_gradients, name, lambda *arguments: None)
    monkeypatch.setattr(backends, "choose", lambda requested, *_: requested or "reference")
    for module in (search_cell, lowrank_linear):
        monkeypatch.setattr(module, "needs_dispatcher", lambda x: False)  # no operator may hide what happens inside
    monkeypatch.setattr(constants, "_held", {})


TASKS = Case(d=16, width=8, batch=(3, 5), tasks=(5, 10), alpha="mixed", norm=True)
CASES = [
    TASKS,
    TASKS.with_(padding=(("left", 2), ("right", 1), ("left", 0))),
    TASKS.with_(padding=(("left", 2), ("right", 1), ("left", 0)), per_task_alpha=False, causal=False),
    TASKS.with_(padding=(("left", 0),) * 3, per_task_weights=False, alpha="published"),
    TASKS.with_(tasks=None),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", ["triton", "cuda", "reference", "second order"])
def test_a_second_call_neither_waits_nor_copies(backend, case):
    """One alpha on the host serves both, by its values."""
    twice, call = backend == "second order", build(case if backend != "cuda" else case.with_(dtype=torch.float16))
    backend = "triton" if twice else backend
    mask, segments = call.options.get("attention_mask"), call.options.get("segments")
    results, layouts = [], Layouts()
    with pretending() as crossings:
        alpha = call.tensors.pop("alpha")
        tensors = {name: OnGpu(tensor).requires_grad_() for name, tensor in call.tensors.items()}
        mask, dout = None if mask is None else OnGpu(mask), OnGpu(call.dout)
        weights = CellWeights(**{name: tensor for name, tensor in tensors.items() if name != "h"})
        for attempt in range(2):
            crossings.clear()
            out = search_cell_with_layouts(
                layouts, tensors["h"], weights, alpha.clone(), case.causal, mask, None, segments, backend
            )
            found = torch.autograd.grad(out, list(tensors.values()), dout, create_graph=twice, allow_unused=True)
            if twice:
                found = torch.autograd.grad(found[0].sin().sum(), list(tensors.values()), allow_unused=True)
            assert bool(crossings) == (attempt == 0), crossings
            results.append([out.inside, *(None if one is None else one.inside for one in found)])
    if backend != "cuda":
        for one, other in zip(*results, strict=True):
            assert one is other is None or torch.equal(one, other)
        assert torch.allclose(results[0][0], call.run("reference", alpha=alpha), atol=1e-4)
        assert not torch.allclose(results[0][0], call.tensors["h"], atol=1e-2)


def test_a_full_alpha_is_made_beside_alpha():
    cell = SearchCell(16, 8, operations=("identity", "conv3", "conv5"))
    with pretending() as crossings:
        full = cell.full_alpha(OnGpu(torch.ones(9, 3)))
    assert full.inside[4].tolist() == [0, 1, 0, 0, 1, 1] and not crossings


def test_a_second_step_of_a_model_neither_waits_nor_copies(monkeypatch):
    """transformers looks whether the mask masks anything, except while a CUDA graph is captured."""
    plain = cell_model("gpt2", changes=NO_DROPOUT["gpt2"])
    stack = {name: torch.stack([p.detach()] * 2) for name, p in tarp_parameters(plain).items()}
    batch, alpha = inputs("gpt2", 3, length=5), torch.stack([one_hot(PUBLISHED), one_hot(MIXED)])
    batch.pop("labels")
    batch["attention_mask"][1, -2:] = 0
    segments = torch.tensor([0, 1, 3])

    def step(model, stack, batch, offsets, alpha=alpha):
        with task_parallel(model, stack, offsets), architecture(model, alpha):
            out = model(**batch, use_cache=False).logits
            return out, *torch.autograd.grad(out.square().mean(), list(stack.values()))

    wanted = step(plain, {name: tensor.requires_grad_() for name, tensor in stack.items()}, batch, segments)
    other = step(plain, stack, batch, segments, alpha.flip(0))
    model, offsets = to_gpu(plain), Offsets(segments)
    monkeypatch.setattr(backends, "choose", lambda *_: "triton")
    with pretending() as crossings:
        there = {name: OnGpu(tensor.detach()).requires_grad_() for name, tensor in stack.items()}
        batch = {name: OnGpu(tensor) for name, tensor in batch.items()}
        first = step(model, there, batch, offsets)
        assert "constants.py" in {file for _, file in crossings}
        looks = [what for what, file in crossings if file == "layout.py" and "_local_scalar_dense" in what]
        assert len(looks) == 1, "one look serves all layers"
        crossings.clear()
        second = step(model, there, batch, offsets)
        assert {file for _, file in crossings} <= {"masking_utils.py"}
    for one, again, right in zip(first, second, wanted, strict=True):
        assert torch.equal(one.inside, again.inside)
        torch.testing.assert_close(one.inside, right, rtol=1e-3, atol=1e-4)
    assert (other[0] - wanted[0]).abs().max() > 1e-2, "another task's architecture would go unnoticed"


@pytest.mark.parametrize(
    ("asks", "name"),
    [
        (lambda x: x.tolist(), "tolist"),
        (lambda x: bool((x > 0).any()), "_local_scalar_dense"),
        (lambda x: x[x > 0], "index"),
        (lambda x: x.nonzero(), "nonzero"),
        (lambda x: x.cpu(), "_to_copy"),
        (lambda x: torch.ones(2).to(x.device), "_to_copy"),
        (lambda x: torch.tensor([1, 2], device=x.device), "_to_copy"),
        (lambda x: x[torch.tensor([0])], "index"),
        (lambda x: x.copy_(torch.ones(2)), "copy_"),
    ],
)
def test_the_device_notices(asks, name):
    with pretending() as crossings:
        x = OnGpu(torch.ones(2))
        ((x + 1) * torch.zeros(2, device=GPU)).mul_(x.new_ones(())).masked_fill(x > 0, 1.0)
        assert not crossings
        asks(x)
    assert [what.partition(".")[0] for what, _ in crossings][-1:] == [name]
