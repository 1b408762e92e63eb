"""Raw tables: every row that can be read, with its line number, wherever the parts of a file begin and end."""

import csv
import datetime
import gzip
import io
import json
import random

import polars as pl
import pytest

from common.errors import UserError
from dataset.preprocessing import tables
from dataset.preprocessing.tables import MalformedRows, check_columns, guess_encoding, read_table

COLUMNS = ["user", "item", "when"]
SIZES = (1, 50, 700, 1 << 25)  # of the parts of a file


def read(path, columns=COLUMNS, limit=1.0, needed=None, **reading):
    """(The rows of a table as tuples, what `MalformedRows` says of the others)."""
    malformed = MalformedRows(str(path), limit)
    parse = [pl.col(name) if name in (needed or columns) else pl.col(name).fill_null("") for name in columns]
    rows = [row for frame in read_table(str(path), columns, parse, malformed, **reading) for row in frame.rows()]
    assert malformed.rows == len(rows)
    return rows, [malformed.count, *malformed.examples]


def whatever_the_parts(monkeypatch, path, *arguments, **reading):
    """What `read` gives, the same for parts of any size."""
    results = []
    for size in SIZES:
        for name in ("_BLOCK", "_LINES", "_ROWS"):
            monkeypatch.setattr(tables, name, size)
        results.append(read(path, *arguments, **reading))
    assert all(each == results[-1] for each in results)
    return results[-1]


def written(tmp_path, content, name="table.csv"):
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def error_of(function, *arguments, **named):
    """The message of the `UserError`, which must be one line."""
    with pytest.raises(UserError) as error:
        function(*arguments, **named)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- CSV


@pytest.mark.parametrize("seed", range(4))
def test_orderly_csv_is_what_the_csv_module_reads(tmp_path, monkeypatch, seed):
    draw = random.Random(seed)
    separator, end, name = draw.choice([(",", "\n", "t.csv"), ("\t", "\r\n", "t.tsv"), (";", "\n", "t.txt")])
    letters = ["a", "bc", "é", "日", " ", '"', '""', "\n", "\r\n", separator, "", "😀"]
    table = [["".join(draw.choices(letters, k=draw.randrange(5))) for _ in range(4)] for _ in range(60)]
    text = io.StringIO()
    quoting = draw.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
    csv.writer(text, delimiter=separator, lineterminator=end, quoting=quoting).writerows(table)
    head = separator.join(["when", "other", "user", "item"])
    content = f"{head}{end}{text.getvalue()}".encode()
    path = written(tmp_path, content.removesuffix(end.encode()) if seed % 2 else content, name)
    rows = list(csv.reader(io.StringIO(text.getvalue(), newline=""), delimiter=separator))
    expected = [(row[2], row[3], row[0]) for row in rows if row and row[2]]
    found, malformed = whatever_the_parts(monkeypatch, path, needed=["user"])
    assert found == expected
    assert malformed[0] == sum(bool(row) and not row[2] for row in rows)
    gzipped = written(tmp_path, gzip.compress(path.read_bytes()), f"{name}.gz")
    assert whatever_the_parts(monkeypatch, gzipped, needed=["user"])[0] == expected


def disorderly_row(draw, number):
    """One row of a CSV file: (bytes, the values to be read, or None if it is malformed)."""
    kind = draw.choice(["plain", "quoted", "lines", "pipe", "inches", "opening", "long", "short", "bytes", "trailing"])
    user, item = f"u{number}", f"i{draw.randrange(99)}"
    row = {
        "plain": (f"{user},{item},3", (user, item, "3")),
        "quoted": (f'{user},"{item}, ""new""","3"', (user, f'{item}, "new"', "3")),
        "lines": (f'{user},"{item}\nnext, line\r\n\nlast",3', (user, f"{item}\nnext, line\r\n\nlast", "3")),
        "pipe": (f'{user},5" pipe {item},3', (user, f'5" pipe {item}', "3")),
        "inches": (f'{user},"5 inches" {item},3', (user, f'"5 inches" {item}', "3")),
        "opening": (f'{user},"5 inches {item},3', (user, f'"5 inches {item}', "3")),
        "long": (f"{user},{item},3,4", None),
        "short": (f"{user},{item}", None),
        "bytes": (f"{user},{item}é,3", None),
        "trailing": (f"{user},{item},3,,", (user, item, "3")),
    }[kind]
    return row[0].encode("latin-1" if kind == "bytes" else "utf-8"), row[1]


@pytest.mark.parametrize("seed", range(10))
def test_a_row_that_is_broken_spoils_no_other(tmp_path, monkeypatch, seed):
    draw = random.Random(seed)
    content, line, expected, malformed = b"user,item,when\n", 2, [], []
    for number in range(80):
        row, values = (
            disorderly_row(draw, number) if draw.random() < draw.choice([0.02, 1]) else (b"u,i,1", tuple("ui1"))
        )
        expected += [] if values is None else [values]
        malformed += [] if values else [line]
        blank = draw.choice([b"", b"", b"\n", b"\r\n"])
        line += row.count(b"\n") + blank.count(b"\n") + 1
        content += row + draw.choice([b"\n", b"\r\n"]) + blank
    found, (count, *first) = whatever_the_parts(monkeypatch, written(tmp_path, content))
    assert found == expected
    assert count == len(malformed)
    assert [int(each.split(":")[0].removeprefix("line ")) for each in first] == malformed[:3]


def test_what_is_shown_of_malformed_rows(tmp_path):
    path = written(tmp_path, b"user,item,when\nu,i\nu,caf\xe9,3\n\nu,i,3,4\nu,i,3\n,i,3\n")
    rows, malformed = read(path)
    assert rows == [("u", "i", "3")]
    assert malformed == [4, "line 2: 'u,i'", "line 3: 'not UTF-8: u,caf?,3'", "line 5: 'u,i,3,4'"]
    broken = MalformedRows(str(path), 0.5)
    list(read_table(str(path), COLUMNS, [pl.col(COLUMNS)], broken))
    message = error_of(broken.check, "three columns")
    assert "4 of 5 rows" in message and "line 2" in message and "--max_malformed 0.8" in message
    assert "from 0 to 1" in error_of(MalformedRows, "x", float("nan"))


def test_an_unclosed_quote_at_the_end_and_in_a_long_file(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "_LONGEST_ROW", 50)
    plain = [f"u{n},i,1" for n in range(100)]
    for place in (0, 50, 99):
        lines = [*plain[:place], 'u,"5 inches,1', *plain[place + 1 :]]
        rows, malformed = whatever_the_parts(monkeypatch, written(tmp_path, "\n".join(["user,item,when", *lines])))
        assert len(rows) == 100 and rows[place] == ("u", '"5 inches', "1") and malformed == [0]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("\ufeffuser;item;when\nu;i;1", [("u", "i", "1")]),
        ('"user"|"item"|"when"\r\nu|"i|j"|1\r\n', [("u", "i|j", "1")]),
        (" user , item,when\nu, i,1\n", [("u", " i", "1")]),
        ("user,item,when\nu,a\rb,1\n", [("u", "a\rb", "1")]),
        ("user,item,when\r\r\nu,i,1\r\r\n", [("u", "i", "1")]),
        ("item,when,user,item\n1,2,3,4\n", [("3", "1", "2")]),
        ("user,item,when\n", []),
        ("user,item,when", []),
        ("user,item,when\n\n\n", []),
        ('user,item,when\nu,"",1\n', []),
        ("user,item,when\n#u,NA,null\n", [("#u", "NA", "null")]),
        (f'user,item,when\nu,"{"x," * 200_000}",1\n', [("u", "x," * 200_000, "1")]),
    ],
)
def test_forms_of_csv(tmp_path, monkeypatch, content, expected):
    path = written(tmp_path, content)
    assert whatever_the_parts(monkeypatch, path)[0] == expected
    check_columns(str(path), COLUMNS)


def test_the_same_column_may_be_asked_for_in_any_order(tmp_path):
    path = written(tmp_path, "a,b,c\n1,2,3\n")
    assert read(path, ["c", "a"])[0] == [("3", "1")]


def test_without_a_header_and_without_quotes(tmp_path, monkeypatch):
    path = written(tmp_path, '\ufeffi"1,u,5.0,1\ni2",u,5.0,2\r\n"a,u,5.0\n"a,u,5.0,3\n')
    reading = {"header": ["item", "user", "stars", "when"], "separator": ",", "quoted": False}
    rows, malformed = whatever_the_parts(monkeypatch, path, **reading)
    assert rows == [("u", 'i"1', "1"), ("u", 'i2"', "2"), ("u", '"a', "3")]
    assert malformed == [1, "line 3: '\"a,u,5.0'"]


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "utf-16", "utf-16-le", "utf-8", "utf-8-sig"])
def test_encodings(tmp_path, monkeypatch, encoding):
    content = 'user,item,when\r\nu,"Tea £2,\ncafé",1\r\nu,5" £,2\r\nu,a\rb,3\r\n'.encode(encoding)
    path = written(tmp_path, content)
    rows, _ = whatever_the_parts(monkeypatch, path, encoding=encoding)
    assert rows == [("u", "Tea £2,\ncafé", "1"), ("u", '5" £', "2"), ("u", "a\rb", "3")]


def test_encodings_are_guessed(tmp_path, monkeypatch):
    for size in SIZES[-1], 3:
        monkeypatch.setattr(tables, "_BLOCK", size)
        for content, expected in (
            ("£" * 9, {"utf-8": "utf-8", "latin-1": "latin-1", "utf-16": "utf-16"}),
            ("plain", {"utf-8": "utf-8", "utf-8-sig": "utf-8"}),
            ("", {"utf-8": "utf-8"}),
        ):
            for encoding, guessed in expected.items():
                for squeezed in bytes, gzip.compress:
                    path = written(tmp_path, squeezed(content.encode(encoding)))
                    assert guess_encoding(str(path)) == guessed
    assert guess_encoding(str(written(tmp_path, "£".encode()[:1]))) == "latin-1"
    assert "no such file" in error_of(guess_encoding, str(tmp_path / "none"))
    cut = written(tmp_path, gzip.compress(b"a" * 99)[:-5])
    assert "damaged" in error_of(guess_encoding, str(cut))


# --- JSON lines


def test_json_lines(tmp_path, monkeypatch):
    path = written(
        tmp_path,
        b'\xef\xbb\xbf{"user": "u", "item": 7, "when": 1.5}\n\n   \r\n'
        b'{"user": 7.0, "item": ["a", ["b", null], 2], "when": {"k": 1}, "more": "\\ud800"}\r\n'
        b'{"user": "broken\n'
        b'["user", "item", "when"]\n'
        b'{"user": "u", "item": null, "when": 1}\n'
        b'{"user": "u", "item": NaN, "when": 1}\n'
        b'{"user": "u", "item": "\\ud83d\\ude00 \xed\x95\x9c", "when": true}\n'
        b'{"user": "half \\ud800", "item": 1, "when": 1}\n'
        b'{"user": "half \xed\xa0\x80", "item": 1, "when": 1}\n'
        b'{"user": "\xe9", "item": 1, "when": 1}\n' + b"[" * 100_000 + b"\n"
        b'{"user": "last", "item": 12345678901234567890123, "when": 1}',
        "t.jsonl",
    )
    rows, (count, *first) = whatever_the_parts(monkeypatch, path)
    assert rows == [
        ("u", "7", "1.5"),
        ("7", "a b 2", "k 1"),
        ("u", "😀 한", "True"),
        ("last", "12345678901234567890123", "1"),
    ]
    assert count == 8
    assert [each.split(":")[0] for each in first] == ["line 5", "line 6", "line 7"]
    check_columns(str(path), ["more"])


def test_json_lines_are_what_the_json_module_reads(tmp_path, monkeypatch):
    draw = random.Random(0)
    content, expected, malformed = "", [], []
    for number in range(1, 200):
        values = ["".join(draw.choices('aé😀\\"\n ', k=5)) for _ in COLUMNS]
        line = json.dumps(dict(zip(COLUMNS, values, strict=True)), ensure_ascii=draw.random() < 0.5)
        if draw.random() < 0.1:
            line = line[: draw.randrange(1, len(line))]
            malformed.append(f"line {number}")
        else:
            expected.append(tuple(values))
        content += line + "\n"
    rows, (count, *first) = whatever_the_parts(monkeypatch, written(tmp_path, content, "t.ndjson"))
    assert (rows, count) == (expected, len(malformed))
    assert [each.split(":")[0] for each in first] == malformed[:3]


def test_python_literals_only_where_asked_for(tmp_path):
    path = written(tmp_path, "{'user': 'u', 'item': 'it\\'s', 'when': 1}\n", "t.json")
    assert read(path)[0] == []
    assert read(path, literals=True)[0] == [("u", "it's", "1")]


# --- Parquet


def test_kinds_of_parquet_columns(tmp_path, monkeypatch):
    day, moment = datetime.date(2020, 1, 2), datetime.datetime(2020, 1, 2, 3, 4, 5, 678901)
    kinds = {
        "integer": ([1, None, -3], ["1", None, "-3"]),
        "large": (pl.Series([2**64 - 1, 0, 1], dtype=pl.UInt64), [str(2**64 - 1), "0", "1"]),
        "float": ([1.0, float("nan"), 2.5], ["1", None, "2.5"]),
        "day": ([day, None, day], ["1577923200.0", None, "1577923200.0"]),
        "moment": ([moment] * 3, ["1577934245.678901"] * 3),
        "zoned": (pl.Series([moment] * 3).dt.replace_time_zone("Asia/Tokyo"), ["1577901845.678901"] * 3),
        "nanoseconds": (pl.Series([moment] * 3, dtype=pl.Datetime("ns")), ["1577934245.678901"] * 3),
        "categorical": (pl.Series(["a", "b", None], dtype=pl.Categorical), ["a", "b", None]),
        "list": ([["a", None, "b"], [], None], ["a b", "", None]),
        "nested": ([[[1.0], [2.5]], [[3.0]], []], ["1 2.5", "3", ""]),
        "array": (pl.Series([[1, 2], [3, 4], [5, 6]], dtype=pl.Array(pl.Int64, 2)), ["1 2", "3 4", "5 6"]),
        "struct": ([{"a": 1}] * 3, ["a 1"] * 3),
        "bytes": ([b"x", b"y", None], ["x", "y", None]),
        "nothing": ([None] * 3, [None] * 3),
        "boolean": ([True, False, None], ["true", "false", None]),
    }
    path = tmp_path / "t[1]*.parquet"  # a name, not a pattern
    pl.DataFrame({name: values for name, (values, _) in kinds.items()}).write_parquet(path)
    for name, (_, expected) in kinds.items():
        rows, malformed = whatever_the_parts(monkeypatch, path, [name])
        assert rows == [(value,) for value in expected if value is not None], name
        assert malformed == [
            expected.count(None),
            *(f"line {n + 1}: '(None,)'" for n in range(3) if expected[n] is None),
        ]


def test_damaged_parquet_is_one_line(tmp_path):
    path = tmp_path / "t.parquet"
    pl.DataFrame({"user": [f"user {n}" for n in range(5000)], "item": range(5000)}).write_parquet(path)
    whole, draw = path.read_bytes(), random.Random(0)
    for _ in range(20):
        damaged = bytearray(whole[: draw.choice([len(whole), draw.randrange(len(whole))])])
        for place in draw.sample(range(len(damaged)), min(30, len(damaged))):
            damaged[place] ^= 255
        assert "t.parquet: " in error_of(read, written(tmp_path, damaged, "t.parquet"), ["user", "item"])


# --- what cannot be read


def binary():
    return bytes(range(256)) * 20


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", b"", "first line is empty"),
        ("t.csv", b"\n\nuser,item,when\n", "first line is empty"),
        ("t.csv", b"usr,item,when\n1,2,3\n", "no column user; found usr, item, when; did you mean usr?"),
        ("t.csv", b"user,item,when\r1,2,3\r", "line feed"),
        ("t.csv", b"just one line", "no column user"),
        ("t.csv", binary(), "binary"),
        ("t.tsv", binary(), "binary"),
        ("t.jsonl", binary(), "binary"),
        ("t.parquet", binary(), "is not a Parquet file"),
        ("t.parquet", b"", "is not a Parquet file"),
        ("t.parquet.gz", gzip.compress(b"x", mtime=0), "is not a Parquet file"),
        ("t.csv.gz", b"user,item,when\n", "has the name of a gzip file but is not one"),
        ("t.CSV.GZ", b"user,item,when\n", "has the name of a gzip file but is not one"),
        ("t.csv.gz", b"", "has the name of a gzip file but is not one"),
        ("t.csv.gz", gzip.compress(b"", mtime=0), "first line is empty"),
        ("t.csv.gz", gzip.compress(b"user,item,when\n1,2,3\n", mtime=0)[:12], "damaged"),
        ("t.jsonl.gz", gzip.compress(b'{"user": 1}\n', mtime=0)[:-3], "damaged"),
        ("t.csv", "user,item,when\n".encode("utf-16"), "--encoding utf-16"),
        ("t.jsonl", b"", "no JSON object"),
        ("t.jsonl", b'[{"user": 1, "item": 1, "when": 1}]', "no JSON object"),
        ("t.jsonl", b'{"usr": 1}\n', "did you mean usr?"),
    ],
)
def test_wrong_files_are_found_before_the_work(tmp_path, name, content, message):
    assert message in error_of(check_columns, str(written(tmp_path, content, name)), COLUMNS)


def test_damage_further_on(tmp_path, monkeypatch):
    for name in ("_BLOCK", "_LINES"):
        monkeypatch.setattr(tables, name, 300)
    row, line = b"1,2,3\n", b'{"user": 1, "item": 2, "when": 3}\n'
    noise = random.Random(0).randbytes(20_000)
    for name, start, more in (("t.csv", b"user,item,when\n", row), ("t.jsonl", b"", line)):
        path = written(tmp_path, start + more * 99 + noise, name)
        assert "binary" in error_of(read, path)
        gzipped = gzip.compress(start + more * 9999)
        path = written(tmp_path, gzipped[: len(gzipped) // 2], f"{name}.gz")
        assert "damaged" in error_of(read, path)
        check = gzipped[:-8] + b"12345678"
        assert "damaged" in error_of(read, written(tmp_path, check, f"{name}.gz"))


def test_missing_files_and_unknown_encodings(tmp_path):
    for path in tmp_path / "none.csv", tmp_path:
        assert "no such file" in error_of(read, path)
        assert "no such file" in error_of(check_columns, str(path), COLUMNS)
    path = written(tmp_path, "user,item,when\n")
    for encoding in "latin-l", "rot13", "undefined":
        assert f"--encoding {encoding}: no such encoding" in error_of(read, path, encoding=encoding)
