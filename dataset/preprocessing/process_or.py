"""Online Retail to a data set in the published layout: an invoice is a user, a stock code an item.

    python dataset/preprocessing/process_or.py --input_path data.csv

Reads the CSV file from Kaggle and the CSV export of UCI's workbook, with commas or semicolons, in any encoding. The
text of an item is its description in lower case; rows without one are left out and counted. Cancelled invoices (their
number begins with a C) are kept, as in the published data set.
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
from dataset.preprocessing.tables import Malformed, check_columns, guess_encoding, read_table  # noqa: E402
from dataset.preprocessing.texts import clean_sentence  # noqa: E402
from dataset.preprocessing.times import time_column  # noqa: E402

INVOICE, OTHER_INVOICE = "InvoiceNo", "Invoice"  # the second in the workbook of two years
COLUMNS = ("StockCode", "Description", "InvoiceDate")


def process_or(options):
    """Write the data set into OUTPUT_PATH/DATASET, see `splits.write_data_set`, and encode its texts.

    Args:
        options (argparse.Namespace): the command line.

    Raises:
        UserError: the file is missing, lacks a column or cannot be read, or nothing remains.
    """
    path = options.input_path
    encoding = guess_encoding(path)
    names = check_columns(path, COLUMNS, encoding=encoding)
    invoice = OTHER_INVOICE if OTHER_INVOICE in names else INVOICE
    check_columns(path, [invoice], encoding=encoding)
    malformed = Malformed(path, options.max_malformed)
    left_out = {}
    process(
        options,
        lambda: read_invoices(
            path, invoice, malformed, left_out, options.drop_cancellations, options.timestamp_format, encoding=encoding
        ),
        text_reader(
            path,
            ["StockCode"],
            [["Description"]],
            Malformed(path, 1.0),  # the same rows have been counted already
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
        },
        left_out,
    )


def description_text(fields, style="clean"):
    """The text of an item: its description in lower case with a full stop."""
    lower = fields[0].lower()
    return f"{lower}." if style == "published" else clean_sentence(lower)


def read_invoices(path, invoice, malformed, left_out, drop_cancellations=False, timestamp_format=None, **reading):
    """Read who bought what when.

    Args:
        path (str): the CSV file.
        invoice (str): the column of invoice numbers.
        malformed (Malformed): counts the unreadable rows.
        left_out (dict): takes the numbers of rows left out, by reason.
        drop_cancellations (bool): leave out the invoices whose number begins with a C.
        timestamp_format (str, optional): of dates; see `times.time_column`.
        reading: further arguments of `tables.read_table`.

    Returns:
        Interactions: `user` is an invoice, `item` a stock code.

    Raises:
        UserError: the file is missing, lacks a column, is empty, or too many rows are malformed.
    """
    columns = [invoice, *COLUMNS]
    ambiguous = "%m/%d/%Y"  # Kaggle's way to write a day
    when = time_column(path, "InvoiceDate", timestamp_format, ambiguous, **reading)
    parse = [
        pl.col(invoice).alias("user"),
        pl.col("StockCode").alias("item"),
        when.alias("timestamp"),
        pl.col("Description").fill_null("").str.strip_chars().alias("text"),
    ]
    left_out |= {"rows without a description": 0, "rows of cancelled invoices": 0}

    def frames():
        for frame in read_table(path, columns, parse, malformed, **reading):
            for reason, leave_out in (
                ("rows without a description", pl.col("text") == ""),
                ("rows of cancelled invoices", drop_cancellations & pl.col("user").str.starts_with("C")),
            ):
                kept = frame.filter(~leave_out)
                left_out[reason] += len(frame) - len(kept)
                frame = kept
            yield frame
        malformed.check(f"{', '.join(columns)}")

    return Interactions.collect(frames(), path)


def _parser():
    parser = argparse.ArgumentParser(description="Online Retail to a data set in the published layout.")
    parser.add_argument("--dataset", default="OR", metavar="NAME", help="name of the data set (default: OR)")
    parser.add_argument("--input_path", required=True, metavar="FILE", help="the CSV file")
    parser.add_argument("--drop_cancellations", action="store_true", help="leave out cancelled invoices")
    parser.add_argument("--timestamp_format", metavar="FORMAT",
                        help="such as '%%d.%%m.%%Y %%H:%%M' (default: the form that fits)")  # fmt: skip
    add_processing_options(parser)
    return parser


def main(argv):
    """The command; see the top of the file."""
    process_or(_parser().parse_args(argv))


if __name__ == "__main__":
    run_command(main)
