"""From interactions to the published layout: order, k-core, prefixes, numbering, bytes."""

import random

import polars as pl
import pytest

from common.errors import UserError
from dataset.preprocessing.splits import k_core, write_splits

HEADER = "user_id:token\titem_id_list:token_seq\titem_id:token"


def frame(rows):
    return pl.DataFrame(rows, schema={"user": pl.String, "item": pl.String, "timestamp": pl.Int64}, orient="row")


def sequence(user, items, start=0):
    return [(user, item, start + step) for step, item in enumerate(items)]


def texts_of(rows):
    return {item: f"text of {item}." for _, item, _ in rows}


def lines(folder, name, end):
    content = (folder / name / f"{name}.{end}").read_text(encoding="utf-8")
    assert content.endswith("\n")
    return content[:-1].split("\n")


def content(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_rows_of_train_valid_and_test(tmp_path):
    rows = sequence("ann", "abcde") + sequence("bob", "eca")
    summary = write_splits(frame(rows), texts_of(rows), str(tmp_path), "S")
    assert lines(tmp_path, "S", "train.inter") == [HEADER, "0\t0 1\t2", "0\t0\t1"]  # longest prefix first; bob has none
    assert lines(tmp_path, "S", "valid.inter") == [HEADER, "0\t0 1 2\t3", "1\t4\t2"]
    assert lines(tmp_path, "S", "test.inter") == [HEADER, "0\t0 1 2 3\t4", "1\t4 2\t0"]
    assert lines(tmp_path, "S", "user2index") == ["ann\t0", "bob\t1"]
    assert lines(tmp_path, "S", "item2index") == ["a\t0", "b\t1", "c\t2", "d\t3", "e\t4"]
    assert lines(tmp_path, "S", "text")[:2] == ["item_id:token\ttext:token_seq", "a\ttext of a."]
    assert summary | {"empty_texts": 0} == {
        "users": 2, "items": 5, "interactions": 8, "train_rows": 2, "duplicates": 0,
        "items_without_text": 0, "interactions_without_text": 0, "empty_texts": 0,
    }  # fmt: skip


def test_prefixes_keep_the_newest_fifty_items(tmp_path):
    rows = sequence("u", [f"i{number:02}" for number in range(55)])
    write_splits(frame(rows), texts_of(rows), str(tmp_path), "S")
    longest = lines(tmp_path, "S", "train.inter")[1].split("\t")
    assert longest == ["0", " ".join(str(item) for item in range(2, 52)), "52"]
    assert lines(tmp_path, "S", "test.inter")[1].split("\t")[1].split()[0] == "4"
    assert len(lines(tmp_path, "S", "train.inter")) == 1 + 52


def test_ties_in_time_stay_in_file_order_and_numbering_follows_the_rules(tmp_path):
    rows = [("late", "z", 5), ("tie", "c", 9), ("tie", "a", 9), ("late", "y", 4), ("tie", "b", 9), ("late", "c", 6)]
    write_splits(frame(rows), texts_of(rows), str(tmp_path), "S")
    assert lines(tmp_path, "S", "user2index") == ["late\t0", "tie\t1"]  # by first row in the file, not by time
    assert lines(tmp_path, "S", "item2index") == ["y\t0", "z\t1", "c\t2", "a\t3", "b\t4"]  # user by user, in time order
    assert lines(tmp_path, "S", "test.inter")[1:] == ["0\t0 1\t2", "1\t2 3\t4"]


def test_repeated_rows_count_once_but_repeated_purchases_stay(tmp_path):
    rows = [("u", "a", 1), ("u", "a", 1), ("u", "a", 2), ("u", "b", 3)]
    summary = write_splits(frame(rows), texts_of(rows), str(tmp_path), "S")
    assert summary["duplicates"] == 1
    assert lines(tmp_path, "S", "test.inter")[1] == "0\t0 0\t1"


def test_k_core_is_what_repeated_plain_filtering_leaves():
    luck = random.Random(3)
    rows = [(f"u{luck.randrange(60)}", f"i{int(luck.paretovariate(0.6)) % 80}", step) for step in range(600)]
    expected = rows
    while True:
        users = [row[0] for row in expected]
        fewer = [row for row in expected if users.count(row[0]) >= 6]
        items = [row[1] for row in fewer]
        fewer = [row for row in fewer if items.count(row[1]) >= 5]
        if len(fewer) == len(expected):
            break
        expected = fewer
    assert 0 < len(expected) < len(rows)
    assert k_core(frame(rows), 6, 5).rows() == expected


def test_items_without_metadata_go_before_the_core(tmp_path):
    rows = sequence("u", "abcx") + sequence("v", "xab")  # without x, v has two interactions left
    texts = {item: item for item in "abc"}
    summary = write_splits(frame(rows), texts, str(tmp_path), "S")
    assert (summary["users"], summary["items_without_text"], summary["interactions_without_text"]) == (1, 1, 2)
    assert lines(tmp_path, "S", "item2index") == ["a\t0", "b\t1", "c\t2"]


def test_empty_text_is_kept_and_named_and_every_text_is_one_line(tmp_path):
    rows = sequence("u", "abc")
    summary = write_splits(frame(rows), {"a": "  ", "b": "two\nlines\there", "c": "c."}, str(tmp_path), "S")
    assert summary["empty_texts"] == ["a"]
    assert lines(tmp_path, "S", "text")[1:] == ["a\tunknown item.", "b\ttwo lines here", "c\tc."]


def test_same_input_same_bytes_and_texts_may_be_a_frame(tmp_path):
    luck = random.Random(5)
    rows = [(f"u{luck.randrange(40)}", f"i{luck.randrange(30)}", luck.randrange(20)) for _ in range(500)]
    texts = texts_of(rows)
    write_splits(frame(rows), texts, str(tmp_path / "one"), "S", 5, 5)
    shuffled = luck.sample(sorted(texts.items()), len(texts))
    as_frame = pl.DataFrame(shuffled, schema=["item", "text"], orient="row")
    write_splits(frame(rows), as_frame, str(tmp_path / "two"), "S", 5, 5)
    assert content(tmp_path / "one" / "S") == content(tmp_path / "two" / "S")
    assert len(content(tmp_path / "one" / "S")) == 6


def test_nothing_left_and_impossible_ids_are_one_line_errors(tmp_path):
    rows = sequence("u", "abc")
    with pytest.raises(UserError, match="none of the 3 interactions remains"):
        write_splits(frame(rows), texts_of(rows), str(tmp_path), "S", user_k=4)
    rows = sequence("tab\tbed", "abc")
    with pytest.raises(UserError, match="holds a tab"):
        write_splits(frame(rows), texts_of(rows), str(tmp_path), "S")
    assert not any(tmp_path.iterdir())
