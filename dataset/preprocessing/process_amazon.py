"""Amazon ratings and metadata to a data set in the published layout.

    python dataset/preprocessing/process_amazon.py --dataset Scientific --input_path DIR
    python dataset/preprocessing/process_amazon.py --dataset MyShop --ratings r.csv --metadata m.json.gz

DIR has the layout of the Amazon download: `Ratings/FULLNAME.csv` (item,user,rating,timestamp, no header) and
`Metadata/meta_FULLNAME.json.gz` (one JSON object a line; asin, title, category, brand are read).
"""

import argparse
import gzip
import json
import os
import sys
import time
import zlib

PROJECT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, PROJECT)  # so that the script finds `common`, from whatever folder it is started

import polars as pl  # noqa: E402

from common.errors import UserError, did_you_mean, run_command  # noqa: E402
from dataset.preprocessing.splits import summary_line, write_splits  # noqa: E402
from dataset.preprocessing.texts import clean_text  # noqa: E402

FULL_NAMES = {
    "Appliances": "Appliances",
    "Arts": "Arts_Crafts_and_Sewing",
    "Automotive": "Automotive",
    "Beauty": "All_Beauty",
    "Books": "Books",
    "CDs": "CDs_and_Vinyl",
    "Cell": "Cell_Phones_and_Accessories",
    "Clothing": "Clothing_Shoes_and_Jewelry",
    "Electronics": "Electronics",
    "Fashion": "AMAZON_FASHION",
    "Food": "Grocery_and_Gourmet_Food",
    "Games": "Video_Games",
    "Garden": "Patio_Lawn_and_Garden",
    "Gift": "Gift_Cards",
    "Home": "Home_and_Kitchen",
    "Instruments": "Musical_Instruments",
    "Kindle": "Kindle_Store",
    "Luxury": "Luxury_Beauty",
    "Magazine": "Magazine_Subscriptions",
    "Movies": "Movies_and_TV",
    "Music": "Digital_Music",
    "Office": "Office_Products",
    "Pantry": "Prime_Pantry",
    "Pet": "Pet_Supplies",
    "Scientific": "Industrial_and_Scientific",
    "Software": "Software",
    "Sports": "Sports_and_Outdoors",
    "Tools": "Tools_and_Home_Improvement",
    "Toys": "Toys_and_Games",
}


def process_amazon(dataset, ratings, metadata, output_path, user_k=5, item_k=5):
    """Write the data set into OUTPUT_PATH/DATASET; see `write_splits` for the rules and for what is returned.

    Args:
        dataset (str): its name.
        ratings (str): CSV file without header: item,user,rating,timestamp.
        metadata (str): JSON lines, gzipped where the name ends in `.gz`.
        output_path (str): the folder in which the data set's folder is made.
        user_k, item_k (int): the fewest interactions of a user and of an item.

    Raises:
        UserError: a file is missing or cannot be read, or nothing remains.
    """
    interactions = read_ratings(ratings)
    texts = read_metadata(metadata, set(interactions["item"]))
    return write_splits(interactions, texts, output_path, dataset, user_k, item_k)


def read_ratings(path):
    """Read a ratings file.

    Returns:
        polars.DataFrame: `user` (str), `item` (str), `timestamp` (int, seconds), in file order.

    Raises:
        UserError: the file is missing, empty or has other columns.
    """
    _check_file(path)
    schema = {"item": pl.String, "user": pl.String, "rating": pl.Float64, "timestamp": pl.Int64}
    try:
        frame = pl.read_csv(path, has_header=False, schema=schema, quote_char=None)
    except (pl.exceptions.PolarsError, UnicodeDecodeError) as failure:
        reason = str(failure).strip().splitlines()[0]
        raise UserError(f"{path}: expected the columns item,user,rating,timestamp and no header ({reason})") from None
    frame = frame.select("user", "item", "timestamp")
    if frame.is_empty() or sum(frame.null_count().row(0)):
        found = "is empty" if frame.is_empty() else "a row lacks its item, user or timestamp"
        raise UserError(f"{path}: {found}; expected rows of item,user,rating,timestamp")
    return frame


def read_metadata(path, wanted):
    """Read the cleaned texts of the wanted items: title, category and brand, a sentence each.

    Args:
        path (str): JSON lines, gzipped where the name ends in `.gz`.
        wanted (set of str): raw item ids; others are skipped.

    Returns:
        dict: raw item id -> text; '' where all three fields are empty. Of two entries the first counts.

    Raises:
        UserError: the file is missing or damaged, or a line is no JSON object with an `asin`.
    """
    _check_file(path)
    texts = {}
    number = 0  # of the last line that could be read
    try:
        with gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb") as file:
            for line in file:
                number += 1
                if line.isspace():
                    continue
                entry = json.loads(line)
                item = entry["asin"]
                if item in wanted and item not in texts:
                    # `categories` is what the 2014 edition calls the field
                    category = entry.get("category") or entry.get("categories")
                    texts[item] = clean_text([entry.get("title"), category, entry.get("brand")])
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        raise UserError(f"{path}: line {number}: expected a JSON object with an asin; mend the line") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as failure:
        raise UserError(f"{path}: is damaged after line {number} ({failure}); download it again") from None
    return texts


def _check_file(path):
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file; give --input_path, or both --ratings and --metadata")


def find_files(dataset, input_path):
    """The ratings and the metadata file of a data set, by its short or full name, in the layout of the download."""
    if dataset not in FULL_NAMES and dataset not in FULL_NAMES.values():
        hint = did_you_mean(dataset, FULL_NAMES) or f"; expected one of {', '.join(FULL_NAMES)}"
        raise UserError(f"--dataset {dataset}: no such Amazon category{hint}")
    full_name = FULL_NAMES.get(dataset, dataset)
    return (
        os.path.join(input_path, "Ratings", f"{full_name}.csv"),
        os.path.join(input_path, "Metadata", f"meta_{full_name}.json.gz"),
    )


def _parser():
    parser = argparse.ArgumentParser(description="Amazon ratings and metadata to a data set in the published layout.")
    parser.add_argument("--dataset", required=True, metavar="NAME",
                        help=f"any name; with --input_path one of {', '.join(FULL_NAMES)}")  # fmt: skip
    parser.add_argument("--input_path", metavar="DIR", help="folder with Ratings/ and Metadata/")
    parser.add_argument("--ratings", metavar="FILE", help="CSV: item,user,rating,timestamp, no header")
    parser.add_argument("--metadata", metavar="FILE", help="JSON lines, .gz or plain")
    parser.add_argument("--output_path", default=os.path.join(PROJECT, "dataset", "downstream"), metavar="DIR",
                        help="default: dataset/downstream of the project")  # fmt: skip
    parser.add_argument("--user_k", type=int, default=5, help="fewest interactions of a user (default: 5)")
    parser.add_argument("--item_k", type=int, default=5, help="fewest interactions of an item (default: 5)")
    return parser


def main(argv):
    """The command; see the top of the file."""
    options = _parser().parse_args(argv)
    ratings, metadata = options.ratings, options.metadata
    if options.input_path and not (ratings or metadata):
        ratings, metadata = find_files(options.dataset, options.input_path)
    elif options.input_path or not (ratings and metadata):
        raise UserError("expected either --input_path, or both --ratings and --metadata")
    start = time.perf_counter()
    summary = process_amazon(options.dataset, ratings, metadata, options.output_path, options.user_k, options.item_k)
    print(summary_line(options.dataset, summary))
    print(f"  {os.path.join(options.output_path, options.dataset)} written in {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    run_command(main)
