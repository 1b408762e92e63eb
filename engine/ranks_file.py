"""The table of ranks as a Parquet file, with raw user and item ids."""

import os
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from common.errors import UserError
from common.files import atomic_path
from engine.metrics import RankTable

if TYPE_CHECKING:
    from data import UniSRecDataset

COLUMNS = ("user", "target", "history_length", "rank", "candidates", "in_history")


def write_ranks(path: str, table: RankTable, dataset: "UniSRecDataset") -> None:
    """Write a table of ranks as Parquet, one row per evaluated row, `user` and `target` as raw ids.

    Args:
        path: the file.
        table: the table of an evaluation, with user and item ids.
        dataset: the data set, which has the raw ids.

    Raises:
        UserError: the file cannot be written, or a line of NAME.user2index or NAME.item2index is malformed.
    """
    frame = pl.DataFrame(
        {
            "user": pl.Series(user_names(dataset)[table.user], dtype=pl.String),
            "target": pl.Series(np.array(dataset.item_names(), object)[table.target], dtype=pl.String),
            "history_length": table.history_length.astype(np.int32),
            "rank": table.rank,
            "candidates": table.candidates.astype(np.int32),
            "in_history": table.in_history,
        }
    )
    with atomic_path(path) as temporary:
        frame.write_parquet(temporary)


def read_ranks(path: str) -> RankTable:
    """Read a file that `write_ranks` wrote, sorted by user and target.

    Raises:
        UserError: the file is missing, is not a Parquet file, lacks a column, or holds something else than ranks.
    """
    advice = "write it with --ranks_file of finetune.py or run_baseline.py"
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file; {advice}")
    try:
        frame = pl.read_parquet(path, glob=False)  # brackets in a path are not a pattern
    except (pl.exceptions.PolarsError, OSError) as error:
        raise UserError(f"{path}: is not a Parquet file ({str(error).splitlines()[0]}); {advice}") from None
    missing = [name for name in COLUMNS if name not in frame.columns]
    if missing:
        raise UserError(f"{path}: has no column {', '.join(missing)}, expected {', '.join(COLUMNS)}; {advice}")
    ranks = frame["rank"].to_numpy()
    if ranks.dtype.kind not in "fiu" or not (ranks >= 1).all():  # a null is NaN
        raise UserError(f"{path}: column rank, expected numbers from 1 on in every row; {advice}")
    frame = frame.sort("user", "target", "history_length", maintain_order=True)
    return RankTable(**{name: frame[name].to_numpy() for name in COLUMNS})


def user_names(dataset: "UniSRecDataset") -> np.ndarray:
    """The raw id of each user, from NAME.user2index. Without this file, the user as written in the .inter files.

    Returns:
        object [users + 1]: the str of each user id, `[PAD]` first.

    Raises:
        UserError: a line of NAME.user2index is not USER<TAB>NUMBER.
    """
    names = dataset.field2id_token[dataset.uid_field].astype(object)
    path = os.path.join(dataset.config["data_path"], f"{dataset.dataset_name}.user2index")
    if not os.path.isfile(path):
        return names
    from data.catalogue import read_index  # imported here: it imports torch, which `read_ranks` does not need

    raw = {}
    for number, line, name, token in read_index(path):
        if not token.isdecimal():
            raise UserError(
                f"{path}, line {number}: found {line[:60]!r}, expected USER<TAB>NUMBER; process the data set again"
            )
        raw[token] = name
    return np.array([raw.get(token, token) for token in names], object)
