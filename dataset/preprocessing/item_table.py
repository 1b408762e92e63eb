"""Item texts out of a table of any shop: JSON lines, CSV, Parquet."""

import polars as pl

from common.errors import UserError
from dataset.preprocessing.tables import read_table


def text_reader(path, item_columns, fields, malformed, make_text, all_items=False, skip_empty=False, **reading):
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
        reading: further arguments of `tables.read_table`.

    Returns:
        callable: (items, wanted), polars.Series of raw ids, to a polars.DataFrame `item`, `text`.
    """
    columns = list(dict.fromkeys([*item_columns, *(name for names in fields for name in names)]))
    parse = [
        pl.coalesce(item_columns).alias("item"),
        pl.struct(pl.coalesce(names).alias(str(place)) for place, names in enumerate(fields)).alias("fields"),
    ]

    def read_texts(items, wanted):
        asked = pl.DataFrame({"item": items}).with_columns(wanted=pl.col("item").is_in(wanted.implode()))
        parts = []
        for frame in read_table(path, columns, parse, malformed, **reading):
            if skip_empty:
                frame = frame.filter(pl.any_horizontal(pl.col("fields").struct.unnest().str.strip_chars() != ""))
            frame = frame.unique("item", keep="first", maintain_order=True)
            if all_items:
                frame = frame.with_columns(wanted=True)
            else:
                frame = frame.join(asked, on="item", how="inner", maintain_order="left")
            text = [
                make_text(list(values.values())) if is_wanted else None
                for values, is_wanted in frame.select("fields", "wanted").iter_rows()
            ]
            parts.append(frame.select("item", text=pl.Series(text, dtype=pl.String)))
        malformed.check(f"an item id in {' or '.join(item_columns)}")
        if not parts:
            raise UserError(f"{path}: holds no item; expected {' or '.join(item_columns)} and texts")
        return pl.concat(parts).unique("item", keep="first", maintain_order=True)

    return read_texts
