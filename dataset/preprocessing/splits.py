"""Interactions and item texts to a data set in the published layout: leave-one-out splits, indices, texts."""

import os

import numpy as np
import polars as pl

from common.errors import UserError
from common.files import atomic_path
from dataset.preprocessing.texts import TEXT_HEADER, UNKNOWN_TEXT

INTER_HEADER = "user_id:token\titem_id_list:token_seq\titem_id:token"
MAX_ITEMS = 50  # of a prefix; older items are cut
MIN_INTERACTIONS = 3  # of a user: one to start from, one for validation, one for the test


def write_splits(interactions, texts, output_path, name, user_k=0, item_k=0):
    """Write the data set NAME into OUTPUT_PATH/NAME. The same input gives the same bytes.

    In this order: rows with the same user, item and timestamp count once; items that have no entry in `texts` are left
    out; users with fewer than `user_k` and items with fewer than `item_k` interactions are left out until none is left
    (users always need 3). A user's interactions stand in the order of their timestamps, ties in the order of the rows.

    Users are numbered in the order of their first remaining row in the file; items in the order in which they appear
    when one walks the users 0, 1, 2, ... through, each from the oldest interaction to the newest.

    An item whose text is empty stays, with the text `UNKNOWN_TEXT`.

    Args:
        interactions (polars.DataFrame): columns `user` (str), `item` (str), `timestamp` (int or float), in file order.
        texts (dict or polars.DataFrame): raw item id -> text; as a frame: columns `item` and `text`, items distinct.
        output_path (str): the folder in which the data set's folder is made.
        name (str): the data set.
        user_k, item_k (int): 0 leaves nobody out.

    Returns:
        dict: `users`, `items`, `interactions`, `train_rows` written; `duplicates` rows and `items_without_text`,
        `interactions_without_text` left out; `empty_texts`: raw ids of the items kept with `UNKNOWN_TEXT`.

    Raises:
        UserError: nothing remains, or a raw id holds a tab or a line break.
    """
    if isinstance(texts, dict):
        texts = pl.DataFrame({"item": list(texts), "text": list(texts.values())}, schema_overrides=_TEXT_SCHEMA)
    rows = interactions.select("user", "item", "timestamp").with_row_index("position")
    distinct = rows.unique(["user", "item", "timestamp"], keep="first", maintain_order=True)
    known = distinct.join(texts.select("item"), on="item", how="semi", maintain_order="left")
    core = k_core(known, max(user_k, MIN_INTERACTIONS), item_k)
    if core.is_empty():
        raise UserError(
            f"{name}: none of the {len(rows)} interactions remains ({len(known)} have an item with metadata; "
            f"user_k={user_k}, item_k={item_k}); check that both files belong together, or lower the two limits"
        )
    ordered, users, items = number(core)
    for kind, raw in (("user", users), ("item", items)):
        _check_raw_ids(kind, raw)

    stem = os.path.join(output_path, name, name)
    item_texts, empty = _texts_in_order(items, texts)
    _write_lines(f"{stem}.user2index", (f"{user}\t{index}" for index, user in enumerate(users)))
    _write_lines(f"{stem}.item2index", (f"{item}\t{index}" for index, item in enumerate(items)))
    _write_lines(f"{stem}.text", (f"{i}\t{t}" for i, t in zip(items, item_texts, strict=True)), TEXT_HEADER)
    train_rows = _write_inter_files(stem, ordered)
    left_out = distinct.join(known, on="position", how="anti")
    return {
        "users": len(users),
        "items": len(items),
        "interactions": len(ordered),
        "train_rows": train_rows,
        "duplicates": len(rows) - len(distinct),
        "items_without_text": left_out["item"].n_unique(),
        "interactions_without_text": len(left_out),
        "empty_texts": empty,
    }


_TEXT_SCHEMA = {"item": pl.String, "text": pl.String}


def k_core(rows, user_k, item_k):
    """Leave out users and items with too few interactions, again and again until none is left.

    Args:
        rows (polars.DataFrame): columns `user` and `item`, and any others.
        user_k, item_k (int): the fewest interactions of a user and of an item.

    Returns:
        polars.DataFrame: the remaining rows in their order; the largest such set, so the order of the steps is all one.
    """
    codes = [rows[side].rank("dense").to_numpy().astype(np.int64) - 1 for side in ("user", "item")]
    remaining = np.arange(len(rows))
    while True:
        keep = np.ones(len(remaining), dtype=bool)
        for code, k in zip(codes, (user_k, item_k), strict=True):
            here = code[remaining]
            keep &= np.bincount(here)[here] >= k
        if keep.all():
            return rows[remaining]
        remaining = remaining[keep]


def number(rows):
    """Number users and items from 0 and put the rows in order: user by user, each in time order.

    Args:
        rows (polars.DataFrame): columns `position` (in the file), `user`, `item`, `timestamp`, in file order.

    Returns:
        tuple: a polars.DataFrame with the columns `user` and `item` (indices); the raw users in the order of their
        indices (list of str); the raw items likewise.
    """
    users = rows.select(pl.col("user").unique(maintain_order=True)).with_row_index("user_index")
    walk = rows.join(users, on="user").sort("user_index", "timestamp", "position")
    items = walk.select(pl.col("item").unique(maintain_order=True)).with_row_index("item_index")
    walk = walk.join(items, on="item", how="left", maintain_order="left")
    indices = walk.select(user="user_index", item="item_index")
    return indices, users["user"].to_list(), items["item"].to_list()


def summary_line(name, summary):
    """What `write_splits` did, for the terminal: what was written, and what was left out or replaced."""
    counts = (f"{summary[kind]:,} {kind}" for kind in ("users", "items", "interactions"))
    notes = [f"{name}: {', '.join(counts)}"]
    if summary["duplicates"]:
        notes.append(f"{summary['duplicates']:,} repeated rows counted once")
    if summary["items_without_text"]:
        notes.append(
            f"{summary['items_without_text']:,} items without metadata left out, "
            f"with {summary['interactions_without_text']:,} interactions"
        )
    if summary["empty_texts"]:
        notes.append(
            f"{len(summary['empty_texts']):,} items with an empty text kept as {UNKNOWN_TEXT!r}: "
            f"{', '.join(summary['empty_texts'][:3])}{', ...' if len(summary['empty_texts']) > 3 else ''}"
        )
    return "\n  ".join(notes)


def _texts_in_order(items, texts):
    """The text of each raw item on one line, `UNKNOWN_TEXT` where it is empty, and the items that this happened to."""
    frame = pl.DataFrame({"item": items}, schema={"item": pl.String})
    found = frame.join(texts, on="item", how="left", maintain_order="left")["text"]
    lines = [" ".join((text or "").split()) for text in found]
    empty = [item for item, line in zip(items, lines, strict=True) if not line]
    return [line or UNKNOWN_TEXT for line in lines], empty


def _write_inter_files(stem, ordered):
    """Write the three `.inter` files from the rows of `number`; returns the number of rows for training."""
    ends = np.cumsum(ordered.group_by("user", maintain_order=True).len()["len"].to_numpy()).tolist()
    tokens = ordered["item"].cast(pl.String).to_list()
    sequences = [tokens[start:end] for start, end in zip([0, *ends], ends, strict=False)]

    def row(user, target):
        sequence = sequences[user]
        return f"{user}\t{' '.join(sequence[max(0, target - MAX_ITEMS) : target])}\t{sequence[target]}"

    everybody = range(len(sequences))
    train = [row(user, target) for user in everybody for target in range(len(sequences[user]) - 3, 0, -1)]
    _write_lines(f"{stem}.train.inter", train, INTER_HEADER)
    for split, from_end in (("valid", 2), ("test", 1)):
        lines = (row(user, len(sequences[user]) - from_end) for user in everybody)
        _write_lines(f"{stem}.{split}.inter", lines, INTER_HEADER)
    return len(train)


def _check_raw_ids(kind, raw):
    """Raw ids stand in tab-separated files."""
    for each in raw:
        if "\t" in each or "\n" in each or "\r" in each:
            raise UserError(f"{kind} id {each!r}: holds a tab or a line break, which the data set's files cannot hold")


def _write_lines(path, lines, header=None):
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as file:
        if header is not None:
            file.write(f"{header}\n")
        file.writelines(f"{line}\n" for line in lines)
