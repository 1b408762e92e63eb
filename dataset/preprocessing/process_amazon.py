"""Turn Amazon ratings and metadata into a data set in the published layout, and encode its texts.

    python dataset/preprocessing/process_amazon.py --dataset Pantry [--input_path DIR]
    python dataset/preprocessing/process_amazon.py --dataset MyShop --ratings r.csv --metadata m.json.gz

Three editions are read as downloaded. DIR holds the files themselves or the folders named here:

    2018  Ratings/FULLNAME.csv (item,user,rating,timestamp)   Metadata/meta_FULLNAME.json.gz
    2014  ratings_NAME.csv (user,item,rating,timestamp)       meta_NAME.json.gz (Python literals, never executed)
    2023  NAME.jsonl.gz or NAME.csv.gz (with a header)        meta_NAME.jsonl.gz
"""

import argparse
import functools
import itertools
import os
import sys
from collections.abc import Iterator, Sequence

PROJECT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, PROJECT)  # so that the script finds `common` from any working folder

import polars as pl  # noqa: E402

from common.errors import UserError, did_you_mean, run_command  # noqa: E402
from dataset.preprocessing.command_line import add_processing_options, process  # noqa: E402
from dataset.preprocessing.interactions import Interactions  # noqa: E402
from dataset.preprocessing.item_table import text_reader  # noqa: E402
from dataset.preprocessing.tables import MalformedRows, check_columns, read_table, table_kind  # noqa: E402
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
# The paths of an edition's files below --input_path, given the name of the category.
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
# The names that a field has in the three editions.
FIELD_NAMES = {
    "category": ["category", "categories"],
    "brand": ["brand", "store"],
    "features": ["features", "feature"],
}


def process_amazon(options: argparse.Namespace) -> None:
    """Write the data set into OUTPUT_PATH/DATASET, see `splits.write_data_set`, and encode its texts.

    Raises:
        UserError: a file is missing or cannot be read, or nothing remains.
    """
    ratings, metadata, edition = source_files(options)
    malformed = [MalformedRows(path, options.max_malformed) for path in (ratings, metadata)]
    fields = [name.strip() for name in options.text_fields.split(",")]
    names = [FIELD_NAMES.get(field, [field]) for field in fields]
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


def read_ratings(path: str, edition: str, malformed: MalformedRows) -> Interactions:
    """Read the ratings of an edition (`2014`, `2018`, `2023`).

    Timestamps are whole numbers: seconds, in 2023 milliseconds.

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

    def frames() -> Iterator[pl.DataFrame]:
        yield from read_table(
            path, [user, item, "timestamp"], parse, malformed, header=header, separator=",", quoted=header is None
        )
        malformed.check(f"{user}, {item} and a whole-number timestamp")

    return Interactions.collect(frames(), path)


def source_files(options: argparse.Namespace) -> tuple[str, str, str]:
    """The ratings file, the metadata file and the edition that the options name.

    Raises:
        UserError: the options contradict each other, or the files are missing.
    """
    given = (options.ratings, options.metadata)
    if not any(given):
        return find_files(options.dataset, options.input_path or RAW, options.edition)
    if options.input_path or not all(given):
        names = ("input_path", "ratings", "metadata")
        found = " ".join(f"--{name}" for name in names if getattr(options, name))
        raise UserError(f"found {found}, expected either --input_path, or both --ratings and --metadata")
    return *given, options.edition or _guess_edition(options.ratings)


def find_files(dataset: str, input_path: str, edition: str | None = None) -> tuple[str, str, str]:
    """Find the ratings file, the metadata file and the edition of a category, given its short or full name.

    Raises:
        UserError: the files are missing.
    """
    if not os.path.isdir(input_path):
        raise UserError(f"--input_path {input_path}: no such folder; expected the folder with Amazon's files")
    names = list(dict.fromkeys([FULL_NAMES.get(dataset, dataset), dataset]))
    looked_for: list[str] = []
    for each in [edition] if edition else RATINGS:
        ratings, metadata = (
            _first_file(input_path, patterns[each], names, looked_for) for patterns in (RATINGS, METADATA)
        )
        if ratings and metadata:
            return ratings, metadata, each
    hint = did_you_mean(dataset, FULL_NAMES) if dataset not in FULL_NAMES else ""
    raise UserError(
        f"{input_path}: holds no ratings and metadata of {dataset}{hint}; looked for {', '.join(looked_for[:2])}, ...; "
        "correct --dataset, or name the files with --ratings and --metadata"
    )


def _first_file(folder: str, patterns: Sequence[str], names: Sequence[str], looked_for: list[str]) -> str | None:
    """The first file that exists, at the path of its pattern or directly in the folder. Extends `looked_for`."""
    for name, pattern in itertools.product(names, patterns):
        for relative in dict.fromkeys([pattern.format(name), os.path.basename(pattern.format(name))]):
            if os.path.isfile(path := os.path.join(folder, relative)):
                return path
            looked_for.append(relative)
    return None


def _guess_edition(ratings: str) -> str:
    """2014 for `ratings_X.csv`, 2023 for JSON lines or a header with `parent_asin`, else 2018."""
    if os.path.basename(ratings).startswith("ratings_"):
        return "2014"
    if table_kind(ratings) == "json":
        return "2023"
    try:
        check_columns(ratings, ["parent_asin"], separator=",")
        return "2023"
    except UserError:
        return "2018"  # a missing or damaged file is reported when it is read


def _check_fields(metadata: str, fields: Sequence[str], names: Sequence[Sequence[str]]) -> None:
    """Check that the metadata have each field, under one of its names."""
    for field, alternatives in zip(fields, names, strict=True):
        for name in alternatives:
            try:
                check_columns(metadata, [name])
                break
            except UserError as error:
                missing = error
        else:
            raise UserError(f"--text_fields {field}: {missing}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Turn Amazon ratings and metadata into a data set and encode its texts."
    )
    parser.add_argument("--dataset", required=True, metavar="NAME",
                        help=f"a category: {', '.join(FULL_NAMES)}, or its full name; "
                             "any name if --ratings and --metadata are given")  # fmt: skip
    parser.add_argument("--input_path", metavar="DIR",
                        help="folder of the downloaded files (default: dataset/raw of the project)")  # fmt: skip
    parser.add_argument("--ratings", metavar="FILE", help="ratings file, instead of --input_path")
    parser.add_argument("--metadata", metavar="FILE",
                        help="metadata file that belongs to --ratings: JSON lines, .gz or plain")  # fmt: skip
    parser.add_argument("--edition", choices=sorted(COLUMNS | RATINGS), help="default: derived from the file names")
    parser.add_argument("--text_fields", default=TEXT_FIELDS, metavar="A,B,C",
                        help=f"fields of the metadata that make up the text (default: {TEXT_FIELDS})")  # fmt: skip
    add_processing_options(parser)
    return parser


def main(argv: list[str]) -> None:
    """Run the command. It is described at the top of the file."""
    process_amazon(_parser().parse_args(argv))


if __name__ == "__main__":
    run_command(main)
