"""Amazon ratings and metadata to a data set in the published layout, and its texts to features.

    python dataset/preprocessing/process_amazon.py --dataset Pantry [--input_path DIR]
    python dataset/preprocessing/process_amazon.py --dataset MyShop --ratings r.csv --metadata m.json.gz

Three editions are read, each as it is downloaded; DIR holds the files themselves or the folders named here:

    2018  Ratings/FULLNAME.csv (item,user,rating,timestamp)   Metadata/meta_FULLNAME.json.gz
    2014  ratings_NAME.csv (user,item,rating,timestamp)       meta_NAME.json.gz (Python literals, never run)
    2023  NAME.jsonl.gz or NAME.csv.gz (with a header)        meta_NAME.jsonl.gz
"""

import argparse
import functools
import itertools
import os
import sys

PROJECT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, PROJECT)  # so that the script finds `common`, from whatever folder it is started

import polars as pl  # noqa: E402

from common.errors import UserError, did_you_mean, run_command  # noqa: E402
from dataset.preprocessing.command_line import add_processing_options, process  # noqa: E402
from dataset.preprocessing.interactions import Interactions  # noqa: E402
from dataset.preprocessing.item_table import text_reader  # noqa: E402
from dataset.preprocessing.tables import Malformed, check_columns, read_table, table_kind  # noqa: E402
from dataset.preprocessing.texts import item_text  # noqa: E402

RAW = os.path.join(PROJECT, "dataset", "raw")
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
# Where the files of an edition lie below --input_path, by the category's name.
RATINGS = {
    "2018": ("Ratings/{}.csv", "Ratings/{}.csv.gz"),
    "2014": ("ratings_{}.csv", "ratings_{}.csv.gz"),
    "2023": ("{}.jsonl.gz", "{}.jsonl", "{}.csv.gz", "{}.csv"),
}
METADATA = {
    "2018": ("Metadata/meta_{}.json.gz", "Metadata/meta_{}.json"),
    "2014": ("meta_{}.json.gz", "meta_{}.json"),
    "2023": ("meta_{}.jsonl.gz", "meta_{}.jsonl"),
}
# The columns of ratings without a header.
COLUMNS = {"2018": ["item", "user", "rating", "timestamp"], "2014": ["user", "item", "rating", "timestamp"]}
TEXT_FIELDS = "title,category,brand"
# One field, three editions.
OTHER_NAMES = {
    "category": ["category", "categories"],
    "brand": ["brand", "store"],
    "features": ["features", "feature"],
}


def process_amazon(options):
    """Write the data set into OUTPUT_PATH/DATASET, see `splits.write_data_set`, and encode its texts.

    Args:
        options (argparse.Namespace): the command line.

    Raises:
        UserError: a file is missing or cannot be read, or nothing remains.
    """
    ratings, metadata, edition = source_files(options)
    malformed = [Malformed(path, options.max_malformed) for path in (ratings, metadata)]
    fields = [name.strip() for name in options.text_fields.split(",")]
    names = [OTHER_NAMES.get(field, [field]) for field in fields]
    if options.text_fields != TEXT_FIELDS:
        _check_fields(metadata, fields, names)
    items = ["parent_asin", "asin"] if edition == "2023" else ["asin"]
    make_text = functools.partial(item_text, style=options.text_style)
    process(
        options,
        lambda: read_ratings(ratings, edition, malformed[0]),
        text_reader(metadata, items, names, malformed[1], make_text, literals=edition == "2014"),
        malformed,
        {"command": "process_amazon", "edition": edition, "text_fields": fields},
    )


def read_ratings(path, edition, malformed):
    """Read the ratings of an edition (`2014`, `2018`, `2023`).

    Returns:
        Interactions: timestamps are whole numbers, seconds or, in 2023, milliseconds.

    Raises:
        UserError: the file is missing, empty or damaged, or too many rows are malformed.
    """
    header = None if edition == "2023" else COLUMNS[edition]
    user, item = ("user_id", "parent_asin") if header is None else ("user", "item")
    parse = [
        pl.col(user).alias("user"),
        pl.col(item).alias("item"),
        pl.col("timestamp").cast(pl.Int64, strict=False),
    ]

    def frames():
        yield from read_table(
            path, [user, item, "timestamp"], parse, malformed, header=header, separator=",", quoted=header is None
        )
        malformed.check(f"{user}, {item} and a whole-number timestamp")

    return Interactions.collect(frames(), path)


def source_files(options):
    """The ratings, the metadata and the edition that the options name.

    Raises:
        UserError: the options contradict each other, or no such files are there.
    """
    given = (options.ratings, options.metadata)
    if not any(given):
        return find_files(options.dataset, options.input_path or RAW, options.edition)
    if options.input_path or not all(given):
        raise UserError("expected either --input_path, or both --ratings and --metadata")
    return *given, options.edition or _edition_by_name(options.ratings)


def find_files(dataset, input_path, edition=None):
    """The ratings and metadata of a category, by its short or full name: (ratings, metadata, edition)."""
    if not os.path.isdir(input_path):
        raise UserError(f"--input_path {input_path}: no such folder; expected the one with Amazon's files")
    names = list(dict.fromkeys([FULL_NAMES.get(dataset, dataset), dataset]))
    looked_for = []
    for each in [edition] if edition else RATINGS:
        found = [_first_file(input_path, patterns[each], names, looked_for) for patterns in (RATINGS, METADATA)]
        if all(found):
            return *found, each
    hint = did_you_mean(dataset, FULL_NAMES) if dataset not in FULL_NAMES else ""
    raise UserError(
        f"{input_path}: no ratings and metadata of {dataset} there{hint}; looked for {', '.join(looked_for[:2])}, ...; "
        "give the right --dataset, or name the files with --ratings and --metadata"
    )


def _first_file(folder, patterns, names, looked_for):
    """The first file that is there, in the folder or, without their own folder's name, directly in it."""
    for name, pattern in itertools.product(names, patterns):
        for relative in dict.fromkeys([pattern.format(name), os.path.basename(pattern.format(name))]):
            if os.path.isfile(path := os.path.join(folder, relative)):
                return path
            looked_for.append(relative)
    return None


def _edition_by_name(ratings):
    """2014: `ratings_X.csv`; 2023: JSON lines, or a header that names `parent_asin`; else 2018."""
    if os.path.basename(ratings).startswith("ratings_"):
        return "2014"
    if table_kind(ratings) == "json":
        return "2023"
    try:
        check_columns(ratings, ["parent_asin"], separator=",")
        return "2023"
    except UserError:
        return "2018"  # what is wrong with the file itself is found when it is read


def _check_fields(metadata, fields, names):
    """Fields that were asked for by name must occur, under one of their names."""
    for field, others in zip(fields, names, strict=True):
        for other in others:
            try:
                check_columns(metadata, [other])
                break
            except UserError as error:
                missing = error
        else:
            raise UserError(f"--text_fields {field}: {missing}")


def _parser():
    parser = argparse.ArgumentParser(description="Amazon ratings and metadata to a data set in the published layout.")
    parser.add_argument("--dataset", required=True, metavar="NAME",
                        help=f"a category: {', '.join(FULL_NAMES)}, or a full name; "
                             "any name with --ratings and --metadata")  # fmt: skip
    parser.add_argument("--input_path", metavar="DIR",
                        help="folder with the files as downloaded (default: dataset/raw of the project)")  # fmt: skip
    parser.add_argument("--ratings", metavar="FILE", help="instead of --input_path, with --metadata")
    parser.add_argument("--metadata", metavar="FILE", help="JSON lines, .gz or plain")
    parser.add_argument("--edition", choices=sorted(COLUMNS | RATINGS), help="default: by the names of the files")
    parser.add_argument("--text_fields", default=TEXT_FIELDS, metavar="A,B,C",
                        help=f"fields of the metadata that make up the text (default: {TEXT_FIELDS})")  # fmt: skip
    add_processing_options(parser)
    return parser


def main(argv):
    """The command; see the top of the file."""
    process_amazon(_parser().parse_args(argv))


if __name__ == "__main__":
    run_command(main)
