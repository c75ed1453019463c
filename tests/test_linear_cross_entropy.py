"""`linear_cross_entropy` in float32, by blocks, against the equation in float64; bad input."""

import pytest
import torch

from tarp_kernels import available_backends, backend
from tarp_kernels.ops import linear_cross_entropy as module
from tarp_kernels.ops.linear_cross_entropy import linear_cross_entropy
from tests.threads import one_thread

needs_cpu = pytest.mark.skipif("cpu" not in available_backends(), reason="the native backend is not built")
S, K, N = 23, 12, 37


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Three blocks of rows, the last one smaller, and three of the vocabulary."""
    monkeypatch.setattr(module, "ROWS", 9)
    monkeypatch.setattr(module, "LOGITS", 4 * N)
    monkeypatch.setattr(module, "DEPTH", 16)


def tensors(bias=True):
    draw = torch.Generator().manual_seed(0)
    x, weight, b = (torch.randn(*shape, generator=draw) for shape in ((S, K), (N, K), (N,)))
    return x, weight, b if bias else None, torch.randint(N, (S,), generator=draw)


def equation(x, weight, bias, targets):
    logits = x @ weight.T if bias is None else x @ weight.T + bias
    return torch.logsumexp(logits, 1) - logits[range(len(targets)), targets]


def results(function, x, weight, bias, targets):
    """Losses, the gradient of a weighted sum of them, and the gradient of a product with that gradient."""
    draw = torch.Generator().manual_seed(1)
    x = x.detach().requires_grad_()
    shares = torch.randn(S, generator=draw).to(x.dtype).requires_grad_()
    direction = torch.randn(S, K, generator=draw).to(x.dtype)
    losses = function(x, weight, bias, targets)
    (first,) = torch.autograd.grad(losses, x, shares, create_graph=True)
    second = torch.autograd.grad((first * direction).sum(), (x, shares))
    (alone,) = torch.autograd.grad(function(x, weight, bias, targets), x, shares)
    return [t.detach().double() for t in (losses, first, alone, *second)]


def off(got, expected):
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(got, expected, strict=True))


def wide(*given):
    return [t.double() if t is not None and t.is_floating_point() else t for t in given]


TOLERANCE = 1e-5


@needs_cpu
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "none"])
def test_losses_and_both_derivatives_are_those_of_the_equation(bias):
    given = tensors(bias)
    assert off(results(linear_cross_entropy, *given), results(equation, *wide(*given))) < TOLERANCE


@needs_cpu
def test_the_tolerance_tells_a_target_a_share_and_a_block_apart():
    given = tensors()
    right = results(equation, *wide(*given))
    x, weight, bias, targets = wide(*given)
    later = torch.where(torch.arange(S) < 18, targets, targets.roll(1))  # wrong in the last block alone
    assert off(results(equation, x, weight, bias, later), right) > 100 * TOLERANCE
    assert off(results(equation, x, weight, bias * 1.001, targets), right) > 10 * TOLERANCE
    assert off([t * (i != 2) for i, t in enumerate(right)], right) == 1


@needs_cpu
def test_no_logits_wait_for_backward_and_none_are_differentiated_without_need(monkeypatch):
    x, weight, bias, targets = tensors()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        linear_cross_entropy(x.requires_grad_(), weight, bias, targets)
    assert kept and (S, N) not in kept
    asked, right = [], module._by_blocks
    monkeypatch.setattr(module, "_by_blocks", lambda *a: asked.append(a[-1]) or right(*a))
    with torch.no_grad():
        linear_cross_entropy(x, weight, bias, targets)
    linear_cross_entropy(x.detach(), weight, bias, targets)
    assert asked == [False, False]


@needs_cpu
def test_large_logits_overflow_nowhere():
    x, weight, bias, targets = tensors()
    got = results(linear_cross_entropy, x * 300, weight, bias, targets)[:3]
    expected = results(equation, *wide(x * 300, weight, bias, targets))[:3]
    assert all(t.isfinite().all() for t in got) and off(got, expected) < TOLERANCE


def test_a_trained_head_gets_its_gradients():
    given = tensors()
    found = []
    for function, (x, weight, bias, targets) in ((linear_cross_entropy, given), (equation, wide(*given))):
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        found.append([t.double() for t in torch.autograd.grad(function(*leaves, targets).sum(), leaves)])
    assert off(*found) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_give_what_pytorch_gives(dtype):
    x, weight, bias, targets = tensors()
    x, weight, bias = (t.to(dtype) for t in (x, weight, bias))
    got = linear_cross_entropy(x, weight, bias, targets)
    logits = torch.nn.functional.linear(x, weight, bias)
    logits = logits if dtype == torch.float64 else logits.float()
    assert torch.equal(got, torch.nn.functional.cross_entropy(logits, targets, reduction="none"))


@needs_cpu
def test_under_the_reference_backend_no_kernel_runs(monkeypatch):
    def kernel(*_):
        raise AssertionError("a kernel ran")

    monkeypatch.setattr(module, "_product", kernel)
    given = tensors()
    with backend("reference"):
        assert off([linear_cross_entropy(*given).double()], [equation(*wide(*given))]) < TOLERANCE
    with pytest.raises(AssertionError, match="a kernel ran"):
        linear_cross_entropy(*given)


@needs_cpu
def test_the_same_bits_on_one_thread_and_on_several():
    x, weight, bias, targets = tensors()
    several = linear_cross_entropy(x, weight, bias, targets)
    with one_thread():
        assert torch.equal(linear_cross_entropy(x, weight, bias, targets), several)


def test_no_rows_are_no_losses():
    x, weight, bias, targets = tensors()
    assert linear_cross_entropy(x[:0], weight, bias, targets[:0]).shape == (0,)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda x, w, b, t: (x[None], w, b, t), "flatten x"),
        (lambda x, w, b, t: (x, w[:, 1:], b, t), r"weight: got shape \[37, 11\]"),
        (lambda x, w, b, t: (x, w.double(), b, t), "weight: got dtype torch.float64"),
        (lambda x, w, b, t: (x, w, b[1:], t), r"bias: got shape \[36\]"),
        (lambda x, w, b, t: (x, w, b, t[1:]), r"targets: got torch.int64 \[22\]"),
        (lambda x, w, b, t: (x, w, b, t.int()), "targets: got torch.int32"),
        (lambda x, w, b, t: (x, w, b, t - 100), "targets: go from -100"),
        (lambda x, w, b, t: (x, w, b, t + 1), "to 37, expected 0 to 36"),
    ],
    ids=["x", "width", "dtype", "bias", "rows", "int32", "ignored", "beyond"],
)
def test_bad_input_is_named(change, says):
    x, weight, bias, targets = tensors()
    targets[0] = N - 1
    targets[1] = 0
    with pytest.raises((TypeError, ValueError), match=says):
        linear_cross_entropy(*change(x, weight, bias, targets))
