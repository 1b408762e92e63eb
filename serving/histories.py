"""Reading histories from a file."""

import json
import os
from collections.abc import Iterator

from common.errors import UserError
from dataset.preprocessing.texts import read_item_order

HISTORIES_HELP = 'JSON lines: ["A", "B"] or {"history": ["A", "B"]}; or the NAME.test.inter of a data set'


def read_histories(path: str) -> Iterator[tuple[int, list[str]]]:
    """Read histories of raw ids, oldest item first.

    Args:
        path: JSON lines, a list of raw ids or an object with the key `history` on each. Or the `NAME.test.inter` of a
            data set (or its train or valid), with `NAME.item2index` beside it.

    Yields:
        the number of the line, from 1, and the history.

    Raises:
        UserError: the file is missing, or a line is no history.
    """
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file")
    is_inter = path.endswith(".inter")
    ids = read_item_order(f"{path.rsplit('.', 2)[0]}.item2index") if is_inter else []
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}, line {number}"
            if not is_inter:
                yield number, _from_json(line, where)
            elif number > 1:  # the first line holds the names of the columns
                yield number, _from_row(line, ids, where)


def _from_json(line: bytes, where: str) -> list[str]:
    try:
        text = line.decode()
        content = json.loads(text)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{where}: is not JSON ({error}); expected a list of item ids") from None
    history = content.get("history") if isinstance(content, dict) else content
    if not isinstance(history, list) or not all(isinstance(item, str) for item in history):
        raise UserError(f'{where}: found {text.strip()[:60]!r}, expected ["id", ...] or {{"history": ["id", ...]}}')
    return history


def _from_row(line: bytes, ids: list[str], where: str) -> list[str]:
    try:
        return [ids[int(index)] for index in line.split(b"\t")[1].split()]
    except (IndexError, ValueError):
        raise UserError(f"{where}: found {line[:60]!r}, expected USER<TAB>HISTORY<TAB>ITEM") from None
