"""Task sets, their leaks, the sampler, and what is refused before any training starts."""

from types import SimpleNamespace

import pytest
import torch

from mltd import Example, Task, TaskSampler, TaskSet, collate
from mltd.tasks import check_fits
from tests.mltd.conftest import LONGEST, VOCABULARY, bare_model, random_tasks

ONE, TWO, THREE = Example((1, 2, 3), (-100, 2, 3)), Example((4, 5), (-100, 5)), Example((6, 7, 8, 9), (6, 7, 8, 9))


def test_a_task_counts_the_tokens_that_a_model_can_predict():
    assert ONE.scored == 2 and THREE.scored == 3  # nothing comes before the first token
    assert Task("a", [list(map(list, ONE))], [TWO]) == Task("a", (ONE,), (TWO,))


@pytest.mark.parametrize(
    ("support", "query", "complaint"),
    [
        ([], [ONE], r"task 'odd': support: got no example"),
        ([ONE], [], r"task 'odd': query: got no example"),
        ([ONE], [TWO, Example((), ())], r"task 'odd': query\[1\]: got no token"),
        ([Example((1, 2), (1,))], [ONE], r"task 'odd': support\[0\]: got 1 labels for 2 tokens"),
        ([Example((1, 2), (-100, -100))], [ONE], r"task 'odd': support: got no scored token"),
        ([ONE], [Example((1, 2), (1, -100))], r"task 'odd': query: got no scored token"),
    ],
)
def test_a_task_that_cannot_be_learnt_is_named(support, query, complaint):
    with pytest.raises(ValueError, match=complaint):
        Task("odd", support, query)


def test_a_task_that_does_not_fit_the_model_is_named():
    model = bare_model()
    too_long = Example((1,) * (LONGEST + 1), (1,) * (LONGEST + 1))
    check_fits([Task("fits", [ONE], [Example((1,) * LONGEST, (1,) * LONGEST)])], model)
    with pytest.raises(
        ValueError, match=rf"task 'b': query\[1\]: got {LONGEST + 1} tokens, expected at most {LONGEST}"
    ):
        check_fits([Task("a", [ONE], [TWO]), Task("b", [ONE], [TWO, too_long])], model)
    with pytest.raises(ValueError, match=rf"task 'c': support\[0\]: got token {VOCABULARY}"):
        check_fits([Task("c", [Example((1, VOCABULARY), (1, VOCABULARY))], [TWO])], model)
    with pytest.raises(ValueError, match=r"task 'd': support\[0\]: got token -3"):
        check_fits([Task("d", [Example((1, -3, 2), (1, -100, 2))], [TWO])], model)
    with pytest.raises(ValueError, match="encoder-decoder"):
        check_fits([Task("e", [TWO], [TWO])], SimpleNamespace(config=SimpleNamespace(is_encoder_decoder=True)))


def test_a_task_set_is_a_sequence_with_names():
    tasks = TaskSet([Task("a", [ONE], [TWO]), Task("b", [TWO], [THREE]), Task("c", [ONE], [THREE])], "train")
    assert tasks.names == ("a", "b", "c") and len(tasks) == 3 and tasks[1].name == "b"
    assert tasks[1:].names == ("b", "c") and isinstance(tasks[1:], TaskSet)
    assert tasks.select(["c", "a"]).names == ("c", "a") and tasks.select(["a"], name="test").name == "test"
    with pytest.raises(ValueError, match="nowhere"):
        tasks.select(["a", "nowhere"])
    with pytest.raises(ValueError, match="two tasks named 'a'"):
        TaskSet([Task("a", [ONE], [TWO]), Task("a", [ONE], [THREE])])
    assert tasks.fingerprint() == TaskSet(list(tasks), "other").fingerprint() != tasks[:2].fingerprint()


def test_leaks_are_named_and_only_leaks():
    train = TaskSet([Task("a", [ONE, TWO], [THREE]), Task("b", [TWO], [THREE])], "train")
    assert train.check_leaks() == []
    relabelled = Example(ONE.input_ids, (1, 2, 3))
    leaky = TaskSet([Task("x", [TWO, ONE], [relabelled])], "leaky")
    (leak,) = leaky.check_leaks()
    assert leak == ("support/query", "leaky/x/support[1]", "leaky/x/query[0]")
    assert str(leak) == "the same tokens in leaky/x/support[1] and in leaky/x/query[0]"

    test = TaskSet([Task("b", [Example((9, 9), (9, 9))], [ONE])], "test")
    assert set(train.check_leaks(test)) == {
        ("name", "train/b", "test/b"),
        ("example", "train/a/support[0]", "test/b/query[0]"),
    }
    clean = TaskSet([Task("z", [Example((1, 2), (1, 2))], [Example((1, 2, 3, 4), (1, 2, 3, 4))])], "test")
    assert train.check_leaks(clean) == []


@pytest.mark.parametrize("per_batch", [1, 2, 3, 5])
def test_the_sampler_draws_every_task_once_an_epoch_and_none_twice_in_a_batch(per_batch):
    tasks = random_tasks(5)
    sampler = TaskSampler(tasks, per_batch, seed=3)
    drawn = []
    for _ in range(20):
        batch = [task.name for task in next(sampler)]
        assert len(set(batch)) == per_batch
        drawn += batch
    for name in tasks.names:
        assert abs(drawn.count(name) - len(drawn) / 5) < 1
    assert drawn[:5] != list(tasks.names) or drawn[5:10] != list(tasks.names)  # shuffled


def test_the_sampler_goes_on_from_its_state():
    tasks = random_tasks(5)
    sampler = TaskSampler(tasks, 3, seed=7)
    for _ in range(4):
        next(sampler)
    state = sampler.state_dict()
    expected = [next(sampler) for _ in range(6)]
    resumed = TaskSampler(tasks, 3, seed=0)
    resumed.load_state_dict(state)
    assert [next(resumed) for _ in range(6)] == expected
    other = TaskSampler(tasks, 3, seed=8)
    assert [next(other) for _ in range(10)] != [next(TaskSampler(tasks, 3, seed=7)) for _ in range(10)]
    with pytest.raises(ValueError, match="made for 5 tasks, expected 4"):
        TaskSampler(tasks[:4], 3, seed=0).load_state_dict(state)
    with pytest.raises(ValueError, match="tasks_per_batch: got 6 for 5 tasks"):
        TaskSampler(tasks, 6, seed=0)


def test_collate_pads_on_the_right():
    batch = collate([ONE, THREE], pad_id=50)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 50], [6, 7, 8, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[-100, 2, 3, -100], [6, 7, 8, 9]]
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())
