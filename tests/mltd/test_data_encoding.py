"""Records as examples: what is read and what is scored for each kind, and what becomes of text that is too long."""

import pytest

from mltd.data.encoding import encode, windows
from mltd.data.records import Record
from tests.mltd.data_parts import framed_tokenizer, pairs
from tests.mltd.demo_parts import letter_tokenizer

LETTERS, FRAMED = letter_tokenizer(), framed_tokenizer()


def only(encoded):
    (items,) = encoded.items.values()
    return items


def said(tokenizer, ids):
    return "".join(tokenizer.convert_ids_to_tokens(list(ids)))


def test_only_the_target_and_its_end_are_scored():
    (item,) = only(encode({"t": pairs(("who?", "me."))}, LETTERS))
    labels = item.example.labels
    assert said(LETTERS, item.example.input_ids) == "who?\nme.\n"
    assert labels[:5] == (-100,) * 5 and labels[5:] == item.example.input_ids[5:]


def test_text_begins_as_the_tokenizer_begins_it_and_ends_once():
    (item,) = only(encode({"t": pairs(("who?", "me."))}, FRAMED))
    assert said(FRAMED, item.example.input_ids) == "<s>who?\nme.\n"
    assert item.example.labels[:6] == (-100,) * 6


def test_a_prompt_of_ones_own_and_the_braces_of_a_source_are_kept():
    encoded = encode({"t": pairs(("a b", "yes"))}, LETTERS, prompt="read {source} so.", end=".")
    assert said(LETTERS, only(encoded)[0].example.input_ids) == "read a b so.yes."
    with pytest.raises(ValueError, match=r"prompt: got 'no', expected \{source\} in it"):
        encode({"t": pairs(("a", "b"))}, LETTERS, prompt="no")
    (item,) = only(encode({"t": pairs(("a {x}", "b"))}, LETTERS))
    assert len(item.example.input_ids) == len("a {x}\nb\n")


def test_text_without_a_source_is_scored_from_its_second_token():
    (item,) = only(encode({"t": (Record("", ("abc",), "1"),)}, LETTERS))
    assert item.example.input_ids == item.example.labels and said(LETTERS, item.example.input_ids) == "abc\n"


@pytest.mark.parametrize("tokenizer", [LETTERS, FRAMED], ids=["adds-no-end", "adds-an-end"])
def test_a_seq2seq_target_is_a_sequence_of_its_own_with_one_end(tokenizer):
    (item,) = only(encode({"t": pairs(("who?", "me."))}, tokenizer, "seq2seq"))
    assert said(tokenizer, item.example.input_ids).replace("<s>", "").replace("</s>", "") == "who?"
    assert item.example.labels[-1] == tokenizer.eos_token_id
    assert item.example.labels.count(tokenizer.eos_token_id) == 1
    assert said(tokenizer, item.example.labels[:-1]).removeprefix("<s>") == "me."


def test_a_seq2seq_target_needs_an_end_token():
    with pytest.raises(ValueError, match="has no eos_token"):
        encode({"t": pairs(("a", "b"))}, framed_tokenizer(eos_token=None), "seq2seq")


def test_classes_are_numbered_by_name_in_each_task():
    groups = {"food": pairs(("a", "sweet"), ("b", "bitter")), "work": pairs(("c", "late"), ("d", "early"))}
    encoded = encode(groups, FRAMED, "classification")
    assert encoded.labels == {"food": ("bitter", "sweet"), "work": ("early", "late")}
    assert [[item.example.labels for item in items] for items in encoded.items.values()] == [[(1,), (0,)]] * 2
    assert said(FRAMED, encoded.items["food"][0].example.input_ids) == "<s>a</s>"


def test_tasks_of_one_set_have_as_many_classes_as_each_other():
    groups = {"two": pairs(("a", "x"), ("b", "y")), "three": pairs(("a", "x"), ("b", "y"), ("c", "z"))}
    with pytest.raises(ValueError, match="task 'three': got 3 classes, expected 2 as in 'two'"):
        encode(groups, FRAMED, "classification")
    encoded = encode(groups, FRAMED, "classification", labels=["z", "y", "x"])
    assert [item.example.labels for item in encoded.items["three"]] == [(2,), (1,), (0,)]
    with pytest.raises(ValueError, match=r"task 'three': record '2': got the label 'z', expected one of \['x', 'y'\]"):
        encode(groups, FRAMED, "classification", labels=["x", "y"])


def test_a_number_is_regressed_on():
    (item,) = only(encode({"t": pairs(("a", " -2.5"))}, FRAMED, "regression"))
    assert item.example.labels == (-2.5,)
    for text in ("high", "nan", "inf"):
        with pytest.raises(ValueError, match=f"task 't': record '0': got '{text}', expected a finite number"):
            encode({"t": pairs(("a", text))}, FRAMED, "regression")


def test_labels_can_be_learnt_as_text():
    (item,) = only(encode({"t": pairs(("good", "yes"))}, LETTERS, prompt="{source} so? "))
    assert said(LETTERS, item.example.input_ids) == "good so? yes\n"


def test_every_reference_can_be_an_example():
    groups = {"t": (Record("mr", ("a", "b"), "1"),)}
    assert len(only(encode(groups, LETTERS))) == 1
    items = only(encode(groups, LETTERS, every_reference=True))
    assert [said(LETTERS, item.example.input_ids) for item in items] == ["mr\na\n", "mr\nb\n"]


# --- too long ---------------------------------------------------------------------------------------------------------

LONG = {"t": pairs(("abcdefgh", "xy"), ("ab", "cd"))}  # 12 and 6 tokens


def test_too_long_is_an_error_that_names_task_and_record_unless_asked_otherwise():
    with pytest.raises(ValueError, match="task 't': record '0': got 12 tokens, expected at most 9"):
        encode(LONG, LETTERS, max_length=9)
    assert len(only(encode(LONG, LETTERS, max_length=12))) == 2


@pytest.mark.parametrize(
    ("too_long", "first"), [("cut_start", "defgh\nxy\n"), ("cut_end", "abcde\nxy\n")], ids=["start", "end"]
)
def test_the_source_is_cut_as_little_as_needed_and_the_target_never(too_long, first):
    items = only(encode(LONG, LETTERS, max_length=9, too_long=too_long))
    assert [said(LETTERS, item.example.input_ids) for item in items] == [first, "ab\ncd\n"]
    assert [label for label in items[0].example.labels if label != -100] == list(items[0].example.input_ids[-3:])
    with pytest.raises(ValueError, match="nothing of the source is left"):
        encode(LONG, LETTERS, max_length=4, too_long=too_long)


def test_what_frames_a_source_is_not_cut():
    items = only(encode(LONG, FRAMED, "seq2seq", max_length=5, too_long="cut_end"))
    assert said(FRAMED, items[0].example.input_ids) == "<s>abc</s>"
    items = only(encode(LONG, LETTERS, max_length=12, prompt="{source} so? ", too_long="cut_start"))
    assert said(LETTERS, items[0].example.input_ids) == "efgh so? xy\n"


def test_long_records_can_be_left_out_and_so_can_the_groups_that_they_leave_empty():
    groups = {**LONG, "long": pairs(("abcdefgh", "xyz"))}
    encoded = encode(groups, LETTERS, max_length=9, too_long="drop")
    assert [item.record.id for item in encoded.items["t"]] == ["1"] and encoded.items["long"] == ()
    assert list(encoded.at_least(1).items) == ["t"]


def test_a_long_seq2seq_target_is_an_error_or_left_out():
    groups = {"t": pairs(("ab", "cdefgh"), ("a", "b"))}
    with pytest.raises(ValueError, match="record '0': its target has 8 tokens, expected at most 5"):
        encode(groups, FRAMED, "seq2seq", max_target_length=5, too_long="cut_end")
    assert len(only(encode(groups, FRAMED, "seq2seq", max_target_length=5, too_long="drop"))) == 1


def test_another_way_to_treat_long_text_is_an_error_even_where_nothing_is_long():
    with pytest.raises(ValueError, match="too_long: got 'cut', expected 'error', 'drop', 'cut_start' or 'cut_end'"):
        encode(LONG, LETTERS, too_long="cut")
    with pytest.raises(ValueError, match="max_length: got 0, expected at least 1"):
        encode(LONG, LETTERS, max_length=0)


def test_the_tokenizer_s_own_limit_is_kept():
    with pytest.raises(ValueError, match="got 12 tokens, expected at most 9"):
        encode(LONG, framed_tokenizer(model_max_length=9, bos_token=None))


@pytest.mark.parametrize(
    ("groups", "kind", "message"),
    [
        ({"t": (Record("a", ("b",), "1"), Record("c", ("d",), "1"))}, "causal", "two records with the id '1'"),
        ({"t": (Record("a", (), "1"),)}, "causal", "record '1': got the references"),
        ({"t": (Record("a", ("b", " "), "1"),)}, "causal", "record '1': got the references"),
        ({"t": (Record("", ("b",), "1"),)}, "seq2seq", "record '1': got no source"),
        ({"t": pairs(("a", "b"))}, "masked", "kind: got 'masked', expected 'causal'"),
    ],
    ids=["same-id", "no-reference", "empty-reference", "no-source", "kind"],
)
def test_records_that_cannot_be_encoded_are_errors(groups, kind, message):
    with pytest.raises(ValueError, match=message):
        encode(groups, FRAMED, kind)


# --- windows ----------------------------------------------------------------------------------------------------------


def test_windows_are_of_one_length_and_do_not_reach_into_another_text():
    texts = (Record("", ("abcdefgh",), "one"), Record("", ("xyzxy",), "two"), Record("", ("a",), "three"))
    items = only(windows({"t": texts}, FRAMED, 3))
    assert [said(FRAMED, item.example.input_ids) for item in items] == ["abc", "def", "xyz"]
    assert all(item.example.labels == item.example.input_ids for item in items)
    assert [item.record.id for item in items] == ["one[0]", "one[1]", "two[0]"]
    assert items[0].record.target.replace(" ", "") == "abc"
    kept = only(windows({"t": texts}, FRAMED, 3, rest=True))
    assert [said(FRAMED, item.example.input_ids) for item in kept] == ["abc", "def", "gh", "xyz", "xy"]


def test_windows_refuse_what_they_would_not_read():
    with pytest.raises(ValueError, match="record '0' has a source"):
        windows({"t": pairs(("a", "b"))}, LETTERS, 4)
    with pytest.raises(ValueError, match="length: got 1, expected at least 2"):
        windows({"t": (Record("", ("abc",), "1"),)}, LETTERS, 1)
    assert windows({"t": (Record("", ("abc",), "1"),)}, LETTERS, 4).at_least(1).items == {}
