"""Tasks drawn from groups: sizes, units that stay together, classes in turn, and the same draw everywhere."""

import subprocess
import sys
from collections import Counter

import pytest

from mltd.data.encoding import encode
from mltd.data.episodes import draw, leave_one_out, stable_shuffle
from mltd.data.records import Record
from tests.mltd.data_parts import framed_tokenizer, pairs
from tests.mltd.demo_parts import letter_tokenizer

TOKENIZER = letter_tokenizer()
WORDS = [a + b for a in "abcdefg" for b in "hijkl"]


def dialogues(count, turns=3):
    return tuple(
        Record(f"ask {WORDS[i]} {WORDS[j]}", (f"say {WORDS[i]} {WORDS[j]}",), f"{i}.{j}", f"dialogue {i}")
        for i in range(count)
        for j in range(turns)
    )


def singles(count, prefix=""):
    return pairs(*((f"ask {prefix}{word}", f"say {prefix}{word}") for word in WORDS[:count]))


def test_tasks_have_the_sizes_asked_for_and_distinct_units():
    encoded = encode({"one": singles(12), "two": singles(7, "z")}, TOKENIZER)
    drawn = draw(encoded, "train", support=2, query=3, episodes=4)
    assert drawn.tasks.names == ("one", "one#2", "two") and drawn.tasks.name == "train"
    assert {(len(task.support), len(task.query)) for task in drawn.tasks} == {(2, 3)}
    used = [record.id for name in ("one", "one#2") for record in (*drawn.support[name], *drawn.query[name])]
    assert len(set(used)) == 10
    assert drawn.tasks.check_leaks() == [] == drawn.check_duplicates()


def test_the_records_of_a_task_are_those_of_its_examples():
    encoded = encode({"one": singles(12)}, TOKENIZER)
    drawn = draw(encoded, "test", support=2, query=None)
    (task,) = drawn.tasks
    assert len(task.query) == 10
    by_id = {item.record.id: item.example for item in encoded.items["one"]}
    assert [by_id[record.id] for record in drawn.support["one"]] == list(task.support)
    assert [by_id[record.id] for record in drawn.query["one"]] == list(task.query)


def test_a_draw_depends_on_texts_and_seed_and_on_nothing_else():
    records = singles(12)
    first = draw(encode({"one": records}, TOKENIZER), "train", support=3, query=4)
    renamed = tuple(record._replace(id=f"file:{i}") for i, record in enumerate(records[::-1]))
    assert draw(encode({"one": renamed}, TOKENIZER), "train", support=3, query=4).tasks.tasks == first.tasks.tasks
    assert draw(encode({"one": records}, TOKENIZER), "train", support=3, query=4, seed=1).tasks[0] != first.tasks[0]
    assert draw(encode({"two": records}, TOKENIZER), "train", support=3, query=4).tasks[0].support != (
        first.tasks[0].support
    )


def test_a_draw_is_the_same_in_another_process():
    order = stable_shuffle("topic", [(record,) for record in singles(9)], 3)
    script = (
        "from mltd.data.episodes import stable_shuffle\n"
        "from mltd.data.records import Record\n"
        f"print(stable_shuffle('topic', [(Record(*r),) for r in {[tuple(record) for record in singles(9)]}], 3))"
    )
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert said.strip() == str(order) == "[6, 3, 2, 8, 7, 0, 1, 4, 5]"


def test_dialogues_stay_whole_and_count_as_one():
    drawn = draw(encode({"persona": dialogues(6)}, TOKENIZER), "train", support=2, query=1, episodes=3)
    assert [len(task.support) for task in drawn.tasks] == [6, 6]
    for name in drawn.tasks.names:
        support, query = ({record.unit for record in part[name]} for part in (drawn.support, drawn.query))
        assert len(support) == 2 and len(query) == 1 and not support & query


def test_each_dialogue_in_turn_is_held_out():
    records = (*dialogues(2), *dialogues(3)[-3:])
    drawn = leave_one_out(encode({"persona": records}, TOKENIZER), "train")
    assert drawn.tasks.names == ("persona#1", "persona#2", "persona#3")
    for i, name in enumerate(drawn.tasks.names):
        assert {record.unit for record in drawn.query[name]} == {f"dialogue {i}"}
        assert len(drawn.query[name]) == 3 and len(drawn.support[name]) == 6
        assert {record.unit for record in drawn.support[name]} == {f"dialogue {j}" for j in range(3) if j != i}


def test_references_of_one_record_stay_together():
    groups = {"t": tuple(Record(f"mr {word}", (f"a {word}", f"b {word}"), word) for word in WORDS[:4])}
    drawn = draw(encode(groups, TOKENIZER, every_reference=True), "train", support=2)
    assert len(drawn.tasks[0].support) == 4
    assert not {record.id for record in drawn.support["t"]} & {record.id for record in drawn.query["t"]}


def test_classes_take_turns_so_that_support_has_k_of_each():
    labels = "yes", "no", "maybe"
    records = tuple(
        Record(f"ask {word} {label}", (label,), f"{word} {label}")
        for label, count in zip(labels, (12, 5, 7), strict=True)
        for word in WORDS[:count]
    )
    encoded = encode({"t": records}, framed_tokenizer(), "classification")
    as_text = encode({"t": records}, TOKENIZER)

    def classes(part):
        return [Counter(record.target for record in found) for found in part.values()]

    for drawn in (
        draw(encoded, "train", support=3, query=4, episodes=2),
        draw(as_text, "train", support=3, query=4, episodes=2, by_class=True),
    ):
        assert classes(drawn.support) == [dict.fromkeys(labels, 1)] * 2
        assert [sorted(found.values()) for found in classes(drawn.query)] == [[1, 1, 2]] * 2
    (all_others,) = classes(draw(encoded, "train", support=12).query)  # 4 of each class, as far as they last
    assert all_others == {"yes": 8, "no": 1, "maybe": 3}
    assert classes(draw(as_text, "train", support=6, query=6).support) != [dict.fromkeys(labels, 2)]


def test_what_was_read_comes_again_only_after_everything_else():
    records = pairs(*((source, f"{source}{i}") for source in "abc" for i in range(3)))
    for seed in range(4):
        order = [records[i].source for i in stable_shuffle("topic", [(record,) for record in records], seed)]
        assert [set(order[i : i + 3]) for i in (0, 3, 6)] == [{"a", "b", "c"}] * 3


def test_the_same_text_on_two_sides_is_found_however_it_is_spelt():
    repeated = pairs(("ask a", "say b"), ("Ask a.", "say  b"), ("ask c", "say d"))
    tokenizer = framed_tokenizer()
    drawn = draw(encode({"t": repeated}, tokenizer), "train", support=1, query=2)
    clean = draw(encode({"t": repeated[1:]}, tokenizer), "test", support=1, query=1)
    places = [(one.first, one.second) for one in drawn.check_duplicates(clean)]
    assert len(places) == 3  # the first record once, each of the others once
    assert all(first.startswith("train/t/") and second.startswith("test/t/") for first, second in places)
    inside = leave_one_out(encode({"t": repeated}, tokenizer), "train").check_duplicates()
    assert {one.second for one in inside} == {"train/t#1/query[0] (0)", "train/t#2/query[0] (1)"}
    assert clean.check_duplicates() == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"support": 0}, "got 0, None, 1, expected at least 1"),
        ({"support": 1, "query": 0}, "expected at least 1"),
        ({"support": 1, "episodes": 2}, "query: got None with several episodes"),
        ({"support": 5, "query": 4}, r"2 groups of 3 have fewer units, as \{'small': 3, 'none': 0\}"),
        ({"support": 3}, r"fewer units, as \{'small': 3, 'none': 0\}.*at_least\(4\)"),
    ],
    ids=["no-support", "no-query", "episodes", "too-few", "nothing-left"],
)
def test_what_cannot_be_drawn_is_an_error(arguments, message):
    groups = {"large": singles(9), "small": singles(3), "none": pairs(("ask " + "a" * 90, "b"))}
    encoded = encode(groups, TOKENIZER, max_length=40, too_long="drop")
    with pytest.raises(ValueError, match=message):
        draw(encoded, "train", **arguments)


def test_nothing_can_be_held_out_of_one_unit():
    with pytest.raises(ValueError, match=r"fewer than two units in 1 groups of 2, as \['single'\].*at_least\(2\)"):
        leave_one_out(encode({"persona": dialogues(2), "single": dialogues(1)}, TOKENIZER), "train")
    with pytest.raises(ValueError, match="got no group"):
        leave_one_out(encode({}, TOKENIZER), "train")
