"""Reading item texts from a table of a shop: JSON lines, CSV or Parquet."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import polars as pl

from common.errors import UserError
from dataset.preprocessing.tables import MalformedRows, read_table

SHOW_COLUMNS_HELP = (
    "columns to show with recommendations, such as title,image,url; NAME=COLUMN gives a column another name "
    "(default: none)"
)
_OWN_COLUMNS = ("id", "item", "text", "count")  # of the tables that the columns to show are added to


def parse_show_columns(option: str) -> dict[str, str]:
    """The value of `--show_columns`: the name of each column to show -> its column in the table.

    Raises:
        UserError: a name is empty, occurs twice, or is one of the names that every item has.
    """
    shown: dict[str, str] = {}
    for part in option.split(",") if option else []:
        name, _, column = (word.strip() for word in part.partition("="))
        if name in shown:
            raise UserError(f"--show_columns {option}: {name} occurs twice; give one of them another name: NAME=COLUMN")
        shown[name] = column or name
    check_show_names(shown, f"--show_columns {option}")
    return shown


def check_show_names(names: Iterable[str], where: str) -> None:
    """Check that columns to show can have these names.

    Raises:
        UserError: a name is empty, or one of the names that every item has.
    """
    for name in names:
        if not name.strip() or name in _OWN_COLUMNS:
            raise UserError(f"{where}: a column to show cannot have the name {name!r}; give it another, such as title")


def raw_id(column: str) -> pl.Expr:
    """A raw id without blanks around it. Null if nothing is left."""
    stripped = pl.col(column).str.strip_chars()
    return pl.when(stripped != "").then(stripped)


def text_reader(
    path: str,
    item_columns: Sequence[str],
    fields: Sequence[Sequence[str]],
    malformed: MalformedRows,
    make_text: Callable[[list[str | None]], str],
    all_items: bool = False,
    skip_empty: bool = False,
    read_id: Callable[[str], pl.Expr] = pl.col,
    show: Mapping[str, str] | None = None,
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
        show: columns to show with an item: name -> column.
        reading: further arguments of `tables.read_table`.

    Returns:
        A function of the raw ids of all items, and of those whose text is needed. It returns the columns `item` and
        `text`, and the columns to show.
    """
    show = show or {}
    columns = list(dict.fromkeys([*item_columns, *(name for names in fields for name in names), *show.values()]))
    parse = [
        pl.coalesce(read_id(name) for name in item_columns).alias("item"),
        pl.struct(pl.coalesce(names).alias(str(number)) for number, names in enumerate(fields)).alias("fields"),
    ]
    if show:
        parse.append(pl.struct(pl.col(column).alias(name) for name, column in show.items()).alias("show"))

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
            shown = (pl.col("show").struct.field(name) for name in show)
            parts.append(frame.select("item", pl.Series("text", text, pl.String), *shown))
        malformed.check(f"an item id in {' or '.join(item_columns)}")
        if not parts:
            raise UserError(f"{path}: holds no item; expected rows with {' or '.join(item_columns)} and texts")
        return pl.concat(parts).unique("item", keep="first", maintain_order=True)

    return read_texts
