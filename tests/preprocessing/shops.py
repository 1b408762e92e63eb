"""Small shops for the tests of preprocessing: interactions, texts, and what a data set's files hold."""

import gzip
import json

import polars as pl

from dataset.preprocessing.interactions import Interactions
from dataset.preprocessing.splits import Rules, write_data_set

HEADER = "user_id:token\titem_id_list:token_seq\titem_id:token"


def interactions(rows, parts=1):
    """Interactions of rows (user, item, timestamp), taken up in some parts."""
    kind = pl.Float64 if any(isinstance(row[2], float) for row in rows) else pl.Int64
    table = pl.DataFrame(rows, schema={"user": pl.String, "item": pl.String, "timestamp": kind}, orient="row")
    size = -(-len(rows) // parts)
    return Interactions.collect([table[start : start + size] for start in range(0, len(rows), size)], "rows")


def sequence(user, items, start=0):
    """One interaction a second."""
    return [(user, item, start + step) for step, item in enumerate(items)]


def texts_of(rows):
    return {item: f"text of {item}." for _, item, _ in rows}


def write(folder, rows, texts=None, name="S", **rules):
    """Write the data set `name` into `folder`; returns its description."""
    texts = texts_of(rows) if texts is None else texts
    table = pl.DataFrame({"item": list(texts), "text": list(texts.values())}, schema_overrides={"text": pl.String})
    rules = Rules(**{"user_k": 0, "item_k": 0} | rules)
    return write_data_set(name, str(folder), interactions(rows), lambda items, wanted: table, rules, dict)


def lines(folder, name, end):
    """The lines of one of its files."""
    content = (folder / name / f"{name}.{end}").read_text(encoding="utf-8")
    assert content.endswith("\n")
    return content[:-1].split("\n")


def content(folder):
    """All files of a folder: dict of name -> bytes."""
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def write_json_lines(path, entries):
    """JSON objects, one a line, gzipped where the name says so."""
    with gzip.open(path, "wt", encoding="utf-8") if str(path).endswith(".gz") else open(path, "w") as file:
        file.writelines(json.dumps(entry) + "\n" for entry in entries)
