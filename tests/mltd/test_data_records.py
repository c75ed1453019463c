"""Records before any tokenizer: what counts as the same text, which groups there are, and splits that keep apart."""

import pytest

from mltd.data.duplicates import deduplicated, duplicates
from mltd.data.records import Record, at_least, label_groups, merged, normalised, pooled
from mltd.data.splits import GroupSplit, split_groups
from tests.mltd.data_parts import pairs


def test_case_white_space_and_punctuation_do_not_count_but_signs_alone_do():
    assert normalised("  Hi,   THERE! ") == "hi there"
    assert normalised(" ?! ") == "?!" != normalised("...")


def test_records_of_one_source_are_merged_with_each_reference_once():
    groups = {"e2e": (Record("mr", ("a",), "1"), Record("other", ("b",), "2"), Record("mr", ("c", "a"), "3"))}
    assert merged(groups) == {"e2e": (Record("mr", ("a", "c"), "1"), Record("other", ("b",), "2"))}


def test_groups_of_too_few_units_are_left_out():
    turns = tuple(Record("", (letter,), letter, unit="dialogue 1") for letter in "abc")
    groups = {"persona": turns, "topic": pairs(("a", "b"), ("c", "d"))}
    assert set(at_least(groups, 1)) == {"persona", "topic"}
    assert set(at_least(groups, 2)) == {"topic"}


def test_pooled_groups_keep_ids_and_units_apart():
    one = pooled({"a": (Record("", ("x",), "1", "u"),), "b": (Record("", ("y",), "1"),)}, "wiki")["wiki"]
    assert [(record.id, record.unit, record.target) for record in one] == [("a/1", "a/u", "x"), ("b/1", "", "y")]


def test_labels_are_cut_into_disjoint_groups_the_same_every_time():
    records = tuple(Record(f"{label}{i}", (label,), f"{label}{i}") for label in "abcdefg" for i in range(2))
    made = label_groups({"bank": records}, ways=3)
    labels = [{record.target for record in group} for group in made.values()]
    assert list(made) == ["bank/1", "bank/2"] and [len(found) for found in labels] == [3, 3]
    assert not labels[0] & labels[1]
    assert all(len(group) == 6 for group in made.values())
    again = label_groups({"bank": records[::-1]}, ways=3)
    assert [{record.target for record in group} for group in again.values()] == labels
    others = [label_groups({"bank": records}, ways=3, seed=seed) for seed in range(1, 5)]
    assert any([{record.target for record in group} for group in made.values()] != labels for made in others)
    with pytest.raises(ValueError, match=r"ways: got 8, expected 2 ≤ ways ≤ 7, the labels of 'bank'"):
        label_groups({"bank": records}, ways=8)


# --- duplicates -------------------------------------------------------------------------------------------------------


def test_duplicates_are_named_however_they_are_spelt():
    mine = [("train/a", Record("How are you?", ("Fine.",), "1")), ("train/b", Record("x", ("fine",), "2"))]
    other = [("test/c", Record("how  are you", ("FINE",), "3")), ("test/d", Record("how are you", ("bad",), "4"))]
    found = duplicates(mine, other)
    assert [(one.first, one.second) for one in found] == [("train/a", "test/c")]
    assert str(found[0]) == "the same text in train/a and in test/c: 'how  are you\\nFINE'"
    by_target = {(one.first, one.second) for one in duplicates(mine, other, by="target")}
    assert by_target == {("train/a", "test/c"), ("train/b", "test/c")}


def test_any_common_reference_makes_a_duplicate_and_it_is_named_once():
    mine = [("a", Record("s", ("one", "two", "three"), "1"))]
    assert len(duplicates(mine, [("b", Record("S", ("Two", "three"), "2"))])) == 1
    assert duplicates(mine, [("b", Record("S", ("four",), "2"))]) == []


def test_a_text_stays_only_in_the_first_group_that_has_it():
    groups = {
        "second": pairs(("x", "Hello  there!"), ("y", "only here")),
        "first": pairs(("p", "hello there"), ("q", "Hello, there."), ("x", "hello there")),
    }
    assert deduplicated(groups, ["first", "second"]) == {"first": groups["first"], "second": groups["second"][1:]}
    assert deduplicated(groups)["second"] == groups["second"]
    assert deduplicated(groups, ["first", "second"], by="target") == {
        "first": groups["first"][:1],
        "second": groups["second"][1:],
    }


def test_a_unit_may_repeat_itself():
    turns = (Record("", ("yes",), "1.1", "1"), Record("", ("yes",), "1.2", "1"), Record("", ("yes",), "2.1", "2"))
    assert deduplicated({"persona": turns})["persona"] == turns[:2]


# --- splits -----------------------------------------------------------------------------------------------------------

TEN = {f"group{i}": pairs((f"s{i}", f"t{i}")) for i in range(10)}


def test_a_split_is_disjoint_complete_and_the_same_every_time():
    split = split_groups(TEN, validation=2, test=3)
    assert [len(part) for part in split] == [5, 2, 3]
    assert sorted(name for part in split for name in part) == sorted(TEN)
    assert split.check() == []
    assert split_groups(dict(reversed(TEN.items())), validation=2, test=3) == split
    assert split_groups(TEN, validation=2, test=3, seed=1) != split


def test_groups_can_be_named_for_a_part():
    split = split_groups(TEN, validation=["group3"], test=["group1", "group2"])
    assert list(split.test) == ["group1", "group2"] and list(split.validation) == ["group3"]
    mixed = split_groups(TEN, validation=9 - 2, test=["group1", "group2"])
    assert len(mixed.train) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"validation": 5, "test": 5}, "at least one left to train on"),
        ({"validation": 0, "test": 11}, "test: got 11 of 10 groups to choose from, expected 0 to 10"),
        ({"validation": 0, "test": ["nobody"]}, r"test: got \['nobody'\], expected names"),
        ({"validation": 0, "test": "group1"}, "test: got 'group1', expected names"),
        ({"validation": ["group1"], "test": ["group1"]}, r"validation: got \['group1'\] which are in test too"),
    ],
    ids=["nothing-left", "too-many", "unknown", "a-text", "both"],
)
def test_a_split_that_cannot_be_is_an_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        split_groups(TEN, **arguments)


def test_texts_and_names_in_two_parts_are_found_and_can_be_dropped():
    split = GroupSplit(
        train={"a": pairs(("Hi", "you"), ("my", "own")), "b": pairs(("same", "text"))},
        validation={"c": pairs(("hi!", "You"), ("another", "one"))},
        test={"d": pairs(("HI", "you"), ("SAME", "text."))},
    )
    assert {(one.first, one.second) for one in split.check()} == {
        ("train/a (0)", "validation/c (0)"),
        ("train/a (0)", "test/d (0)"),
        ("train/b (0)", "test/d (1)"),
        ("validation/c (0)", "test/d (0)"),
    }
    clean = split.without_duplicates()
    assert clean.check() == []
    assert clean.test == split.test
    assert clean.validation == {"c": split.validation["c"][1:]}
    assert clean.train == {"a": split.train["a"][1:]}
    named_twice = split._replace(train={"d": pairs(("new", "text"))})
    assert "the same task name in train/d and in test/d" in [str(one) for one in named_twice.check()]
    with pytest.raises(ValueError, match="train: got the group 'd' of another part too"):
        named_twice.without_duplicates()
