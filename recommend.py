"""Recommend items from a bundle: python recommend.py -m saved/bundle --history "sku1,sku2" """

import argparse
import itertools
from collections.abc import Iterator, Mapping

from common.errors import UserError, run_command
from common.files import atomic_path, check_can_write
from serving.catalogue import add_catalogue_options, read_catalogue
from serving.histories import HISTORIES_HELP, read_histories

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
    from serving.recommender import Recommender  # imported here: it takes seconds

    items, columns = read_catalogue(options.items, options) if options.items else (None, None)
    index = None if options.histories else False  # for one history, building an index would not pay
    recommender = Recommender.from_pretrained(options.model, items, columns, index, options.unseen_bias)
    if options.new_items:
        recommender.add_items(*read_catalogue(options.new_items, options))
    settings = {"k": options.k, "exclude_history": not options.keep_history, "on_unknown": options.on_unknown}
    if options.histories:
        write_recommendations(recommender, options.histories, options.out, settings)
        return
    history = [item.strip() for item in options.history.split(",") if item.strip()]
    recommendations = recommender.recommend(history, **settings)
    for item in history:
        text, shown = recommender.texts.get(item, "unknown, skipped"), recommender.columns.get(item, {})
        print(f"{'history':>8}  {item:<14}  {_line(text, shown)}")
    for rank, found in enumerate(recommendations, start=1):
        print(f"{rank:>2} {found.score:5.3f}  {found.id:<14}  {_line(found.text, found.columns)}")


def _line(text: str, columns: Mapping[str, str]) -> str:
    """The title of an item, else its text, and the other columns to show."""
    others = (f"{name}: {value}" for name, value in columns.items() if name != "title")
    return "  ".join([columns.get("title", text)[:90], *others])


def write_recommendations(recommender, path: str, out: str, settings: dict) -> None:
    """Recommend for every history of a file, and write a Parquet file.

    Its columns are `line` (from 1), `rank` (from 1), `id`, `score` and `source`. It is written in parts, so the number
    of histories is not limited by the memory.

    Args:
        recommender: a `serving.recommender.Recommender`.
        path: see `serving.histories.read_histories`.
        out: the Parquet file.
        settings: of `Recommender.recommend`.
    """
    import polars as pl
    from polars.io.plugins import register_io_source
    from tqdm import tqdm

    schema = {"line": pl.Int64, "rank": pl.Int32, "id": pl.String, "score": pl.Float32, "source": pl.String}

    def frames(*_):
        with tqdm(unit=" histories", disable=None) as bar:
            for part in _parts(path):
                if settings["on_unknown"] == "error":
                    _check_known(part, recommender.texts, path)
                best = recommender.recommend([history for _, history in part], **settings)
                rows = [
                    (number, rank, found.id, found.score, found.source)
                    for (number, _), each in zip(part, best, strict=True)
                    for rank, found in enumerate(each, start=1)
                ]
                yield pl.DataFrame(rows, schema, orient="row")
                bar.update(len(part))

    with atomic_path(out) as temporary:
        register_io_source(frames, schema=schema).sink_parquet(temporary)
    print(f"written: {out}")


def _parts(path: str) -> Iterator[list[tuple[int, list[str]]]]:
    """The histories of a file in parts: the numbers of the lines, and the histories."""
    histories = read_histories(path)
    while part := list(itertools.islice(histories, AT_ONCE)):
        yield part


def _check_known(part, known, path):
    for number, history in part:
        for item in history:
            if item not in known:
                raise UserError(f"{path}, line {number}: unknown item {item!r}; leave it out, or use --on_unknown skip")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Recommend items from a bundle.")
    parser.add_argument("-m", "--model", required=True, metavar="FOLDER", help="the bundle")
    parser.add_argument("--history", metavar="A,B,C", help="raw ids of the items of a user, oldest first")
    parser.add_argument("--histories", metavar="FILE", help=HISTORIES_HELP)
    parser.add_argument("--out", metavar="FILE", help="Parquet file for the recommendations for --histories")
    parser.add_argument("-k", type=int, default=10, help="number of recommendations (default: 10)")
    add_catalogue_options(parser)
    parser.add_argument(
        "--unseen_bias", type=float, metavar="X",
        help="added to the logits of items that were not in the training data (default: as the model was trained)",
    )  # fmt: skip
    parser.add_argument("--new_items", metavar="FILE", help="items to add to those of the bundle, of the same columns")
    parser.add_argument("--keep_history", action="store_true", help="also recommend the items of the history")
    parser.add_argument("--on_unknown", choices=("error", "skip"), default="error", help="unknown items of a history")
    return parser


if __name__ == "__main__":
    run_command(main)
