"""Tables as records: columns by name, and errors that name file, line and column before anything is trained."""

import pytest

from mltd.data.files import DataError, read_archive, read_text
from mltd.data.records import Record
from mltd.data.tables import Columns, read_csv, read_dataset, read_jsonl
from tests.mltd.data_parts import write, write_tar, write_zip

QA = Columns(source="question", target="answer", group="topic")


@pytest.mark.parametrize("name", ["qa.jsonl", "qa.jsonl.gz"])
def test_json_lines_are_grouped_by_a_column(tmp_path, name):
    text = (
        '{"topic": "b", "question": "q1", "answer": "a1", "more": null}\n'
        '{"topic": "a", "question": ["one.", " ", "two."], "answer": ["a2", "a3"]}\n'
        '{"topic": "b", "question": 7, "answer": true}\n'
    )
    assert read_jsonl(write(tmp_path / name, text), QA) == {
        "b": (Record("q1", ("a1",), f"{name}:1"), Record("7", ("True",), f"{name}:3")),
        "a": (Record("one. two.", ("a2", "a3"), f"{name}:2"),),
    }


def test_without_a_group_the_task_has_the_file_s_name_and_without_a_source_there_is_text_only(tmp_path):
    path = write(tmp_path / "news.jsonl.gz", '{"text": "a\u2028b"}\n')
    assert read_jsonl(path, Columns(None, "text")) == {"news": (Record("", ("a\u2028b",), "news.jsonl.gz:1"),)}


@pytest.mark.parametrize(
    ("name", "delimiter"), [("qa.csv", ","), ("qa.csv.gz", ","), ("qa.tsv", "\t"), ("qa.tsv.gz", "\t")]
)
def test_csv_and_tsv_keep_quoted_values_and_words_that_look_like_missing_ones(tmp_path, name, delimiter):
    rows = [["topic", "question", "answer"], ["t", f'"a{delimiter}b\nc"', "NA"], [], ["t", "None", '"say ""x"""']]
    text = "".join(delimiter.join(row) + "\n" for row in rows)
    assert read_csv(write(tmp_path / name, "\ufeff" + text), QA) == {
        "t": (
            Record(f"a{delimiter}b\nc", ("NA",), f"{name}:2"),
            Record("None", ('say "x"',), f"{name}:5"),
        )
    }


def test_several_columns_are_joined_as_a_source_and_are_references_as_a_target(tmp_path):
    path = write(tmp_path / "sums.csv", 'id,r1,r2,s1,s2\n7,"good\n",bad,one,two\n')
    columns = Columns(source=("r1", "r2"), target=("s1", "s2"), unit="id")
    assert read_csv(path, columns) == {"sums": (Record("good\nbad", ("one", "two"), "sums.csv:2", "7"),)}


def test_quotation_marks_can_be_signs_like_any_other(tmp_path):
    path = write(tmp_path / "q.tsv", 'x\ty\n"a\tb"\n')
    with pytest.raises(DataError, match=r"q\.tsv, line 2: got 1 values, expected 2"):
        read_csv(path, Columns("x", "y"))
    assert read_csv(path, Columns("x", "y"), quoting=False)["q"][0] == Record('"a', ('b"',), "q.tsv:2")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"topic": "t", "question": "q", "answer": "a"}\n{"topic"', r"qa\.jsonl, line 2, line 1: expected JSON"),
        ('{"topic": "t", "question": "q", "answer": "a"}\n\n', r"qa\.jsonl, line 2: got '', expected a JSON object"),
        ("[1]\n", r"qa\.jsonl, line 1: got '\[1\]', expected a JSON object"),
        ('{"topic": "t", "question": "q"}\n', r"qa\.jsonl:1: no column 'answer'.*\['topic', 'question'\]"),
        ('{"topic": "t", "question": "q", "answer": " "}\n', r"qa\.jsonl:1: column 'answer' is ' ', expected text"),
        ('{"topic": "t", "question": "q", "answer": null}\n', r"qa\.jsonl:1: column 'answer' is None, expected text"),
        ('{"topic": "t", "question": "q", "answer": ["a", ""]}\n', r"column 'answer' is \['a', ''\], expected text"),
        ('{"topic": "t", "question": [], "answer": "a"}\n', r"qa\.jsonl:1: column 'question' is \[\], expected text"),
        ('{"topic": "t", "question": {"x": 1}, "answer": "a"}\n', r"column 'question' is \{'x': 1\}, expected text"),
        ('{"topic": "t", "question": NaN, "answer": "a"}\n', r"column 'question' is nan, expected text"),
        ('{"topic": ["t"], "question": "q", "answer": "a"}\n', r"qa\.jsonl:1: column 'topic' is a list"),
        ('{"topic": "", "question": "q", "answer": "a"}\n', r"qa\.jsonl:1: column 'topic' is '', expected text"),
        ("", r"qa\.jsonl: has no row"),
    ],
    ids=[
        "cut",
        "empty-line",
        "no-object",
        "no-column",
        "blank",
        "null",
        "one-of-two",
        "empty-list",
        "object",
        "nan",
        "group-list",
        "group-blank",
        "empty-file",
    ],
)
def test_a_line_that_cannot_be_read_is_named(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        read_jsonl(write(tmp_path / "qa.jsonl", text), QA)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('topic,question,answer\nt,"a\nb",c\nt,x\n', r"qa\.csv, line 4: got 2 values, expected 3"),
        (
            "topic,question,answer\nt,a,b,c\n",
            r"qa\.csv, line 2: got 4 values, expected 3.*quote values that hold a ','",
        ),
        ("topic,question,reply\nt,a,b\n", r"qa\.csv:2: no column 'answer'"),
        ("topic,question,answer\nt,a,b\nt,a,\n", r"qa\.csv:3: column 'answer' is '', expected text"),
        ('topic,question,answer\nt,"a,b\n', r"qa\.csv, line 2: expected CSV"),
        ("topic,question,answer\n", r"qa\.csv: has no row"),
    ],
    ids=["few", "many", "no-column", "blank", "open-quote", "no-row"],
)
def test_a_row_that_cannot_be_read_is_named(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        read_csv(write(tmp_path / "qa.csv", text), QA)


def test_a_dataset_in_memory_or_on_disk_gives_the_names_of_its_classes(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    )
    data = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    columns = Columns("text", "label")
    assert read_dataset(data, columns) == {
        "dataset": (Record("a", ("good",), "dataset:0"), Record("b", ("bad",), "dataset:1"))
    }
    data.save_to_disk(str(tmp_path / "saved"))
    (records,) = read_dataset(tmp_path / "saved", columns).values()
    assert [(record.source, record.target) for record in records] == [("a", "good"), ("b", "bad")]
    grouped = read_dataset(data, Columns(None, "text", group="label"))
    assert {name: records[0].target for name, records in grouped.items()} == {"good": "a", "bad": "b"}
    for missing in (-1, None):
        unlabelled = datasets.Dataset.from_dict({"text": ["a"], "label": [missing]}, features=features)
        with pytest.raises(DataError, match="dataset:0: column 'label' is None, expected text"):
            read_dataset(unlabelled, columns)
    with pytest.raises(DataError, match=r"got a DatasetDict with the splits 'train', 'test', expected a Dataset"):
        read_dataset(datasets.DatasetDict({"train": data, "test": data}), columns)


# --- files and archives -----------------------------------------------------------------------------------------------


def test_archives_are_read_in_order_and_in_place(tmp_path):
    files = {"b/2.txt": "two", "a/1.txt": "one", "a/3.md": "three"}
    for path in (write_tar(tmp_path / "x.tar.gz", files), write_zip(tmp_path / "x.zip", files)):
        assert list(read_archive(path, ".txt").items()) == [("a/1.txt", b"one"), ("b/2.txt", b"two")]
        with pytest.raises(DataError, match=r"has no file that ends in '\.xml'"):
            read_archive(path, ".xml")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.tar.gz", "x.zip"]


@pytest.mark.parametrize("name", ["x.tar.gz", "x.zip", "x.txt.gz"])
@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"not one"], ids=["cut", "other"])
def test_a_damaged_archive_is_named(tmp_path, name, damage):
    path = tmp_path / name
    if name == "x.txt.gz":
        write(path, "some text " * 99)
    else:
        (write_zip if name == "x.zip" else write_tar)(path, {"a.txt": bytes(range(256)) * 99})
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=rf"{name}: expected a whole"):
        read_text(path) if name == "x.txt.gz" else read_archive(path)


def test_text_of_another_encoding_is_named_with_its_line(tmp_path):
    (tmp_path / "x.txt").write_bytes("one\ntwo\ncafé\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"x\.txt, line 3: expected UTF-8 text"):
        read_text(tmp_path / "x.txt")
