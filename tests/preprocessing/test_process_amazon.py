"""Amazon's files of three editions to a data set; the published split of Scientific comes back from its raw form."""

import gzip
import json
import os

import pytest

from common.errors import UserError, run_command
from dataset.preprocessing.process_amazon import FULL_NAMES, find_files, main
from dataset.preprocessing.texts import read_texts
from tests.conftest import ROOT
from tests.preprocessing.shops import HEADER, content, lines, write_json_lines

SHARED = os.path.join(os.path.dirname(ROOT), "shared", "data")
CLICKS = [("u", "a", 10), ("v", "b", 20), ("u", "b", 30), ("v", "c", 40), ("u", "c", 50), ("v", "a", 60)]
# The split that CLICKS make, whatever the edition.
TEST_ROWS = [HEADER, "0\t0 1\t2", "1\t1 2\t0"]
TEXTS = ["a\tSalt & Pepper. Home Kitchen. Acme.", "b\tSpoon.", "c\tLamp. Home."]


def write_2018(folder):
    (folder / "Ratings").mkdir(parents=True)
    (folder / "Metadata").mkdir()
    rows = "".join(f"{item},{user},5.0,{when}\n" for user, item, when in CLICKS)
    (folder / "Ratings" / "Prime_Pantry.csv").write_text(rows)
    write_json_lines(
        folder / "Metadata" / "meta_Prime_Pantry.json.gz",
        [
            {"asin": "a", "title": "Salt &amp; Pepper", "category": ["Home", "Kitchen"], "brand": "Acme."},
            {"asin": "a", "title": "a second entry"},
            {"asin": "b", "title": "Spoon", "category": [], "brand": None},
            {"asin": "unknown", "title": "x"},
            {"asin": "c", "title": "Lamp", "category": ["Home"], "feature": ["bright", "blue"]},
        ],
    )


def write_2014(folder):
    folder.mkdir()
    rows = "".join(f"{user},{item},5.0,{when}\n" for user, item, when in CLICKS)
    (folder / "ratings_Prime_Pantry.csv").write_text(rows)
    with gzip.open(folder / "meta_Prime_Pantry.json.gz", "wt", encoding="utf-8") as file:
        file.write(
            "{'asin': 'a', 'title': \"Salt &amp; Pepper\", 'categories': [['Home', 'Kitchen']], 'brand': 'Acme'}\n"
        )
        file.write('{"asin": "b", "title": "Spoon"}\n')  # JSON is understood too
        file.write("{'asin': 'c', 'title': 'Lamp', 'categories': [['Home']], 'price': 1.5}\n")


def write_2023(folder, ratings="jsonl"):
    folder.mkdir()
    if ratings == "jsonl":
        rows = [{"user_id": user, "asin": "x", "parent_asin": item, "timestamp": when, "text": "Ten.\nTen!"}
                for user, item, when in CLICKS]  # fmt: skip
        write_json_lines(folder / "Prime_Pantry.jsonl.gz", rows)
    else:
        rows = "".join(f"{user},{item},5.0,{when}\n" for user, item, when in CLICKS)
        with gzip.open(folder / "Prime_Pantry.csv.gz", "wt") as file:
            file.write("user_id,parent_asin,rating,timestamp\n" + rows)
    write_json_lines(
        folder / "meta_Prime_Pantry.jsonl.gz",
        [
            {"parent_asin": "a", "title": "Salt &amp; Pepper", "categories": ["Home", "Kitchen"], "store": "Acme"},
            {"parent_asin": "b", "title": "Spoon", "categories": [], "store": None, "features": ["steel"]},
            {"parent_asin": "c", "title": "Lamp", "categories": ["Home"], "description": ["Bright.", "Blue"]},
        ],
    )


def process(folder, output, *options, dataset="Pantry"):
    small = ["--user_k", "3", "--item_k", "1", "--plm_name", "none"]
    main(["--dataset", dataset, "--input_path", str(folder), "--output_path", str(output), *small, *options])


EDITIONS = {
    "2018": write_2018,
    "2014": write_2014,
    "2023": write_2023,
    "2023 ratings only": lambda folder: write_2023(folder, "csv"),
}


@pytest.mark.parametrize("edition", EDITIONS)
@pytest.mark.parametrize("name", ["Pantry", "Prime_Pantry"])
def test_every_edition_by_short_and_full_name(tmp_path, edition, name, capsys):
    EDITIONS[edition](tmp_path / "raw")
    process(tmp_path / "raw", tmp_path, dataset=name)
    assert lines(tmp_path, name, "test.inter") == TEST_ROWS
    assert lines(tmp_path, name, "text")[1:] == TEXTS
    assert f"{name}: 2 users, 3 items, 6 interactions" in capsys.readouterr().out
    description = json.loads((tmp_path / name / f"{name}.json").read_text())
    assert description["options"]["edition"] == edition[:4]
    assert [source["malformed"] for source in description["sources"]] == [0, 0]


def test_the_folders_of_2018_may_be_missing_and_the_files_be_named(tmp_path):
    write_2018(tmp_path / "raw")
    for folder in ("Ratings", "Metadata"):
        (file,) = (tmp_path / "raw" / folder).iterdir()
        file.rename(tmp_path / "raw" / file.name)
    process(tmp_path / "raw", tmp_path / "flat")
    files = ["--ratings", str(tmp_path / "raw/Prime_Pantry.csv"),
             "--metadata", str(tmp_path / "raw/meta_Prime_Pantry.json.gz")]  # fmt: skip
    end = ["--user_k", "3", "--item_k", "1", "--plm_name", "none", "--output_path", str(tmp_path / "named")]
    main(["--dataset", "Pantry", *files, *end])
    assert content(tmp_path / "flat" / "Pantry") == content(tmp_path / "named" / "Pantry")
    for wrong in (files[:2], [*files, "--input_path", "raw"]):
        with pytest.raises(UserError, match="--input_path"):
            main(["--dataset", "My", *wrong, *end])


def test_the_text_is_made_of_the_fields_asked_for(tmp_path):
    write_2023(tmp_path / "raw")
    process(tmp_path / "raw", tmp_path, "--text_fields", "store,title,description,features")
    assert lines(tmp_path, "Pantry", "text")[1:] == [
        "a\tAcme. Salt & Pepper.",
        "b\tSpoon. steel.",
        "c\tLamp. Bright. Blue.",
    ]
    with pytest.raises(UserError, match=r"--text_fields titel: .*no column titel.*did you mean title"):
        process(tmp_path / "raw", tmp_path, "--text_fields", "titel")


def test_published_texts_are_repeated_letter_by_letter(tmp_path):
    write_2018(tmp_path / "raw")
    process(tmp_path / "raw", tmp_path, "--text_style", "published")
    assert lines(tmp_path, "Pantry", "text")[1:] == [
        "a\tSalt & Pepper. Home Kitchen. Acme. ", "b\tSpoon. . ", "c\tLamp. Home. ",
    ]  # fmt: skip


def test_names_of_the_categories(tmp_path):
    assert len(FULL_NAMES) == len(set(FULL_NAMES.values())) == 29
    with pytest.raises(UserError, match=r"holds no ratings and metadata of Toyz; did you mean Toys\?; looked for"):
        find_files("Toyz", str(tmp_path))
    with pytest.raises(UserError, match=r"looked for Ratings/Toys_and_Games\.csv"):
        find_files("Toys", str(tmp_path))
    with pytest.raises(UserError, match="no such folder"):
        find_files("Toys", str(tmp_path / "nowhere"))


def break_gzip(path):
    path.write_bytes(path.read_bytes()[:-9])


def few_malformed(path):
    """Two of 400 rows."""
    rows = [f"{item},{user},5.0,{60 * turn + when}\n" for turn in range(67) for user, item, when in CLICKS][:400]
    rows[6], rows[20] = "half a row\n", "a,u,5.0,yesterday\n"
    path.write_text("".join(rows))


def test_a_few_malformed_rows_are_shown_and_left_out(tmp_path, capsys):
    write_2018(tmp_path / "raw")
    few_malformed(tmp_path / "raw/Ratings/Prime_Pantry.csv")
    process(tmp_path / "raw", tmp_path)
    printed = capsys.readouterr().out
    assert "398 interactions" in printed
    assert "Prime_Pantry.csv: 2 malformed rows left out; line 7: 'half a row'; line 21: 'a,u,5.0,yesterday'" in printed
    with pytest.raises(UserError, match=r"2 of 400 rows are malformed, line 7: .* --max_malformed 0\.01"):
        process(tmp_path / "raw", tmp_path, "--max_malformed", "0.001")


@pytest.mark.parametrize(
    ("file", "harm", "message"),
    [
        ("Ratings/Prime_Pantry.csv", lambda p: p.write_text("user_id,parent_asin\n" * 9), "9 of 9 rows are malformed"),
        ("Ratings/Prime_Pantry.csv", lambda p: p.write_text("a,u,5.0\n" * 9), "line 1: 'a,u,5.0'"),
        ("Ratings/Prime_Pantry.csv", lambda p: p.write_text(""), "holds no interaction"),
        ("Ratings/Prime_Pantry.csv", lambda p: p.write_bytes(bytes(range(256))), "is a binary file"),
        ("Ratings/Prime_Pantry.csv", lambda p: p.write_text("zz,u,5.0,1\n" * 9), "none of the 9 interactions remains"),
        ("Metadata/meta_Prime_Pantry.json.gz", break_gzip, "the gzip file is damaged"),
        ("Metadata/meta_Prime_Pantry.json.gz", lambda p: p.write_text("no gzip"), "has the name of a gzip file but"),
        ("Metadata/meta_Prime_Pantry.json.gz", lambda p: p.write_bytes(gzip.compress(b"[1]\n{\n")), "2 of 2 rows"),
        ("Metadata/meta_Prime_Pantry.json.gz", lambda p: write_json_lines(p, [{"asin": x} for x in "abc"]),
         "3 of 3 items have no text: a, b, c; choose --missing_text"),
        ("Metadata/meta_Prime_Pantry.json.gz", os.remove, "holds no ratings and metadata of Pantry; looked for"),
    ],
)  # fmt: skip
def test_bad_files_are_one_line_with_exit_code_2(tmp_path, capsys, file, harm, message):
    write_2018(tmp_path / "raw")
    harm(tmp_path / "raw" / file)
    with pytest.raises(SystemExit) as stop:
        run_command(lambda argv: process(tmp_path / "raw", tmp_path / "out"), [])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert message in error
    assert not list(tmp_path.glob("out/*"))


def raw_rows(folder, name):
    """All rows of the three splits in raw ids: dict of split -> sorted list of (user, items, target)."""

    def raw(end):
        return {index: raw for raw, index in (line.split("\t") for line in lines(folder, name, end))}

    users, items = raw("user2index"), raw("item2index")
    rows = {}
    for split in ("train", "valid", "test"):
        fields = [line.split("\t") for line in lines(folder, name, f"{split}.inter")[1:]]
        rows[split] = sorted((users[u], [items[i] for i in prefix.split(" ")], items[t]) for u, prefix, t in fields)
    return rows


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir(SHARED), reason="no raw data in ../shared/data")
def test_scientific_comes_back_from_its_raw_form(tmp_path, capsys):
    from pathlib import Path

    published = Path(SHARED, "downstream")
    expected = read_texts(str(published / "Scientific" / "Scientific.text"))
    texts = {}
    for style in ("clean", "published"):
        main(["--dataset", "Scientific", "--input_path", os.path.join(SHARED, "raw"), "--text_style", style,
              "--output_path", str(tmp_path / style), "--plm_name", "none"])  # fmt: skip
        texts[style] = read_texts(str(tmp_path / style / "Scientific" / "Scientific.text"))
        assert "8,442 users, 4,385 items, 59,427 interactions" in capsys.readouterr().out
    assert raw_rows(tmp_path / "clean", "Scientific") == raw_rows(published, "Scientific")
    assert texts["published"] == expected
    assert len(expected) == 4385
    steps = json.loads((tmp_path / "clean/Scientific/Scientific.json").read_text())["steps"]
    assert [step["interactions"] for step in steps] == [69169, 68669, 67669, 59427]
    assert steps[1]["items"] - steps[2]["items"] == 40

    for item, text in texts["clean"].items():  # the published cleaning leaves double blanks, and ". ." at 13 ends
        assert text.rstrip(". ") == " ".join(expected[item].split()).rstrip(". ")
        assert text.endswith(".") and not text.endswith((" .", ".."))
