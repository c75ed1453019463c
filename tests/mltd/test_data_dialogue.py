"""Personas as tasks: how dialogues of each format are read, and which of them are by the same persona."""

import pytest

from mltd.data.dialogue import Dialogue, Turn, by_persona
from mltd.data.encoding import encode
from mltd.data.episodes import draw, leave_one_out
from mltd.data.files import DataError
from mltd.data.persona_chat import read_convai2, read_personachat_csv, read_synthetic_persona_chat
from mltd.data.records import Record
from tests.mltd.data_parts import corpus, write
from tests.mltd.demo_parts import LETTERS, letter_tokenizer

FACEBOOK = """\
1 your persona: i read.
2 your persona: i ski.
3 partner's persona: i am somebody else.
4 hi\thello .
5 how are you ?\tfine .\t\tfine .|bad .
1 your persona: i ski.
2 your persona: i read.
3 yo\they .
"""


def dialogue(id, *persona, said="abc"):
    return Dialogue(str(id), persona, tuple(Turn(i % 2 == 1, letter) for i, letter in enumerate(said)))


def names(dialogues, **options):
    """Which dialogues are by the same persona."""
    groups = by_persona([one._replace(turns=(Turn(False, "x"), Turn(True, one.id))) for one in dialogues], **options)
    return {name: [record.unit for record in records] for name, records in groups.items()}


def test_dialogue_lines_are_read_from_the_side_of_the_persona(tmp_path):
    first, second = read_convai2(write(tmp_path / "valid.txt", FACEBOOK))
    assert first.persona == ("i read.", "i ski.") and second.persona == ("i ski.", "i read.")
    assert first.turns == ((False, "hi"), (True, "hello ."), (False, "how are you ?"), (True, "fine ."))
    assert by_persona([first, second]) == {
        "i read. i ski.": (
            Record("hi", ("hello .",), "1.1", "1"),
            Record("hi\nhello .\nhow are you ?", ("fine .",), "1.3", "1"),
            Record("yo", ("hey .",), "2.1", "2"),
        )
    }
    shorter = by_persona([first], history=2)["i read. i ski."]
    assert [record.source for record in shorter] == ["hi", "hello .\nhow are you ?"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("2 your persona: i read.\n", r"valid\.txt, line 1: got '2 your persona: i read\.', expected a number, from 1"),
        ("1 your persona: i read.\nhi\thello\n", r"valid\.txt, line 2: got 'hi\\thello', expected a number"),
        ("1 your persona: i read.\n2 hi\n", r"valid\.txt, line 2: got 'hi', expected two utterances with a tab"),
        ("1 your persona: i read.\n2 hi\t \n", r"valid\.txt, line 2: got 'hi\\t ', expected two utterances"),
        ("1 hi\thello\n", r"valid\.txt, dialogue 1: expected lines of a persona"),
        ("1 your persona: i read.\n", r"valid\.txt, dialogue 1: expected .* lines of utterances"),
        ("", r"valid\.txt: has no dialogue"),
    ],
    ids=["no-start", "no-number", "no-tab", "no-reply", "no-persona", "nothing-said", "empty"],
)
def test_a_dialogue_line_that_cannot_be_read_is_named(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        read_convai2(write(tmp_path / "valid.txt", text))


def test_a_table_of_personas_and_chats_is_read_from_the_second_speaker(tmp_path):
    path = write(tmp_path / "chats.csv", ',Persona,chat\n0, i read. do i ski ? yes.,"hi\nhello\n\nbye\nsee you\n"\n')
    (only,) = read_personachat_csv(path)
    assert only.persona == ("i read.", "do i ski ?", "yes.")
    assert [turn.text for turn in only.turns if turn.own] == ["hello", "see you"]
    with pytest.raises(DataError, match=r"chats\.csv:2: column 'chat' is '', expected text"):
        read_personachat_csv(write(path, ",Persona,chat\n0,i read.,\n"))
    with pytest.raises(DataError, match=r"chats\.csv:2: no column 'Persona'"):
        read_personachat_csv(write(path, ",persona,chat\n0,i read.,hi\n"))
    with pytest.raises(DataError, match=r"chats\.csv: has no dialogue"):
        read_personachat_csv(write(path, ",Persona,chat\n"))


def test_a_synthetic_conversation_is_read_from_both_sides(tmp_path):
    head = "user 1 personas,user 2 personas,Best Generated Conversation\n"
    text = (
        '"I read.\nI ski.",I sew.,"* * *\nUser 1: Hi!\n**User 2:** A list:\n- one\nUser 2: More.\n*User 1:* Bye. *"\n'
    )
    path = write(tmp_path / "chat.csv.gz", f"{head}{text}I sew.,I ski.,nobody is named\nI sew.,I ski.,\n")
    first, second = read_synthetic_persona_chat(path)
    assert first == Dialogue(
        "1.1",
        ("I read.", "I ski."),
        (Turn(True, "Hi!"), Turn(False, "A list:\n- one"), Turn(False, "More."), Turn(True, "Bye.")),
    )
    assert second.id == "1.2" and [turn.own for turn in second.turns] == [False, True, True, False]
    groups = by_persona([first, second])
    assert [record.target for record in groups["I read. I ski."]] == ["Bye."]  # "Hi!" answers nothing
    for bad in (f"{head}I sew.,I ski.,nobody is named\n", "user 1 personas,user 2 personas,x\na,b,User 1: c\n"):
        with pytest.raises(DataError, match="chat.csv.gz"):
            read_synthetic_persona_chat(write(path, bad))


# --- who is who -------------------------------------------------------------------------------------------------------


def test_two_shared_sentences_make_one_persona_also_by_way_of_a_third():
    made = [dialogue(1, "A b.", "c", "d"), dialogue(2, "e", "f", "c"), dialogue(3, "d", "a b", "e"), dialogue(4, "f")]
    assert names(made) == {"A b. c": ["1", "3"], "c e": ["2"], "f": ["4"]}
    bridge = dialogue(5, "f", "a B!", "e")
    assert names([*made, bridge]) == {"A b. c": ["1", "2", "3", "5"], "f": ["4"]}
    assert names(made, shared=1) == {"A b.": ["1", "2", "3", "4"]}
    assert names(made, shared=3) == {"A b. c d": ["1"], "c e f": ["2"], "a b d e": ["3"], "f": ["4"]}


def test_equal_personas_of_one_sentence_are_one_and_a_longer_one_is_another():
    made = [dialogue(1, "a"), dialogue(2, "A."), dialogue(3, "a", "b")]
    assert names(made) == {"a": ["1", "2"], "a b": ["3"]}


def test_which_dialogues_belong_together_does_not_depend_on_their_order():
    made = [dialogue(i, *(f"s{(i * k) % 7}" for k in (1, 2, 4))) for i in range(1, 7)]
    forwards, backwards = ({frozenset(ids) for ids in names(one).values()} for one in (made, made[::-1]))
    assert forwards == backwards and len(forwards) > 1


def test_a_list_of_personas_decides_where_there_is_one():
    personas = {"first": ["a", "b", "c"], "second": ["C!", "d", "e"]}
    made = [dialogue(1, "a", "c", "d"), dialogue(2, "c", "d", "e", "a"), dialogue(3, "a", "x")]
    assert names(made, personas=personas) == {"first": ["1"], "second": ["2"]}
    assert names(made, personas=personas, shared=1) == {"first": ["1", "3"], "second": ["2"]}


def test_a_dialogue_in_which_the_persona_answers_nothing_makes_no_task():
    assert by_persona([dialogue(1, "a", "b", said="x")]) == {}
    with pytest.raises(ValueError, match="shared, history: got 0 and None, expected at least 1"):
        by_persona([], shared=0)


# --- the real corpora -------------------------------------------------------------------------------------------------


def in_letters(groups):
    """The same records in the few letters that the test's tokenizer knows."""

    def plain(text):
        return "".join(sign for sign in text.lower() if sign in LETTERS).strip() or "x"

    return {
        name: tuple(
            record._replace(source=plain(record.source), references=(plain(record.target),)) for record in group
        )
        for name, group in groups.items()
    }


def test_convai2_is_100_personas_of_1000_dialogues_and_gives_both_kinds_of_tasks():
    groups = by_persona(read_convai2(corpus("convai2_valid") / "valid_self_original_no_cands.txt"), history=1)
    assert sum(len(records) for records in groups.values()) == 7801
    dialogues = [len({record.unit for record in records}) for records in groups.values()]
    assert (len(groups), sum(dialogues), min(dialogues)) == (100, 1000, 5)
    first = dict(list(in_letters(groups).items())[:4])
    encoded = encode(first, letter_tokenizer())
    held_out = leave_one_out(encoded, "train")
    assert len(held_out.tasks) == sum(dialogues[:4])
    fixed = draw(encoded, "test", support=3, query=2)
    assert fixed.tasks.names == tuple(first)
    assert all(len({record.unit for record in records}) == 3 for records in fixed.support.values())


def test_the_first_1072_dialogues_of_personachat():
    dialogues = read_personachat_csv(corpus("personachat_train1072") / "personachat.csv")
    assert len(dialogues) == 1072 and sum(len(one.turns) for one in dialogues) == 15830
    assert {len(one.turns) % 2 for one in dialogues} == {0}
    groups = by_persona(dialogues)
    assert sum(len(records) for records in groups.values()) == 15830 // 2
    assert len(groups) == 654


def test_synthetic_persona_chat_is_100_personas_in_each_part():
    folder = corpus("synthetic_persona_chat")
    # the test part has 968 conversations, of which one is empty and one names no speaker
    for part, sides in (("valid", 2 * 1000), ("test", 2 * (968 - 2))):
        dialogues = read_synthetic_persona_chat(folder / f"Synthetic-Persona-Chat_{part}.csv.gz")
        assert len(dialogues) == sides
        groups = by_persona(dialogues)
        assert len(groups) == 100
        assert min(len({record.unit for record in records}) for records in groups.values()) >= 15
