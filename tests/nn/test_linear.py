"""`TarpLinear` and `TarpConv1D` against the equation, their start, and what they share with the layer they replace."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from tarp_kernels import TarpConfig, TarpConv1D, TarpLinear

K, N, R = 12, 20, 3
TERMS = 4
HIDDEN = {"relu": torch.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh}
OUTPUT = {
    "none": lambda g: g,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "softplus": F.softplus,
}
FACTOR = {
    "centred_softplus": lambda v: F.softplus(v + 0.541324854612918),
    "one_plus": lambda v: 1 + v,
    "softplus": F.softplus,
}


def layer(conv=False, bias=True, dtype=torch.float32, seed=0, moved=True, **config):
    """An adapted layer; `moved` gives every adapter parameter random values."""
    torch.manual_seed(seed)
    config = TarpConfig(**{"r": R} | config)
    if conv:
        made = TarpConv1D.from_conv1d(Conv1D(N, K).to(dtype), config)
    else:
        made = TarpLinear.from_linear(nn.Linear(K, N, bias=bias, dtype=dtype), config)
    if moved:
        with torch.no_grad():
            for name in made.adapter_names():
                getattr(made, name).normal_(std=0.5)
    return made


def equation(module, x, weight):
    """y = x (Φ ⊙ W)ᵀ + b + scaling · U Σ(x) V x, one row at a time, in float64 (method.md §2, eq. 1 and 3)."""
    config = module.config
    tensors = {name: getattr(module, name).detach().double() for name in module.adapter_names()}
    weight = weight.double()
    if "P" in tensors and config.multiplicative == "static":
        argument = product(tensors, "PH", "P", "Q")
        if config.product == "matmul":
            weight = weight + argument @ weight
        else:
            weight = weight * FACTOR[config.multiplicative_activation](argument)
    if config.kind == "kronecker" and config.additive:
        weight = weight + config.scaling * product(tensors, "H", "U", "V")
    V, U = tensors.get("V", torch.zeros(config.r, K)).double(), tensors.get("U", torch.zeros(N, config.r)).double()
    if config.kind == "kronecker":
        V, U = torch.zeros(config.r, K).double(), torch.zeros(N, config.r).double()
    rows = []
    for row in x.double().reshape(-1, x.shape[-1]):
        own = weight
        if config.multiplicative == "dynamic":
            update = tensors["P"] @ middle(config, tensors, "P", row) @ tensors["Q"]
            own = weight * (update if config.multiplicative_activation == "softplus" else 1 + update)
        sigma = middle(config, tensors, "", row) if "w1" in tensors else torch.eye(config.r, dtype=torch.float64)
        y = own @ row + config.scaling * U @ sigma @ V @ row
        rows.append(y if module.bias is None else y + module.bias.double())
    return torch.stack(rows).reshape(*x.shape[:-1], -1).detach()


def middle(config, tensors, prefix, row):
    """Σ(x) [r, r] of one row, by the generator whose names start with the prefix."""
    g = tensors[prefix + "w1"] @ row + tensors.get(prefix + "b1", 0)
    if prefix + "w2" in tensors:
        g = tensors[prefix + "w2"] @ HIDDEN[config.hidden_activation](g) + tensors.get(prefix + "b2", 0)

    def shape(s):
        return torch.diag(s) if config.sigma == "diag" else s.reshape(config.r, config.r)

    if config.activation == "one_plus":
        return torch.eye(config.r, dtype=torch.float64) + shape(g)
    return shape(OUTPUT[config.activation](g))


def product(tensors, mixed, left, right):
    """left right, or Σ_k mixed_k ⊗ (left_k right_k)."""
    if mixed not in tensors:
        return tensors[left] @ tensors[right]
    terms = zip(tensors[mixed], tensors[left], tensors[right], strict=True)
    return sum(torch.kron(h, u @ v) for h, u, v in terms)


FORMS = [
    *(
        {"sigma": sigma, "generator": generator, "activation": activation, "generator_bias": bias}
        for sigma, generator, activation, bias in itertools.product(
            ("diag", "full"), ("linear", "mlp"), ("one_plus", "none", "sigmoid", "tanh", "softplus"), (False, True)
        )
    ),
    *({"generator": "mlp", "hidden_activation": name, "generator_hidden": 5} for name in HIDDEN),
    {"kind": "bilinear"},
    {"multiplicative": "static"},
    {"multiplicative": "static", "multiplicative_activation": "softplus", "sigma": "full", "init": "paper"},
    {"multiplicative": "static", "multiplicative_activation": "one_plus", "kind": "bilinear"},
    {"multiplicative": "static", "additive": False},
    {"kind": "kronecker", "kronecker_terms": TERMS},
    {"kind": "kronecker", "kronecker_terms": TERMS, "multiplicative": "static"},
    {"multiplicative": "dynamic"},
    {"multiplicative": "dynamic", "sigma": "full", "generator": "mlp", "generator_bias": True, "scaling": 0.5},
    {"multiplicative": "dynamic", "kind": "bilinear", "activation": "tanh", "generator": "mlp", "generator_hidden": 5},
    {"multiplicative": "dynamic", "additive": False, "sigma": "full", "activation": "none"},
    {"multiplicative": "dynamic", "multiplicative_activation": "softplus", "init": "paper"},
    {"multiplicative": "static", "product": "matmul"},
    {"multiplicative": "static", "product": "matmul", "additive": False},
    {"multiplicative": "static", "product": "matmul", "kind": "kronecker", "kronecker_terms": TERMS, "scaling": 0.5},
    {"scaling": -0.5, "sigma": "full", "r": 1},
]


@pytest.mark.parametrize("config", FORMS, ids=str)
@pytest.mark.parametrize("conv", [False, True])
def test_output_is_the_equation(conv, config):
    module = layer(conv, **config)
    x = torch.randn(2, 5, K)
    weight = module.weight.t() if conv else module.weight
    expected = equation(module, x, weight)
    torch.testing.assert_close(module(x), expected.float(), rtol=1e-4, atol=1e-4)
    for name in module.adapter_names():
        kept = getattr(module, name).detach().clone()
        with torch.no_grad():
            getattr(module, name).zero_()
        assert (module(x).double() - expected).abs().amax() > 1e-2, f"{name} could be dropped unnoticed"
        with torch.no_grad():
            getattr(module, name).copy_(kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("conv", [False, True])
def test_dtype_of_the_base_is_kept(conv, dtype):
    module = layer(conv, dtype=dtype)
    assert {getattr(module, name).dtype for name in module.adapter_names()} == {dtype}
    x = torch.randn(4, K).to(dtype)
    y, expected = module(x), equation(module, x, module.weight.t() if conv else module.weight)
    assert y.dtype == dtype
    unit = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(y.double(), expected, rtol=2 * unit, atol=2 * unit * expected.abs().amax().item())


@pytest.mark.parametrize("shape", [(K,), (0, K), (1, K), (2, 0, K), (2, 3, 4, K)])
def test_any_leading_shape(shape):
    module, x = layer(), torch.randn(shape)
    y = module(x)
    assert y.shape == (*shape[:-1], N)
    if x.numel():
        torch.testing.assert_close(y, equation(module, x, module.weight).float(), rtol=1e-4, atol=1e-4)


# --- the start --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [form for form in FORMS if "init" not in form], ids=str)
def test_identity_start_is_the_base_layer(config):
    module, x = layer(moved=False, **config), torch.randn(6, K)
    torch.testing.assert_close(module(x), F.linear(x, module.weight, module.bias), rtol=1e-6, atol=1e-6)
    module(x).square().sum().backward()
    gradients = {name: getattr(module, name).grad for name in module.adapter_names()}
    started = {"U": config.get("additive", True), "P": "multiplicative" in config}
    assert all(gradients[name].any() for name, there in started.items() if there), "the start must not stop training"


@pytest.mark.parametrize(
    ("config", "zeros"),
    [
        ({"activation": "one_plus"}, {"U", "w1"}),
        ({"activation": "one_plus", "generator": "mlp", "generator_bias": True}, {"U", "b1", "w2", "b2"}),
        ({"activation": "none", "generator_bias": True}, {"U", "b1"}),
        ({"activation": "sigmoid", "sigma": "full"}, {"U"}),
        ({"kind": "bilinear"}, {"U"}),
        ({"kind": "kronecker", "kronecker_terms": TERMS}, {"U"}),
        ({"multiplicative": "dynamic", "generator": "mlp"}, {"U", "w2", "P", "Pw2"}),
        ({"multiplicative": "dynamic", "activation": "none", "generator_bias": True}, {"U", "b1", "P", "Pb1"}),
    ],
)
def test_identity_start_values(config, zeros):
    module = layer(moved=False, **config)
    for name in module.adapter_names():
        parameter = getattr(module, name).detach()
        if name in zeros:
            assert not parameter.any(), name
        elif name == "Q":
            assert 0.01 < parameter.std() < 0.04
        else:
            bound = 1 / math.sqrt(parameter.shape[-1])
            assert parameter.abs().amax() <= bound and parameter.std() > bound / 4, name


def test_the_published_start_shrinks_every_weight():
    """softplus(P Q) with P, Q ~ N(0, 0.02²) is ln 2 = 0.693 almost everywhere."""
    base = nn.Linear(300, 200, bias=False)
    config = TarpConfig(multiplicative="static", multiplicative_activation="softplus", additive=False, init="paper")
    module = TarpLinear.from_linear(base, config)
    weight = module(torch.eye(300)).t().detach()
    scale = (weight / base.weight.detach()).mean().item()
    assert abs(scale - 0.693) < 5e-4
    with pytest.raises(ValueError, match="multiplicative_activation: got 'softplus'.*init='paper'"):
        TarpConfig(multiplicative="static", multiplicative_activation="softplus")


def test_uniform_start_fills_its_range():
    torch.manual_seed(0)
    V = TarpLinear.from_linear(nn.Linear(1000, 4), TarpConfig(r=20)).V.detach()
    bound = 1 / math.sqrt(1000)
    assert 0.99 * bound < V.abs().amax() <= bound
    assert abs(V.std().item() / (bound / math.sqrt(3)) - 1) < 0.02 and abs(V.mean().item()) < 0.02 * bound


def test_published_start_values():
    torch.manual_seed(0)
    config = TarpConfig(r=20, sigma="full", generator="mlp", generator_hidden=50, generator_bias=True, init="paper")
    module = TarpLinear.from_linear(nn.Linear(1000, 500), config)
    for name in ("V", "U", "w1", "w2"):
        parameter = getattr(module, name).detach()
        assert abs(parameter.std().item() / 0.02 - 1) < 0.05 and abs(parameter.mean().item()) < 1e-3, name
        assert parameter.abs().amax() > 0.06, "normal, not uniform"
    assert not module.b1.any() and not module.b2.any()


def test_reset_starts_anew():
    module, x = layer(), torch.randn(4, K)
    module.reset_adapter()
    torch.testing.assert_close(module(x), F.linear(x, module.weight, module.bias), rtol=1e-6, atol=1e-6)


# --- the layer that it replaces ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("conv", [False, True])
def test_base_parameters_are_shared_and_left_alone(conv):
    base = Conv1D(N, K) if conv else nn.Linear(K, N)
    base.weight.requires_grad_(False)
    module = (TarpConv1D.from_conv1d if conv else TarpLinear.from_linear)(base.eval(), TarpConfig(r=R))
    assert module.weight is base.weight and module.bias is base.bias
    assert not module.weight.requires_grad and module.bias.requires_grad and not module.training
    assert (module.in_features, module.out_features) == (K, N)
    assert set(module.state_dict()) == {"weight", "bias", "V", "U", "w1"}
    if conv:
        assert module.nf == N and module.weight.shape == (K, N)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_disabled_is_the_base_layer_bit_for_bit(bias, dtype):
    base = nn.Linear(K, N, bias=bias, dtype=dtype)
    module, x = (
        TarpLinear.from_linear(base, TarpConfig(r=R, init="paper", activation="none")),
        torch.randn(5, K).to(dtype),
    )
    with torch.no_grad():
        module.U.add_(1)
    assert not torch.equal(module(x), base(x))
    module.enabled = False
    assert torch.equal(module(x), base(x))


@pytest.mark.parametrize("conv", [False, True])
def test_gradients_only_where_they_are_asked_for(conv):
    module, x = layer(conv), torch.randn(4, K)
    module.weight.requires_grad_(False)
    module.bias.requires_grad_(False)
    module.V.requires_grad_(False)
    module(x).sum().backward()
    assert module.weight.grad is module.bias.grad is module.V.grad is x.grad is None
    assert module.U.grad.any() and module.w1.grad.any()


@pytest.mark.parametrize("conv", [False, True])
def test_weight_can_train_along(conv):
    module, x = layer(conv, dtype=torch.float64), torch.randn(4, K, dtype=torch.float64)
    module(x).sum().backward()
    expected = x.sum(0).expand(N, K)
    torch.testing.assert_close(module.weight.grad, expected.t() if conv else expected)
    torch.testing.assert_close(module.bias.grad, torch.full((N,), 4.0, dtype=torch.float64))


def test_adapter_names_and_shapes_of_each_form():
    def shapes(**config):
        module = layer(**config)
        return {name: tuple(getattr(module, name).shape) for name in module.adapter_names()}

    pair = {"V": (R, K), "U": (N, R)}
    assert shapes(kind="bilinear", generator_bias=True) == pair
    assert shapes() == pair | {"w1": (R, K)}
    assert shapes(sigma="full", generator_bias=True) == pair | {"w1": (R * R, K), "b1": (R * R,)}
    factor = {"P": (N, R), "Q": (R, K)}
    assert shapes(kind="bilinear", multiplicative="static") == pair | factor
    assert shapes(multiplicative="static", additive=False) == factor
    kron = {"V": (TERMS, R, K // TERMS), "U": (TERMS, N // TERMS, R), "H": (TERMS, TERMS, TERMS)}
    assert shapes(kind="kronecker", kronecker_terms=TERMS) == kron
    both = kron | {"P": kron["U"], "Q": kron["V"], "PH": kron["H"]}
    assert shapes(kind="kronecker", kronecker_terms=TERMS, multiplicative="static") == both
    with pytest.raises(ValueError, match="kronecker_terms: got 5, expected a divisor of in_features"):
        layer(kind="kronecker", kronecker_terms=5)
    square = shapes(kind="kronecker", kronecker_terms=TERMS, multiplicative="static", product="matmul")
    assert square == both | {"Q": (TERMS, R, N // TERMS)}
    assert shapes(multiplicative="static", product="matmul", kind="bilinear") == pair | {"P": (N, R), "Q": (R, N)}
    assert shapes(multiplicative="dynamic", kind="bilinear") == pair | factor | {"Pw1": (R, K)}
    mlp = shapes(multiplicative="dynamic", generator="mlp", generator_bias=True, generator_hidden=7)
    tensors = {"w1": (7, K), "b1": (7,), "w2": (R, 7), "b2": (R,)}
    assert mlp == pair | factor | tensors | {f"P{name}": shape for name, shape in tensors.items()}
    assert shapes(generator="mlp") == pair | {"w1": (R, K), "w2": (R, R)}
    assert shapes(sigma="full", generator="mlp", generator_hidden=7, generator_bias=True) == pair | {
        "w1": (7, K),
        "b1": (7,),
        "w2": (R * R, 7),
        "b2": (R * R,),
    }


def test_dropout_acts_in_training_only_and_follows_the_seed():
    module, x = layer(dropout=0.5), torch.randn(64, K)
    module.eval()
    still = module(x)
    torch.testing.assert_close(still, equation(module, x, module.weight).float(), rtol=1e-4, atol=1e-4)
    module.train()
    torch.manual_seed(5)
    first, second = module(x), module(x)
    torch.manual_seed(5)
    assert torch.equal(module(x), first) and not torch.equal(first, second)
    assert (first - still).abs().mean() > 0.1
    base = F.linear(x, module.weight, module.bias)
    module.config = TarpConfig(r=R, dropout=0.999)
    assert ((module(x) - base).abs().amax(1) < 1e-5).float().mean() > 0.9, "dropout must not touch the base product"


def test_wrong_layers_are_refused():
    with pytest.raises(TypeError, match="linear: got Embedding, expected torch.nn.Linear"):
        TarpLinear.from_linear(nn.Embedding(3, 4), TarpConfig())
    with pytest.raises(TypeError, match="linear: got Conv1D.*TarpConv1D"):
        TarpLinear.from_linear(Conv1D(3, 4), TarpConfig())
    with pytest.raises(TypeError, match="conv1d: got Linear"):
        TarpConv1D.from_conv1d(nn.Linear(3, 4), TarpConfig())


def test_printed_form_names_what_matters():
    text = repr(layer(sigma="full", bias=False))
    for part in ("TarpLinear", "in_features=12", "out_features=20", "bias=False", "sigma=full", "r=3"):
        assert part in text
