"""Passes cover every scored token once, and their losses are those that the model itself computes."""

from itertools import combinations, pairwise

import pytest
import torch

from mltd import Example, collate
from mltd.packing import PASS_COST, cheapest_cuts, pack
from tests.mltd.conftest import bare_model, loss_by_hand, random_tasks


@pytest.mark.parametrize("max_tokens", [1, 20, 50, 10_000])
def test_passes_cover_every_example_once_and_stay_within_the_limit(max_tokens):
    groups = [task.query for task in random_tasks(5, seed=2)]
    packed = pack(groups, max_tokens)
    seen = [[] for _ in groups]
    for one in packed.passes:
        count, length = one.inputs["input_ids"].shape
        assert count * length <= max(max_tokens, length) and (max_tokens > 1 or count == 1)
        offsets = one.offsets.offsets
        assert offsets[0] == 0 and offsets[-1] == count and len(one.positions) == sum(one.scored)
        for task, examples in enumerate(seen):
            for row in range(offsets[task], offsets[task + 1]):
                examples.append(tuple(one.inputs["input_ids"][row, : one.inputs["attention_mask"][row].sum()].tolist()))
    # the last token of each is predicted and never read
    assert [sorted(examples) for examples in seen] == [sorted(e.input_ids[:-1] for e in group) for group in groups]
    assert packed.scored == tuple(sum(e.scored for e in group) for group in groups)
    assert packed.tokens == sum(len(e.input_ids) - 1 for group in groups for e in group)


@pytest.mark.parametrize("max_tokens", [1, 60, 10_000])
def test_cuts_are_the_cheapest_of_all(max_tokens):
    lengths = [3, 4, 4, 5, 20, 21, 40, 41, 41]

    def cost(cuts):
        parts = list(pairwise(cuts))
        if any(j - i > 1 and (j - i) * lengths[j - 1] > max_tokens for i, j in parts):
            return float("inf")
        return sum((j - i) * lengths[j - 1] + PASS_COST for i, j in parts)

    inner = range(1, len(lengths))
    all_cuts = [[0, *some, len(lengths)] for count in range(len(lengths)) for some in combinations(inner, count)]
    assert cost(cheapest_cuts(lengths, max_tokens)) == min(map(cost, all_cuts)) < float("inf")


def test_equal_lengths_share_one_pass():
    assert cheapest_cuts([32] * 40, 1280) == [0, 40] and cheapest_cuts([32] * 40, 1279) != [0, 40]
    assert cheapest_cuts([], 5) == [0]


def test_an_example_without_a_scored_token_costs_nothing():
    scored, silent = Example((1, 2, 3), (1, 2, 3)), Example((4,) * 40, (-100,) * 40)
    packed = pack([(scored, silent), (scored,)], 1000)
    assert packed.examples == 2 and packed.passes[0].inputs["input_ids"].shape == (2, 2)
    with pytest.raises(ValueError, match="max_tokens"):
        pack([(scored,)], 0)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("max_tokens", [30, 10_000])
def test_losses_are_those_of_every_example_alone_and_of_the_models_own_loss(family, max_tokens):
    model, tasks = bare_model(family).double(), random_tasks(4, seed=5)
    packed = pack([task.query for task in tasks], max_tokens)
    with torch.no_grad():
        ours = sum(packed.loss_sums(model, one) for one in packed.passes) / torch.tensor(packed.scored)
        alone = torch.stack([loss_by_hand(model, task.query) for task in tasks])
        theirs = torch.stack([model(**collate(task.query, pad_id=7)).loss for task in tasks])  # float32 inside
    torch.testing.assert_close(ours, alone, rtol=1e-12, atol=0)
    torch.testing.assert_close(ours.float(), theirs, rtol=1e-5, atol=0)
    assert alone.std() > 0.01, "tasks too alike to tell them apart"


def test_what_comes_after_the_last_scored_token_is_not_read():
    model, generator = bare_model("gpt2").double(), torch.Generator().manual_seed(3)
    ids = [tuple(torch.randint(50, (9,), generator=generator).tolist()) for _ in range(3)]
    ends = (4, 8, 6)  # the last scored token of each
    pairs = zip(ids, ends, strict=True)
    group = [Example(row, tuple(i if 2 <= t <= end else -100 for t, i in enumerate(row))) for row, end in pairs]
    packed = pack([group], 10_000)
    (one,) = packed.passes
    assert one.inputs["input_ids"].shape == (3, 8) and packed.tokens == sum(ends)
    mean = packed.loss_sums(model, one) / sum(packed.scored)
    torch.testing.assert_close(mean, loss_by_hand(model, group)[None], rtol=1e-12, atol=0)


def test_the_output_head_sees_the_scored_positions_only_and_is_left_as_it_was():
    model, tasks = bare_model(), random_tasks(3)
    seen = []
    watch = model.lm_head.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    packed = pack([task.query for task in tasks], 10_000)
    for one in packed.passes:
        packed.loss_sums(model, one)
    watch.remove()
    assert seen == [(sum(one.scored), model.config.vocab_size) for one in packed.passes]
    assert not model.lm_head._forward_pre_hooks
