"""Reading the published `.inter` files into `Sequences`, with a cache keyed by the file's size and time."""

import hashlib
import io
import os

import numpy as np
import torch

from common.errors import UserError
from common.files import atomic_path
from data.sequences import Sequences, fold_rows

_FIELDS = ("user_id:token", "item_id_list:token_seq", "item_id:token")
_CHUNK = 1 << 26  # bytes of text parsed at a time
_LONGEST_HEADER = 1 << 16
_CACHE_VERSION = 2
DOMAIN = 1 << 32  # mixtures: a number is domain * DOMAIN + index


def load_sequences(path, catalogue, is_mixture, show_progress=False):
    """Load one `.inter` file, from its cache where that is fresh.

    Args:
        path (str): the file.
        catalogue (Catalogue): turns written item numbers into item ids.
        is_mixture (bool): ids are `domain-index`.

    Returns:
        Sequences

    Raises:
        UserError: a missing, empty or malformed file, an item that the catalogue does not know.
    """
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file; a data set needs NAME.train.inter, NAME.valid.inter, NAME.test.inter")
    status = os.stat(path)
    key = f"{_CACHE_VERSION} {os.path.abspath(path)} {status.st_size} {status.st_mtime_ns} {catalogue.counts}"
    cache = _cache_path(path)
    cached = _read_cache(cache, key)
    if cached is not None:
        return cached
    sequences = _parse(path, catalogue, is_mixture, show_progress)
    _write_cache(cache, key, sequences)
    return _read_cache(cache, key) or sequences


def largest_numbers(path, is_mixture, n_domains):
    """One more than the largest item number of each domain in a file, for data sets without features. list of int."""
    highest = np.zeros(n_domains, np.int64)
    for _line, _users, _lengths, tokens, targets in _read_chunks(path, is_mixture, False):
        numbers = np.concatenate([tokens, targets])
        np.maximum.at(highest, numbers // DOMAIN, numbers % DOMAIN + 1)
    return highest.tolist()


def _parse(path, catalogue, is_mixture, show_progress):
    parts = []
    for line, users, lengths, tokens, targets in _read_chunks(path, is_mixture, show_progress):
        rows = np.arange(line, line + len(users))
        tokens = catalogue.ids(tokens, path, np.repeat(rows, lengths))
        parts.append((users, lengths, tokens, catalogue.ids(targets, path, rows)))
    if not parts:
        raise UserError(f"{path}: holds no rows after its header; expected one row per history and target")
    return fold_rows(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _read_chunks(path, is_mixture, show_progress):
    """Yield (line number, users [R], lengths [R], history numbers, targets [R]) of parts of a file, numbers int64."""
    import polars as pl  # here: a warm start reads caches only
    from tqdm import tqdm

    with open(path, "rb") as file:
        header = file.readline(_LONGEST_HEADER).decode("utf-8", "replace").rstrip("\r\n").split("\t")
        missing = [field for field in _FIELDS if field not in header]
        if missing:
            found = "\t".join(header)[:80]
            raise UserError(f"{path}: header {found!r} lacks {', '.join(missing)}; expected {' '.join(_FIELDS)}")
        line, size = 2, os.path.getsize(path)
        with tqdm(
            total=size,
            unit="B",
            unit_scale=True,
            desc=f"Reading {os.path.basename(path)}",
            disable=None if show_progress and size > _CHUNK else True,
        ) as bar:
            while text := file.read(_CHUNK):
                text += file.readline()
                bar.update(len(text))
                try:
                    frame = pl.read_csv(
                        io.BytesIO(text),
                        separator="\t",
                        has_header=False,
                        quote_char=None,
                        new_columns=header,
                        infer_schema=False,
                    )
                except (pl.exceptions.PolarsError, UnicodeDecodeError) as error:
                    raise UserError(_first_wrong_line(text, path, line, header, error)) from None
                yield line, *_parse_frame(frame.select(_FIELDS), path, line, is_mixture)
                line += len(frame)


def _first_wrong_line(text, path, line, header, error):
    """The message for the first line that has not as many columns as the header."""
    for number, row in enumerate(text.removesuffix(b"\n").split(b"\n"), start=line):
        columns = row.count(b"\t") + 1
        if columns != len(header):
            return (
                f"{path}, line {number}: is no tab-separated text of {len(header)} columns, as in its header, but "
                f"of {columns}; expected {' '.join(_FIELDS)}"
            )
    return f"{path}: is no tab-separated text ({str(error).splitlines()[0]}); expected {' '.join(_FIELDS)}"


def _parse_frame(frame, path, line, is_mixture):
    users, histories, targets = (frame[field].fill_null("").str.strip_chars() for field in _FIELDS)
    lengths = (histories.str.count_matches(" ", literal=True) + 1).to_numpy().astype(np.int64)
    users = _numbers(users, np.ones_like(lengths), path, line, is_mixture, "user_id")
    tokens = _numbers(histories, lengths, path, line, is_mixture, "item_id_list")
    targets = _numbers(targets, np.ones_like(lengths), path, line, is_mixture, "item_id")
    return users, lengths, tokens, targets


def _numbers(column, lengths, path, line, is_mixture, field):
    """Parse a column of blank-separated ids; int64 [sum of lengths]."""
    import polars as pl

    per_token = 2 if is_mixture else 1
    plain = column.str.replace_all("-", " ", literal=True) if is_mixture else column
    numbers = plain.str.split(" ").explode().cast(pl.UInt32, strict=False)
    wrong = numbers.null_count() or len(numbers) != per_token * lengths.sum()
    if is_mixture and not wrong:
        # as many dashes as ids, and never two in one: `0-1-2 3` would pass for `0-1 2-3`
        wrong = bool((column.str.count_matches("-", literal=True).to_numpy() != lengths).any())
        wrong |= bool(column.str.contains("-[^ ]*-").any())
    if wrong:
        raise UserError(_first_wrong_id(column, path, line, is_mixture, field))
    numbers = numbers.to_numpy().astype(np.int64)
    return numbers[0::2] * DOMAIN + numbers[1::2] if is_mixture else numbers


def _first_wrong_id(column, path, line, is_mixture, field):
    """The message for the first id that is none."""
    expected = "domain-index, such as 0-17" if is_mixture else "a whole number from 0 on"
    for row, text in enumerate(column):
        for token in text.split(" "):
            pieces = token.split("-") if is_mixture else [token]
            if len(pieces) != (2 if is_mixture else 1) or not all(p.isascii() and p.isdigit() for p in pieces):
                found = repr(token) if len(token) <= 40 else f"{token[:40]!r}..."
                return (
                    f"{path}, line {line + row}: {field} holds {found}; expected {expected}; "
                    "write item and user numbers as dataset/README.md says"
                )
            if any(int(piece[:40]) >= DOMAIN for piece in pieces):
                return (
                    f"{path}, line {line + row}: {field} holds a number above {DOMAIN - 1} ({token[:40]}); "
                    "expected item indices from 0 on"
                )
    return f"{path}: {field} holds what is no number; expected {expected}"


def _cache_path(path):
    """Beside the data where that folder can be written to, else in the user's own cache folder."""
    folder = os.path.dirname(os.path.abspath(path))
    if os.access(folder, os.W_OK):
        return os.path.join(folder, ".unisrec-cache", os.path.basename(path) + ".pt")
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    name = hashlib.sha256(os.path.abspath(path).encode()).hexdigest()[:16]
    return os.path.join(home, "unisrec", f"{name}-{os.path.basename(path)}.pt")


def _read_cache(cache, key):
    """The sequences of a cache, mapped: processes of one machine share them. None where it is of another file."""
    try:
        stored = torch.load(cache, map_location="cpu", mmap=True, weights_only=True)
        if stored["key"] != key:
            return None
        arrays = {name: tensor.numpy() for name, tensor in stored["arrays"].items()}
        return Sequences(**arrays, window=stored["window"])
    except Exception:
        return None  # none there, or half of one: it is only a cache


def _write_cache(cache, key, sequences):
    arrays = {name: torch.from_numpy(array) for name, array in vars(sequences).items() if name != "window"}
    try:
        with atomic_path(cache) as temporary:
            torch.save({"key": key, "window": sequences.window, "arrays": arrays}, temporary)
    except (OSError, UserError, RuntimeError):
        pass  # a read-only home, a full disk: the next run parses again
