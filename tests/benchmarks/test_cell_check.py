"""The part of benchmarks/gpu_check.py about the search cell, as far as it needs no GPU."""

import time

import pytest
import torch

from benchmarks import cell_check
from benchmarks.measuring import served, wrong
from tarp_kernels import available_backends
from tests.lowrank_linear.cuda_runs import needs_nvcc
from tests.lowrank_linear.triton_runs import on_ptx_machine
from tests.search_cell.cuda_runs import cells_on_ptx_machine

CPU = torch.device("cpu")
VALUES, SLOPES = cell_check.TOLERANCE[torch.bfloat16]


def test_calls_cover_every_form_and_name_it():
    calls = list(cell_check.calls(CPU))
    names = [call.name for call in calls]
    assert len(set(names)) == len(names)
    words = (*cell_check.OPERATIONS, "dominant", "soft", "mixed", "padded", "packed", "tasks", "causal", "LayerNorm")
    for word in (*words, "one cell for all"):
        assert any(word in name for name in names), word
    assert any("causal" not in name for name in names)
    for call in calls:
        for tensor in (*call.tensors.values(), call.dout):
            assert torch.equal(tensor, tensor.bfloat16().double()), "rounded on the way into the call"


@pytest.mark.native
@pytest.mark.skipif("cpu" not in available_backends(), reason="the native backend is not built")
def test_the_native_backend_is_right():
    rows = cell_check.correctness(CPU, "cpu")
    assert [row for row in rows if not row["ok"]] == [] and len(rows) >= 80
    assert sum("beside the mixture" in row["call"] for row in rows) == 6
    assert sum("by steps" in row["call"] for row in rows) == 4


@pytest.mark.proof
@pytest.mark.parametrize(
    ("backend", "machine", "steps"),
    [("triton", on_ptx_machine, 2), pytest.param("cuda", cells_on_ptx_machine, 0, marks=needs_nvcc)],
    ids=["triton", "cuda"],
)
def test_the_backends_of_a_gpu_are_right_on_the_ptx_machine(backend, machine, steps, monkeypatch):
    few = [cell_check.make(None, "tasks", causal=False, norm=True, seed=1, device=CPU)]
    monkeypatch.setattr(cell_check, "calls", lambda device: few)
    monkeypatch.setattr(cell_check, "dtypes_of", lambda *_: [torch.bfloat16])
    with machine(80):
        rows = cell_check.correctness(CPU, backend)
    assert wrong(rows) == [] and len(rows) == 6
    assert served(rows)["search_cell"] == {backend: {"served": 4, "not served": 0}}
    assert served(rows)["search_cell_step"] == {backend: {"served": steps, "not served": 2 - steps}}


def other_side(call):
    return call._replace(options=call.options | {"causal": False})


def neighbours_cell(call):
    own = ("h", "alpha")
    return call._replace(tensors={n: t if n in own else t.roll(1, 0) for n, t in call.tensors.items()})


def neighbours_alpha(call):
    return call._replace(tensors=call.tensors | {"alpha": call.tensors["alpha"].roll(1, 0)})


def segment_one_row_off(call):
    moved = call.options["segments"].clone()
    moved[2] -= 1
    return call._replace(options=call.options | {"segments": moved})


def taps_flipped(call):
    return call._replace(tensors=call.tensors | {"conv5": call.tensors["conv5"].flip(-3)})


MUTANTS = [other_side, neighbours_cell, neighbours_alpha, segment_one_row_off, taps_flipped]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
@pytest.mark.parametrize("operations", [None, cell_check.MIXED], ids=["soft", "mixed"])
def test_the_widest_tolerance_sees_a_mistake(mutant, operations):
    call = cell_check.make(operations, "tasks", causal=True, norm=False, seed=1, device=CPU)
    errors = cell_check.errors(mutant(call).run("reference"), call.run("reference"), call.tensors["h"])
    assert errors["out"] > VALUES and max(errors.values()) > SLOPES


def test_padding_that_flows_and_a_state_that_is_forgotten_are_seen():
    call = cell_check.make(cell_check.MIXED, "padded", causal=True, norm=True, seed=3, device=CPU)
    wanted, h = call.run("reference"), call.tensors["h"]
    masked = call._replace(options={"causal": True})
    assert cell_check.errors(masked.run("reference"), wanted, h)["out"] > VALUES
    halves = [call._replace(tensors=call.tensors | {"h": part}, options={"causal": True}) for part in h.split(20, 1)]
    forgotten = torch.cat([half.steps("reference", (half.tensors["h"].shape[1],)) for half in halves], 1)
    whole = masked.run("reference")
    assert cell_check.errors({"out": forgotten}, {"out": whole["out"]}, h)["out"] > VALUES
    assert torch.allclose(masked.steps("reference", (20, 5)), whole["out"], rtol=1e-12)


def test_zeros_nan_and_a_missing_gradient_are_wrong():
    call = cell_check.make(None, "whole", causal=True, norm=False, seed=1, device=CPU)
    wanted, h = call.run("reference"), call.tensors["h"]
    assert cell_check.right(cell_check.errors(wanted, wanted, h), torch.float32)
    for name in wanted:
        for broken in (wanted | {name: wanted[name] * 0}, wanted | {name: wanted[name] * float("nan")}):
            assert not cell_check.right(cell_check.errors(broken, wanted, h), torch.bfloat16), name
    without = {name: value for name, value in wanted.items() if name != "conv3"}
    assert not cell_check.right(cell_check.errors(without, wanted, h), torch.bfloat16)


def test_every_contender_is_timed_and_what_the_deadline_cuts_off_is_named():
    rows, left_out = cell_check.speed(cell_check.SMALL, CPU, deadline=time.monotonic() + 600)
    assert left_out == []
    contenders = {(row["kind"], row["contender"]) for row in rows}
    both = {(kind, n) for kind in ("forward", "forward+backward") for n in ("mixture", "skipping", "masked", "cpu")}
    assert contenders == both | {("one token a sequence", n) for n in ("reference", "step", "cpu")}
    rows, left_out = cell_check.speed(cell_check.SMALL, CPU, deadline=time.monotonic() - 1)
    assert rows == [] and left_out == ["search_cell 2 x 24 tokens, d = 48, C = 16"]
