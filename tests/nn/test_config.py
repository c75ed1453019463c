"""`TarpConfig`: what it accepts, what it names when it refuses, and that it survives a file."""

import json
from dataclasses import FrozenInstanceError, asdict

import pytest

from tarp_kernels import SearchCellConfig, TarpConfig


def test_defaults_are_the_documented_ones():
    config = TarpConfig()
    expected = {
        "r": 8,
        "kind": "dynamic",
        "sigma": "diag",
        "generator": "linear",
        "generator_hidden": None,
        "hidden_activation": "silu",
        "activation": "one_plus",
        "generator_bias": False,
        "multiplicative": "none",
        "multiplicative_activation": "centred_softplus",
        "product": "hadamard",
        "kronecker_terms": 4,
        "additive": True,
        "scaling": 1.0,
        "dropout": 0.0,
        "init": "identity",
        "target_modules": None,
        "layers": None,
        "rank_pattern": None,
        "train_layernorm": False,
        "search_cell": None,
    }
    assert asdict(config) == expected
    with pytest.raises(FrozenInstanceError):
        config.r = 4


@pytest.mark.parametrize(("sigma", "outputs"), [("diag", 5), ("full", 25)])
def test_generator_outputs(sigma, outputs):
    assert TarpConfig(r=5, sigma=sigma).generator_outputs == outputs


@pytest.mark.parametrize(
    "field", ["kind", "sigma", "generator", "hidden_activation", "activation", "multiplicative", "product", "init"]
)
def test_unknown_choices_name_the_field_and_the_choices(field):
    with pytest.raises(ValueError, match=rf"{field}: got 'wrong', expected one of '"):
        TarpConfig(**{field: "wrong"})


def test_search_cells_are_configured_by_their_own_class():
    with pytest.raises(TypeError, match="search_cell: got dict, expected None or SearchCellConfig"):
        TarpConfig(search_cell={"width": 64})
    config = TarpConfig(search_cell=SearchCellConfig(width=8, operations=("none", "conv3"), per_layer=True))
    assert TarpConfig.from_dict(json.loads(json.dumps(asdict(config)))) == config
    for values, words in (
        ({"width": 0}, "width: got 0"),
        ({"stem": "rms"}, "stem: got 'rms'"),
        ({"per_layer": 1}, "per_layer: got 1"),
        ({"operations": "conv3"}, "operations: got 'conv3', expected a tuple"),
        ({"operations": ("conv7",)}, "operations: got 'conv7', expected some of none, identity"),
        ({"operations": ("conv3", "none")}, r"in this order: \('none', 'conv3'\)"),
        ({"operations": ()}, "operations: got none"),
    ):
        with pytest.raises((TypeError, ValueError), match=words):
            SearchCellConfig(**values)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"product": "matmul"}, "product: got 'matmul' with multiplicative='none'.*expected multiplicative='static'"),
        ({"product": "matmul", "multiplicative": "dynamic"}, "got 'matmul' with multiplicative='dynamic'"),
        (
            {"product": "matmul", "multiplicative": "static", "multiplicative_activation": "softplus", "init": "paper"},
            r"'softplus', expected .* it computes \(I \+ P Q\) W",
        ),
        ({"multiplicative": "dynamic", "kind": "kronecker"}, "multiplicative: got 'dynamic' with kind='kronecker'"),
        ({"multiplicative": "dynamic", "multiplicative_activation": "softplus"}, r"init='identity', but Φ\(x\) = 0"),
    ],
)
def test_forms_that_do_not_go_together_say_so(values, words):
    with pytest.raises(ValueError, match=words):
        TarpConfig(**values)


def test_what_the_activation_means_for_a_factor_made_from_the_input():
    def meaning(activation, multiplicative="dynamic"):
        config = TarpConfig(multiplicative=multiplicative, multiplicative_activation=activation, init="paper")
        return config.factor_activation

    assert [meaning(name) for name in ("centred_softplus", "one_plus", "softplus")] == ["one_plus", "one_plus", "none"]
    assert [meaning(name, "static") for name in ("one_plus", "softplus")] == ["one_plus", "softplus"]


@pytest.mark.parametrize(
    ("values", "error", "word"),
    [
        ({"r": 0}, ValueError, "r: got 0"),
        ({"additive": False}, ValueError, "additive: got False without a multiplicative part"),
        ({"additive": 1}, TypeError, "additive: got 1"),
        ({"r": -3}, ValueError, "r: got -3"),
        ({"r": 2.0}, TypeError, "r: got 2.0"),
        ({"r": True}, TypeError, "r: got True"),
        ({"generator_hidden": 0}, ValueError, "generator_hidden"),
        ({"generator_hidden": "8"}, TypeError, "generator_hidden"),
        ({"rank_pattern": {"q_proj": 0}}, ValueError, r"rank_pattern\['q_proj'\]"),
        ({"dropout": 1.0}, ValueError, "dropout"),
        ({"dropout": -0.1}, ValueError, "dropout"),
        ({"dropout": "0.1"}, ValueError, "dropout"),
        ({"scaling": "1"}, TypeError, "scaling"),
        ({"scaling": True}, TypeError, "scaling"),
    ],
)
def test_bad_numbers_are_refused(values, error, word):
    with pytest.raises(error, match=word):
        TarpConfig(**values)


def test_a_dictionary_from_json_gives_the_same_configuration():
    config = TarpConfig(
        r=3, sigma="full", target_modules=["q_proj"], layers=[0], rank_pattern={"q_proj": 2}, dropout=0.1
    )
    assert TarpConfig.from_dict(json.loads(json.dumps(asdict(config)))) == config
    with pytest.raises(ValueError, match="'colour'"):
        TarpConfig.from_dict({**asdict(config), "colour": 1})
