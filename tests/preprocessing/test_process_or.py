"""Online Retail, as Kaggle and UCI's workbook give it, to a data set."""

import gzip
import json
import os

import pytest

from dataset.preprocessing.process_or import main
from dataset.preprocessing.texts import read_texts
from tests.conftest import SHARED
from tests.preprocessing.shops import content as files

ONLINE_RETAIL = os.path.join(SHARED, "data", "raw", "Online_Retail.csv.gz")
HEADER = ["InvoiceNo", "StockCode", "Description", "Quantity", "InvoiceDate", "UnitPrice", "CustomerID", "Country"]
ROWS = [  # invoice, stock code, description, day, hour
    ("536365", "B", "RED  MUG, £2", "12/1/2010", "8:26"),
    ("536365", "A", "", "12/1/2010", "8:26"),
    ("536365", "A", 'Tray 5" WIDE ', "12/1/2010", "8:26"),
    ("536365", "C", "CAFÉ SIGN", "12/1/2010", "8:26"),
    ("536366", "C", "cafe sign, old", "12/13/2010", "18:00"),
    ("536366", "B", "?", "12/13/2010", "9:05"),
    ("536366", "A", "tray", "12/13/2010", "9:05"),
    ("C536367", "A", "TRAY", "12/14/2010", "9:05"),
    ("C536367", "B", "  ", "12/14/2010", "9:05"),
    ("C536367", "C", "SIGN", "12/14/2010", "9:05"),
    ("C536367", "D", "DISCOUNT.", "12/14/2010", "9:05"),
]


def quoted(value):
    return '"{}"'.format(value.replace('"', '""')) if '"' in value or "," in value else value


def kaggle(rows=ROWS, header=HEADER, quantities=None):
    lines = [
        ",".join(map(quoted, [invoice, code, text, quantity, f"{day} {hour}", "2.55", "17850.0", "United Kingdom"]))
        for (invoice, code, text, day, hour), quantity in zip(rows, quantities or ["6"] * len(rows), strict=True)
    ]
    return "\r\n".join([",".join(header), *lines]) + "\r\n"


def workbook(rows=ROWS):
    """As a spreadsheet in Europe exports the workbook of two years."""

    def moment(day, hour):
        month, number, year = day.split("/")
        return f"{year}-{month:0>2}-{number:0>2} {hour:0>5}:00"

    lines = [
        ";".join([invoice, code, text.replace('"', '""').join('""'), "6", moment(day, hour), "2,55", "", "France"])
        for invoice, code, text, day, hour in rows
    ]
    return "\n".join([";".join(["Invoice", *HEADER[1:5], "Price", "Customer ID", "Country"]), *lines])


def run(tmp_path, content, *options, name="data.csv"):
    """Process a file. Returns the folder, str, of the data set."""
    path, out = tmp_path / name, tmp_path / f"out{len(list(tmp_path.iterdir()))}"
    path.write_bytes(content)
    main(
        ["--input_path", str(path), "--output_path", str(out), "--user_k=1", "--item_k=1", "--plm_name=none", *options]
    )
    return os.path.join(str(out), "OR")


def stock_codes(folder):
    """Invoice -> list of its stock codes in order, also of those that are cut off from long histories."""

    def raw(end):
        with open(os.path.join(folder, f"OR.{end}"), encoding="utf-8") as file:
            return {index: raw for raw, index in (line.rstrip("\n").split("\t") for line in file)}

    users, items = raw("user2index"), raw("item2index")
    targets, shortest = {}, {}
    for split in ("test", "valid", "train"):  # the rows of a user, from the longest history to that of one item
        with open(os.path.join(folder, f"OR.{split}.inter"), encoding="utf-8") as file:
            for user, history, target in [line.rstrip("\n").split("\t") for line in file][1:]:
                targets.setdefault(user, []).append(items[target])
                shortest[user] = items[history.split(" ")[0]]
    return {users[user]: [shortest[user], *reversed(found)] for user, found in targets.items()}


def sequences(folder):
    """Invoice -> its stock codes in order, as one string."""
    return {invoice: "".join(codes) for invoice, codes in stock_codes(folder).items()}


def description(folder):
    with open(os.path.join(folder, "OR.json"), encoding="utf-8") as file:
        return json.load(file)


def test_kaggles_file(tmp_path, capsys):
    folder = run(tmp_path, kaggle().encode("latin-1"))
    assert sequences(folder) == {"536365": "BAC", "536366": "BAC", "C536367": "ACD"}
    texts = {"B": "red mug, £2.", "A": 'tray 5" wide.', "C": "café sign.", "D": "discount."}
    assert read_texts(f"{folder}/OR.text") == texts
    about = description(folder)
    assert about["left_out"] == {"rows without a description": 2, "rows of cancelled invoices": 0}
    assert about["options"]["encoding"] == "latin-1"
    assert (about["sources"][0]["rows"], about["sources"][0]["malformed"]) == (11, 0)
    assert "2 rows without a description left out" in capsys.readouterr().out


@pytest.mark.parametrize(
    "content",
    [
        kaggle().encode(),
        kaggle().encode("utf-8-sig"),
        kaggle().encode("utf-16"),
        gzip.compress(kaggle().encode(), mtime=0),
        gzip.compress(kaggle().encode("latin-1"), mtime=0),
        kaggle().replace(",", "\t").replace('\t £2"', ', £2"').replace("sign\t old", "sign, old").encode("latin-1"),
        kaggle([(*row[:3], row[3].replace("2010", "10"), row[4]) for row in ROWS]).encode(),
        kaggle([(*row[:3], row[3].replace("12/1/", "12/01/"), f"{row[4]}:00") for row in ROWS]).encode(),
        workbook().encode("latin-1"),
        workbook().encode("utf-8-sig"),
    ],
)
def test_other_forms_give_the_same_data_set(tmp_path, content):
    expected, found = run(tmp_path, kaggle().encode("latin-1")), run(tmp_path, content)
    for end in ("text", "item2index", "user2index", "train.inter", "valid.inter", "test.inter"):
        with open(f"{expected}/OR.{end}", "rb") as first, open(f"{found}/OR.{end}", "rb") as second:
            assert first.read() == second.read()


def test_cancellations_on_demand_are_left_out(tmp_path):
    folder = run(tmp_path, kaggle().encode("latin-1"), "--drop_cancellations")
    assert sequences(folder) == {"536365": "BAC", "536366": "BAC"}
    assert "D" not in read_texts(f"{folder}/OR.text")
    assert description(folder)["left_out"] == {"rows without a description": 2, "rows of cancelled invoices": 3}


def test_repeated_lines_agree_in_invoice_stock_code_quantity_and_date(tmp_path):
    lines = [  # stock code, hour, quantity
        ("A", "8:26", "6"),
        ("B", "8:26", "6"),
        ("A", "8:26", "6"),  # repeats the first
        ("A", "8:26", "-6"),
        ("A", "8:26", ""),
        ("A", "8:26", " "),  # repeats the one before
        ("A", "8:27", "6"),
        ("A", "8:26", "-6 "),  # repeats the fourth
    ]
    rows = [("1", code, f"text {code}", "12/1/2010", hour) for code, hour, _ in lines]
    rows += [("2", *row[1:]) for row in rows]
    folder = run(tmp_path, kaggle(rows, quantities=[quantity for *_, quantity in lines] * 2).encode())
    assert sequences(folder) == {"1": "ABAAA", "2": "ABAAA"}
    about = description(folder)
    assert [step["interactions"] for step in about["steps"][:2]] == [16, 10]
    assert about["rules"]["repeated_rows"] == ["user", "item", "timestamp", "quantity"]


def test_shuffled_ties(tmp_path):
    codes = "ABCDEFGHIJKL"
    rows = [(invoice, code, f"text {code}", "12/1/2010", "8:26") for invoice in "12" for code in codes]
    rows += [(invoice, "Z", "text Z", "12/1/2010", hour) for invoice in "12" for hour in ("8:25", "8:27")]
    content = kaggle(rows).encode()
    in_file_order = run(tmp_path, content)
    assert sequences(in_file_order) == dict.fromkeys("12", f"Z{codes}Z")
    about = description(in_file_order)
    assert about["options"]["ties"] == "file" and about["rules"]["tie_seed"] is None

    shuffled = run(tmp_path, content, "--ties", "shuffle")
    about = description(shuffled)
    assert about["options"]["ties"] == "shuffle" and about["rules"]["tie_seed"] == 2020
    found = sequences(shuffled)
    assert len({f"Z{codes}Z", *found.values()}) == 3  # both invoices in another order, each in its own
    for sequence in found.values():
        assert sequence[0] == sequence[-1] == "Z" and sorted(sequence[1:-1]) == list(codes)
    assert sequences(run(tmp_path, content, "--ties=shuffle")) == found
    assert sequences(run(tmp_path, content, "--ties=shuffle", "--seed=1")) != found


def test_a_negative_seed_is_refused(tmp_path, refused):
    (tmp_path / "data.csv").write_bytes(kaggle().encode())
    argv = ["--input_path", tmp_path / "data.csv", "--output_path", tmp_path, "--plm_name=none", "--ties=shuffle"]
    assert "--seed -1: expected a whole number from 0 on" in refused(main, *argv, "--seed=-1")


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isfile(ONLINE_RETAIL), reason="no Online_Retail.csv.gz in ../shared/data/raw")
def test_the_published_data_set(tmp_path):
    folders = {}
    for name, options in {"file": [], "shuffle": ["--ties=shuffle"], "again": ["--ties=shuffle"]}.items():
        main(["--input_path", ONLINE_RETAIL, "--output_path", str(tmp_path / name), "--plm_name=none", *options])
        folders[name] = str(tmp_path / name / "OR")
        about = description(folders[name])
        assert (about["users"], about["items"], about["interactions"]) == (16520, 3469, 519906)
        assert about["rows"] == {"train": 470346, "valid": 16520, "test": 16520}
        assert about["left_out"]["rows without a description"] == 1454
        assert [step["interactions"] for step in about["steps"]] == [540455, 535026, 535026, 519906]
    assert files(tmp_path / "shuffle" / "OR") == files(tmp_path / "again" / "OR")

    found = {name: stock_codes(folders[name]) for name in ("file", "shuffle")}
    assert found["file"].keys() == found["shuffle"].keys()
    pairs = [(items, found["shuffle"][user]) for user, items in found["file"].items()]
    assert all(sorted(in_file_order) == sorted(shuffled) for in_file_order, shuffled in pairs)
    assert sum(in_file_order != shuffled for in_file_order, shuffled in pairs) > 0.99 * len(pairs)
    with open(f"{folders['file']}/OR.user2index") as first, open(f"{folders['shuffle']}/OR.user2index") as second:
        assert first.read() == second.read()


def test_published_style(tmp_path):
    folder = run(tmp_path, kaggle().encode("latin-1"), "--text_style", "published")
    with open(f"{folder}/OR.text", encoding="utf-8") as file:
        assert dict(line.rstrip("\n").split("\t") for line in list(file)[1:])["B"] == "red  mug, £2."


def test_days_that_may_be_months_are_read_as_kaggle_writes_them(tmp_path):
    rows = [
        ("1", "A", "a", "2/1/2010", "0:00"),
        ("1", "B", "b", "1/3/2010", "0:00"),
        ("1", "C", "c", "1/2/2010", "0:00"),
    ]
    assert sequences(run(tmp_path, kaggle(rows).encode())) == {"1": "CBA"}
    folder = run(tmp_path, kaggle(rows).encode(), "--timestamp_format", "%d/%m/%Y %H:%M")
    assert sequences(folder) == {"1": "ACB"}
    assert description(folder)["options"]["timestamp_format"] == "%d/%m/%Y %H:%M"


def test_malformed_rows_are_left_out_only_if_allowed(tmp_path, refused):
    rows = [*ROWS, ("", "A", "TRAY", "12/1/2010", "9:00"), ("536368", "A", "TRAY", "soon", "9:00")]
    content = kaggle(rows).encode("latin-1")
    (tmp_path / "data.csv").write_bytes(content)
    message = refused(main, "--input_path", tmp_path / "data.csv", "--output_path", tmp_path, "--plm_name=none")
    assert "2 of 13 rows are malformed, line 13: ',A,TRAY,6,12/1/2010 9:00," in message and "InvoiceNo" in message
    folder = run(tmp_path, content, "--max_malformed", "0.2")
    assert sequences(folder) == {"536365": "BAC", "536366": "BAC", "C536367": "ACD"}
    assert description(folder)["sources"][0]["malformed"] == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"", "first line is empty"),
        (b"PK\x03\x04\x14\x00\x06\x00" + bytes(99), "binary"),
        (b"\x89PNG\r\n\x1a\n" + bytes(99), "no column StockCode"),
        (gzip.compress(kaggle().encode(), mtime=0)[:-20], "damaged"),
        (b"item,user\n1,2\n", "no column StockCode; found item, user"),
        (kaggle(header=[*HEADER[:3], "Count", *HEADER[4:]]).encode(), "no column Quantity; found InvoiceNo"),
        (kaggle(header=["InvoiceNr", *HEADER[1:]]).encode(), "no column InvoiceNo; found InvoiceNr"),
        (kaggle([]).encode(), "holds no timestamp"),
        (kaggle([(*row[:3], "soon", "") for row in ROWS]).encode(), "'soon' is not a timestamp"),
        (kaggle([(*row[:2], "", *row[3:]) for row in ROWS]).encode(), "holds no interaction"),
        (kaggle().encode(), "none of the 9 interactions remains"),
    ],
)
def test_wrong_files_are_one_line_and_leave_nothing(tmp_path, refused, content, message):
    path = tmp_path / "data.csv"
    if content is not None:
        path.write_bytes(content)
    before = sorted(tmp_path.rglob("*"))
    argv = ["--input_path", path, "--output_path", tmp_path / "out" / "deeper", "--plm_name=none"]
    assert message in refused(main, *argv)
    assert sorted(tmp_path.rglob("*")) == before
