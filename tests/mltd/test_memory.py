"""The estimate of memory against what torch's profiler sees of a whole adaptation."""

import random

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from mltd import Example, InnerConfig, Task, adapt
from mltd.memory import estimate_memory
from tests.mltd.conftest import VOCABULARY, bare_model, tarp_model


def tasks_of(count, shots, length):
    draw = random.Random(0)

    def example():
        ids = tuple(draw.randrange(VOCABULARY) for _ in range(length))
        return Example(ids, ids)

    return [Task(f"t{i}", [example() for _ in range(shots)], [example()]) for i in range(count)]


def peak(call):
    """Bytes that lay beside what there was before, at most; a second call, as the first one makes things for good."""
    call()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        call()
    now = most = 0
    for event in sorted(watched.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize(("count", "shots"), [(1, 2), (8, 4)])
def test_the_estimate_is_near_what_is_taken(count, shots, optimizer):
    model, tasks = tarp_model(r=16), tasks_of(count, shots, 40)
    inner = InnerConfig(steps=2, optimizer=optimizer, lr=1e-3, max_tokens=10_000)
    found = estimate_memory(model, tasks, inner)
    taken = peak(lambda: adapt(model, tasks, inner))
    assert 0.75 * taken < found.tasks + found.activations < 1.25 * taken
    assert found.activations > 0.3 * taken and found.tasks > 0.1 * taken, "a part could be left out unseen"
    assert found.base == sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    assert "MiB" in str(found) and found.total == found.base + found.tasks + found.activations


def test_what_runs_one_by_one_and_what_is_cut_into_passes_takes_less():
    model, tasks = tarp_model(), tasks_of(6, 4, 40)
    whole = estimate_memory(model, tasks, InnerConfig(max_tokens=10_000))
    assert estimate_memory(model, tasks, InnerConfig(max_tokens=10_000), 2).tasks * 3 == whole.tasks
    cut = estimate_memory(model, tasks, InnerConfig(max_tokens=240))
    assert cut.tasks == whole.tasks and cut.activations == whole.activations // 4
    everything = estimate_memory(bare_model(), tasks, InnerConfig(adapts=("all",), max_tokens=10_000))
    assert everything.tasks == 4 * sum(p.numel() * p.element_size() for p in bare_model().parameters())


def test_bf16_products_keep_less():
    model, tasks = bare_model("gpt2"), tasks_of(1, 2, 40)
    whole = InnerConfig(adapts=("all",))
    assert (
        estimate_memory(model, tasks, InnerConfig(adapts=("all",), autocast="bf16")).activations
        < estimate_memory(model, tasks, whole).activations
    )
    assert torch.is_autocast_enabled("cpu") is False
