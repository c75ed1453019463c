"""The measuring core: no time behind a red gate, ratios to the baseline, tables that say what was measured."""

import math
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from rich.console import Console

from mltd.bench import contenders, layers, memory, models, table
from mltd.bench.cases import Case, GateError, Timing, interleaved, measure
from mltd.bench.run import run_bench
from tarp_kernels import TarpConfig, TarpLinear, available_backends

SHAPE = "12x40x56x3"


def case_of(calls, gate=lambda: 0.0, baseline="a"):
    return Case("forward", SHAPE, calls, gate, baseline, rounds=5)


def test_nothing_is_timed_behind_a_red_gate():
    def red():
        raise GateError("different results")

    def call():
        raise AssertionError("was timed")

    with pytest.raises(GateError, match="different results"):
        measure(case_of({"a": call}, red))


def test_ratios_are_medians_over_the_baseline(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("mltd.bench.cases.time.perf_counter", lambda: now[0])

    def lasting(*seconds):
        durations = iter(seconds)
        return lambda: now.__setitem__(0, now[0] + next(durations))

    # two warm-up runs, which must not count, then five rounds
    calls = {"a": lasting(9, 9, 2, 2, 2, 2, 70), "b": lasting(9, 9, 8, 4, 5, 6, 7)}
    rows = {row.contender: row for row in measure(case_of(calls))}
    assert (rows["a"].ratio, rows["a"].p50_ms) == (1, 2000)
    assert (rows["b"].ratio, rows["b"].p50_ms) == (3, 6000)
    assert rows["b"].p20_ms == pytest.approx(4800) and rows["b"].p80_ms == pytest.approx(7200)
    assert rows["b"].rounds == 5


def test_contenders_take_turns_and_every_round_begins_with_another():
    order = []
    times = interleaved({name: lambda name=name: order.append(name) for name in "abc"}, 3)
    assert "".join(order) == "aabbcc" + "abc" + "bca" + "cab"
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3, "c": 3}


@pytest.mark.parametrize("kind", ["forward", "forward+backward", "decode", "multiplicative", "multiplicative cached"])
def test_layer_gates_are_green_for_the_layer_as_it_is(kind):
    case = layers.layer_case(kind, SHAPE, 2)
    assert set(case.calls) == {"linear", "tarp", "unfused", "peft_lora"}
    assert case.gate() < 1e-4


def spoil_output(layer, x, weight):
    return RIGHT(layer, x, weight) * 1.001


def spoil_idle(layer, x, weight):
    return torch.nn.functional.linear(x, weight, layer.bias)


def spoil_gradient(layer, x, weight):
    # the values are right, but nothing flows back to x
    return RIGHT(layer, x.detach(), weight) + 0 * x.sum()


def spoil_cache(layer, x, weight):
    layer.cache = None
    return RIGHT(layer, x, weight)


def spoil_cached_product(layer, x, weight):
    y = RIGHT(layer, x, weight)
    if layer.cache is not None:
        layer.cache.kept = layer.weight  # without Φ
        y = RIGHT(layer, x, weight)
    return y


RIGHT = TarpLinear._adapt


@pytest.mark.parametrize(
    ("kind", "spoil"),
    [
        ("forward", spoil_output),
        ("forward", spoil_idle),
        ("decode", spoil_idle),
        ("multiplicative cached", spoil_cache),
        ("multiplicative cached", spoil_cached_product),
        ("forward+backward", spoil_output),
        ("forward+backward", spoil_idle),
        ("forward+backward", spoil_gradient),
    ],
)
def test_layer_gates_are_red_for_a_wrong_or_idle_layer(kind, spoil, monkeypatch):
    monkeypatch.setattr(TarpLinear, "_adapt", spoil)
    with pytest.raises(GateError):
        layers.layer_case(kind, SHAPE, 2).gate()


def test_deviation_is_measured_against_what_the_adapter_adds():
    base, added = torch.full((4,), 1000.0), torch.full((4,), 0.5)
    assert contenders.deviation(base + added, base + added, base, "y") == 0
    with pytest.raises(GateError, match="off by"):  # 1e-6 of the output, but 0.2 % of the adapter's part
        contenders.deviation(base + added * 1.002, base + added, base, "y")
    with pytest.raises(GateError):
        contenders.deviation(base, base, base, "y")
    with pytest.raises(GateError):
        contenders.deviation(base * math.nan, base + added, base, "y")


def test_the_unfused_layer_is_the_equation_and_knows_no_other_form():
    layer = TarpLinear.from_linear(torch.nn.Linear(7, 5), TarpConfig(r=2))
    contenders.stir(layer)
    x = torch.randn(3, 7)
    s, h = 1 + x @ layer.w1.T, x @ layer.V.T
    expected = x @ layer.weight.T + layer.bias + (s * h) @ layer.U.T
    torch.testing.assert_close(contenders.unfused_layer(layer)(x), expected)
    others = {"sigma": "full"}, {"multiplicative": "dynamic"}, {"multiplicative": "static", "product": "matmul"}
    for other in others:
        with pytest.raises(ValueError, match="the default form"):
            contenders.unfused_layer(TarpLinear.from_linear(torch.nn.Linear(7, 5), TarpConfig(r=2, **other)))


def test_a_whole_model_is_compared_by_its_logits(small_llama, tmp_path):
    case = models.whole_model_case(tmp_path, batch=2, length=5)
    assert list(case.calls) == ["base", "tarp", "unfused"] and "random weights" in case.shape
    assert case.calls["tarp"]().shape == (2, 5, 49152)
    assert case.gate() < 1e-3


def test_a_whole_models_gate_is_red_when_one_layer_is_wrong(small_llama, tmp_path, monkeypatch):
    case = models.whole_model_case(tmp_path, batch=2, length=5)
    monkeypatch.setattr(TarpLinear, "_adapt", spoil_output)
    with pytest.raises(GateError, match="logits"):
        case.gate()


def test_inner_steps_agree_at_once_and_task_by_task(small_llama):
    case = models.inner_steps_case(shots=2)
    assert list(case.calls) == ["tarp task by task", "tarp at once", "unfused task by task", "unfused at once"]
    assert case.gate() < 2e-3


def test_the_inner_steps_gate_is_red_when_tasks_are_mixed_up(small_llama, monkeypatch):
    case = models.inner_steps_case(shots=2)
    adapt = models.adapt

    def mixed(model, tasks, config):
        return {name: value.roll(1, 0) for name, value in adapt(model, tasks, config).items()}

    monkeypatch.setattr(models, "adapt", mixed)
    with pytest.raises(GateError, match="moved otherwise"):
        case.gate()


def test_the_inner_steps_gate_is_red_when_nothing_moves(small_llama, monkeypatch):
    case = models.inner_steps_case(shots=2)
    adapt = models.adapt
    monkeypatch.setattr(models, "adapt", lambda model, tasks, config: adapt(model, tasks, replace(config, steps=0)))
    with pytest.raises(GateError):
        case.gate()


def timing(kind, contender, ratio, baseline="linear", shape=SHAPE):
    return Timing(kind, shape, contender, baseline, ratio, 1.0, 1.0 * ratio, 2.0, 5, 1e-6)


def test_goals_are_held_against_geometric_means():
    rows = [timing("forward", "linear", 1.0), timing("forward", "linear", 1.0, shape="other")]
    rows += [timing("forward", "tarp", 0.5), timing("forward", "tarp", 2.0, shape="other")]
    rows += [timing("decode", "linear", 1.0), timing("decode", "tarp", 1.3)]
    rows += [timing("inner steps 1-shot", "unfused task by task", 1.0, "unfused task by task")]
    rows += [timing("inner steps 1-shot", "tarp at once", 0.25, "unfused task by task")]
    frame = table.speed_frame(rows)
    found = {verdict["kind"]: verdict for verdict in table.verdicts(frame)}
    assert found["forward"]["measured"] == pytest.approx(1.0) and found["forward"]["ok"]
    assert found["decode"]["measured"] == pytest.approx(1.3) and not found["decode"]["ok"]
    assert found["inner steps 1-shot"]["measured"] == pytest.approx(4.0) and found["inner steps 1-shot"]["ok"]
    console = Console(record=True, width=160, file=open("/dev/null", "w"))
    table.print_speed(frame, console)
    text = console.export_text()
    assert "geometric mean" in text and "missed" in text and "reached" in text


def test_a_red_case_is_named_and_left_out_of_the_table(tmp_path, monkeypatch):
    monkeypatch.setattr(TarpLinear, "_adapt", spoil_idle)
    console = Console(record=True, width=160, file=open("/dev/null", "w"))
    assert run_bench(tmp_path, [SHAPE], 2, ["layers"], console) == 1
    assert "its gate is red" in console.export_text()
    assert not (tmp_path / "speed.csv").exists()


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux' /proc")
def test_memory_of_unfused_pytorch_is_seen():
    """Three products of T×N are alive at its peak, so 2 y beside y; a plain layer has nothing beside y."""
    found = memory.measure_memory(["2048x64x1024x4"])
    rows = {row.contender: row for row in found if row.kind == "additive"}
    assert rows["linear"].output_mib == pytest.approx(8)
    assert rows["linear"].peak_mib < 1
    assert rows["unfused"].peak_mib == pytest.approx(16, abs=1)


@pytest.mark.native
@pytest.mark.skipif("cpu" not in available_backends(), reason="the native backend is not built")
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux' /proc")
def test_a_factor_takes_less_than_a_twentieth_of_the_weight():
    """Its buffers that stay counted in; unfused PyTorch writes the factor and its product with W out."""
    W = 4096 * 4096 * 4 / 2**20  # MiB
    found = memory.measure_memory(["64x4096x4096x8"])
    rows = {row.contender: row for row in found if row.kind == "multiplicative"}
    assert rows["tarp"].peak_mib + rows["tarp"].kept_mib < W / 20
    assert rows["unfused"].peak_mib > 1.9 * W, "the system does not show what it should"


def test_csv_lines_name_machine_and_versions(tmp_path):
    table.save(table.speed_frame([timing("forward", "linear", 1.0)]), tmp_path / "deep" / "speed.csv")
    (line,) = pd.read_csv(tmp_path / "deep" / "speed.csv").to_dict("records")
    assert line["torch"] == torch.__version__.partition("+")[0] or line["torch"] == torch.__version__
    assert line["threads"] == torch.get_num_threads() and line["cpu"] and line["time"]
