"""`generate` with a cache gives what it gives without one, where search cells look at the tokens before."""

import copy
import pickle

import pytest
import torch
from transformers import DynamicCache, StaticCache

from tarp_kernels import architecture, disable_tarp, task_parallel
from tarp_kernels.models_cells import search_cells
from tarp_kernels.nn import cell_cache
from tests.models.cell_models import MIXED, PUBLISHED, cell_model, one_hot
from tests.models.test_cells import stacked
from tests.models.tiny import base_model, inputs

FAMILIES = ("gpt2", "llama", "bart", "t5")
PROMPT = {"sequences": 3, "length": 6}
SEARCH = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "several": {"num_beams": 4, "num_return_sequences": 2, "early_stopping": True},
    "samples": {"do_sample": True, "num_return_sequences": 2, "top_k": 20},
}


def prompt(padded: bool) -> dict[str, torch.Tensor]:
    batch = inputs("llama", **PROMPT)
    batch.pop("labels")
    if padded:
        for row, padding in enumerate((4, 0, 2)):
            batch["attention_mask"][row, :padding] = 0
            batch["input_ids"][row, :padding] = 0
    return batch


def generate(model, batch, alpha, use_cache=True, **options):
    torch.manual_seed(3)
    given = {"max_new_tokens": 12, "output_scores": True, "return_dict_in_generate": True} | options
    with architecture(model, alpha):
        return model.generate(**batch, use_cache=use_cache, **given)


def assert_same(found, expected):
    assert torch.equal(found.sequences, expected.sequences)
    for one, other in zip(found.scores, expected.scores, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("padded", [False, True], ids=["full", "left padded"])
@pytest.mark.parametrize("search", SEARCH)
@pytest.mark.parametrize("operations", [PUBLISHED, MIXED], ids=["published", "mixed"])
def test_with_and_without_cache(family, padded, search, operations):
    model, batch, alpha = cell_model(family, dtype=torch.float64), prompt(padded), one_hot(operations)
    expected = generate(model, batch, alpha, use_cache=False, **SEARCH[search])
    assert_same(generate(model, batch, alpha, **SEARCH[search]), expected)
    assert not any(cell.calls.open for cell in search_cells(model).values())


def different(found, expected) -> bool:
    if found.sequences.shape != expected.sequences.shape or not torch.equal(found.sequences, expected.sequences):
        return True
    return any((a - b).abs().nan_to_num().max() > 1e-3 for a, b in zip(found.scores, expected.scores, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_would_go_wrong_is_noticed(family, monkeypatch):
    """States that are forgotten, that beams do not move, and padding that flows into them."""
    model, alpha = cell_model(family, dtype=torch.float64), one_hot(PUBLISHED)
    greedy, beams = (generate(model, prompt(True), alpha, False, **SEARCH[name]) for name in ("greedy", "beams"))
    with monkeypatch.context() as patch:
        patch.setattr(cell_cache.CellCache, "before", lambda *_: None)
        assert different(generate(model, prompt(True), alpha), greedy)
    with monkeypatch.context() as patch:
        patch.setattr(cell_cache._CarriesCells, "_move", lambda *_: None)
        assert different(generate(model, prompt(True), alpha, **SEARCH["beams"]), beams)
    if family in ("gpt2", "llama"):
        for cell in search_cells(model).values():
            proper = cell._beside
            monkeypatch.setattr(cell, "_beside", lambda h, call, run=proper: run(h, call._replace(mask=None)))
        assert different(generate(model, prompt(True), alpha), greedy)


def pickled(cache):
    return pickle.loads(pickle.dumps(cache))


@pytest.mark.parametrize("twin", [copy.deepcopy, pickled])  # as those who keep a prompt's cache make
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_in_chunks_by_hand(family, twin):
    model, batch = cell_model(family, dtype=torch.float64), prompt(False)
    ids, cache, found = batch["input_ids"], DynamicCache(config=model.config), []
    with architecture(model, one_hot()), torch.no_grad():
        whole = model(ids, use_cache=False).logits
        for chunk in ids.split([3, 1, 2], dim=1):
            found.append(model(chunk, past_key_values=cache).logits)
            cache = twin(cache)
        torch.testing.assert_close(torch.cat(found, 1), whole)
        cache.reset()
        torch.testing.assert_close(model(ids, past_key_values=cache).logits, whole)


def test_a_copy_of_a_cache_goes_its_own_way():
    model, batch = cell_model("llama", dtype=torch.float64), prompt(False)
    ids, cache = batch["input_ids"], DynamicCache(config=model.config)
    with architecture(model, one_hot()), torch.no_grad():
        model(ids[:, :3], past_key_values=cache)
        kept = copy.deepcopy(cache)
        first = model(ids[:, 3:], past_key_values=cache).logits
        torch.testing.assert_close(model(ids[:, 3:], past_key_values=kept).logits, first)
        kept.batch_select_indices(torch.tensor([2, 0]))
        kept.batch_repeat_interleave(2)
        rows = [2, 2, 0, 0]
        following = torch.tensor([[5], [5], [6], [6]])
        found = model(following, past_key_values=kept).logits
        whole = model(torch.cat([ids[rows], following], 1), use_cache=False).logits[:, -1:]
        torch.testing.assert_close(found, whole)


@pytest.mark.parametrize("family", FAMILIES)
def test_tasks_generate_at_once(family):
    model, batch = cell_model(family, dtype=torch.float64), prompt(True)
    stack, alphas = stacked(model, 2), torch.stack([one_hot(PUBLISHED), one_hot(MIXED)])
    with task_parallel(model, stack, torch.tensor([0, 1, 3])):
        expected = generate(model, batch, alphas, use_cache=False, num_beams=2)
        assert_same(generate(model, batch, alphas, num_beams=2), expected)
        assert different(generate(model, batch, alphas.flip(0), num_beams=2), expected)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_without_cells_a_cache_stays_as_it_was(family):
    model, batch = cell_model(family), prompt(False)
    with disable_tarp(model):
        cache = generate(model, batch, one_hot()).past_key_values
    assert type(cache) is DynamicCache and not hasattr(cache, "cell_states")
    carried = generate(model, batch, one_hot()).past_key_values
    assert isinstance(carried, DynamicCache) and type(carried).__name__ == "DynamicCache"


def test_caches_that_cannot_carry_the_states_are_refused():
    model, batch = cell_model("llama"), prompt(False)
    ids, one = batch["input_ids"], torch.full((3, 1), 5)
    with torch.no_grad():
        with pytest.raises(ValueError, match="past_key_values: got StaticCache.*DynamicCache|attention_mask: got"):
            model.generate(**batch, max_new_tokens=3, cache_implementation="static")
        with pytest.raises(ValueError, match="past_key_values: got StaticCache.*use DynamicCache"):
            model(ids, past_key_values=StaticCache(config=model.config, max_cache_len=16))
        made_inside = model(ids, use_cache=True).past_key_values
        with pytest.raises(ValueError, match="past_key_values: holds 6 tokens, .* has seen 0; .*DynamicCache"):
            model(one, past_key_values=made_inside)
        cache = DynamicCache(config=model.config)
        with disable_tarp(model):
            model(ids, past_key_values=cache)
        with pytest.raises(ValueError, match="has seen 0"):
            model(one, past_key_values=cache)
        assistant = base_model("llama", seed=5)  # another model, some of whose guesses are wrong
        with pytest.raises(ValueError, match="cropped"):
            model.generate(ids[:1], assistant_model=assistant, max_new_tokens=20, do_sample=False)
    with pytest.raises(ValueError, match="past_key_values: got a cache in training mode"):
        model.train().gradient_checkpointing_enable()
        model(ids, past_key_values=DynamicCache(config=model.config))


def test_a_cropped_cache_is_refused():
    model, batch = cell_model("llama"), prompt(False)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(batch["input_ids"], past_key_values=cache)
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[:, :, :-2], layer.values[:, :, :-2]
        with pytest.raises(ValueError, match="holds 4 tokens, of which .* has seen 6"):
            model(torch.full((3, 1), 5), past_key_values=cache)
