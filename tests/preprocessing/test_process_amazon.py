"""Amazon files to a data set; the published split of Scientific comes back from its raw form."""

import gzip
import json
import os

import pytest

from common.errors import UserError
from dataset.preprocessing.process_amazon import (
    FULL_NAMES,
    find_files,
    main,
    process_amazon,
    read_metadata,
    read_ratings,
)
from dataset.preprocessing.texts import read_texts

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
SHARED = os.path.join(os.path.dirname(ROOT), "shared", "data")


def write_metadata(path, entries):
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(entry) + "\n" for entry in entries)


def test_metadata_is_cleaned_and_the_first_entry_counts(tmp_path):
    path = str(tmp_path / "meta.json.gz")
    write_metadata(
        path,
        [
            {"asin": "a", "title": "Tea &amp; cup", "category": ["Home", "Kitchen"], "brand": "Acme."},
            {"asin": "a", "title": "later"},
            {"asin": "b", "title": None, "category": None, "brand": ""},
            {"asin": "c", "title": "Old edition", "categories": [["Toys", "Games"]]},
            {"asin": "unwanted", "title": "x"},
        ],
    )
    assert read_metadata(path, {"a", "b", "c"}) == {
        "a": "Tea & cup. Home Kitchen. Acme.",
        "b": "",
        "c": "Old edition. Toys Games.",
    }


def test_damaged_metadata_is_named(tmp_path):
    plain = tmp_path / "meta.json"
    plain.write_text('{"asin": "a"}\n{"asin": \n')
    with pytest.raises(UserError, match="line 2"):
        read_metadata(str(plain), {"a"})
    cut = tmp_path / "cut.json.gz"
    cut.write_bytes(gzip.compress(b'{"asin": "a"}\n' * 1000)[:-9])
    with pytest.raises(UserError, match="damaged"):
        read_metadata(str(cut), {"a"})
    fake = tmp_path / "fake.json.gz"
    fake.write_text("no gzip")
    with pytest.raises(UserError, match="damaged"):
        read_metadata(str(fake), {"a"})


def test_ratings_are_read_in_file_order_and_wrong_ones_refused(tmp_path):
    path = tmp_path / "r.csv"
    path.write_text("i1,u1,5.0,20\ni2,u1,1.0,10\n")
    assert read_ratings(str(path)).rows() == [("u1", "i1", 20), ("u1", "i2", 10)]
    for wrong in ("item,user,rating,timestamp\ni1,u1,5.0,20\n", "i1,u1,5.0\n", "i1,u1,5.0,\n", ""):
        path.write_text(wrong)
        with pytest.raises(UserError, match="item,user,rating,timestamp"):
            read_ratings(str(path))
    with pytest.raises(UserError, match="no such file"):
        read_ratings(str(tmp_path / "none.csv"))


def test_names_of_the_categories():
    assert len(FULL_NAMES) == len(set(FULL_NAMES.values())) == 29
    ratings, metadata = find_files("Scientific", "raw")
    assert ratings == os.path.join("raw", "Ratings", "Industrial_and_Scientific.csv")
    assert metadata == os.path.join("raw", "Metadata", "meta_Industrial_and_Scientific.json.gz")
    assert find_files("All_Beauty", "raw") == find_files("Beauty", "raw")
    with pytest.raises(UserError, match="did you mean Toys"):
        find_files("Toyz", "raw")


def test_command_with_files_of_ones_own(tmp_path, capsys):
    (tmp_path / "r.csv").write_text("".join(f"{item},u,5.0,{step}\n" for step, item in enumerate("abc")))
    write_metadata(str(tmp_path / "m.json.gz"), [{"asin": item, "title": item} for item in "abc"])
    files = ["--ratings", str(tmp_path / "r.csv"), "--metadata", str(tmp_path / "m.json.gz")]
    main(["--dataset", "My", *files, "--output_path", str(tmp_path), "--user_k", "3", "--item_k", "1"])
    assert "1 users, 3 items, 3 interactions" in capsys.readouterr().out
    assert (tmp_path / "My" / "My.test.inter").read_text().endswith("0\t0 1\t2\n")
    for wrong in (files[:2], [], [*files, "--input_path", "raw"]):
        with pytest.raises(UserError, match="--input_path"):
            main(["--dataset", "My", *wrong])


def raw_sequences(folder, name):
    """Raw user -> raw items in order, from the test row (all but the last item, at most 50) and its target."""

    def raw(end):
        with open(os.path.join(folder, f"{name}.{end}"), encoding="utf-8") as file:
            return {index: raw for raw, index in (line.rstrip("\n").split("\t") for line in file)}

    users, items = raw("user2index"), raw("item2index")
    with open(os.path.join(folder, f"{name}.test.inter"), encoding="utf-8") as file:
        next(file)
        rows = [line.rstrip("\n").split("\t") for line in file]
    return {users[user]: [items[i] for i in (*prefix.split(" "), target)] for user, prefix, target in rows}


@pytest.mark.skipif(not os.path.isdir(SHARED), reason="no raw data in ../shared/data")
def test_scientific_comes_back_from_its_raw_form(tmp_path):
    ratings, metadata = find_files("Scientific", os.path.join(SHARED, "raw"))
    summary = process_amazon("Scientific", ratings, metadata, str(tmp_path))
    assert (summary["users"], summary["items"], summary["interactions"]) == (8442, 4385, 59427)
    assert (summary["duplicates"], summary["items_without_text"]) == (500, 40)

    published, ours = os.path.join(SHARED, "downstream", "Scientific"), str(tmp_path / "Scientific")
    assert raw_sequences(ours, "Scientific") == raw_sequences(published, "Scientific")

    expected = read_texts(os.path.join(published, "Scientific.text"))
    texts = read_texts(os.path.join(ours, "Scientific.text"))
    assert texts.keys() == expected.keys()
    for item, text in texts.items():  # the published cleaning leaves double blanks, and ". ." at 13 ends
        assert text.rstrip(". ") == " ".join(expected[item].split()).rstrip(". ")
        assert text.endswith(".") and not text.endswith((" .", ".."))
