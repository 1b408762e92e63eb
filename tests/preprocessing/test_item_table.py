"""Item texts out of tables: which rows count, and what is read of them."""

import json
import random

import polars as pl
import pytest

from common.errors import UserError
from dataset.preprocessing import tables
from dataset.preprocessing.item_table import text_reader
from dataset.preprocessing.tables import MalformedRows

ROWS = [
    {"id": "a", "title": "A", "brand": "X"},
    {"id": "b", "old": "B", "brand": " "},
    {"id": "a", "title": "later"},
    {"id": None, "asin": "c", "title": "", "brand": None},
    {"title": "of nothing"},
    {"asin": "c", "title": "C"},
    {"id": "d", "title": "D", "old": "not this"},
    {"id": "e", "title": "E"},
]
FIELDS = [["title", "old"], ["brand"]]


def read(path, items, wanted, limit=1.0, **options):
    """(Item -> text in the order found, number of malformed rows)."""
    malformed = MalformedRows(str(path), limit)
    reader = text_reader(str(path), ["id", "asin"], FIELDS, malformed, made, **options)
    found = reader(pl.Series(items, dtype=pl.String), pl.Series(wanted, dtype=pl.String))
    assert found.columns == ["item", "text"]
    return dict(found.rows()), malformed.count


def made(fields):
    """A text that shows what it was made from."""
    return "|".join("-" if field is None else field for field in fields)


@pytest.fixture(params=["jsonl", "csv", "parquet"])
def table(tmp_path, request):
    path = tmp_path / f"items.{request.param}"
    frame = pl.DataFrame(ROWS)
    {"jsonl": frame.write_ndjson, "csv": frame.write_csv, "parquet": frame.write_parquet}[request.param](path)
    return path


@pytest.mark.parametrize("size", [1, 60, 1 << 25])
def test_the_first_row_of_an_item_counts(table, monkeypatch, size):
    for name in ("_BLOCK", "_LINES", "_ROWS"):
        monkeypatch.setattr(tables, name, size)
    nothing = "-" if table.suffix == ".csv" else ""  # CSV has no empty text beside no text
    texts, malformed = read(table, ["d", "a", "b", "c", "z"], ["a", "b", "c"])
    assert list(texts.items()) == [("a", "A|X"), ("b", "B| "), ("c", f"{nothing}|-"), ("d", None)]
    assert malformed == 1
    texts, _ = read(table, ["a", "c"], ["a", "c"], skip_empty=True)
    assert texts == {"a": "A|X", "c": "C|-"}
    texts, _ = read(table, ["d", "a"], ["a"], all_items=True)
    assert texts == {"a": "A|X", "b": "B| ", "c": f"{nothing}|-", "d": "D|-", "e": "E|-"}
    assert list(texts) == list("abcde")


def test_random_tables_in_parts_of_any_size(tmp_path, monkeypatch):
    draw = random.Random(0)
    rows = [{"id": f"i{draw.randrange(30)}", "title": str(number)} for number in range(150)]
    path = tmp_path / "items.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    first = {}
    for row in rows:
        first.setdefault(row["id"], f"{row['title']}|-")
    asked, wanted = [f"i{n}" for n in range(0, 40, 2)], [f"i{n}" for n in range(0, 40, 6)]
    for size in (1, 7, 100, 10_000):
        monkeypatch.setattr(tables, "_LINES", size)
        expected = {item: text if item in wanted else None for item, text in first.items() if item in asked}
        assert list(read(path, asked, wanted)[0].items()) == list(expected.items())
        assert list(read(path, asked, wanted, all_items=True)[0].items()) == list(first.items())


def test_texts_are_made_only_where_wanted_and_once(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "_LINES", 3)
    path = tmp_path / "items.jsonl"
    path.write_text('{"id": "a", "title": "A"}\n{"id": "b", "title": "B"}\n' * 20)
    made_from = []
    items = pl.Series(["a", "b"])
    text_reader(str(path), ["id"], [["title"]], MalformedRows(str(path)), made_from.append)(items, items.head(1))
    assert made_from == [["A"]]


def test_ids_can_be_read_in_ones_own_way(table):
    texts, _ = read(table, ["A", "B"], ["A"], read_id=lambda name: pl.col(name).str.to_uppercase())
    assert texts == {"A": "A|X", "B": None}


def test_what_cannot_be_read(tmp_path):
    path = tmp_path / "items.jsonl"
    for content, message in (
        ("", "holds no item; expected rows with id or asin and texts"),
        (
            '{"title": "x"}\n',
            "1 of 1 rows are malformed, line 1: \"(None, None, 'x', None, None)\"; expected an item id in id or asin",
        ),
        ("{\n", "1 of 1 rows are malformed"),
    ):
        path.write_text(content)
        with pytest.raises(UserError) as error:
            read(path, ["a"], ["a"], limit=0.5)
        assert message in str(error.value) and "\n" not in str(error.value)
