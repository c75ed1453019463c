"""Readers by name: parts of a corpus, personas of dialogues, and settings that a reader does not have."""

import json

import pytest

from mltd.data.dialogue import by_persona
from mltd.data.persona_chat import read_convai2
from mltd.readers import CORPORA, DIALOGUES, PACKAGED, PARTED, READERS, TABLES, read_groups
from mltd.run_config import DataConfig
from tests.mltd.data_parts import corpus, write, write_tar, write_zip

PLACES = {  # name -> where the real corpus lies, and how many groups its first part has
    "clinc150": ("clinc150", "", 10),
    "rnnlg": ("rnnlg", "rnnlg_original.tar.gz", 4),
    "snips": ("snips", "snips2017.tar.gz", 1),
    "webnlg": ("webnlg_2017", "webnlg_challenge_2017.tar.gz", 10),
}


def read(path, **data):
    return read_groups(DataConfig(str(path), **data))


def parted(folder) -> dict:
    """A small corpus of each kind, its parts of different texts."""
    write(folder / "domains.json.gz", json.dumps({"bank": ["pay"]}))
    write(folder / "data_full.json.gz", json.dumps({part: [[f"pay {part}", "pay"]] for part in PARTED["clinc150"][1]}))
    acts = {f"d/tv/{part}.json": json.dumps([[f"{part}()", "hey"]]) for part in PARTED["rnnlg"][1]}
    said = {
        f"s/a/{part}_a{ending}": json.dumps({"a": [{"data": [{"text": part}]}]})
        for part, ending in (("train", "_full.json"), ("validate", ".json"))
    }
    files = {"train": "train/x.xml", "dev": "dev/x.xml", "test": "test/testdata_with_lex.xml"}
    files["test_unseen"] = "test/testdata_unseen_with_lex.xml"
    triple = "<modifiedtripleset><mtriple>{} | is | b</mtriple></modifiedtripleset>"
    entry = f'<e><entry category="C">{triple}<lex>t</lex></entry></e>'
    return {
        "clinc150": folder,
        "rnnlg": write_tar(folder / "r.tar.gz", acts),
        "snips": write_zip(folder / "s.zip", said),
        "webnlg": write_tar(folder / "w.tar.gz", {f"w/{file}": entry.format(part) for part, file in files.items()}),
    }


@pytest.mark.parametrize("reader", PARTED)
def test_the_part_that_is_chosen_is_read_and_another_is_refused_with_those_there_are(reader, tmp_path):
    path, parts = parted(tmp_path)[reader], PARTED[reader][1]
    for part in parts:
        ((record,),) = read(path, reader=reader, part=part).values()
        assert part in record.source.replace(" : ", " ").replace("(", " ").split()
    for data, got in (({}, "is missing"), ({"part": "tests"}, "got 'tests'")):
        with pytest.raises(ValueError) as caught:
            read(path, reader=reader, **data)
        assert str(caught.value).startswith(
            f"data.part: {got}, expected one of {', '.join(map(repr, parts))}, the parts"
        )


@pytest.mark.parametrize("reader", [name for name in READERS if name not in PARTED])
def test_a_part_of_what_has_none_is_refused(reader, tmp_path):
    with pytest.raises(ValueError, match=f"data.part: got 'test', but the reader '{reader}' has no parts.*clinc150"):
        read(tmp_path, reader=reader, part="test")


@pytest.mark.parametrize("reader", [*TABLES, *CORPORA, *PARTED, *PACKAGED])
def test_a_history_of_what_has_no_dialogues_is_refused(reader, tmp_path):
    with pytest.raises(ValueError, match=f"data.history: got 2, but the reader '{reader}' has no dialogues.*convai2"):
        read(tmp_path, reader=reader, history=2)


def spoken(*personas: str) -> str:
    lines = []
    for i, persona in enumerate(personas):
        own = [f"your persona: i {part} {persona}." for part in ("like", "own")]
        lines += [f"{n} {line}" for n, line in enumerate([*own, f"a{i}\tb{i}", f"c{i}\td{i}"], 1)]
    return "\n".join(lines) + "\n"


def test_one_persona_is_one_task_under_a_number(tmp_path):
    path = write(tmp_path / "valid.txt", spoken("cats", "dogs", "cats"))
    groups = read(path, reader="convai2")
    assert {name: {record.unit for record in records} for name, records in groups.items()} == {
        "persona 1": {"1", "3"},
        "persona 2": {"2"},
    }
    assert [record.source for record in groups["persona 2"]] == ["a1", "a1\nb1\nc1"]
    assert [record.source for record in read(path, reader="convai2", history=1)["persona 2"]] == ["a1", "c1"]
    assert list(groups.values()) == list(by_persona(read_convai2(path)).values())


def test_the_other_dialogues_are_read_by_name(tmp_path):
    one = write(tmp_path / "a.csv", ',Persona,chat\n0,i read. i ski.,"hi\nhello"\n')
    assert [r.target for r in read(one, reader="personachat-csv")["persona 1"]] == ["hello"]
    head = "user 1 personas,user 2 personas,Best Generated Conversation\n"
    two = write(tmp_path / "b.csv", head + '"i read.\ni ski.","i run.\ni cook.","User 1: hi\nUser 2: yo\nUser 1: hm"\n')
    groups = read(two, reader="synthetic-persona-chat")
    assert {name: [r.target for r in records] for name, records in groups.items()} == {
        "persona 1": ["hm"],
        "persona 2": ["yo"],
    }
    assert set(DIALOGUES) == {"convai2", "personachat-csv", "synthetic-persona-chat"}


@pytest.mark.parametrize("reader", PARTED)
def test_a_part_of_each_real_corpus(reader):
    folder, file, groups = PLACES[reader]
    found = read(corpus(folder) / file, reader=reader, part=PARTED[reader][1][0])
    assert len(found) == groups and all(found.values())


def test_personas_of_the_real_dialogues():
    found = read(corpus("convai2_valid") / "valid_self_original_no_cands.txt", reader="convai2", history=1)
    dialogues = [{record.unit for record in records} for records in found.values()]
    assert sum(map(len, dialogues)) == 1000 and max(map(len, dialogues)) > 1
