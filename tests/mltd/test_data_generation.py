"""Summaries and data-to-text: every source with all that may be said of it, by domain, category or origin."""

import json
from collections import Counter

import pytest

from mltd.data.files import DataError
from mltd.data.meaning import read_e2e, read_rnnlg
from mltd.data.records import Record
from mltd.data.summaries import read_contracts, read_fewsum, read_scitldr
from mltd.data.triples import read_dart_json, read_dart_xml, read_webnlg
from tests.mltd.data_parts import corpus, write, write_tar


def counts(groups):
    """(records, references) of each group."""
    return {name: (len(found), sum(len(record.references) for record in found)) for name, found in groups.items()}


def total(groups):
    return tuple(map(sum, zip(*counts(groups).values(), strict=True)))


# --- summaries --------------------------------------------------------------------------------------------------------


def test_scitldr_joins_sentences_and_keeps_every_summary(tmp_path):
    path = write(
        tmp_path / "dev.jsonl.gz", '{"source": ["One.\\n", " ", "Two."], "target": ["a", "b"], "title": "t"}\n'
    )
    assert read_scitldr(path) == {"science": (Record("One. Two.", ("a", "b"), "dev.jsonl.gz:1"),)}


def test_contracts_are_an_object_of_objects(tmp_path):
    row = {"original_text": "we may", "reference_summary": "they may", "note": ""}
    path = write(tmp_path / "all.json", json.dumps({"legal1": row}))
    assert read_contracts(path) == {"contracts": (Record("we may", ("they may",), "all.json:legal1"),)}
    for bad, message in (
        ([row], "expected a JSON object of objects"),
        ({"legal1": {**row, "original_text": ""}}, r"all\.json:legal1: column 'original_text' is ''"),
        ({}, "has no row"),
    ):
        with pytest.raises(DataError, match=message):
            read_contracts(write(path, json.dumps(bad)))


def test_fewsum_joins_eight_reviews_and_keeps_three_summaries(tmp_path):
    head = ["cat", "group_id", *(f"rev{i}" for i in range(1, 9)), *(f"summ{i}" for i in range(1, 4))]
    row = ["cloth", "x", *(f"r{i}" for i in range(1, 8)), '"a ""good"" one"', "s1", "s2", "s3"]
    path = write(tmp_path / "amazon.csv", "".join("\t".join(line) + "\n" for line in (head, row)))
    (record,) = read_fewsum(path)["cloth"]
    assert record.source == "\n".join([*(f"r{i}" for i in range(1, 8)), 'a "good" one'])
    assert record.references == ("s1", "s2", "s3")


# --- triples ----------------------------------------------------------------------------------------------------------


def entry(category, triples, *texts, number=1):
    inside = "".join(f"<mtriple>{triple}</mtriple>" for triple in triples)
    said = "".join(f'<lex comment="{comment}" lid="Id1">{text}</lex>' for comment, text in texts)
    return (
        f'<entry category="{category}" eid="Id{number}"><modifiedtripleset>{inside}</modifiedtripleset>{said}</entry>'
    )


def document(*entries):
    return f"<benchmark><entries>{''.join(entries)}</entries></benchmark>"


AIRPORT = entry("Airport", ["A | in | B &amp; C", "B | near | D"], ("good", "A is  in B."), ("good", "B has A."))
FOOD = entry("Food", ["Soup | from | Spain"], ("good", "A soup."))


def test_webnlg_gives_entries_by_category_with_all_references(tmp_path):
    files = {
        "w/train/1triples/x.xml": document(AIRPORT, FOOD),
        "w/train/2triples/y.xml": document(AIRPORT),
        "w/dev/1triples/x.xml": document(FOOD),
        "w/test/testdata_with_lex.xml": document(AIRPORT, FOOD),
        "w/test/testdata_unseen_with_lex.xml": document(FOOD),
    }
    path = write_tar(tmp_path / "w.tar.gz", files)
    assert read_webnlg(path, "train") == {
        "Airport": (
            Record("A : in : B & C | B : near : D", ("A is in B.", "B has A."), "x.1"),
            Record("A : in : B & C | B : near : D", ("A is in B.", "B has A."), "y.1"),
        ),
        "Food": (Record("Soup : from : Spain", ("A soup.",), "x.2"),),
    }
    assert [list(read_webnlg(path, part)) for part in ("dev", "test", "test_unseen")] == [
        ["Food"],
        ["Airport", "Food"],
        ["Food"],
    ]
    with pytest.raises(ValueError, match="part: got 'valid', expected one of 'train', 'dev', 'test', 'test_unseen'"):
        read_webnlg(path, "valid")
    with pytest.raises(DataError, match="has no entry of 'train'"):
        read_webnlg(write_tar(tmp_path / "v.tar.gz", {"w/dev/x.xml": document(FOOD)}), "train")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<benchmark>", r"x\.xml: expected XML"),
        (document(), r"x\.xml: has no entry"),
        (document(FOOD, entry("", ["a | b | c"], ("good", "d"))), r"x\.xml, entry 2: has no category"),
        (document(entry("Food", [], ("good", "d"))), r"x\.xml, entry 1: got the triples \[\], expected at least one"),
        (document(entry("Food", ["a | b"], ("good", "d"))), r"entry 1: got the triples .* each of three texts"),
        (document(entry("Food", ["a | b | c"])), r"entry 1: got the texts \(\), expected at least one"),
        (document(entry("Food", ["a | b | c"], ("good", " "))), r"entry 1: got the texts \('',\)"),
    ],
    ids=["cut", "empty", "no-category", "no-triple", "two-parts", "no-text", "empty-text"],
)
def test_an_entry_that_cannot_be_read_is_named(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        read_webnlg(write_tar(tmp_path / "w.tar.gz", {"w/train/x.xml": text}), "train")


def test_dart_groups_by_where_the_texts_come_from(tmp_path):
    mixed = entry("MISC", ["a | b | c"], ("e2e", "one"), ("webnlg", "two"), ("e2e", "three"), ("e2e", ""))
    path = write(tmp_path / "test.xml.gz", document(mixed, entry("MISC", ["d | e | f"], ("e2e", "four"))))
    expected = {
        "e2e": (Record("a : b : c", ("one", "three"), "1"), Record("d : e : f", ("four",), "2")),
        "webnlg": (Record("a : b : c", ("two",), "1"),),
    }
    assert read_dart_xml(path) == expected
    entries = [
        {"tripleset": [["a", "b", "c"]], "annotations": [{"source": s, "text": t} for s, t in texts]}
        for texts in ([("e2e", "one"), ("webnlg", "two"), ("e2e", "three")], [("e2e", "four")])
    ]
    entries[1]["tripleset"] = [["d", "e", "f"]]
    assert read_dart_json(write(tmp_path / "dev.json.gz", json.dumps(entries))) == expected


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], "has no entry"),
        ({"x": 1}, r"dev\.json, entry 1: expected an object with tripleset and annotations"),
        ([{"tripleset": [["a", "b", "c"]], "annotations": [{"source": "x"}]}], "entry 1: expected an object"),
        ([{"tripleset": [["a", "b"]], "annotations": [{"source": "x", "text": "y"}]}], "entry 1: got the triples"),
        ([{"tripleset": [["a", "b", "c"]], "annotations": []}], r"entry 1: got the texts \(\)"),
        ([{"tripleset": [["a", "b", "c"]], "annotations": [{"source": "x", "text": " "}]}], r"got the texts \('',\)"),
    ],
    ids=["empty", "no-list", "no-text", "two-parts", "no-annotation", "blank"],
)
def test_a_dart_entry_that_cannot_be_read_is_named(tmp_path, entries, message):
    with pytest.raises(DataError, match=message):
        read_dart_json(write(tmp_path / "dev.json", json.dumps(entries)))


# --- meaning representations ------------------------------------------------------------------------------------------


def test_e2e_gives_each_meaning_once(tmp_path):
    path = write(tmp_path / "dev.csv", 'mr,ref\n"name[A], x[B]",one\n"name[A], x[B]",two\nname[C],three\n')
    assert read_e2e(path) == {
        "e2e": (Record("name[A], x[B]", ("one", "two"), "dev.csv:2"), Record("name[C]", ("three",), "dev.csv:4"))
    }


def test_rnnlg_gives_each_act_of_a_domain_once(tmp_path):
    comments = "####\n# (c)\n"
    files = {
        "d/hotel/test.json": comments + '[["bye()", "goodbye", "x"], ["hi()", "hello", "y"], ["bye()", "bye", "z"]]',
        "d/tv/test.json": comments + '[["hi()", "hey", "y"]]',
        "d/tv/train.json": "[]",
    }
    path = write_tar(tmp_path / "r.tar.gz", files)
    assert read_rnnlg(path, "test") == {
        "hotel": (Record("bye()", ("goodbye", "bye"), "1"), Record("hi()", ("hello",), "2")),
        "tv": (Record("hi()", ("hey",), "1"),),
    }
    with pytest.raises(DataError, match=r"d/tv/train\.json: has no entry"):
        read_rnnlg(path, "train")
    with pytest.raises(ValueError, match="part: got 'dev', expected one of"):
        read_rnnlg(path, "dev")
    for bad, message in (
        ('#\n[["hi()", "hello", "y"],\n["x"', r"tv/test\.json, line 3: expected JSON"),
        ('[["hi()", " ", "y"]]', r"tv/test\.json, entry 1: got \['hi\(\)', ' ', 'y'\], expected \[act, text"),
        ('[["hi()"]]', r"tv/test\.json, entry 1: got"),
        ("[3]", r"tv/test\.json, entry 1: got 3"),
    ):
        with pytest.raises(DataError, match=message):
            read_rnnlg(write_tar(path, {"d/tv/test.json": bad}), "test")


# --- the real corpora -------------------------------------------------------------------------------------------------


def test_summarisation_in_three_domains():
    folder = corpus("scitldr")
    sizes = {part: counts(read_scitldr(folder / f"{part}.jsonl.gz"))["science"] for part in ("train", "dev", "test")}
    assert {part: size[0] for part, size in sizes.items()} == {"train": 1992, "dev": 619, "test": 618}
    assert sizes["train"][1] == 1992 and sizes["dev"][1] == 1453
    assert counts(read_contracts(corpus("legal_summ") / "all_v1.json")) == {"contracts": (446, 446)}
    folder = corpus("fewsum")
    sizes = {
        (shop, part): total(read_fewsum(folder / f"{shop}_{part}.csv"))
        for shop in ("amazon", "yelp")
        for part in ("train", "val", "test")
    }
    assert [size[0] for size in sizes.values()] == [28, 12, 20, 30, 30, 40]
    assert all(references == 3 * products for products, references in sizes.values())
    assert len(read_fewsum(folder / "amazon_train.csv")) == 4


def test_webnlg_has_the_published_entries_and_references():
    path = corpus("webnlg_2017") / "webnlg_challenge_2017.tar.gz"
    groups = {part: read_webnlg(path, part) for part in ("train", "dev", "test", "test_unseen")}
    sizes = {part: total(found) for part, found in groups.items()}
    assert sizes == {"train": (6940, 18102), "dev": (872, 2268), "test": (1862, 4928), "test_unseen": (891, 2433)}
    assert counts(groups["train"])["Food"][0] == 1424 and len(groups["train"]) == 10
    unseen = {name: len(records) for name, records in groups["test_unseen"].items()}
    assert unseen == {
        "Artist": 213,
        "Athlete": 159,
        "CelestialBody": 112,
        "MeanOfTransportation": 198,
        "Politician": 209,
    }
    assert not unseen.keys() & groups["train"].keys() and unseen.keys() < groups["test"].keys()


def test_dart_has_the_published_entries_and_references():
    folder = corpus("dart")
    dev = counts(read_dart_json(folder / "dart-v1.1.1-full-dev.json.gz"))
    assert {name: references for name, (_, references) in dev.items()} == {
        "e2e": 4290,
        "webnlg": 2268,
        "WikiSQL_decl_sents": 250,
        "WikiTableQuestions_lily": 106,
        "WikiTableQuestions_mturk": 39,
        "WikiSQL_lily": 27,
    }
    assert sum(entries for entries, _ in dev.values()) == 2768
    # 12,552 references, one of them empty
    assert total(read_dart_xml(folder / "dart-v1.1.1-full-test.xml.gz")) == (5097, 12552 - 1)


def test_e2e_and_rnnlg_have_the_published_meanings():
    folder = corpus("e2e")
    assert len(read_e2e(folder / "devset.csv")["e2e"]) == 547
    assert len(read_e2e(folder / "testset_w_refs.csv")["e2e"]) == 630
    groups = read_rnnlg(corpus("rnnlg") / "rnnlg_original.tar.gz", "test")
    assert Counter({name: len(records) for name, records in groups.items()}) == Counter(
        hotel=399, laptop=2607, restaurant=580, tv=1393
    )
