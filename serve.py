"""Serve a bundle over HTTP: python serve.py saved/bundle [--port 8000]"""

import argparse
import os

from common.errors import UserError, run_command
from common.files import writing


def main(argv: list[str]) -> None:
    """Run the command. It is described at the top of the file."""
    options = _parser().parse_args(argv)
    token = _read_token(options.token_file) if options.token_file else None
    if token is None and not _is_loopback(options.host):
        raise UserError(
            f"--host {options.host}: others could change the items; give a --token_file, or serve on 127.0.0.1"
        )
    import torch  # imported here: these take seconds
    import uvicorn

    from serving.catalogue import read_catalogue
    from serving.recommender import Recommender
    from serving.service import Shop, create_app

    torch.set_num_threads(options.threads)
    items = (
        read_catalogue(options.items, options.item_column, options.text_columns.split(",")) if options.items else None
    )
    if not os.path.isdir(options.bundle):
        raise UserError(f"{options.bundle}: no such folder; finetune.py leaves a bundle beside its checkpoint")
    with writing(options.bundle):
        shop = Shop(options.bundle, lambda folder: Recommender.from_pretrained(folder, items, options.index))
    print(
        f"serving {options.bundle}, {len(shop.recommender):,} items: http://{options.host}:{options.port}", flush=True
    )
    uvicorn.run(create_app(shop, token), host=options.host, port=options.port, log_level="warning")


def _is_loopback(host: str) -> bool:
    return host in ("localhost", "127.0.0.1")


def _read_token(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            token = file.read().strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "is not UTF-8"
        raise UserError(f"--token_file {path}: {reason}; expected a file with the token") from None
    if len(token) < 16 or not token.isascii():
        raise UserError(f"--token_file {path}: expected at least 16 ASCII characters, such as: openssl rand -hex 32")
    return token


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Serve a bundle over HTTP, with a page at /.")
    parser.add_argument("bundle", metavar="FOLDER", help="the bundle")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine only)"
    )
    parser.add_argument("--port", type=int, default=8000, help="port (default: 8000)")
    parser.add_argument("--token_file", metavar="FILE", help="token that requests need to change items")
    parser.add_argument("--threads", type=int, default=1, help="threads of a computation (default: 1)")
    parser.add_argument(
        "--index",
        action=argparse.BooleanOptionalAction,
        help="search with an approximate index (default: above a million items)",
    )
    parser.add_argument("--items", metavar="FILE", help="catalogue, for a bundle without items")
    parser.add_argument(
        "--item_column", default="item_id", metavar="NAME", help="column of the raw id (default: item_id)"
    )
    parser.add_argument("--text_columns", default="title", metavar="A,B", help="columns of the text (default: title)")
    return parser


if __name__ == "__main__":
    run_command(main)
