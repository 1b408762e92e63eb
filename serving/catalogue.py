"""Reading the items of a catalogue: raw ids and texts."""

from collections.abc import Sequence

import polars as pl

from common.errors import UserError
from dataset.preprocessing.item_table import text_reader
from dataset.preprocessing.tables import MalformedRows, check_columns
from dataset.preprocessing.texts import item_text


def read_catalogue(path: str, item_column: str = "item_id", text_columns: Sequence[str] = ("title",)) -> dict[str, str]:
    """Read items from a table, with the texts that `process_custom.py` would make of them.

    Args:
        path: CSV, TSV, JSON lines (plain or gzipped) or Parquet.
        item_column: the column of the raw id.
        text_columns: the columns that make up the text, in order.

    Returns:
        dict: raw id -> text, in the order of the table. The first row of an item counts.

    Raises:
        UserError: the file is missing or damaged, or lacks a column, or has no item.
    """
    columns = [name.strip() for name in text_columns]
    check_columns(path, [item_column, *columns])
    malformed = MalformedRows(path, 0)
    read = text_reader(path, [item_column], [[name] for name in columns], malformed, item_text, all_items=True)
    nothing = pl.Series([], dtype=pl.String)
    table = read(nothing, nothing)
    items = dict(zip(table["item"].to_list(), table["text"].to_list(), strict=True))
    if not items:
        raise UserError(f"{path}: holds no item")
    return items
