"""Intents and sentiments: texts with a label, by domain or product."""

import json
from collections import Counter

import pytest

from mltd.data.encoding import encode
from mltd.data.episodes import draw
from mltd.data.files import DataError
from mltd.data.intents import read_banking77, read_clinc150, read_snips
from mltd.data.records import Record, label_groups
from mltd.data.reviews import read_movie_reviews, read_product_reviews, read_sentences
from tests.mltd.data_parts import corpus, framed_tokenizer, write, write_tar, write_zip


def labels(records):
    return Counter(record.target for record in records)


def test_banking77_is_a_table(tmp_path):
    path = write(tmp_path / "train.csv", 'text,category\n"a, b",card\nc,cash\n')
    assert read_banking77(path) == {
        "banking77": (Record("a, b", ("card",), "train.csv:2"), Record("c", ("cash",), "train.csv:3"))
    }


def test_clinc150_is_grouped_by_domain(tmp_path):
    write(tmp_path / "domains.json.gz", json.dumps({"bank": ["pay", "pin"], "home": ["light"]}))
    data = {
        "train": [["switch on", "light"], ["pay him", "pay"], ["new pin", "pin"]],
        "val": [],
        "oos_val": [["x", "oos"]],
    }
    write(tmp_path / "data_full.json.gz", json.dumps(data))
    assert read_clinc150(tmp_path, "train") == {
        "bank": (Record("pay him", ("pay",), "2"), Record("new pin", ("pin",), "3")),
        "home": (Record("switch on", ("light",), "1"),),
    }
    with pytest.raises(ValueError, match="part: got 'oos_val', expected one of 'train', 'val', 'test'"):
        read_clinc150(tmp_path, "oos_val")
    with pytest.raises(DataError, match=r"expected .* data_full\.json\.gz with 'test'"):
        read_clinc150(tmp_path, "test")
    for bad, message in (
        ([["x", "oos"]], r"train, entry 1: got the intent 'oos', expected one that domains"),
        ([["x", "pay"], [" ", "pay"]], r"train, entry 2: got \[' ', 'pay'\], expected \[query, intent\]"),
        ([["x"]], r"train, entry 1: got \['x'\]"),
    ):
        write(tmp_path / "data_full.json.gz", json.dumps({"train": bad}))
        with pytest.raises(DataError, match=message):
            read_clinc150(tmp_path, "train")


def queries(intent, *texts):
    return json.dumps({intent: [{"data": [{"text": part} for part in parts]} for parts in texts]}, ensure_ascii=False)


def test_snips_joins_the_parts_of_a_query(tmp_path):
    files = {
        "s/Play/train_Play_full.json": queries("Play", ["play ", "caf\xe9", " now"], ["stop"]).encode("latin-1"),
        "s/Play/train_Play.json": queries("Play", ["not this"]),
        "s/Play/validate_Play.json": queries("Play", ["on"]),
        "s/Rate/train_Rate_full.json": queries("Rate", ["five"]),
    }
    path = write_tar(tmp_path / "s.tar.gz", files)
    assert read_snips(path, "train") == {
        "snips": (
            Record("play café now", ("Play",), "Play.1"),
            Record("stop", ("Play",), "Play.2"),
            Record("five", ("Rate",), "Rate.1"),
        )
    }
    assert [record.source for record in read_snips(path, "validate")["snips"]] == ["on"]
    with pytest.raises(ValueError, match="part: got 'test', expected one of 'train', 'validate'"):
        read_snips(path, "test")
    for bad, message in (
        (queries("Other", ["x"]), r"train_Play_full\.json: expected \{intent"),
        (queries("Play", ["x"], [" "]), r"train_Play_full\.json, entry 2: expected a query with text"),
        ("{", r"train_Play_full\.json, line 1: expected JSON"),
    ):
        with pytest.raises(DataError, match=message):
            read_snips(write_tar(path, {"s/Play/train_Play_full.json": bad}), "train")


def test_movie_reviews_are_positive_or_negative_by_folder(tmp_path):
    path = write_zip(tmp_path / "m.zip", {"m/pos/a.txt": "good \n", "m/neg/b.txt": "bad", "m/README.txt": "no"})
    assert read_movie_reviews(path) == {
        "movies": (Record("bad", ("negative",), "b"), Record("good", ("positive",), "a"))
    }
    with pytest.raises(DataError, match=r"m/neg/b\.txt: expected text"):
        read_movie_reviews(write_zip(path, {"m/pos/a.txt": "good", "m/neg/b.txt": " "}))
    with pytest.raises(DataError, match=r"got the labels \['positive'\], expected two"):
        read_movie_reviews(write_zip(path, {"m/pos/a.txt": "good"}))


def test_sentences_have_the_label_of_their_file(tmp_path):
    path = write_zip(
        tmp_path / "subjectivity.zip",
        {
            "s/plot.tok.gt9.5000": "it is .\n\n",
            "s/quote.tok.gt9.5000": "caf\xe9 !\n".encode("latin-1"),
            "s/README.txt": "x",
        },
    )
    assert read_sentences(path) == {
        "subjectivity": (
            Record("it is .", ("objective",), "objective.1"),
            Record("café !", ("subjective",), "subjective.1"),
        )
    }
    tagged = {
        "p/IntegratedPros.txt": "<Pros>good</Pros>\n  <Pros></Pros>\n",
        "p/IntegratedCons.txt": "<Cons>bad</Cons>\n",
    }
    groups = read_sentences(write_zip(tmp_path / "pros_cons.zip", tagged))
    assert [(record.source, record.target) for record in groups["pros_cons"]] == [
        ("bad", "negative"),
        ("good", "positive"),
    ]


def test_a_product_s_sentences_have_the_sign_of_their_marks(tmp_path):
    text = "\n".join(
        [
            "*****",
            "[t]a title[+3]",
            "picture[+2], size[+1][u]##it is good . ",
            "flash[-]##it is dark .",
            "##says nothing .",
            "zoom[+2], flash[-1]##both .",
            "look##no sign .",
            "price[-2] too much",
            "colours[+1] #many .",
            "goes on without a mark .",
            "use[+3]##",
        ]
    )
    path = write_zip(tmp_path / "p.zip", {"p/Camera X.txt": text, "p/README.txt": "no"})
    (records,) = read_product_reviews(path).values()
    assert [(record.id, record.source, record.target) for record in records] == [
        ("3", "it is good .", "positive"),
        ("4", "it is dark .", "negative"),
        ("8", "too much", "negative"),
        ("9", "many .", "positive"),
    ]
    with pytest.raises(DataError, match=r"p/x\.txt: got the labels \[\], expected two"):
        read_product_reviews(write_zip(path, {"p/x.txt": "plain text\n"}))


# --- the real corpora -------------------------------------------------------------------------------------------------


def test_banking77_gives_few_shot_tasks_of_seven_intents():
    folder = corpus("banking77")
    train, test = (read_banking77(folder / f"{part}.csv") for part in ("train", "test"))
    assert (len(train["banking77"]), len(test["banking77"])) == (10003, 3080)
    assert set(labels(train["banking77"])) == set(json.loads((folder / "categories.json").read_text()))
    groups = label_groups(test, ways=7)
    assert len(groups) == 11 and {len(labels(records)) for records in groups.values()} == {7}
    drawn = draw(encode(groups, framed_tokenizer(), "classification"), "test", support=5 * 7, query=2 * 7)
    for name in groups:
        assert set(labels(drawn.support[name]).values()) == {5} and set(labels(drawn.query[name]).values()) == {2}
    assert {task.kind.name for task in drawn.tasks} == {"classification"}


def test_clinc150_has_ten_domains_of_fifteen_intents():
    folder = corpus("clinc150")
    for part, each in (("train", 100), ("val", 20), ("test", 30)):
        groups = read_clinc150(folder, part)
        assert len(groups) == 10
        assert {tuple(sorted(set(labels(records).values()))) for records in groups.values()} == {(each,)}
        assert {len(labels(records)) for records in groups.values()} == {15}


def test_snips_has_seven_intents():
    path = corpus("snips") / "snips2017.tar.gz"
    assert labels(read_snips(path, "validate")["snips"]) == dict.fromkeys(
        labels(read_snips(path, "train")["snips"]), 100
    )
    assert sorted(labels(read_snips(path, "train")["snips"]).values()) == [1942, 1954, 1956, 1959, 1973, 2000, 2000]


def test_reviews_have_the_published_sizes():
    folder = corpus("nltk_reviews")
    assert labels(read_movie_reviews(folder / "movie_reviews.zip")["movies"]) == {"negative": 1000, "positive": 1000}
    polarity = read_sentences(folder / "sentence_polarity.zip")["sentence_polarity"]
    assert labels(polarity) == {"negative": 5331, "positive": 5331}
    subjectivity = read_sentences(folder / "subjectivity.zip")["subjectivity"]
    assert labels(subjectivity) == {"objective": 5000, "subjective": 5000}
    # 45,875 lines, of which eight are empty
    assert len(read_sentences(folder / "pros_cons.zip")["pros_cons"]) == 45875 - 8
    first, second = (read_product_reviews(folder / f"product_reviews_{i}.zip") for i in (1, 2))
    assert (len(first), len(second)) == (5, 9)
    # 239 sentences about this camera have a sign, 3 of them both
    assert len(first["Canon_G3"]) == 239 - 3
    assert sum(map(len, first.values())) == 1700
