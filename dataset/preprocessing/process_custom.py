"""Turn tables of interactions and item texts into a data set, and encode its texts.

    python dataset/preprocessing/process_custom.py --dataset MyShop --interactions clicks.csv --items items.parquet \\
        --user_column customer --item_column sku --timestamp_column clicked_at --text_columns name,description

Each of the two tables is CSV, TSV, JSON lines (plain or gzipped) or Parquet. Both may be the same file. Timestamps are
numbers or dates. If an item has several rows, the text of the first one counts.
"""

import argparse
import functools
import os
import sys
from collections.abc import Iterator, Sequence

PROJECT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, PROJECT)  # so that the script finds `common` from any working folder

import polars as pl  # noqa: E402

from common.errors import run_command  # noqa: E402
from dataset.preprocessing.command_line import add_processing_options, process  # noqa: E402
from dataset.preprocessing.interactions import Interactions  # noqa: E402
from dataset.preprocessing.item_table import SHOW_COLUMNS_HELP, parse_show_columns, raw_id, text_reader  # noqa: E402
from dataset.preprocessing.splits import MIN_INTERACTIONS  # noqa: E402
from dataset.preprocessing.tables import MalformedRows, check_columns, read_table  # noqa: E402
from dataset.preprocessing.texts import item_text  # noqa: E402
from dataset.preprocessing.times import time_column, without_fractions  # noqa: E402


def process_custom(options: argparse.Namespace) -> None:
    """Write the data set into OUTPUT_PATH/DATASET, see `splits.write_data_set`, and encode its texts.

    Raises:
        UserError: a file is missing, lacks a column or cannot be read, or nothing remains.
    """
    columns = [options.user_column, options.item_column, options.timestamp_column]
    item_column = options.items_item_column or options.item_column
    text_columns = [name.strip() for name in options.text_columns.split(",")]
    show = parse_show_columns(options.show_columns)
    reading = {"encoding": options.encoding}
    check_columns(options.interactions, columns, **reading)
    check_columns(options.items, [item_column, *text_columns, *show.values()], **reading)
    malformed = [MalformedRows(path, options.max_malformed) for path in (options.interactions, options.items)]
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
            read_id=raw_id,
            show=show,
            **reading,
        ),
        malformed,
        {
            "command": "process_custom",
            "columns": columns,
            "items_item_column": item_column,
            "text_columns": text_columns,
            **({"show_columns": show} if show else {}),
            "timestamp_format": options.timestamp_format,
            "encoding": options.encoding,
        },
        split=options.split,
        valid_share=options.valid_share,
        test_share=options.test_share,
        all_items=options.all_items,
    )


def read_interactions(
    path: str, columns: Sequence[str], malformed: MalformedRows, timestamp_format: str | None = None, **reading
) -> Interactions:
    """Read a table of interactions.

    Args:
        path: the table.
        columns: the columns of the user, the item and the timestamp.
        malformed: counts the rows that lack one of the three.
        timestamp_format: of dates, see `times.time_column`.
        reading: further arguments of `tables.read_table`.

    Raises:
        UserError: the file is damaged or holds no interaction, or too many rows are malformed.
    """
    user, item, timestamp = columns
    time = time_column(path, timestamp, timestamp_format, **reading)
    parse = [raw_id(user).alias("user"), raw_id(item).alias("item"), time.alias("timestamp")]

    def frames() -> Iterator[pl.DataFrame]:
        yield from read_table(path, list(dict.fromkeys(columns)), parse, malformed, **reading)
        malformed.check(f"{user}, {item} and {timestamp}")

    rows = Interactions.collect(frames(), path)
    rows.timestamp = without_fractions(rows.timestamp)
    return rows


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Turn tables of interactions and item texts into a data set and encode its texts."
    )
    parser.add_argument("--dataset", required=True, metavar="NAME", help="name of the data set")
    parser.add_argument("--interactions", required=True, metavar="FILE",
                        help="table of interactions: .csv, .tsv, .jsonl (or .gz of these), .parquet")  # fmt: skip
    parser.add_argument("--items", required=True, metavar="FILE",
                        help="table of item texts, of the same kinds; may be the same file")  # fmt: skip
    parser.add_argument(
        "--user_column", default="user_id", metavar="NAME", help="column of the user (default: user_id)"
    )
    parser.add_argument(
        "--item_column", default="item_id", metavar="NAME", help="column of the item (default: item_id)"
    )
    parser.add_argument("--timestamp_column", default="timestamp", metavar="NAME",
                        help="column of the timestamp (default: timestamp)")  # fmt: skip
    parser.add_argument("--timestamp_format", metavar="FORMAT",
                        help="such as '%%d.%%m.%%Y %%H:%%M' (default: derived from the values)")  # fmt: skip
    parser.add_argument("--items_item_column", metavar="NAME",
                        help="column of the item in the item table (default: as --item_column)")  # fmt: skip
    parser.add_argument("--text_columns", default="title", metavar="A,B,C",
                        help="columns of the item table that make up the text, in order (default: title)")  # fmt: skip
    parser.add_argument("--show_columns", default="", metavar="A,B=C", help=SHOW_COLUMNS_HELP)
    parser.add_argument(
        "--encoding", default="utf-8", metavar="NAME", help="encoding of both text files (default: utf-8)"
    )
    parser.add_argument("--split", choices=tuple(MIN_INTERACTIONS), default="leave_one_out",
                        help="leave_one_out: test on the last interaction of each user; time: test on the latest "
                             "interactions of all users (default: leave_one_out)")  # fmt: skip
    parser.add_argument("--valid_share", type=float, default=0.1, metavar="SHARE",
                        help="share of the interactions for validation, with --split time (default: 0.1)")  # fmt: skip
    parser.add_argument("--test_share", type=float, default=0.1, metavar="SHARE",
                        help="share of the interactions for the test, with --split time (default: 0.1)")  # fmt: skip
    parser.add_argument("--all_items", action="store_true",
                        help="keep items without interactions in the catalogue")  # fmt: skip
    add_processing_options(parser)
    return parser


def main(argv: list[str]) -> None:
    """Run the command. It is described at the top of the file."""
    process_custom(_parser().parse_args(argv))


if __name__ == "__main__":
    run_command(main)
