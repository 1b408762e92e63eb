"""Turn MovieLens-100k, which comes with RecBole, into four small data sets. Nothing is downloaded.

    python dataset/preprocessing/process_movielens.py --output_path DIR

Films are grouped by their first listed genre into domains that have no film in common: Action, Comedy and Other (all
other genres) for pre-training, Drama as the target. They are written to DIR/downstream/NAME.
"""

import argparse
import functools
import importlib.util
import os
import re
import sys
import time
from collections.abc import Sequence
from typing import Any

PROJECT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, PROJECT)  # so that the script finds `common` from any working folder

import polars as pl  # noqa: E402

from common.errors import UserError, run_command  # noqa: E402
from dataset.preprocessing.interactions import Interactions  # noqa: E402
from dataset.preprocessing.splits import Rules, write_data_set  # noqa: E402

SOURCE_DOMAINS = ("Action", "Comedy", "Other")
TARGET_DOMAIN = "Drama"

# Titles end in their article: "Boot, Das", "Enfer, L'".
_ARTICLE_LAST = re.compile(r"([^()]+), (The|An|A|Les|La|Le|L'|Il|Das|Der|Die|Det|O)(?=\s*(?:[()]|$))")


def process_movielens(
    output_path: str, user_k: int = 5, item_k: int = 5, source: str | None = None
) -> dict[str, dict[str, Any]]:
    """Write the four data sets into OUTPUT_PATH/downstream.

    A user may occur in several domains, a film only in one. Films without a title are left out.

    Args:
        output_path: the folder in which `downstream` is created.
        user_k, item_k: the fewest interactions of a user and of an item in each domain.
        source: the folder of `ml-100k.inter` and `ml-100k.item`. Default: the one in the installed RecBole.

    Returns:
        Name of the domain -> its description. The target domain is the last.

    Raises:
        UserError: RecBole or its copy of MovieLens is missing.
    """
    source = source or recbole_ml_100k()
    interactions = _read_atomic_file(os.path.join(source, "ml-100k.inter"), ("user_id", "item_id", "timestamp"))
    interactions = interactions.select(
        pl.col("user_id").alias("user"), pl.col("item_id").alias("item"), pl.col("timestamp").cast(pl.Float64)
    )
    films = read_films(os.path.join(source, "ml-100k.item"))
    written = {}
    for domain in (*SOURCE_DOMAINS, TARGET_DOMAIN):
        texts = films.filter(pl.col("domain") == domain).select("item", "text")
        rows = interactions.join(texts, on="item", how="semi", maintain_order="left")
        written[domain] = write_data_set(
            domain,
            os.path.join(output_path, "downstream"),
            Interactions.collect([rows], source),
            functools.partial(_given_texts, texts),
            Rules(user_k, item_k),
            lambda: {"options": {"command": "process_movielens"}},
        )
    return written


def _given_texts(texts: pl.DataFrame, items: pl.Series, needed: pl.Series) -> pl.DataFrame:
    """The texts of all items, whichever are needed; see `splits.write_data_set`."""
    return texts


def recbole_ml_100k() -> str:
    """The folder of MovieLens-100k in the installed RecBole. RecBole is not imported.

    Raises:
        UserError: RecBole is not installed, or has no such folder.
    """
    package = importlib.util.find_spec("recbole")
    if package is None or not package.submodule_search_locations:
        raise UserError("recbole: is not installed, but MovieLens-100k is read from it; run: pip install recbole")
    folder = os.path.join(package.submodule_search_locations[0], "dataset_example", "ml-100k")
    if not os.path.isdir(folder):
        raise UserError(f"{folder}: no such folder; expected MovieLens-100k; install RecBole 1.2.1")
    return folder


def read_films(path: str) -> pl.DataFrame:
    """Read the films that have a title.

    Returns:
        The columns `item` (raw id), `text` ("The Full Monty, 1997, Comedy.") and `domain`.
    """
    films = _read_atomic_file(path, ("item_id", "movie_title", "release_year", "class"))
    films = films.filter(
        ~pl.col("movie_title").is_in(["unkonwn", "unknown", ""])
    )  # "unkonwn" is the spelling in the file
    rows = [
        (item, film_text(title, year, genres), domain_of(genres)) for item, title, year, genres in films.iter_rows()
    ]
    return pl.DataFrame(rows, schema={"item": pl.String, "text": pl.String, "domain": pl.String}, orient="row")


def film_text(title: str, year: str, genres: str) -> str:
    """Title, year and genres as one sentence. Each may be empty. Genres are separated by blanks."""
    parts = [natural_title(title), year, *genres.split()]
    return f"{', '.join(part for part in parts if part)}."


def natural_title(title: str) -> str:
    """Move the article to the front: 'Full Monty, The' -> 'The Full Monty', also inside brackets."""

    def article_first(found: re.Match) -> str:
        words, article = found.groups()
        start = len(words) - len(words.lstrip())
        blank = "" if article.endswith("'") else " "
        return f"{words[:start]}{article}{blank}{words[start:]}"

    return _ARTICLE_LAST.sub(article_first, title).strip()


def domain_of(genres: str) -> str:
    """The domain of a film, given by its first listed genre."""
    main = genres.split(" ")[0]
    return main if main in (*SOURCE_DOMAINS, TARGET_DOMAIN) else "Other"


def _read_atomic_file(path: str, columns: Sequence[str]) -> pl.DataFrame:
    """Columns of one of RecBole's atomic files, as strings, '' if empty. A header of `name:type` becomes `name`."""
    try:
        frame = pl.read_csv(path, separator="\t", quote_char=None, infer_schema=False)
        return frame.rename(lambda column: column.split(":")[0]).select(columns).fill_null("")
    except (OSError, pl.exceptions.PolarsError) as failure:
        reason = str(failure).strip().splitlines()[0]
        raise UserError(
            f"{path}: expected MovieLens-100k with {', '.join(columns)} ({reason}); install RecBole again"
        ) from None


def table(written: dict[str, dict[str, Any]]) -> str:
    """The users, items and interactions of each domain, as lines for the terminal."""
    lines = [f"{'domain':<10}{'users':>8}{'items':>8}{'interactions':>14}"]
    for domain, summary in written.items():
        lines.append(f"{domain:<10}{summary['users']:>8,}{summary['items']:>8,}{summary['interactions']:>14,}")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Turn MovieLens-100k, which comes with RecBole, into four data sets.")
    parser.add_argument("--output_path", default=os.path.join(PROJECT, "dataset"), metavar="DIR",
                        help="write the data sets to DIR/downstream (default: dataset of the project)")  # fmt: skip
    parser.add_argument("--user_k", type=int, default=5, metavar="N",
                        help="leave out users with fewer interactions (default: 5)")  # fmt: skip
    parser.add_argument("--item_k", type=int, default=5, metavar="N",
                        help="leave out items with fewer interactions (default: 5)")  # fmt: skip
    return parser


def main(argv: list[str]) -> None:
    """Run the command. It is described at the top of the file."""
    options = _parser().parse_args(argv)
    start = time.perf_counter()
    written = process_movielens(options.output_path, options.user_k, options.item_k)
    print(table(written))
    print(f"{os.path.join(options.output_path, 'downstream')} written in {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    run_command(main)
