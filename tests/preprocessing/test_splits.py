"""From interactions to the published layout: what stays, prefixes, numbers, texts, the description, bytes."""

import errno
import hashlib
import json
import os
import random
import subprocess
import sys

import polars as pl
import pytest

from common.errors import UserError
from dataset.preprocessing import splits
from dataset.preprocessing.splits import Rules, report, write_data_set
from dataset.preprocessing.texts import read_texts, texts_sha256
from tests.conftest import ROOT
from tests.preprocessing.shops import HEADER, content, interactions, lines, sequence, texts_of, write

FILES = {"train.inter", "valid.inter", "test.inter", "user2index", "item2index", "text", "json"}


def test_rows_of_train_valid_and_test(tmp_path):
    rows = sequence("ann", "abcde") + sequence("bob", "eca")
    description = write(tmp_path, rows)
    assert lines(tmp_path, "S", "train.inter") == [HEADER, "0\t0 1\t2", "0\t0\t1"]  # longest prefix first; bob has none
    assert lines(tmp_path, "S", "valid.inter") == [HEADER, "0\t0 1 2\t3", "1\t4\t2"]
    assert lines(tmp_path, "S", "test.inter") == [HEADER, "0\t0 1 2 3\t4", "1\t4 2\t0"]
    assert lines(tmp_path, "S", "user2index") == ["ann\t0", "bob\t1"]
    assert lines(tmp_path, "S", "item2index") == ["a\t0", "b\t1", "c\t2", "d\t3", "e\t4"]
    assert lines(tmp_path, "S", "text")[:2] == ["item_id:token\ttext:token_seq", "a\ttext of a."]
    counts = {key: description[key] for key in ("users", "items", "interactions", "rows", "items_without_text")}
    assert counts == {
        "users": 2, "items": 5, "interactions": 8, "rows": {"train": 2, "valid": 2, "test": 2},
        "items_without_text": [],
    }  # fmt: skip


def test_prefixes_keep_the_newest_fifty_items(tmp_path):
    rows = sequence("u", [f"i{number:02}" for number in range(55)])
    write(tmp_path, rows)
    longest = lines(tmp_path, "S", "train.inter")[1].split("\t")
    assert longest == ["0", " ".join(str(item) for item in range(2, 52)), "52"]
    assert lines(tmp_path, "S", "test.inter")[1].split("\t")[1].split()[0] == "4"
    assert len(lines(tmp_path, "S", "train.inter")) == 1 + 52


def expected_rows(rows):
    """The three files by the plainest way, for rows that all stay: dict of split -> lines."""
    histories = {}
    for user, item, when in rows:
        histories.setdefault(user, []).append((when, item))
    numbers, found = {}, {"train": [HEADER], "valid": [HEADER], "test": [HEADER]}
    for user, history in enumerate(histories.values()):
        history.sort(key=lambda pair: pair[0])
        items = [str(numbers.setdefault(item, len(numbers))) for _, item in history]
        for target in range(len(items) - 1, 0, -1):
            split = {1: "test", 2: "valid"}.get(len(items) - target, "train")
            found[split].append(f"{user}\t{' '.join(items[max(0, target - 50) : target])}\t{items[target]}")
    return found


@pytest.mark.parametrize("block", [1, 300, 1 << 20])
def test_the_files_are_what_plain_loops_write(tmp_path, monkeypatch, block):
    monkeypatch.setattr(splits, "_BLOCK", block)
    luck = random.Random(4)
    rows = [(f"u{min(luck.randrange(30), luck.randrange(30))}", f"i{luck.randrange(300)}", n // 3) for n in range(1500)]
    rows = [row for row in rows if sum(other[0] == row[0] for other in rows) >= 3]
    write(tmp_path, list(dict.fromkeys(rows)))
    for split, expected in expected_rows(list(dict.fromkeys(rows))).items():
        assert lines(tmp_path, "S", f"{split}.inter") == expected
    assert max(line.count(" ") for line in expected) == 49


def test_ties_in_time_stay_in_file_order_and_numbering_follows_the_rules(tmp_path):
    rows = [("late", "z", 5), ("tie", "c", 9), ("tie", "a", 9), ("late", "y", 4), ("tie", "b", 9), ("late", "c", 6)]
    write(tmp_path, rows)
    assert lines(tmp_path, "S", "user2index") == ["late\t0", "tie\t1"]  # by first row in the file, not by time
    assert lines(tmp_path, "S", "item2index") == ["y\t0", "z\t1", "c\t2", "a\t3", "b\t4"]  # user by user, in time order
    assert lines(tmp_path, "S", "test.inter")[1:] == ["0\t0 1\t2", "1\t2 3\t4"]


def test_repeated_rows_count_once_but_repeated_purchases_stay(tmp_path):
    rows = [("u", "a", 1), ("u", "a", 1), ("u", "a", 2), ("u", "b", 3)]
    assert write(tmp_path, rows)["interactions"] == 3
    assert lines(tmp_path, "S", "test.inter")[1] == "0\t0 0\t1"


def test_the_report_says_what_each_step_took(tmp_path):
    rows = sequence("u", "abcx") + sequence("v", "xab") + [("u", "a", 0)]  # without x, v has two interactions left
    description = write(tmp_path, rows, {item: item for item in "abc"})
    steps = {step["step"]: (step["interactions"], step["users"], step["items"]) for step in description["steps"]}
    assert list(steps.values()) == [(8, 2, 4), (7, 2, 4), (5, 2, 3), (3, 1, 3)]
    assert list(steps) == ["read", "repeated rows", "items without metadata", "fewer than 3 of a user, 0 of an item"]
    printed = report(description).splitlines()
    assert printed[0] == "S: 1 users, 3 items, 3 interactions; rows: 1 valid, 1 test" or "0 train" in printed[0]
    assert [line.split()[-3:] for line in printed[2:]] == [
        ["8", "2", "4"], ["-1", "+0", "+0"], ["-2", "+0", "-1"], ["-2", "-1", "+0"],
    ]  # fmt: skip


def test_items_without_a_text(tmp_path):
    rows = sequence("u", "abcd") + sequence("v", "dcba")
    texts = {"a": " . ", "b": "b.", "c": "", "d": "d."}
    with pytest.raises(UserError, match="2 of 4 items have no text: a, c; choose --missing_text"):
        write(tmp_path, rows, texts)
    assert not any(tmp_path.iterdir())
    assert write(tmp_path, rows, texts, missing_text="empty")["items_without_text"] == ["a", "c"]
    assert lines(tmp_path, "S", "text")[1:] == ["a\t . ", "b\tb.", "c\t", "d\td."]
    with pytest.raises(UserError, match="none of the 8 interactions remains"):
        write(tmp_path, rows, texts, missing_text="drop")
    rows += sequence("w", "bdbd")
    description = write(tmp_path, rows, texts, missing_text="drop")
    assert (description["users"], description["items"]) == (1, 2)
    assert description["steps"][3] == {"step": "items without text", "interactions": 8, "users": 3, "items": 2}


def test_only_the_texts_of_items_that_can_stay_are_asked_for(tmp_path):
    rows = sequence("u", "abc") * 1 + sequence("once", "q")
    asked = {}

    def read_texts(items, wanted):
        asked.update(items=sorted(items), wanted=sorted(wanted))
        return pl.DataFrame({"item": list("abcq"), "text": ["a", "b", "c", None]})

    write_data_set("S", str(tmp_path), interactions(rows), read_texts, Rules(3, 1), dict)
    assert asked == {"items": list("abcq"), "wanted": list("abc")}


def test_all_items_stand_in_the_catalogue(tmp_path):
    rows = sequence("u", "abc")
    description = write(tmp_path, rows, {"new": "new.", **texts_of(rows), "rare": "rare."}, all_items=True)
    assert lines(tmp_path, "S", "item2index") == ["a\t0", "b\t1", "c\t2", "new\t3", "rare\t4"]
    assert lines(tmp_path, "S", "text")[4:] == ["new\tnew.", "rare\trare."]
    assert description["items"] == 5


def test_split_by_time(tmp_path):
    rows = sequence("u", "abcde") + sequence("v", "edcba", 10) + [("w", "a", 3), ("w", "b", 14)]
    description = write(tmp_path, rows, split="time", valid_share=0.2, test_share=0.1)
    # 12 interactions: valid from the 9th (time 11... ) on, test from the last 10% on, where ties go together
    times = sorted(row[2] for row in rows)
    valid_from, test_from = times[round(0.7 * 12)], times[round(0.9 * 12)]
    part = {row: "test" if row[2] >= test_from else "valid" if row[2] >= valid_from else "train" for row in rows}
    firsts = {"u": 0, "v": 10, "w": 3}
    for split in ("train", "valid", "test"):
        expected = sum(name == split and row[2] > firsts[row[0]] for row, name in part.items())
        assert description["rows"][split] == expected == len(lines(tmp_path, "S", f"{split}.inter")) - 1
    assert lines(tmp_path, "S", "test.inter")[1:] == ["1\t4 3 2 1\t0", "2\t0\t1"]


def test_the_description_says_where_everything_comes_from(tmp_path):
    rows = sequence("u", "abc")
    texts = {"a": "first. ", "b": "", "c": "third."}
    description = write(tmp_path, rows, texts, missing_text="empty")
    assert json.loads((tmp_path / "S" / "S.json").read_text()) == description
    assert set(content(tmp_path / "S")) == {f"S.{end}" for end in FILES}
    for name, file in description["files"].items():
        written = (tmp_path / "S" / name).read_bytes()
        assert file == {"bytes": len(written), "sha256": hashlib.sha256(written).hexdigest()}
    assert len(description["files"]) == 6
    assert description["texts_sha256"] == hashlib.sha256(b"first.\n\nthird.").hexdigest()
    assert description["texts_sha256"] == texts_sha256(read_texts(str(tmp_path / "S" / "S.text")).values())


def test_features_of_the_same_texts_stay_in_the_description(tmp_path):
    rows = sequence("u", "abc")
    path = tmp_path / "S" / "S.json"
    description = write(tmp_path, rows)
    features = {"feat1CLS": {"texts_sha256": description["texts_sha256"]}, "feat1Mean": {"texts_sha256": "another"}}
    path.write_text(json.dumps(description | {"features": features}))
    assert list(write(tmp_path, rows)["features"]) == ["feat1CLS"]
    assert write(tmp_path, rows, {item: "new" for item in "abc"})["features"] == {}
    path.write_text("{half")
    assert write(tmp_path, rows)["features"] == {}


SCRIPT = """
import random, sys
from tests.preprocessing.shops import texts_of, write
luck = random.Random(5)
rows = [(f"u{luck.randrange(40)}", f"i{luck.randrange(30)}", luck.randrange(20)) for _ in range(500)]
write(sys.argv[1], rows, texts_of(rows), user_k=5, item_k=5)
"""


@pytest.mark.slow
def test_same_bytes_whatever_the_hash_seed_and_the_number_of_threads(tmp_path):
    found = []
    for seed, threads in (("1", "1"), ("2", "2"), ("3", "4")):
        environment = os.environ | {"PYTHONHASHSEED": seed, "POLARS_MAX_THREADS": threads, "PYTHONPATH": ROOT}
        subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path / seed)], env=environment, cwd=ROOT, check=True)
        found.append(content(tmp_path / seed / "S"))
    assert found[0] == found[1] == found[2]
    assert len(found[0]) == len(FILES)


def test_a_full_disk_leaves_the_old_data_set(tmp_path, monkeypatch):
    write(tmp_path, sequence("u", "abc"))
    before = content(tmp_path / "S")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(splits, "_write_table", full)
    for name in ("S", "New"):
        with pytest.raises(UserError, match=f"{name}: cannot be written: the disk is full"):
            write(tmp_path, sequence("u", "abcd"), name=name)
    assert content(tmp_path / "S") == before
    assert os.listdir(tmp_path) == ["S"]


@pytest.mark.parametrize(
    ("rows", "rules", "message"),
    [
        (sequence("u", "abc"), {"user_k": 4}, "none of the 3 interactions remains"),
        (sequence("tab\tbed", "abc"), {}, "user id 'tab\\\\tbed': holds a tab"),
        (sequence("u", ["a", "b", "line\nbreak"]), {}, "item id 'line\\\\nbreak': holds a tab or a line break"),
        (sequence("u", "abc"), {"user_k": -1}, "--user_k -1: expected a whole number from 0"),
        (sequence("u", "abc"), {"missing_text": "dorp"}, "did you mean drop"),
        (sequence("u", "abc"), {"split": "tmie"}, "did you mean time"),
        (sequence("u", "abc"), {"test_share": 0.9}, "leave something to train on"),
        (sequence("u", "abc"), {"name": "a/b"}, "expected a plain folder name"),
        (sequence("u", "abc"), {"name": ""}, "expected a plain folder name"),
        ([("u", "a", 1), ("u", "b", 1)], {"split": "time"}, "no row for valid"),
    ],
)
def test_what_cannot_be_is_one_line_and_leaves_nothing_behind(tmp_path, rows, rules, message):
    with pytest.raises(UserError, match=message) as error:
        write(tmp_path, rows, **rules)
    assert "\n" not in str(error.value)
    assert not any(tmp_path.iterdir())
