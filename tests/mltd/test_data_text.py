"""Text of many domains for language modelling: books by author, documents by genre, addresses, articles."""

import pytest

from mltd.data.books import read_books
from mltd.data.encoding import windows
from mltd.data.files import DataError
from mltd.data.masc import read_masc
from mltd.data.records import Record, pooled
from mltd.data.speeches import read_speeches
from mltd.data.wikitext import read_wikitext
from tests.mltd.data_parts import corpus, write, write_tar, write_zip
from tests.mltd.demo_parts import letter_tokenizer


def words(groups):
    return sum(len(record.target.split()) for records in groups.values() for record in records)


def test_an_author_is_a_domain_and_the_title_page_is_not_read(tmp_path):
    front = "# Title: {}\n\n## Author: A\n\n## Year: 1900\n\n-------\n\n"
    files = {
        "B/Two.md": front.format("Two") + "## I\r\n\r\ntwo\n-------\nmore\n",
        "A/One.md": front.format("One") + "one\n",
        "A/Bare.md": "no page\n",
    }
    assert read_books(write_tar(tmp_path / "books.tar.gz", files)) == {
        "A": (Record("", ("no page",), "Bare"), Record("", ("one",), "One")),
        "B": (Record("", ("## I\n\ntwo\n-------\nmore",), "Two"),),
    }
    for bad in ({"One.md": "one"}, {"A/One.md": front.format("One")}):
        with pytest.raises(DataError, match=r"One\.md: expected a book with text in the folder of its author"):
            read_books(write_tar(tmp_path / "bad.tar.gz", bad))


def test_tags_are_taken_off_and_a_genre_is_a_domain(tmp_path):
    files = {
        "categories.txt": "spoken/a b.txt telephone\nwritten/c.txt letters\n",
        "spoken/a b.txt": "\nuh_UH who_WRB ,_, _NN Mr._NNP\n\nsnake_case_NN D. \n",
        "written/c.txt": "dear_JJ\n",
    }
    assert read_masc(write_tar(tmp_path / "masc.tar.gz", files)) == {
        "letters": (Record("", ("dear",), "written/c.txt"),),
        "telephone": (Record("", ("uh who , Mr.\nsnake_case D.",), "spoken/a b.txt"),),
    }


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.txt": "x_NN"}, "has no categories.txt"),
        (
            {"categories.txt": "a.txt jokes\nb.txt jokes\n", "a.txt": "x_NN"},
            r"categories\.txt, line 2: got 'b\.txt jokes'",
        ),
        ({"categories.txt": "a.txt jokes\n", "a.txt": "\n"}, r"a\.txt: expected text"),
    ],
    ids=["no-genres", "no-file", "no-text"],
)
def test_a_document_without_genre_or_text_is_named(tmp_path, files, message):
    with pytest.raises(DataError, match=message):
        read_masc(write_tar(tmp_path / "masc.tar.gz", files))


def test_a_speaker_is_a_domain(tmp_path):
    files = {
        "u/1950-Truman.txt": "first",
        "u/1951-Truman-2.txt": "caf\xe9".encode("latin-1"),
        "u/1789-Adams.txt": "old",
        "u/README": "no",
    }
    assert read_speeches(write_zip(tmp_path / "u.zip", files)) == {
        "Adams": (Record("", ("old",), "1789-Adams"),),
        "Truman": (Record("", ("first",), "1950-Truman"), Record("", ("café",), "1951-Truman-2")),
    }
    for bad in ({"Truman.txt": "x"}, {"1950-Truman.txt": " "}):
        with pytest.raises(DataError, match=r"Truman\.txt: expected text in a file named as year-name\.txt"):
            read_speeches(write_zip(tmp_path / "bad.zip", bad))


def test_an_article_begins_at_its_heading_and_nowhere_else(tmp_path):
    text = " \n = A = B = \n \n first \n \n = = Part = = \n \n x \n \n = y = \n z \n \n = A = B = \n \n second \n"
    path = write(tmp_path / "wiki.txt", text)
    assert read_wikitext(path) == {
        "A = B": (Record("", ("= A = B = \n \n first \n \n = = Part = = \n \n x \n \n = y = \n z",), "A = B"),),
        "A = B (2)": (Record("", ("= A = B = \n \n second",), "A = B (2)"),),
    }
    with pytest.raises(DataError, match=r"wiki\.txt, line 2: got ' text', expected the heading of an article"):
        read_wikitext(write(path, "\n text\n = A = \n"))
    with pytest.raises(DataError, match=r"wiki\.txt: has no article"):
        read_wikitext(write(path, " \n"))


# --- the real corpora -------------------------------------------------------------------------------------------------


def test_classic_books_are_16_by_15_authors():
    groups = read_books(corpus("classic_books") / "classic_books.tar.gz")
    assert len(groups) == 15 and sum(len(books) for books in groups.values()) == 16
    assert {book.id for book in groups["Lewis Carroll"]} == {
        "Alice's Adventures in Wonderland",
        "Through the Looking-Glass",
    }
    # 1,251,993 words with the title pages, each of which has # Title: ## Author: ## Year: 1900 ------- and two names
    names = sum(len(f"{author} {book.id}".split()) for author, books in groups.items() for book in books)
    assert words(groups) == 1251993 - 16 * 8 - names
    assert not any("Author:" in book.target for books in groups.values() for book in books)


def test_masc_has_17_genres():
    groups = read_masc(corpus("masc") / "masc_tagged_no_email.tar.gz")
    documents = {genre: len(records) for genre, records in groups.items()}
    assert documents == {
        "blog": 21,
        "court-transcript": 2,
        "debate-transcript": 2,
        "essays": 8,
        "face-to-face": 6,
        "ficlets": 5,
        "fiction": 5,
        "govt-docs": 5,
        "jokes": 16,
        "journal": 9,
        "letters": 49,
        "movie-script": 6,
        "newspaper": 52,
        "non-fiction": 5,
        "technical": 8,
        "telephone": 5,
        "travel-guides": 7,
    }
    # 491,383 tokens, of which 20 are a tag without a word
    assert words(groups) == 491383 - 20
    tokenizer = letter_tokenizer()
    first = {genre: records[:1] for genre, records in groups.items()}
    cut = windows(first, tokenizer, 64)
    assert {len(item.example.input_ids) for items in cut.items.values() for item in items} == {64}
    assert len(cut.at_least(2).items) == 17


def test_us_speeches_are_65_and_59():
    folder = corpus("us_speeches")
    union, inaugural = (read_speeches(folder / f"{name}.zip") for name in ("state_union", "inaugural"))
    assert sum(map(len, union.values())) == 65 and words(union) == 349711
    assert sum(map(len, inaugural.values())) == 59 and words(inaugural) == 138096
    assert len(union["Reagan"]) == 8 and len(inaugural["Roosevelt"]) == 5


def test_wikitext_2_has_60_articles_in_each_part():
    folder = corpus("wikitext2")
    # tokens as published, less the ends of lines
    for part, tokens in (("valid", 217646 - 3760), ("test", 245569 - 4358)):
        groups = read_wikitext(folder / f"{part}.txt")
        assert len(groups) == 60 and words(groups) == tokens
        assert len(pooled(groups, "encyclopaedia")["encyclopaedia"]) == 60
