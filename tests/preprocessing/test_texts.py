"""Cleaning, dropping words, reading `.text` and `.item2index`."""

import pytest

from common.errors import UserError
from dataset.preprocessing.texts import (
    clean_sentence,
    drop_words,
    item_text,
    published_sentence,
    read_item_order,
    read_texts,
)


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("Wooden spoon", "Wooden spoon."),
        ("Wooden spoon.", "Wooden spoon."),
        ("Wooden spoon. ", "Wooden spoon."),
        ("Spoons, forks ...", "Spoons, forks."),
        ("Salt &amp; Pepper", "Salt & Pepper."),
        ("wide\nhandle\r\nred", "wide handle red."),
        ("  two   blanks\there ", "two blanks here."),
        ("<b>Bold</b> &lt;i&gt;claims&lt;/i&gt;", "Bold claims."),
        ("Fits < 3 inches and > 2", "Fits < 3 inches and > 2."),
        ("<style>.a { color: red }</style>Lamp<!-- old -->", "Lamp."),
        ('12" ruler', '12" ruler.'),
        ("", ""),
        ("...", ""),
        ("x" * 3000, "x" * 3000 + "."),
    ],
)
def test_clean_sentence(raw, clean):
    assert clean_sentence(raw) == clean


@pytest.mark.parametrize(
    ("raw", "published"),
    [
        ("Wooden spoon", "Wooden spoon."),
        ("Wooden spoon....", "Wooden spoon."),
        ("...", ".."),
        (".", ".."),
        ("", "."),
        ("abc. ", "abc. ."),
        ("a\nb\r\nc", "abc."),
        ('12" &quot;ruler&quot; &amp; pen', "12 ruler & pen."),
        ("<b>Bold</b>", "<b>Bold</b>."),
        ("x" * 1998, "x" * 1998 + "."),
        ("x" * 1999, ""),
    ],
)
def test_published_sentence(raw, published):
    assert published_sentence(raw) == published


def test_item_text_joins_title_category_and_brand():
    assert item_text(["Spoon", "Home Kitchen", "Acme"]) == "Spoon. Home Kitchen. Acme."
    assert item_text(["Spoon", None, " . "]) == "Spoon."
    assert item_text([None, "", None]) == ""
    assert item_text(["Spoon", None, ""], "published") == "Spoon. . "


def test_drop_words_is_seeded_and_drops_about_the_asked_share():
    texts = [" ".join(f"w{i}" for i in range(20))] * 500
    once = drop_words(texts, 0.15, seed=7)
    assert once == drop_words(texts, 0.15, seed=7)
    assert once != drop_words(texts, 0.15, seed=8)
    left = sum(len(text.split()) for text in once) / (500 * 20)
    assert left == pytest.approx(0.85, abs=0.015)
    for text in once:  # the remaining words keep their order
        positions = [int(word[1:]) for word in text.split()]
        assert positions == sorted(set(positions))


def test_drop_words_keeps_a_word_and_keeps_everything_at_zero():
    texts = ["alone", "a pair", "", "three of them"] * 50
    hard = drop_words(texts, 0.99, seed=1)
    assert all(bool(new.split()) == bool(old.split()) for new, old in zip(hard, texts, strict=True))
    assert drop_words(["of  uneven   blanks"], 0.0, seed=1) == ["of uneven blanks"]
    with pytest.raises(UserError, match="word_drop"):
        drop_words(texts, 1.0, seed=1)


def test_read_texts_survives_quotes_tabs_and_carriage_returns(tmp_path):
    path = tmp_path / "A.text"
    path.write_bytes(
        b'item_id:token\ttext:token_seq\na\t12" ruler, "new\nb\tone\ttwo\rthree \nc\t\nb\tsecond\n'
        + "d\tline\u2028separator".encode()
    )
    assert read_texts(str(path)) == {
        "a": '12" ruler, "new',
        "b": "one\ttwo\rthree",
        "c": "",
        "d": "line\u2028separator",
    }


def test_read_texts_names_the_line_without_tab(tmp_path):
    path = tmp_path / "A.text"
    path.write_text("item_id:token\ttext:token_seq\na\tfine\nbroken\n")
    with pytest.raises(UserError, match="line 3"):
        read_texts(str(path))
    with pytest.raises(UserError, match="no such file"):
        read_texts(str(tmp_path / "B.text"))


def test_read_item_order_sorts_by_index_and_refuses_gaps(tmp_path):
    path = tmp_path / "A.item2index"
    path.write_text("x\t2\ny\t0\nz\t1\n")
    assert read_item_order(str(path)) == ["y", "z", "x"]
    path.write_text("x\t2\ny\t0\n")
    with pytest.raises(UserError, match="not 0 to 1"):
        read_item_order(str(path))
