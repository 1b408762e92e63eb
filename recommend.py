"""Recommend items from a bundle: python recommend.py -m saved/bundle --history "sku1,sku2" """

import argparse
import json
import os
from collections.abc import Iterator

from common.errors import UserError, run_command
from common.files import atomic_path, check_can_write

AT_ONCE = 4096  # histories of a file


def main(argv: list[str]) -> None:
    """Run the command. It is described at the top of the file."""
    options = _parser().parse_args(argv)
    if bool(options.history is not None) == bool(options.histories):
        raise UserError("expected either --history or --histories")
    if options.out and not options.histories:
        raise UserError("--out: is for the recommendations for --histories; leave it out")
    if options.histories and not options.out:
        raise UserError("--histories: give the file for the recommendations with --out FILE.parquet")
    if options.out:
        check_can_write(options.out)
    from serving.catalogue import read_catalogue  # imported here: it takes seconds
    from serving.recommender import Recommender

    columns = {"item_column": options.item_column, "text_columns": options.text_columns.split(",")}
    items = read_catalogue(options.items, **columns) if options.items else None
    index = None if options.histories else False  # for one history, building an index would not pay
    recommender = Recommender.from_pretrained(options.model, items, index)
    if options.new_items:
        recommender.add_items(read_catalogue(options.new_items, **columns))
    settings = {"k": options.k, "exclude_history": not options.keep_history, "on_unknown": options.on_unknown}
    if options.histories:
        write_recommendations(recommender, options.histories, options.out, settings)
        return
    history = [item.strip() for item in options.history.split(",") if item.strip()]
    recommendations = recommender.recommend(history, **settings)
    for item in history:
        print(f"{'history':>8}  {item:<14}  {recommender.texts.get(item, 'unknown, skipped')[:90]}")
    for rank, found in enumerate(recommendations, start=1):
        print(f"{rank:>2} {found.score:5.3f}  {found.id:<14}  {found.text[:90]}")


def write_recommendations(recommender, path: str, out: str, settings: dict) -> None:
    """Recommend for every history of a file, and write a Parquet file.

    Its columns are `line` (from 1), `rank` (from 1), `id`, `score` and `source`. It is written in parts, so the number
    of histories is not limited by the memory.

    Args:
        recommender: a `serving.recommender.Recommender`.
        path: JSON lines, a list of raw ids or an object with the key `history` on each.
        out: the Parquet file.
        settings: of `Recommender.recommend`.
    """
    import polars as pl
    from polars.io.plugins import register_io_source
    from tqdm import tqdm

    schema = {"line": pl.Int64, "rank": pl.Int32, "id": pl.String, "score": pl.Float32, "source": pl.String}

    def frames(*_):
        with tqdm(unit=" histories", disable=None) as bar:
            for first, histories in _parts(path):
                if settings["on_unknown"] == "error":
                    _check_known(histories, recommender.texts, path, first)
                rows = [
                    (first + number, rank, found.id, found.score, found.source)
                    for number, each in enumerate(recommender.recommend(histories, **settings))
                    for rank, found in enumerate(each, start=1)
                ]
                yield pl.DataFrame(rows, schema, orient="row")
                bar.update(len(histories))

    with atomic_path(out) as temporary:
        register_io_source(frames, schema=schema).sink_parquet(temporary)
    print(f"written: {out}")


def _parts(path: str) -> Iterator[tuple[int, list[list[str]]]]:
    """The histories of a file in parts: the number of the first line, and the histories."""
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file")
    part: list[list[str]] = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            part.append(_history(line, f"{path}, line {number}"))
            if len(part) == AT_ONCE:
                yield number - len(part) + 1, part
                part = []
    if part:
        yield number - len(part) + 1, part


def _check_known(histories, known, path, first):
    for number, history in enumerate(histories, start=first):
        for item in history:
            if item not in known:
                raise UserError(f"{path}, line {number}: unknown item {item!r}; leave it out, or use --on_unknown skip")


def _history(line: bytes, where: str) -> list[str]:
    try:
        text = line.decode()
        content = json.loads(text)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{where}: is not JSON ({error}); expected a list of item ids") from None
    history = content.get("history") if isinstance(content, dict) else content
    if not isinstance(history, list) or not all(isinstance(item, str) for item in history):
        raise UserError(f'{where}: found {text.strip()[:60]!r}, expected ["id", ...] or {{"history": ["id", ...]}}')
    return history


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Recommend items from a bundle.")
    parser.add_argument("-m", "--model", required=True, metavar="FOLDER", help="the bundle")
    parser.add_argument("--history", metavar="A,B,C", help="raw ids of the items of a user, oldest first")
    parser.add_argument("--histories", metavar="FILE", help='JSON lines: ["A", "B"] or {"history": ["A", "B"]}')
    parser.add_argument("--out", metavar="FILE", help="Parquet file for the recommendations for --histories")
    parser.add_argument("-k", type=int, default=10, help="number of recommendations (default: 10)")
    parser.add_argument(
        "--items", metavar="FILE", help="catalogue, for a bundle without items: CSV, TSV, JSON lines, Parquet"
    )
    parser.add_argument("--new_items", metavar="FILE", help="items to add to those of the bundle")
    parser.add_argument(
        "--item_column", default="item_id", metavar="NAME", help="column of the raw id (default: item_id)"
    )
    parser.add_argument("--text_columns", default="title", metavar="A,B", help="columns of the text (default: title)")
    parser.add_argument("--keep_history", action="store_true", help="also recommend the items of the history")
    parser.add_argument("--on_unknown", choices=("error", "skip"), default="error", help="unknown items of a history")
    return parser


if __name__ == "__main__":
    run_command(main)
