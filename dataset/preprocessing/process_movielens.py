"""MovieLens-100k, as it comes with RecBole, to four small data sets: a first try without any download.

    python dataset/preprocessing/process_movielens.py --output_path DIR

Films are grouped by their first listed genre into domains with no film in common: Action, Comedy and Other (all the
small genres) to pre-train on, Drama to transfer to. Written to DIR/downstream/NAME.
"""

import argparse
import importlib.util
import os
import re
import sys
import time

PROJECT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, PROJECT)  # so that the script finds `common`, from whatever folder it is started

import polars as pl  # noqa: E402

from common.errors import UserError, run_command  # noqa: E402
from dataset.preprocessing.interactions import Interactions  # noqa: E402
from dataset.preprocessing.splits import Rules, write_data_set  # noqa: E402

SOURCE_DOMAINS = ("Action", "Comedy", "Other")
TARGET_DOMAIN = "Drama"

# "Boot, Das" and "Enfer, L'": the articles that the file puts behind its titles.
_ARTICLE_LAST = re.compile(r"([^()]+), (The|An|A|Les|La|Le|L'|Il|Das|Der|Die|Det|O)(?=\s*(?:[()]|$))")


def process_movielens(output_path, user_k=5, item_k=5, source=None):
    """Write the four data sets into OUTPUT_PATH/downstream.

    A user may occur in several domains; films do not. Ties in time are ordered by position in the file. Films titled
    'unkonwn' are left out.

    Args:
        output_path (str): the folder in which `downstream` is made.
        user_k, item_k (int): the fewest interactions of a user and of an item, in each domain.
        source (str, optional): folder with `ml-100k.inter` and `ml-100k.item`; default: in the installed RecBole.

    Returns:
        dict: name of the domain -> its description; sources first, the target last.

    Raises:
        UserError: RecBole or its copy of MovieLens is not there.
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
            lambda items, wanted, texts=texts: texts,
            Rules(user_k, item_k),
            lambda: {"options": {"command": "process_movielens"}},
        )
    return written


def recbole_ml_100k():
    """The folder of MovieLens-100k in the installed RecBole, found without importing RecBole.

    Raises:
        UserError: RecBole is not installed, or has no such folder.
    """
    package = importlib.util.find_spec("recbole")
    if package is None:
        raise UserError("recbole: is not installed, and MovieLens-100k comes with it; run: pip install recbole")
    folder = os.path.join(package.submodule_search_locations[0], "dataset_example", "ml-100k")
    if not os.path.isdir(folder):
        raise UserError(f"{folder}: no such folder; expected MovieLens-100k there, as RecBole 1.2.1 has it")
    return folder


def read_films(path):
    """Read the films that have a title.

    Returns:
        polars.DataFrame: `item` (raw id), `text` ("The Full Monty, 1997, Comedy.") and `domain`.
    """
    films = _read_atomic_file(path, ("item_id", "movie_title", "release_year", "class"))
    films = films.filter(~pl.col("movie_title").is_in(["unkonwn", "unknown", ""]))  # the first is how the file has it
    rows = [
        (item, film_text(title, year, genres), domain_of(genres)) for item, title, year, genres in films.iter_rows()
    ]
    return pl.DataFrame(rows, schema={"item": pl.String, "text": pl.String, "domain": pl.String}, orient="row")


def film_text(title, year, genres):
    """Title, year and genres as one sentence; genres are separated by blanks in the file, fields may be empty."""
    parts = [natural_title(title), year, *genres.split()]
    return f"{', '.join(part for part in parts if part)}."


def natural_title(title):
    """'Full Monty, The' -> 'The Full Monty', inside brackets too."""

    def article_first(found):
        words, article = found.groups()
        start = len(words) - len(words.lstrip())
        blank = "" if article.endswith("'") else " "
        return f"{words[:start]}{article}{blank}{words[start:]}"

    return _ARTICLE_LAST.sub(article_first, title).strip()


def domain_of(genres):
    """The domain of a film, by its first listed genre."""
    main = genres.split(" ")[0]
    return main if main in (*SOURCE_DOMAINS, TARGET_DOMAIN) else "Other"


def _read_atomic_file(path, columns):
    """Columns of one of RecBole's atomic files, as strings, '' where empty; `name:type` in the header is `name`."""
    try:
        frame = pl.read_csv(path, separator="\t", quote_char=None, infer_schema=False)
        return frame.rename(lambda column: column.split(":")[0]).select(columns).fill_null("")
    except (OSError, pl.exceptions.PolarsError) as failure:
        reason = str(failure).strip().splitlines()[0]
        raise UserError(f"{path}: expected RecBole's MovieLens-100k with {', '.join(columns)} ({reason})") from None


def table(written):
    """Users, items and interactions of each domain, as lines for the terminal."""
    lines = [f"{'domain':<10}{'users':>8}{'items':>8}{'interactions':>14}"]
    for domain, summary in written.items():
        lines.append(f"{domain:<10}{summary['users']:>8,}{summary['items']:>8,}{summary['interactions']:>14,}")
    return "\n".join(lines)


def _parser():
    parser = argparse.ArgumentParser(description="MovieLens-100k, from RecBole's package, to four small data sets.")
    parser.add_argument("--output_path", default=os.path.join(PROJECT, "dataset"), metavar="DIR",
                        help="data sets go to DIR/downstream (default: dataset of the project)")  # fmt: skip
    parser.add_argument("--user_k", type=int, default=5, help="fewest interactions of a user (default: 5)")
    parser.add_argument("--item_k", type=int, default=5, help="fewest interactions of an item (default: 5)")
    return parser


def main(argv):
    """The command; see the top of the file."""
    options = _parser().parse_args(argv)
    start = time.perf_counter()
    written = process_movielens(options.output_path, options.user_k, options.item_k)
    print(table(written))
    print(f"{os.path.join(options.output_path, 'downstream')} written in {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    run_command(main)
