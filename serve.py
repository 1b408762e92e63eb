"""Serve a bundle over HTTP: python serve.py saved/bundle [--port 8000]"""

import argparse
import contextlib
import fcntl
import itertools
import os
from collections.abc import Iterator

from common.errors import UserError, run_command
from common.files import writing
from serving.catalogue import add_catalogue_options, read_catalogue
from serving.histories import HISTORIES_HELP, read_histories


def main(argv: list[str]) -> None:
    """Run the command. It is described at the top of the file."""
    options = _parser().parse_args(argv)
    token = _read_token(options.token_file) if options.token_file else None
    _check(options, token)
    import torch  # imported here: these take seconds
    import uvicorn

    from serving.recommender import Recommender
    from serving.service import MAX_USERS, Shop, create_app

    torch.set_num_threads(options.threads)
    items, columns = read_catalogue(options.items, options) if options.items else (None, None)
    histories = itertools.islice(read_histories(options.histories), MAX_USERS) if options.histories else ()
    users = [history for _, history in histories]
    with _only_service_of(options.bundle):
        with writing(options.bundle):
            shop = Shop(
                options.bundle,
                lambda folder: Recommender.from_pretrained(folder, items, columns, options.index, options.unseen_bias),
                options.compare,
                users,
            )
        address = f"http://{options.host}:{options.port}"
        print(f"serving {options.bundle}, {len(shop.recommender):,} items: {address}", flush=True)
        uvicorn.run(create_app(shop, token), host=options.host, port=options.port, log_level="warning")


def _check(options: argparse.Namespace, token: str | None) -> None:
    if token is None and not _is_loopback(options.host):
        raise UserError(
            f"--host {options.host}: others could change the items; give a --token_file, or serve on 127.0.0.1"
        )
    if not os.path.isdir(options.bundle):
        raise UserError(f"{options.bundle}: no such folder; finetune.py leaves a bundle beside its checkpoint")


@contextlib.contextmanager
def _only_service_of(folder: str) -> Iterator[None]:
    """Keep other services off a bundle: each would know only its own changes, and could cut a line of the other."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: another process serves it; stop it, or serve a copy of the folder") from None
        except OSError:  # this file system has no locks
            pass
        yield
    finally:
        os.close(handle)


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
    add_catalogue_options(parser)
    parser.add_argument(
        "--unseen_bias", type=float, metavar="X",
        help="added to the logits of items that were not in the training data (default: as the model was trained)",
    )  # fmt: skip
    parser.add_argument(
        "--compare", action="append", default=[], metavar="NAME",
        help="another bundle, or: untrained. The page shows both side by side; may be given several times",
    )  # fmt: skip
    parser.add_argument(
        "--histories", metavar="FILE", help=f"example users, whom anyone can see on the page: {HISTORIES_HELP}"
    )
    return parser


if __name__ == "__main__":
    run_command(main)
