"""Reading item texts from a table of a shop: JSON lines, CSV or Parquet."""

from collections.abc import Callable, Sequence

import numpy as np
import polars as pl

from common.errors import UserError
from dataset.preprocessing.tables import MalformedRows, read_table


def text_reader(
    path: str,
    item_columns: Sequence[str],
    fields: Sequence[Sequence[str]],
    malformed: MalformedRows,
    make_text: Callable[[list[str | None]], str],
    all_items: bool = False,
    skip_empty: bool = False,
    read_id: Callable[[str], pl.Expr] = pl.col,
    **reading,
) -> Callable[[pl.Series, pl.Series], pl.DataFrame]:
    """Build the function that `splits.write_data_set` calls to read item texts.

    If an item has several rows, the first counts.

    Args:
        path: the table.
        item_columns: the columns with the raw item id. The first one that is not empty counts.
        fields: the columns that make up the text, in order. Each entry lists the names that the column may have.
        malformed: counts the rows without an item id.
        make_text: turns the fields of an item into its text, such as `texts.item_text`.
        all_items: read the text of every item of the table.
        skip_empty: ignore rows in which all fields are empty.
        read_id: turns the name of a column with raw ids into an expression for them.
        reading: further arguments of `tables.read_table`.

    Returns:
        A function of the raw ids of all items, and of those whose text is needed. It returns the columns `item` and
        `text`.
    """
    columns = list(dict.fromkeys([*item_columns, *(name for names in fields for name in names)]))
    parse = [
        pl.coalesce(read_id(name) for name in item_columns).alias("item"),
        pl.struct(pl.coalesce(names).alias(str(number)) for number, names in enumerate(fields)).alias("fields"),
    ]

    def read_texts(items: pl.Series, needed: pl.Series) -> pl.DataFrame:
        known = pl.DataFrame({"item": items}).with_columns(is_needed=pl.col("item").is_in(needed.implode()))
        known = known.with_row_index("number")
        missing = np.ones(len(items) + 1, dtype=bool)  # the last entry stands for all items that are not in `items`
        parts = []
        for frame in read_table(path, columns, parse, malformed, **reading):
            if skip_empty:
                frame = frame.filter(pl.any_horizontal(pl.col("fields").struct.unnest().str.strip_chars() != ""))
            frame = frame.unique("item", keep="first", maintain_order=True)
            frame = frame.join(known, on="item", how="left" if all_items else "inner", maintain_order="left")
            frame = frame.with_columns(pl.col("number").fill_null(len(items)))
            frame = frame.filter(missing[frame["number"].to_numpy()])
            missing[frame["number"].to_numpy()] = False
            missing[-1] = True
            text = [
                make_text(list(values.values())) if all_items or is_needed else None
                for values, is_needed in frame.select("fields", "is_needed").iter_rows()
            ]
            parts.append(frame.select("item", text=pl.Series(text, dtype=pl.String)))
        malformed.check(f"an item id in {' or '.join(item_columns)}")
        if not parts:
            raise UserError(f"{path}: holds no item; expected rows with {' or '.join(item_columns)} and texts")
        return pl.concat(parts).unique("item", keep="first", maintain_order=True)

    return read_texts
