"""`masked_sublayer` against computing everything and torch.where: values, gradients, cost, tasks."""

import pytest
import torch
from torch import nn

from tarp_kernels import TarpConfig, TarpLinear, apply_tarp, masked_sublayer, tarp_parameters, task_parallel

B, S, D = 4, 5, 6


class Counting(nn.Module):
    """A feed-forward block that remembers how many rows went through it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.block = nn.Sequential(nn.Linear(D, 9), nn.LayerNorm(9), nn.GELU(), nn.Linear(9, D)).double()
        self.rows: list[int] = []

    def forward(self, x):
        self.rows.append(x.shape[:-1].numel())
        return self.block(x)


def case(mask: torch.Tensor | None = None):
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(B, S, D, generator=draw, dtype=torch.float64).requires_grad_()
    return Counting(), x, torch.rand(B, S, generator=draw) < 0.4 if mask is None else mask


def derivatives(out, inputs):
    found = torch.autograd.grad(out.sin().sum(), inputs, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(found, inputs, strict=True)]


MASKS = {
    "tokens": None,
    "entries": torch.tensor([True, False, False, True]),
    "all": torch.ones(B, S, dtype=torch.bool),
    "nothing": torch.zeros(B, dtype=torch.bool),
    "one": torch.arange(B * S).view(B, S) == 7,
}


@pytest.mark.parametrize("name", MASKS)
def test_equals_computing_everything(name):
    module, x, mask = case(MASKS[name])
    inputs = [x, *module.parameters()]
    out = masked_sublayer(module, x, mask)
    rows = mask if mask.dim() == 2 else mask[:, None].expand(B, S)
    assert module.rows == ([int(rows.sum())] if rows.any() else [])
    wanted = torch.where(rows[..., None], module.block(x), x)
    torch.testing.assert_close(out, wanted)
    for found, expected in zip(derivatives(out, inputs), derivatives(wanted, inputs), strict=True):
        torch.testing.assert_close(found, expected)
    wrong = torch.where(rows.flip(0, 1)[..., None], module.block(x), x)
    if name not in ("all", "nothing", "entries"):  # those read the same backwards
        assert (out - wrong).abs().max() > 1e-2
        assert (derivatives(out, [x])[0] - derivatives(wrong, [x])[0]).abs().max() > 1e-2
    assert torch.equal(out[~rows], x[~rows])


def test_second_order():
    module, x, mask = case()
    inputs = [x, *module.parameters()]

    def twice(out):
        first = torch.autograd.grad(out.square().sum(), inputs, create_graph=True)
        return derivatives(sum(g.sin().sum() for g in first), inputs)

    everything = torch.where(mask[..., None], module(x), x)
    assert (twice(everything)[0] - twice(torch.where(mask.flip(0)[..., None], module(x), x))[0]).abs().max() > 1e-2
    for found, expected in zip(twice(masked_sublayer(module, x, mask)), twice(everything), strict=True):
        torch.testing.assert_close(found, expected)
    assert twice(everything)[0].any()


def test_by_task():
    module, x, _ = case()
    mask, segments = torch.tensor([True, False, True]), torch.tensor([0, 3, 15, 20])
    rows = torch.repeat_interleave(mask, segments.diff()).view(B, S, 1)
    out = masked_sublayer(module, x, mask, segments=segments)
    torch.testing.assert_close(out, torch.where(rows, module.block(x), x))
    assert module.rows == [8]


def test_nothing_selected_is_a_copy():
    module, x, _ = case()
    out = masked_sublayer(module, x.detach(), MASKS["nothing"])
    assert torch.equal(out, x) and out.data_ptr() != x.data_ptr() and not module.rows


def test_autocast_promotes_like_where():
    module, x, mask = case()
    module, x = module.float(), x.detach().float()
    with torch.autocast("cpu", torch.bfloat16):
        out = masked_sublayer(module, x, mask)
    assert out.dtype == torch.float32 and torch.equal(out[~mask], x[~mask])


@pytest.mark.parametrize("sizes", [[0, 1, 4], [0, 2, 2, 4]])
@pytest.mark.parametrize("name", ["tokens", "entries", "all", "one"])
def test_adapted_layers_inside_task_parallel(sizes, name):
    module, x, mask = case(MASKS[name])
    block = apply_tarp(nn.Sequential(module.block[0], module.block[2:]), TarpConfig(r=2, target_modules="all-linear"))
    draw, tasks = torch.Generator().manual_seed(2), len(sizes) - 1
    stack = {
        key: torch.randn(tasks, *p.shape, generator=draw, dtype=torch.float64).requires_grad_()
        for key, p in tarp_parameters(block).items()
    }
    inputs, rows = [x, *stack.values()], mask if mask.dim() == 2 else mask[:, None].expand(B, S)
    states = [layer.stacked for layer in block.modules() if hasattr(layer, "stacked")]
    with task_parallel(block, stack, torch.tensor(sizes)):
        out = masked_sublayer(block, x, mask)
        wanted = torch.where(rows[..., None], block(x), x)
        again = masked_sublayer(block, x, mask)
    with task_parallel(block, {key: tensor.flip(0) for key, tensor in stack.items()}, torch.tensor(sizes)):
        swapped = masked_sublayer(block, x, mask)
    torch.testing.assert_close(out, wanted)
    assert torch.equal(again, out) and (swapped - wanted).abs().max() > 1e-2
    for found, expected in zip(derivatives(out, inputs), derivatives(wanted, inputs), strict=True):
        torch.testing.assert_close(found, expected)
    assert states == [layer.stacked for layer in block.modules() if hasattr(layer, "stacked")]


def test_norms_that_differ_by_task_are_refused():
    module, x, mask = case()
    block = apply_tarp(module.block, TarpConfig(r=2, target_modules="all-linear", train_layernorm=True))
    stack = {key: p.detach()[None].expand(2, *p.shape) for key, p in tarp_parameters(block).items()}
    with task_parallel(block, stack, torch.tensor([0, 1, 4])):
        with pytest.raises(ValueError, match="module: holds a LayerNorm that differs by task"):
            masked_sublayer(block, x, mask)
    masked_sublayer(block, x, mask)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"mask": torch.ones(B, S)}, TypeError, "mask: got torch.float32, expected a bool tensor"),
        ({"mask": [True]}, TypeError, "mask: got list"),
        ({"mask": torch.ones(S, dtype=torch.bool)}, ValueError, r"mask: got shape \[5\] for x \[4, 5, 6\]"),
        ({"mask": torch.ones(B, S, D, dtype=torch.bool)}, ValueError, r"mask: got shape \[4, 5, 6\]"),
        ({"x": torch.ones(D)}, ValueError, r"x: got shape \[6\]"),
        ({"segments": torch.tensor([0, 3, 20])}, ValueError, r"mask: got shape \[4, 5\], expected \[2\]"),
        ({"segments": torch.tensor([0, 3, 19])}, ValueError, "segments: got .*to the 20 rows"),
        ({"segments": torch.tensor([0.0, 20.0])}, ValueError, "segments: got .*int64 row offsets"),
        ({"module": lambda x: x[..., :3]}, ValueError, r"module: returned shape \[\d+, 3\]"),
        ({"module": lambda x: (x, None)}, ValueError, "module: returned tuple"),
    ],
)
def test_bad_input(change, error, words):
    module, x, mask = case()
    given = {"module": module, "x": x, "mask": mask} | change
    with pytest.raises(error, match=words):
        masked_sublayer(given.pop("module"), given.pop("x"), given.pop("mask"), **given)


# --- adapted layers read and write the rows where they lie ------------------------------------------------------------


def stack(kind: str, dtype=torch.float32) -> nn.Module:
    """A module that takes the row numbers itself at one end or both."""
    torch.manual_seed(3)
    config = TarpConfig(r=2, generator_bias=True, init="paper", dropout=0.25)

    def ours(K: int, N: int) -> TarpLinear:
        return TarpLinear.from_linear(nn.Linear(K, N), config)

    layers: dict[str, list[nn.Module]] = {
        "one layer": [ours(D, D)],
        "both ends": [ours(D, 9), nn.GELU(), ours(9, D)],
        "first": [ours(D, 9), nn.GELU(), nn.Linear(9, D)],
        "last": [nn.Linear(D, 9), nn.GELU(), ours(9, D)],
        "nested": [nn.Sequential(ours(D, 9), nn.GELU()), nn.Sequential(nn.LayerNorm(9), ours(9, D))],
    }
    made = layers[kind][0] if len(layers[kind]) == 1 else nn.Sequential(*layers[kind])
    return made.requires_grad_().to(dtype)


STACKS = ["one layer", "both ends", "first", "last", "nested"]


class Gathered(nn.Module):
    """The same module, whose parts cannot be seen."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


def seeded(module: nn.Module, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(4)  # dropout
    return masked_sublayer(module, x, mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", STACKS)
@pytest.mark.parametrize("name", MASKS)
def test_layers_that_take_row_numbers(name, kind, dtype):
    """The bits of gathering, but for the order in which x's two gradients are added."""
    _, x, mask = case(MASKS[name])
    module, x = stack(kind, dtype), x.detach().to(dtype).requires_grad_()
    inputs = [x, *module.parameters()]
    found, wanted = seeded(module, x, mask), seeded(Gathered(module), x, mask)
    assert torch.equal(found, wanted)
    for a, b in zip(derivatives(found, inputs), derivatives(wanted, inputs), strict=True):
        torch.testing.assert_close(a, b)
    if name in ("tokens", "one"):
        wrong = seeded(Gathered(module), x, mask.flip(0, 1))
        assert (found - wrong).abs().max() > 1e-2
        assert (derivatives(found, [x])[0] - derivatives(wrong, [x])[0]).abs().max() > 1e-2


@pytest.mark.parametrize("kind", STACKS)
def test_what_is_gathered_and_put_back(kind, monkeypatch):
    """By PyTorch at the ends that are not ours, and there alone."""
    _, x, mask = case()
    module, x, calls = stack(kind).requires_grad_(False), x.detach().float(), []
    for layer in module.modules():
        if isinstance(layer, TarpLinear):
            for key in layer.adapter_names():
                getattr(layer, key).requires_grad_()
    for name in ("index_select", "index_copy"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda *a, name=name, original=original: (calls.append(name), original(*a))[1]
        )
    for inference in (False, True):
        calls.clear()
        with torch.inference_mode(inference):
            out = masked_sublayer(module, x.clone().requires_grad_(not inference), mask)
        if not inference:
            out.sum().backward()
        assert calls == {"first": ["index_copy"], "last": ["index_select"]}.get(kind, [])
    calls.clear()
    masked_sublayer(Gathered(module), x, mask)
    assert calls == ["index_select", "index_copy"], "what is counted would not be found"


class Other(TarpLinear):
    def forward(self, x):
        return 2 * super().forward(x)


def changed(how: str) -> nn.Module:
    """The stack of both ends, so that its layers must be called."""
    module = stack("both ends").eval()
    first = module[0]
    if how == "hook on a layer":
        first.register_forward_hook(lambda *_: None)
    elif how == "hook on the stack":
        module.register_forward_pre_hook(lambda _, given: (given[0] + 1,))
    elif how == "disabled":
        first.enabled = False
    elif how == "factor":
        config = TarpConfig(r=2, multiplicative="static", init="paper")
        module[0] = TarpLinear.from_linear(nn.Linear(D, 9), config)
    elif how == "merged":
        config = TarpConfig(r=2, kind="bilinear", init="paper")
        module[0] = TarpLinear.from_linear(nn.Linear(D, 9), config)
        module[0].merge()
    elif how == "subclass":
        module[0] = Other.from_linear(nn.Linear(D, 9), TarpConfig(r=2, init="paper"))
    elif how == "replaced forward":
        own = first.forward
        first.forward = lambda x: 3 * own(x)
    return module


@pytest.mark.parametrize(
    "how",
    ["hook on a layer", "hook on the stack", "disabled", "factor", "merged", "subclass", "replaced forward"],
)
def test_layers_that_must_be_called(how):
    _, x, mask = case()
    module, x = changed(how), x.detach().float()
    found = masked_sublayer(module, x, mask)
    assert torch.equal(found, masked_sublayer(Gathered(module), x, mask))


def test_dtypes_that_change_on_the_way():
    _, x, mask = case()
    module, x = stack("both ends").eval(), x.detach().float()
    with torch.autocast("cpu", torch.bfloat16):
        found = masked_sublayer(module, x, mask)
        assert torch.equal(found, masked_sublayer(Gathered(module), x, mask)) and found.dtype == torch.float32
    module[1] = Gathered(nn.GELU()).double()
    module[2] = module[2].double()
    module[1].forward = lambda h: h.double()
    found = masked_sublayer(module, x, mask)
    assert found.dtype == torch.float64 and torch.equal(found, masked_sublayer(Gathered(module), x, mask))


def test_second_order_of_layers_that_take_row_numbers():
    _, x, mask = case()
    module, x = stack("both ends").eval(), x.detach().float().requires_grad_()
    inputs = [x, *module.parameters()]

    def twice(out):
        first = torch.autograd.grad(out.square().mean(), inputs, create_graph=True)
        return derivatives(sum(g.square().sum() for g in first), inputs)

    everything = torch.where(mask[..., None], module(x), x)
    for found, expected in zip(twice(masked_sublayer(module, x, mask)), twice(everything), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["tokens", "one"])
@pytest.mark.parametrize("kind", ["both ends", "one layer", "nested"])
def test_row_numbers_inside_task_parallel(kind, name):
    _, x, mask = case(MASKS[name])
    module, x = stack(kind).eval(), x.detach().float().requires_grad_()
    draw = torch.Generator().manual_seed(2)
    own = {key: torch.randn(3, *p.shape, generator=draw).requires_grad_() for key, p in tarp_parameters(module).items()}
    inputs = [x, *own.values()]
    with task_parallel(module, own, torch.tensor([0, 1, 1, 4])):
        out = masked_sublayer(module, x, mask)
        wanted = torch.where(mask[..., None], module(x), x)
    torch.testing.assert_close(out, wanted)
    for found, expected in zip(derivatives(out, inputs), derivatives(wanted, inputs), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
