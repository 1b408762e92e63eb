"""Reading the items of a catalogue: raw ids, texts, and columns to show."""

import argparse
from collections.abc import Mapping

import polars as pl

from common.errors import UserError
from dataset.preprocessing.item_table import SHOW_COLUMNS_HELP, parse_show_columns, raw_id, text_reader
from dataset.preprocessing.tables import MalformedRows, check_columns
from dataset.preprocessing.texts import item_text

Columns = Mapping[str, Mapping[str, str]]  # raw id -> name -> value


def add_catalogue_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for the catalogue of a bundle without items: `--items`, and those that say how to read it."""
    parser.add_argument(
        "--items", metavar="FILE", help="catalogue, for a bundle without items: CSV, TSV, JSON lines, Parquet"
    )
    parser.add_argument(
        "--item_column", default="item_id", metavar="NAME", help="column of the raw id (default: item_id)"
    )
    parser.add_argument("--text_columns", default="title", metavar="A,B", help="columns of the text (default: title)")
    parser.add_argument("--show_columns", default="", metavar="A,B=C", help=SHOW_COLUMNS_HELP)


def read_catalogue(path: str, options: argparse.Namespace) -> tuple[dict[str, str], dict[str, dict[str, str]]]:
    """Read items from a table, with the ids and texts that `process_custom.py` would make of them.

    Args:
        path: CSV, TSV, JSON lines (plain or gzipped) or Parquet.
        options: those of `add_catalogue_options`.

    Returns:
        dict: raw id -> text, in the order of the table. The first row of an item counts.
        dict: raw id -> the columns to show, without empty ones.

    Raises:
        UserError: the file is missing or damaged, or lacks a column, or has no item.
    """
    texts = [name.strip() for name in options.text_columns.split(",")]
    show = parse_show_columns(options.show_columns)
    check_columns(path, [options.item_column, *texts, *show.values()])
    malformed = MalformedRows(path, 0)
    fields = [[name] for name in texts]
    read = text_reader(
        path, [options.item_column], fields, malformed, item_text, all_items=True, read_id=raw_id, show=show
    )
    nothing = pl.Series([], dtype=pl.String)
    table = read(nothing, nothing).rename({"item": "id"})
    if not len(table):
        raise UserError(f"{path}: holds no item")
    return dict(table.select("id", "text").iter_rows()), columns_to_show(table)


def columns_to_show(table: pl.DataFrame) -> dict[str, dict[str, str]]:
    """The columns to show of a table of items with `id` and `text`: raw id -> name -> value, without empty ones."""
    shown = table.drop("text", "count", strict=False)
    rows = shown.filter(pl.col("id").is_not_null()).iter_rows(named=True) if shown.width > 1 else ()
    return {
        row["id"]: values
        for row in rows
        if (values := {name: value for name, value in row.items() if name != "id" and value is not None})
    }
