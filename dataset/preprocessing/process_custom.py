"""Anyone's interactions and item texts to a data set, and its texts to features.

    python dataset/preprocessing/process_custom.py --dataset MyShop --interactions clicks.csv --items items.parquet \\
        --user_column customer --item_column sku --timestamp_column clicked_at --text_columns name,description

Each of the two tables is CSV, TSV, Parquet or JSON lines, the text ones plain or gzipped; both may be one file.
Timestamps are numbers or dates. Of several rows for an item the first one's text counts.
"""

import argparse
import functools
import os
import sys

PROJECT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, PROJECT)  # so that the script finds `common`, from whatever folder it is started

import polars as pl  # noqa: E402

from common.errors import run_command  # noqa: E402
from dataset.preprocessing.command_line import add_processing_options, process  # noqa: E402
from dataset.preprocessing.interactions import Interactions  # noqa: E402
from dataset.preprocessing.item_table import text_reader  # noqa: E402
from dataset.preprocessing.splits import MIN_INTERACTIONS  # noqa: E402
from dataset.preprocessing.tables import Malformed, check_columns, read_table  # noqa: E402
from dataset.preprocessing.texts import item_text  # noqa: E402
from dataset.preprocessing.times import time_column, without_fractions  # noqa: E402


def process_custom(options):
    """Write the data set into OUTPUT_PATH/DATASET, see `splits.write_data_set`, and encode its texts.

    Args:
        options (argparse.Namespace): the command line.

    Raises:
        UserError: a file is missing, lacks a column or cannot be read, or nothing remains.
    """
    columns = [options.user_column, options.item_column, options.timestamp_column]
    item_column = options.items_item_column or options.item_column
    text_columns = [name.strip() for name in options.text_columns.split(",")]
    reading = {"encoding": options.encoding}
    check_columns(options.interactions, columns, **reading)
    check_columns(options.items, [item_column, *text_columns], **reading)
    malformed = [Malformed(path, options.max_malformed) for path in (options.interactions, options.items)]
    process(
        options,
        lambda: read_interactions(options.interactions, columns, malformed[0], options.timestamp_format, **reading),
        text_reader(
            options.items,
            [item_column],
            [[name] for name in text_columns],
            malformed[1],
            functools.partial(item_text, style=options.text_style),
            all_items=options.all_items,
            read_id=_id,
            **reading,
        ),
        malformed,
        {
            "command": "process_custom",
            "columns": columns,
            "items_item_column": item_column,
            "text_columns": text_columns,
            "timestamp_format": options.timestamp_format,
            "encoding": options.encoding,
        },
        split=options.split,
        valid_share=options.valid_share,
        test_share=options.test_share,
        all_items=options.all_items,
    )


def read_interactions(path, columns, malformed, timestamp_format=None, **reading):
    """Read a table of interactions.

    Args:
        path (str): the table.
        columns (list of str): those of the user, the item and the timestamp.
        malformed (Malformed): counts the rows that lack one of the three.
        timestamp_format (str, optional): of dates; see `times.time_column`.
        reading: further arguments of `tables.read_table`.

    Returns:
        Interactions

    Raises:
        UserError: the file is damaged or holds no interaction, or too many rows are malformed.
    """
    user, item, timestamp = columns
    when = time_column(path, timestamp, timestamp_format, **reading)
    parse = [_id(user).alias("user"), _id(item).alias("item"), when.alias("timestamp")]

    def frames():
        yield from read_table(path, list(dict.fromkeys(columns)), parse, malformed, **reading)
        malformed.check(f"{user}, {item} and {timestamp}")

    rows = Interactions.collect(frames(), path)
    rows.timestamp = without_fractions(rows.timestamp)
    return rows


def _id(column):
    """A raw id without blanks around it; null where nothing is left."""
    stripped = pl.col(column).str.strip_chars()
    return pl.when(stripped != "").then(stripped)


def _parser():
    parser = argparse.ArgumentParser(description="Anyone's interactions and item texts to a data set.")
    parser.add_argument("--dataset", required=True, metavar="NAME", help="name of the data set")
    parser.add_argument("--interactions", required=True, metavar="FILE", help=".csv .tsv .parquet .jsonl, or .gz of it")
    parser.add_argument("--items", required=True, metavar="FILE", help="item texts, likewise; may be the same file")
    parser.add_argument("--user_column", default="user_id", metavar="NAME", help="default: user_id")
    parser.add_argument("--item_column", default="item_id", metavar="NAME", help="default: item_id")
    parser.add_argument("--timestamp_column", default="timestamp", metavar="NAME", help="default: timestamp")
    parser.add_argument("--timestamp_format", metavar="FORMAT",
                        help="such as '%%d.%%m.%%Y %%H:%%M' (default: numbers, or the form that fits)")  # fmt: skip
    parser.add_argument("--items_item_column", metavar="NAME", help="in the item table (default: --item_column)")
    parser.add_argument("--text_columns", default="title", metavar="A,B,C",
                        help="columns of the item table that make up the text, in order (default: title)")  # fmt: skip
    parser.add_argument("--encoding", default="utf-8", metavar="NAME", help="of both text files (default: utf-8)")
    parser.add_argument("--split", choices=tuple(MIN_INTERACTIONS), default="leave_one_out",
                        help="time: the latest interactions of all are the test (default: leave_one_out)")  # fmt: skip
    parser.add_argument("--valid_share", type=float, default=0.1, metavar="SHARE",
                        help="of all interactions, for --split time (default: 0.1)")  # fmt: skip
    parser.add_argument("--test_share", type=float, default=0.1, metavar="SHARE",
                        help="of all interactions, for --split time (default: 0.1)")  # fmt: skip
    parser.add_argument("--all_items", action="store_true",
                        help="items without interactions can be recommended too")  # fmt: skip
    add_processing_options(parser)
    return parser


def main(argv):
    """The command; see the top of the file."""
    process_custom(_parser().parse_args(argv))


if __name__ == "__main__":
    run_command(main)
