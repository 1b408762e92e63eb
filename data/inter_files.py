"""Parsing the published `.inter` files."""

import io
import os
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import polars as pl
from tqdm import tqdm

from common.errors import UserError
from data.sequences import DOMAIN_STRIDE

_FIELDS = ("user_id:token", "item_id_list:token_seq", "item_id:token")
_CHUNK_BYTES = 1 << 26  # bytes of text that are parsed at once
_LONGEST_HEADER = 1 << 16  # bytes


class Chunk(NamedTuple):
    """Some rows of a file.

    Attributes:
        line: the line number of the first row.
        users: int64 [R].
        lengths: int64 [R], the number of history items.
        histories: int64 [sum of lengths], item numbers, one history after another.
        targets: int64 [R], item numbers.
    """

    line: int
    users: np.ndarray
    lengths: np.ndarray
    histories: np.ndarray
    targets: np.ndarray


def read_chunks(path: str, is_mixture: bool, show_progress: bool = False) -> Iterator[Chunk]:
    """Read a file in parts.

    Args:
        path: the file.
        is_mixture: whether ids are written `domain-index`. They become `domain * DOMAIN_STRIDE + index`.
        show_progress: show a progress bar while a large file is read.

    Raises:
        UserError: the file lacks a column, or a row is malformed.
    """
    with open(path, "rb") as file:
        header = _read_header(file, path)
        line, size = 2, os.path.getsize(path)
        with tqdm(
            total=size,
            unit="B",
            unit_scale=True,
            desc=f"Reading {os.path.basename(path)}",
            disable=None if show_progress and size > _CHUNK_BYTES else True,
        ) as bar:
            while text := file.read(_CHUNK_BYTES):
                text += file.readline()
                bar.update(len(text))
                frame = _parse_text(text, path, line, header)
                yield Chunk(line, *_parse_frame(frame, path, line, is_mixture))
                line += len(frame)


def _read_header(file: io.BufferedReader, path: str) -> list[str]:
    header = file.readline(_LONGEST_HEADER).decode("utf-8", "replace").rstrip("\r\n").split("\t")
    missing = [field for field in _FIELDS if field not in header]
    if missing:
        found = "\t".join(header)[:80]
        raise UserError(
            f"{path}: header {found!r} lacks {', '.join(missing)}; expected {' '.join(_FIELDS)}, separated by tabs"
        )
    return header


def _parse_text(text: bytes, path: str, line: int, header: list[str]) -> pl.DataFrame:
    """The three columns as strings."""
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
        raise UserError(_describe_malformed_line(text, path, line, header, error)) from None
    return frame.select(_FIELDS)


def _describe_malformed_line(text: bytes, path: str, line: int, header: list[str], error: Exception) -> str:
    """The error message for the first line whose number of columns is not that of the header."""
    for number, row in enumerate(text.removesuffix(b"\n").split(b"\n"), start=line):
        columns = row.count(b"\t") + 1
        if columns != len(header):
            return (
                f"{path}, line {number}: found {columns} tab-separated columns, expected {len(header)} as in the "
                "header; correct the line"
            )
    return (
        f"{path}: cannot be read as tab-separated text ({str(error).splitlines()[0]}); expected UTF-8 with the columns "
        f"{' '.join(_FIELDS)}"
    )


def _parse_frame(
    frame: pl.DataFrame, path: str, line: int, is_mixture: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Users, history lengths, histories and targets, as in `Chunk`."""
    users, histories, targets = (frame[field].fill_null("").str.strip_chars() for field in _FIELDS)
    lengths = (histories.str.count_matches(" ", literal=True) + 1).to_numpy().astype(np.int64)
    one_each = np.ones_like(lengths)
    return (
        _parse_numbers(users, one_each, path, line, is_mixture, "user_id"),
        lengths,
        _parse_numbers(histories, lengths, path, line, is_mixture, "item_id_list"),
        _parse_numbers(targets, one_each, path, line, is_mixture, "item_id"),
    )


def _parse_numbers(
    column: pl.Series, lengths: np.ndarray, path: str, line: int, is_mixture: bool, field: str
) -> np.ndarray:
    """Parse a column of ids that are separated by blanks: int64 [sum of lengths]."""
    per_id = 2 if is_mixture else 1
    blank_separated = column.str.replace_all("-", " ", literal=True) if is_mixture else column
    numbers = blank_separated.str.split(" ").explode().cast(pl.UInt32, strict=False)
    wrong = bool(numbers.null_count()) or len(numbers) != per_id * lengths.sum()
    if is_mixture and not wrong:
        # One dash per id, and never two within an id: `0-1-2 3` must not pass for `0-1 2-3`.
        wrong = bool((column.str.count_matches("-", literal=True).to_numpy() != lengths).any())
        wrong |= bool(column.str.contains("-[^ ]*-").any())
    if wrong:
        raise UserError(_describe_malformed_id(column, path, line, is_mixture, field))
    values = numbers.to_numpy().astype(np.int64)
    return values[0::2] * DOMAIN_STRIDE + values[1::2] if is_mixture else values


def _describe_malformed_id(column: pl.Series, path: str, line: int, is_mixture: bool, field: str) -> str:
    """The error message for the first malformed id."""
    expected = "domain-index, such as 0-17" if is_mixture else "a whole number from 0 on"
    for row, text in enumerate(column):
        for token in text.split(" "):
            pieces = token.split("-") if is_mixture else [token]
            if len(pieces) != (2 if is_mixture else 1) or not all(p.isascii() and p.isdigit() for p in pieces):
                found = repr(token) if len(token) <= 40 else f"{token[:40]!r}..."
                return (
                    f"{path}, line {line + row}: {field} holds {found}; expected {expected}; "
                    "write users and items as numbers, as dataset/README.md describes"
                )
            if any(int(piece[:40]) >= DOMAIN_STRIDE for piece in pieces):
                return (
                    f"{path}, line {line + row}: {field} holds a number above {DOMAIN_STRIDE - 1} ({token[:40]}); "
                    "number users and items from 0 on"
                )
    return f"{path}: {field} holds a malformed id; expected {expected}"
