"""`task_parallel`: every task its own adapter, errors before anything is set, and nothing left behind."""

import threading

import pytest
import torch
from torch import nn

from tarp_kernels import TarpConfig, TarpLinear, apply_tarp, disable_tarp, tarp_parameters, task_parallel

WIDTHS = (6, 10, 4)


def model(**config) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(WIDTHS[0], WIDTHS[1]), nn.Tanh(), nn.Linear(WIDTHS[1], WIDTHS[2]))
    return apply_tarp(layers.double(), TarpConfig(r=3, target_modules="all-linear", **config))


def stacked(adapted, tasks: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    parameters = tarp_parameters(adapted)
    return {
        name: torch.randn(tasks, *parameter.shape, dtype=torch.float64).mul_(0.5).requires_grad_()
        for name, parameter in parameters.items()
    }


def alone(adapted, stack, task: int, x):
    """The same rows through the same model with one task's adapter as its own parameters."""
    return torch.func.functional_call(adapted, {name: tensor[task] for name, tensor in stack.items()}, (x,))


FORMS = [
    {},
    {"sigma": "full"},
    {"generator": "mlp", "generator_bias": True, "generator_hidden": 4},
    {"kind": "bilinear"},
    {"sigma": "full", "generator": "mlp", "activation": "tanh"},
    {"multiplicative": "dynamic", "sigma": "full", "generator": "mlp", "generator_bias": True},
    {"multiplicative": "dynamic", "kind": "bilinear", "additive": False},
    {"multiplicative": "static", "product": "matmul"},
    {"multiplicative": "static", "product": "matmul", "additive": False},
    {"multiplicative": "static", "product": "matmul", "kind": "kronecker", "kronecker_terms": 2},
]


@pytest.mark.parametrize("config", FORMS, ids=str)
@pytest.mark.parametrize("middle", [(), (5,), (2, 3)])
@pytest.mark.parametrize("offsets", [[0, 2, 3, 6], [0, 0, 6, 6], [0, 6]])
def test_equals_one_task_after_the_other(offsets, middle, config):
    adapted, tasks = model(**config), len(offsets) - 1
    stack, x = stacked(adapted, tasks), torch.randn(6, *middle, WIDTHS[0], dtype=torch.float64)
    with task_parallel(adapted, stack, torch.tensor(offsets)):
        together = adapted(x)
        found = torch.autograd.grad(together.square().sum(), list(stack.values()))
    pieces = [alone(adapted, stack, task, x[offsets[task] : offsets[task + 1]]) for task in range(tasks)]
    expected = torch.cat(pieces)
    torch.testing.assert_close(together, expected, rtol=1e-10, atol=1e-10)
    wanted = torch.autograd.grad(expected.square().sum(), list(stack.values()))
    for gradient, one in zip(found, wanted, strict=True):
        torch.testing.assert_close(gradient, one, rtol=1e-9, atol=1e-9)
        assert one.any()
    if tasks == 3 and offsets[1]:
        swapped = torch.cat([alone(adapted, stack, 0, x[:3]), *pieces[1:]])[:6]
        assert (swapped - expected).abs().amax() > 1e-2, "rows of another task would go unnoticed"


def test_second_order_flows_through_the_stacks():
    adapted = model()
    stack, x = stacked(adapted, 2), torch.randn(4, WIDTHS[0], dtype=torch.float64)
    offsets = torch.tensor([0, 1, 4])

    def query(start):
        with task_parallel(adapted, start, offsets):
            support = adapted(x).square().sum()
            step = torch.autograd.grad(support, list(start.values()), create_graph=True)
        moved = {name: tensor - 0.01 * g for (name, tensor), g in zip(start.items(), step, strict=True)}
        with task_parallel(adapted, moved, offsets):
            return adapted(x).sin().sum()

    names = list(stack)
    found = torch.autograd.grad(query(stack), list(stack.values()))
    torch.manual_seed(2)
    for name, gradient in zip(names, found, strict=True):
        direction, size = torch.randn_like(gradient), 1e-5
        with torch.no_grad():
            ends = [dict(stack) | {name: stack[name] + sign * size * direction} for sign in (1, -1)]
        ends = [{key: tensor.detach().requires_grad_() for key, tensor in end.items()} for end in ends]
        slope = (query(ends[0]) - query(ends[1])) / (2 * size)
        torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-5, atol=1e-8)


def test_the_models_own_parameters_get_no_gradient_and_come_back():
    adapted = model()
    x, own = torch.randn(4, WIDTHS[0], dtype=torch.float64), None
    own = adapted(x).detach()
    with task_parallel(adapted, stacked(adapted, 2), torch.tensor([0, 2, 4])):
        inside = adapted(x)
        inside.sum().backward()
    assert all(parameter.grad is None for parameter in adapted.parameters())
    assert torch.equal(adapted(x), own) and not torch.allclose(inside, own)


def test_state_is_seen_by_other_threads():
    """Autograd's own threads recompute under checkpointing; a context variable would be empty there."""
    adapted = model()
    stack, x, seen = stacked(adapted, 2), torch.randn(4, WIDTHS[0], dtype=torch.float64), []
    with task_parallel(adapted, stack, torch.tensor([0, 2, 4])):
        expected = adapted(x)
        thread = threading.Thread(target=lambda: seen.append(adapted(x)))
        thread.start()
        thread.join()
    assert torch.equal(seen[0], expected)


def test_switched_off_inside_a_block():
    adapted = model()
    x = torch.randn(4, WIDTHS[0], dtype=torch.float64)
    with disable_tarp(adapted):
        base = adapted(x)
    with task_parallel(adapted, stacked(adapted, 2), torch.tensor([0, 2, 4])), disable_tarp(adapted):
        assert torch.equal(adapted(x), base)


def test_a_single_layer():
    layer = TarpLinear.from_linear(nn.Linear(3, 2).double(), TarpConfig(r=2))
    stack = {name: torch.randn(2, *p.shape, dtype=torch.float64) for name, p in tarp_parameters(layer).items()}
    x = torch.randn(4, 3, dtype=torch.float64)
    with task_parallel(layer, stack, torch.tensor([0, 3, 4])):
        together = layer(x)
    torch.testing.assert_close(together, torch.cat([alone(layer, stack, 0, x[:3]), alone(layer, stack, 1, x[3:])]))


def clean(adapted) -> bool:
    return all(module.stacked is None for module in adapted.modules() if isinstance(module, TarpLinear))


@pytest.mark.parametrize(
    "offsets",
    [
        [0, 2, 4],
        torch.tensor([0, 2, 4], dtype=torch.int32),
        torch.tensor([0.0, 2.0, 4.0]),
        torch.tensor([[0, 2, 4]]),
        torch.tensor([0]),
    ],
)
def test_bad_offsets(offsets):
    adapted = model()
    with pytest.raises(ValueError, match="offsets"), task_parallel(adapted, stacked(adapted, 2), offsets):
        pass
    assert clean(adapted)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda stack: stack.pop("2.U"), r"parameters\['2.U'\]: got nothing"),
        (lambda stack: stack.update({"2.U": stack["2.U"][0]}), r"parameters\['2.U'\]: got shape \[4, 3\]"),
        (lambda stack: stack.update({"0.V": stack["0.V"][:1]}), r"expected shape \[2, 3, 6\]"),
        (lambda stack: stack.update({"1.V": stack["0.V"]}), r"parameters\['1.V'\]: belongs to no adapter"),
    ],
)
def test_bad_parameters(change, words):
    adapted = model()
    stack = stacked(adapted, 2)
    change(stack)
    with pytest.raises(ValueError, match=words), task_parallel(adapted, stack, torch.tensor([0, 2, 4])):
        pass
    assert clean(adapted)


def with_norms() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 4), nn.RMSNorm(4, eps=1e-3), nn.LayerNorm((3, 4), bias=False)
    )
    return apply_tarp(layers.double(), TarpConfig(r=2, target_modules="all-linear", train_layernorm=True))


def test_pytorchs_own_norms_differ_by_task_in_second_order_too():
    adapted, offsets = with_norms(), [0, 2, 2, 5]
    stack, x = stacked(adapted, 3), torch.randn(5, 3, 6, dtype=torch.float64)
    assert {"1.weight", "1.bias", "3.weight", "4.weight"} < set(stack)

    def derivatives(y):
        first = torch.autograd.grad(y.square().sum(), list(stack.values()), create_graph=True)
        return first, torch.autograd.grad(sum(g.sin().sum() for g in first), list(stack.values()))

    before = [dict(vars(module)) for module in adapted]
    with task_parallel(adapted, stack, torch.tensor(offsets)):
        together = adapted(x)
        found = derivatives(together)
    assert [vars(module).keys() for module in adapted] == [one.keys() for one in before], "forward stays replaced"
    wanted = torch.cat([alone(adapted, stack, i, x[offsets[i] : offsets[i + 1]]) for i in range(3)])
    torch.testing.assert_close(together, wanted, rtol=1e-10, atol=1e-10)
    for got, want in zip((*found[0], *found[1]), sum(derivatives(wanted), ()), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-9)
    for name in ("1.weight", "1.bias", "3.weight", "4.weight"):
        swapped = stack | {name: stack[name].flip(0)}
        with task_parallel(adapted, swapped, torch.tensor(offsets)):
            assert (adapted(x) - wanted).abs().max() > 1e-2, f"another task's {name} would go unnoticed"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_keep_half_precision(dtype):
    adapted = with_norms().to(dtype)
    stack = {name: p.detach()[None].expand(2, *p.shape) for name, p in tarp_parameters(adapted).items()}
    x = torch.randn(4, 3, 6).to(dtype)
    with torch.no_grad(), task_parallel(adapted, stack, torch.tensor([0, 1, 4])):
        y = adapted(x)
    expected = adapted(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y, expected, rtol=0.03, atol=0.03 * expected.abs().max().item())


def test_norms_must_be_given_like_adapters():
    adapted = with_norms()
    stack, offsets = stacked(adapted, 2), torch.tensor([0, 1, 2])
    for change, words in (({"1.bias": stack["1.bias"][0]}, r"got shape \[6\]"), ({"1.bias": None}, "got nothing")):
        with pytest.raises(ValueError, match=rf"parameters\['1.bias'\]: {words}, expected shape \[2, 6\]"):
            with task_parallel(adapted, stack | change, offsets):
                pass
    assert clean(adapted) and not any("forward" in vars(module) for module in adapted)
    norm = nn.Sequential(nn.Unflatten(0, (1, -1)), nn.LayerNorm(4), nn.Flatten(0, 1), nn.Linear(4, 4))
    turned = apply_tarp(norm.double(), TarpConfig(r=2, target_modules="all-linear", train_layernorm=True))
    with task_parallel(turned, stacked(turned, 2), offsets), pytest.raises(ValueError, match="input has 1 entries"):
        turned(torch.randn(2, 4, dtype=torch.float64))


def test_blocks_do_not_nest_and_an_error_inside_cleans_up():
    adapted = model()
    stack, offsets = stacked(adapted, 2), torch.tensor([0, 2, 4])
    with pytest.raises(ValueError, match="already in a task_parallel"), task_parallel(adapted, stack, offsets):
        with task_parallel(adapted, stack, offsets):
            pass
    assert clean(adapted)
    with pytest.raises(ZeroDivisionError), task_parallel(adapted, stack, offsets):
        raise ZeroDivisionError
    assert clean(adapted)


def test_a_batch_of_another_size_is_an_error():
    adapted = model()
    with task_parallel(adapted, stacked(adapted, 2), torch.tensor([0, 2, 4])):
        with pytest.raises(ValueError, match="5 rows, expected a multiple of the 4"):
            adapted(torch.randn(5, WIDTHS[0], dtype=torch.float64))


def test_a_model_without_adapter():
    with pytest.raises(ValueError, match="apply_tarp"), task_parallel(nn.Linear(2, 2), {}, torch.tensor([0, 1])):
        pass
