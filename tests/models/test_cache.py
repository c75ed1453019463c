"""`cached_factors`: the same outputs, made anew after every change, and nothing left behind."""

import contextlib
import copy
import gc
import io
import pickle

import pytest
import torch
from torch import nn

from tarp_kernels import (
    TarpConfig,
    TarpLinear,
    cached_factors,
    disable_tarp,
    merge_tarp,
    task_parallel,
    unmerge_tarp,
)
from tarp_kernels.nn import linear
from tarp_kernels.nn.adapter import written_out
from tarp_kernels.nn.factor_cache import FactorCache, Seen
from tarp_kernels.ops.factor import kronecker
from tests.models.tiny import inputs, logits, tarp_model

FORMS = {
    "beside a dynamic half": {},
    "alone": {"additive": False, "multiplicative_activation": "one_plus"},
    "kronecker": {"kind": "kronecker", "kronecker_terms": 2},
}


def layer(dtype=torch.float32, trains=False, **config) -> TarpLinear:
    torch.manual_seed(0)
    made = TarpLinear.from_linear(
        nn.Linear(8, 6, dtype=dtype), TarpConfig(**{"r": 3, "multiplicative": "static"} | config)
    )
    with torch.no_grad():
        for name in made.adapter_names():
            getattr(made, name).normal_(std=0.5)
    return made.requires_grad_(trains)


X = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))


def uncached(made: TarpLinear, x=X) -> torch.Tensor:
    cache, made.cache = made.cache, None
    try:
        return made(x)
    finally:
        made.cache = cache


@pytest.fixture
def made_products(monkeypatch) -> list:
    """One entry for each product Φ ⊙ W that a cache makes."""
    seen = []

    def counting(*arguments):
        seen.append(arguments)
        return multiplied(*arguments)

    multiplied = linear.multiplied
    monkeypatch.setattr(linear, "multiplied", counting)
    return seen


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
def test_whole_models_give_the_same_and_no_factor_runs_twice(family, form, made_products):
    model, batch = tarp_model(family, multiplicative="static", **FORMS[form]), inputs(family)
    expected = logits(model, batch)
    keys = model.state_dict().keys()
    layers = [module for module in model.modules() if hasattr(module, "cache")]
    with cached_factors(model) as inside:
        assert inside is model
        first = logits(model, batch)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("tarp_kernels.nn.linear.hadamard_linear", lambda *a, **k: pytest.fail("the factor ran"))
            assert torch.equal(logits(model, batch), first)
        assert model.state_dict().keys() == keys
    assert len(made_products) == len(layers)
    torch.testing.assert_close(first, expected, rtol=1e-4, atol=1e-4)
    with disable_tarp(model):
        assert (logits(model, batch) - expected).abs().max() > 1e-2
    assert all(one.cache is None for one in layers) and torch.equal(logits(model, batch), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_product_is_rounded_once(dtype):
    made = layer(dtype)
    with torch.no_grad(), cached_factors(made):
        made(X.to(dtype))
        product = made.cache.kept
    wide = torch.float64
    phi = torch.nn.functional.softplus(made.P.to(wide) @ made.Q.to(wide) + 0.541324854612918)
    exact = made.weight.to(wide) * phi
    assert product.dtype == dtype
    unit = {torch.bfloat16: 2**-9, torch.float16: 2**-12, torch.float64: 2**-50}[dtype]
    assert ((product.to(wide) - exact).abs() <= 1.01 * unit * 2 * exact.abs() + 1e-7).all()


# --- changes ----------------------------------------------------------------------------------------------------------


def stepped(optimizer, **options):
    def change(made):
        made.requires_grad_(True)
        for name in ("P", "Q", "weight"):
            getattr(made, name).grad = torch.ones_like(getattr(made, name))
        optimizer([made.P, made.Q, made.weight], lr=0.3, **options).step()
        made.requires_grad_(False)

    return change


def copied(name):
    def change(made):
        with torch.no_grad():
            getattr(made, name).copy_(torch.randn_like(getattr(made, name)))

    return change


def loaded(assign):
    def change(made):
        state = {name: torch.randn_like(value) for name, value in made.state_dict().items()}
        made.load_state_dict(state, assign=assign)
        made.requires_grad_(False)

    return change


def there_and_back(made):
    made.to(torch.bfloat16).to(torch.float32)


def replaced(name):
    def change(made):
        old = getattr(made, name)
        new = nn.Parameter(torch.randn_like(old), requires_grad=False)
        while new._version < old._version:
            new.mul_(1)
        setattr(made, name, new)

    return change


def assigned_data(made):
    made.P.data = torch.randn_like(made.P)


CHANGES = {
    "SGD": stepped(torch.optim.SGD, foreach=False),
    "Adam foreach": stepped(torch.optim.Adam, foreach=True),
    "Adam fused": stepped(torch.optim.Adam, fused=True),
    "AdamW fused": stepped(torch.optim.AdamW, fused=True),
    "SGD fused": stepped(torch.optim.SGD, fused=True),
    "copy to P": copied("P"),
    "copy to Q": copied("Q"),
    "copy to weight": copied("weight"),
    "load": loaded(False),
    "load assigned": loaded(True),
    "another precision and back": there_and_back,
    "new P": replaced("P"),
    "new weight": replaced("weight"),
    "other data": assigned_data,
}


def stays_right(change, made=None) -> bool:
    """Whether a call after the change is what a layer without cache gives; the change itself must be seen."""
    made = layer() if made is None else made
    with cached_factors(made), torch.no_grad():
        before = made(X)
        assert made.cache.kept is not None
        change(made)
        after, expected = made(X), uncached(made)
        assert (expected - before).abs().max() > 1e-3, "the change has no effect"
        assert torch.equal(made(X), after)
    return torch.allclose(after, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_makes_the_product_anew(change):
    assert stays_right(CHANGES[change])


def test_the_core_of_kronecker_products_is_watched():
    assert stays_right(copied("PH"), layer(kind="kronecker", kronecker_terms=2))


def no_version(monkeypatch):
    def unchanged(self, now):
        return now is self.tensor and now.data_ptr() == self.memory.data_ptr()

    monkeypatch.setattr(Seen, "unchanged", unchanged)


def no_place(monkeypatch):
    monkeypatch.setattr(Seen, "unchanged", lambda self, now: now is self.tensor and now._version == self.version)


def no_identity_and_place(monkeypatch):
    monkeypatch.setattr(Seen, "unchanged", lambda self, now: now._version == self.version)


def no_hook(monkeypatch):
    monkeypatch.setattr(FactorCache, "forget", lambda self: None)


MUTANTS = {
    no_version: {"SGD", "Adam foreach", "copy to P", "copy to Q", "copy to weight", "load"},
    no_place: {"another precision and back", "other data"},
    no_identity_and_place: {"new P", "new weight", "other data"},
    no_hook: {"Adam fused", "AdamW fused", "SGD fused"},
}


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_a_key_that_lacks_something_fails(mutant, monkeypatch):
    mutant(monkeypatch)
    if mutant is no_version:  # the hook alone would see these two
        monkeypatch.setattr(FactorCache, "forget", lambda self: None)
    wrong = {name for name, change in CHANGES.items() if not stays_right(change)}
    assert wrong >= MUTANTS[mutant]


# --- gradients, copies, and where it is not used ----------------------------------------------------------------------


def test_where_a_gradient_is_asked_for_the_operator_runs(made_products):
    made = layer(trains=True)
    with cached_factors(made):
        y = made(X)
        y.sum().backward()
        assert made_products == [] and made.P.grad.any()
        with torch.no_grad():
            made(X)
        assert len(made_products) == 1
        made.requires_grad_(False)
        x = X.clone().requires_grad_()
        (found,) = torch.autograd.grad(made(x).square().sum(), x)
        (wanted,) = torch.autograd.grad(uncached(made, x).square().sum(), x)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        assert len(made_products) == 1
        made.V.requires_grad_()  # the additive half may train on beside it
        (gradient,) = torch.autograd.grad(made(X).sum(), made.V)
        assert gradient.any() and len(made_products) == 1


def test_inference_mode_and_autocast(made_products):
    made = layer()
    with cached_factors(made):
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
            made(X)
        assert not made.cache.kept.is_inference() and made.cache.kept.dtype == torch.float32
        x = X.clone().requires_grad_()
        torch.autograd.grad(made(x).sum(), x)
        torch.testing.assert_close(made(X), uncached(made), rtol=1e-5, atol=1e-5)
    assert len(made_products) == 1
    with torch.inference_mode():
        born_there = layer()
        with cached_factors(born_there):
            born_there(X)
            assert born_there.cache.kept is None
    assert len(made_products) == 1


def test_autocast_rounds_no_core_of_kronecker_products():
    made = layer(kind="kronecker", kronecker_terms=2)
    with torch.no_grad(), cached_factors(made):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            made(X)
        torch.testing.assert_close(made(X), uncached(made), rtol=1e-5, atol=1e-5)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            parts = kronecker(made.PH, made.P, made.Q) + written_out(made.PH, made.P, made.Q)
    assert {part.dtype for part in parts} == {torch.float32}
    torch.testing.assert_close(kronecker(made.PH, made.P, made.Q)[0], parts[0], rtol=0, atol=0)


def test_neither_copies_nor_pickles_hold_it():
    made = layer()
    with torch.no_grad(), cached_factors(made):
        made(X)
        file = io.BytesIO()
        torch.save(made, file)
        file.seek(0)
        copies = [copy.deepcopy(made), copy.copy(made.cache), pickle.loads(pickle.dumps(made))]
        copies.append(torch.load(file, weights_only=False))
        assert [getattr(one, "cache", None) for one in copies] == [None] * 4
        torch.testing.assert_close(copies[0](X), made(X), rtol=1e-5, atol=1e-5)


def test_blocks_inside_one_another_and_errors(made_products):
    made = layer()
    with torch.no_grad(), pytest.raises(ZeroDivisionError), cached_factors(made):
        made(X)
        with cached_factors(made):
            made(X)
        made(X)
        assert len(made_products) == 1
        raise ZeroDivisionError
    assert made.cache is None
    for form in ({"multiplicative": "none"}, {"multiplicative": "dynamic"}, {"product": "matmul"}):
        with pytest.raises(ValueError, match="no layer with a factor to keep"), cached_factors(layer(**form)):
            pass


def test_a_block_that_is_forgotten_lets_go():
    made = layer()
    block = contextlib.ExitStack()
    block.enter_context(cached_factors(made))
    del block
    gc.collect()
    assert made.cache is None


def test_not_for_tasks_merged_or_disabled_layers(made_products):
    model, batch = tarp_model("llama", multiplicative="static", kind="bilinear"), inputs("llama")
    names = ("U", "V", "P", "Q")
    stack = {n: p.detach()[None] * 0.5 for n, p in model.named_parameters() if n.rpartition(".")[2] in names}
    with task_parallel(model, stack, torch.tensor([0, 3])):
        tasks = logits(model, batch)
    with disable_tarp(model):
        base = logits(model, batch)
    adapted = logits(model, batch)
    with cached_factors(model):
        with task_parallel(model, stack, torch.tensor([0, 3])):
            assert torch.equal(logits(model, batch), tasks)
        with disable_tarp(model):
            assert torch.equal(logits(model, batch), base)
        assert made_products == []
        merge_tarp(model)
        merging = len(made_products)
        torch.testing.assert_close(logits(model, batch), adapted, rtol=1e-4, atol=1e-4)
        assert len(made_products) == merging
        unmerge_tarp(model)
        torch.testing.assert_close(logits(model, batch), adapted, rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            merge_tarp(model)
            unmerge_tarp(model)
        torch.testing.assert_close(logits(model, batch), adapted, rtol=1e-4, atol=1e-4)


def test_compiled_layers_run_the_operator(made_products):
    made = layer()
    with cached_factors(made):
        torch._dynamo.reset()
        compiled = torch.compile(made, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(X), uncached(made), rtol=1e-5, atol=1e-5)
        torch._dynamo.reset()
    assert made_products == []


def test_borrowed_parameters_are_seen():
    made = layer()
    with torch.no_grad(), cached_factors(made):
        before, other = made(X), {"P": torch.randn_like(made.P)}
        borrowed = torch.func.functional_call(made, other, (X,))
        made.cache, cache = None, made.cache
        torch.testing.assert_close(borrowed, torch.func.functional_call(made, other, (X,)), rtol=1e-5, atol=1e-5)
        made.cache = cache
        assert torch.equal(made(X), before) and (borrowed - before).abs().max() > 0.1
