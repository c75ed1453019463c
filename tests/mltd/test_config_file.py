"""Settings from YAML and the command line: what is read, what wins, and what a mistake says."""

import math
from dataclasses import asdict, replace

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mltd import InnerConfig, MetaConfig, Temperature
from mltd.config_file import ConfigError, as_yaml, load_config, write_config
from mltd.run_config import DataConfig, ModelConfig, RunConfig
from tarp_kernels import SearchCellConfig, TarpConfig

MODEL = "model: {name: somewhere}\n"


def load(tmp_path, text: str, *overrides: str) -> RunConfig:
    (tmp_path / "settings.yaml").write_text(text)
    return load_config(tmp_path / "settings.yaml", overrides)


def test_a_file_fills_the_dataclasses_and_the_command_line_wins(tmp_path):
    text = """
model: {name: here, dtype: bfloat16}
data: {path: tasks.jsonl, test_tasks: [a, b]}
method: mltd
tarp: {r: 4, target_modules: [q_proj, v_proj], search_cell: {width: 16}}
meta:
  outer_lr: 1e-3
  temperature: {steps: 7}
  inner: {steps: 5, lr: 1e-2}
"""
    config = load(tmp_path, text, "meta.outer_lr=2e-4", "data.test_tasks=3", "meta.inner.clip=1", "steps=[0, 5]")
    assert config == RunConfig(
        ModelConfig("here", dtype="bfloat16"),
        DataConfig("tasks.jsonl", test_tasks=3),
        "mltd",
        TarpConfig(r=4, target_modules=["q_proj", "v_proj"], search_cell=SearchCellConfig(width=16)),
        MetaConfig(
            InnerConfig(steps=5, lr=1e-2, clip=1.0),
            outer_lr=2e-4,
            temperature=Temperature(steps=7),
            trains=("adapter", "controller"),
        ),
        steps=(0, 5),
    )


def test_overrides_alone_are_enough_and_the_last_one_wins():
    config = load_config(None, ["model.name=x", "tarp.r=2", "tarp.r=3", "model.attn_implementation=eager"])
    assert (config.model, config.tarp.r) == (ModelConfig("x", attn_implementation="eager"), 3)
    assert load_config(None, ["model.name=x"]).tarp == TarpConfig()


def test_an_override_reaches_into_what_the_file_leaves_out_or_empty(tmp_path):
    config = load(tmp_path, MODEL + "method: mltd\ntarp:\n", "tarp.search_cell.width=8")
    assert config.tarp.search_cell == SearchCellConfig(width=8)


@hypothesis.settings(deadline=None, max_examples=40)
@hypothesis.example(0.1, 0.0, "\x85")
@hypothesis.example(0.5, 0.0, "\x1a𐀀𐀀𐀀𐀀𐀀𝖘𝖙𝖚 𝖛")
@hypothesis.example(0.1, 0.0, "\x1a" + "\U00010000" * 60 + " a\x85b\u2028" + " word" * 40)
@given(st.floats(min_value=1e-300, max_value=1e300), st.floats(min_value=0, max_value=1), st.text())
def test_what_is_written_is_read_back_the_same(tmp_path_factory, lr, dropout, name):
    tarp = TarpConfig(dropout=min(dropout, 0.99), rank_pattern={r".*\.q_proj": 3}, layers=[0, 1])
    meta = MetaConfig(InnerConfig(lr=lr), outer_lr=lr, query_steps=(0, 3))
    config = RunConfig(ModelConfig(name), DataConfig(test_tasks=(name, "no", "1")), tarp=tarp, meta=meta, out=name)
    path = tmp_path_factory.getbasetemp() / "written.yaml"
    write_config(path, config)
    assert load_config(path) == config


def test_yaml_shows_the_settings_in_the_order_of_the_dataclasses():
    text = as_yaml(RunConfig(ModelConfig("x")))
    names = [line.split(":")[0] for line in text.splitlines() if not line.startswith((" ", "-"))]
    assert names == list(asdict(RunConfig(ModelConfig("x"))))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        pytest.param("a: 1\nb: [1,\n", "settings.yaml:3: is not YAML", id="broken"),
        pytest.param("seed: 1\nseed: 2\n", 'settings.yaml:2: is not YAML: found duplicate key "seed"', id="twice"),
        pytest.param("- 1\n", "holds a list, expected settings by name", id="list"),
        pytest.param("seed: 1\n", "model.name: is missing", id="no model"),
        pytest.param(MODEL + "sede: 1\n", "sede: no such setting; did you mean seed? expected one of", id="top"),
        pytest.param(MODEL + "meta: {outr_lr: 1}\n", "meta.outr_lr: no such setting; did you mean outer", id="meta"),
        pytest.param(MODEL + "meta: {inner: {zzz: 1}}", "meta.inner.zzz: no such setting; expected one of", id="inner"),
        pytest.param(
            MODEL + "method: mltd\ntarp: {search_cell: {widht: 1}}", "did you mean width? expected one of", id="cell"
        ),
        pytest.param(MODEL + "seed: three\n", "seed: got 'three', expected a valid integer", id="word"),
        pytest.param(MODEL + "seed: '3'\n", "seed: got '3', expected a valid integer", id="quoted"),
        pytest.param(MODEL + "seed: true\n", "seed: got True, expected a valid integer", id="bool"),
        pytest.param(MODEL + "seed: 1.5\n", "seed: got 1.5, expected a valid integer", id="fraction"),
        pytest.param(MODEL + "meta: 1\n", "meta: got 1, expected an object", id="group"),
        pytest.param(MODEL + "meta: {inner: {lr: -1}}\n", "meta.inner.lr: got -1", id="range"),
        pytest.param(MODEL + "tarp: {kind: dyn}\n", "tarp.kind: got 'dyn', expected one of", id="choice"),
        pytest.param(MODEL + "model: {}\n", "duplicate key", id="model twice"),
        pytest.param("model: {name: x, kind: text}\n", "model.kind: got 'text', expected 'causal'", id="literal"),
        pytest.param(MODEL + "method: magic\n", "method: got 'magic', expected one of zero-shot", id="method"),
        pytest.param(MODEL + "steps: []\n", "steps: got ()", id="steps"),
    ],
)
def test_a_mistake_names_the_file_the_setting_and_what_was_expected(text, says, tmp_path):
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    assert says in str(caught.value)
    assert str(tmp_path / "settings.yaml") in str(caught.value)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        pytest.param("seed", "--set: got 'seed', expected name=value", id="no value"),
        pytest.param("=3", "--set: got '=3', expected name=value", id="no name"),
        pytest.param("seed=[1", "--set seed: the value '[1' is not YAML", id="broken"),
        pytest.param("model.name.first=1", "--set model.name.first: name is the value 'somewhere'", id="inside"),
        pytest.param("meta.outer=1", "meta.outer: no such setting; did you mean outer_lr?", id="unknown"),
    ],
)
def test_a_mistake_on_the_command_line_is_named(override, says, tmp_path):
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, MODEL, override)
    assert says in str(caught.value)


def test_text_in_another_encoding_is_refused(tmp_path):
    (tmp_path / "settings.yaml").write_bytes("model: {name: Zürich}".encode("latin-1"))
    with pytest.raises(ConfigError, match="is not text in UTF-8"):
        load_config(tmp_path / "settings.yaml")


# --- what the method decides ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "adapts", "trains", "objective"),
    [
        ("tarp", ("adapter",), ("adapter",), "first_order"),
        ("tarp-multitask", ("adapter",), ("adapter",), "multitask"),
        ("maml", ("all",), ("all",), "first_order"),
        ("reptile", ("all",), ("all",), "reptile"),
    ],
)
def test_the_method_decides_what_is_adapted_and_trained(method, adapts, trains, objective, tmp_path):
    meta = load(tmp_path, MODEL, f"method={method}").meta
    assert (meta.inner.adapts, meta.trains, meta.objective) == (adapts, trains, objective)


def test_methods_without_training_keep_what_adaptation_needs(tmp_path):
    assert load(tmp_path, MODEL, "method=finetune").meta.inner.adapts == ("all",)
    nothing = load(tmp_path, MODEL, "method=zero-shot", "meta.inner.steps=2").meta.inner
    assert (nothing.adapts, nothing.steps) == ((), 0)


def test_a_choice_that_the_method_leaves_open_is_kept(tmp_path):
    assert load(tmp_path, MODEL, "method=maml", "meta.objective=second_order").meta.objective == "second_order"


@pytest.mark.parametrize(
    ("method", "override"),
    [
        ("tarp", "meta.trains=[all]"),
        ("tarp", "meta.inner.adapts=[tarp]"),
        ("tarp", "meta.objective=reptile"),
        ("tarp", "tarp.search_cell.width=8"),
        ("tapt", "meta.validate_every=2"),
    ],
)
def test_what_contradicts_the_method_is_refused(method, override, tmp_path):
    with pytest.raises(ConfigError, match=f"{override.split('=')[0].removesuffix('.width')}: got .* decides it"):
        load(tmp_path, MODEL, f"method={method}", override)


def test_settings_that_agree_with_the_method_are_no_contradiction(tmp_path):
    config = load(tmp_path, MODEL, "method=reptile", "meta.objective=reptile", "meta.trains=[all]")
    assert config == load(tmp_path, MODEL, "method=reptile")
    assert replace(config, meta=replace(config.meta, outer_lr=math.pi)) != config
