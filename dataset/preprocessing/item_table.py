"""Item texts out of a table of any shop: JSON lines, CSV, Parquet."""

import numpy as np
import polars as pl

from common.errors import UserError
from dataset.preprocessing.tables import read_table


def text_reader(
    path, item_columns, fields, malformed, make_text, all_items=False, skip_empty=False, read_id=pl.col, **reading
):
    """A function that reads item texts, as `splits.write_data_set` wants it.

    Of several rows for an item the first wins.

    Args:
        path (str): the table.
        item_columns (list of str): the column with the raw item id; of several, the first that is not empty.
        fields (list of list of str): the columns that make up the text, in order; each with its other names.
        malformed (Malformed): counts rows without an item id.
        make_text (callable): list of the fields, str or None, to the text, such as `texts.item_text`.
        all_items (bool): read every item of the table.
        skip_empty (bool): rows where all fields are empty do not count as rows of an item.
        read_id (callable): the name of a column with raw ids to a polars.Expr of them.
        reading: further arguments of `tables.read_table`.

    Returns:
        callable: (items, wanted), polars.Series of raw ids, to a polars.DataFrame `item`, `text`.
    """
    columns = list(dict.fromkeys([*item_columns, *(name for names in fields for name in names)]))
    parse = [
        pl.coalesce(read_id(name) for name in item_columns).alias("item"),
        pl.struct(pl.coalesce(names).alias(str(place)) for place, names in enumerate(fields)).alias("fields"),
    ]

    def read_texts(items, wanted):
        asked = pl.DataFrame({"item": items}).with_columns(wanted=pl.col("item").is_in(wanted.implode()))
        asked = asked.with_row_index("number")
        missing = np.ones(len(items) + 1, dtype=bool)  # the last one stands for all items that were not asked for
        parts = []
        for frame in read_table(path, columns, parse, malformed, **reading):
            if skip_empty:
                frame = frame.filter(pl.any_horizontal(pl.col("fields").struct.unnest().str.strip_chars() != ""))
            frame = frame.unique("item", keep="first", maintain_order=True)
            frame = frame.join(asked, on="item", how="left" if all_items else "inner", maintain_order="left")
            frame = frame.with_columns(pl.col("number").fill_null(len(items)))
            frame = frame.filter(missing[frame["number"].to_numpy()])
            missing[frame["number"].to_numpy()] = False
            missing[-1] = True
            text = [
                make_text(list(values.values())) if all_items or is_wanted else None
                for values, is_wanted in frame.select("fields", "wanted").iter_rows()
            ]
            parts.append(frame.select("item", text=pl.Series(text, dtype=pl.String)))
        malformed.check(f"an item id in {' or '.join(item_columns)}")
        if not parts:
            raise UserError(f"{path}: holds no item; expected {' or '.join(item_columns)} and texts")
        return pl.concat(parts).unique("item", keep="first", maintain_order=True)

    return read_texts
