"""Turn Online Retail into a data set in the published layout. An invoice is a user, a stock code is an item.

    python dataset/preprocessing/process_or.py --input_path data.csv

Reads the CSV file from Kaggle and the CSV export of UCI's workbook, with commas or semicolons, in any encoding. The
text of an item is its description in lower case. Rows without a description are left out and counted. Rows with the
same invoice, stock code, quantity and date count once. Cancelled invoices, whose numbers begin with a C, are kept as in
the published data set.

The rows of an invoice share one date. By default they stay in the order of the file. The published data set has them in
an arbitrary order, `--ties shuffle` in a random one.
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
from dataset.preprocessing.item_table import text_reader  # noqa: E402
from dataset.preprocessing.tables import MalformedRows, check_columns, guess_encoding, read_table  # noqa: E402
from dataset.preprocessing.texts import clean_sentence  # noqa: E402
from dataset.preprocessing.times import time_column  # noqa: E402

INVOICE, WORKBOOK_INVOICE = "InvoiceNo", "Invoice"  # the second name is that in UCI's workbook of two years
COLUMNS = ("StockCode", "Description", "Quantity", "InvoiceDate")


def process_or(options: argparse.Namespace) -> None:
    """Write the data set into OUTPUT_PATH/DATASET, see `splits.write_data_set`, and encode its texts.

    Raises:
        UserError: the file is missing, lacks a column or cannot be read, or nothing remains.
    """
    path = options.input_path
    encoding = guess_encoding(path)
    names = check_columns(path, COLUMNS, encoding=encoding)
    invoice = WORKBOOK_INVOICE if WORKBOOK_INVOICE in names else INVOICE
    check_columns(path, [invoice], encoding=encoding)
    malformed = MalformedRows(path, options.max_malformed)
    left_out: dict[str, int] = {}
    process(
        options,
        lambda: read_invoices(
            path, invoice, malformed, left_out, options.drop_cancellations, options.timestamp_format, encoding=encoding
        ),
        text_reader(
            path,
            ["StockCode"],
            [["Description"]],
            MalformedRows(path, 1.0),  # malformed rows have already been counted with the interactions
            functools.partial(description_text, style=options.text_style),
            skip_empty=True,
            encoding=encoding,
        ),
        [malformed],
        {
            "command": "process_or",
            "encoding": encoding,
            "timestamp_format": options.timestamp_format,
            "drop_cancellations": options.drop_cancellations,
            "ties": options.ties,
        },
        left_out,
        tie_seed=options.seed if options.ties == "shuffle" else None,
    )


def description_text(fields: Sequence[str | None], style: str = "clean") -> str:
    """The text of an item: its description in lower case with a full stop."""
    lower = (fields[0] or "").lower()
    return f"{lower}." if style == "published" else clean_sentence(lower)


def read_invoices(
    path: str,
    invoice: str,
    malformed: MalformedRows,
    left_out: dict[str, int],
    drop_cancellations: bool = False,
    timestamp_format: str | None = None,
    **reading,
) -> Interactions:
    """Read the interactions. The invoice is the user and the stock code is the item.

    Args:
        path: the CSV file.
        invoice: the column of invoice numbers.
        malformed: counts the malformed rows.
        left_out: filled with the number of rows that were left out, by reason.
        drop_cancellations: leave out the invoices whose number begins with a C.
        timestamp_format: of dates, see `times.time_column`.
        reading: further arguments of `tables.read_table`.

    Raises:
        UserError: the file is missing, lacks a column, is empty, or too many rows are malformed.
    """
    columns = [invoice, *COLUMNS]
    kaggle_day = "%m/%d/%Y"
    time = time_column(path, "InvoiceDate", timestamp_format, kaggle_day, **reading)
    parse = [
        pl.col(invoice).alias("user"),
        pl.col("StockCode").alias("item"),
        time.alias("timestamp"),
        pl.col("Description").fill_null("").str.strip_chars().alias("text"),
        pl.col("Quantity").fill_null("").str.strip_chars().alias("quantity"),
    ]
    left_out |= {"rows without a description": 0, "rows of cancelled invoices": 0}

    def frames() -> Iterator[pl.DataFrame]:
        for frame in read_table(path, columns, parse, malformed, **reading):
            for reason, is_left_out in (
                ("rows without a description", pl.col("text") == ""),
                ("rows of cancelled invoices", drop_cancellations & pl.col("user").str.starts_with("C")),
            ):
                kept = frame.filter(~is_left_out)
                left_out[reason] += len(frame) - len(kept)
                frame = kept
            yield frame
        malformed.check(f"{', '.join(columns)}")

    return Interactions.collect(frames(), path)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Turn Online Retail into a data set and encode its texts.")
    parser.add_argument("--dataset", default="OR", metavar="NAME", help="name of the data set (default: OR)")
    parser.add_argument("--input_path", required=True, metavar="FILE", help="the CSV file")
    parser.add_argument("--drop_cancellations", action="store_true", help="leave out cancelled invoices")
    parser.add_argument("--timestamp_format", metavar="FORMAT",
                        help="such as '%%d.%%m.%%Y %%H:%%M' (default: derived from the values)")  # fmt: skip
    parser.add_argument("--ties", choices=("file", "shuffle"), default="file",
                        help="rows of an invoice with the same date: file keeps the order of the file, shuffle draws a "
                             "random one, seeded by --seed (default: file)")  # fmt: skip
    add_processing_options(parser)
    return parser


def main(argv: list[str]) -> None:
    """Run the command. It is described at the top of the file."""
    process_or(_parser().parse_args(argv))


if __name__ == "__main__":
    run_command(main)
