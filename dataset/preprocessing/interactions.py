"""Interactions as columns of numbers: removal of repeated rows, k-core, chronological order."""

import dataclasses
from collections.abc import Iterable

import numpy as np
import polars as pl

from common.errors import UserError


@dataclasses.dataclass
class Interactions:
    """n interactions in file order.

    Attributes:
        user, item: uint32 [n], indices into `users` and `items`. The order of the indices has no meaning.
        timestamp: int64 or float64 [n]. Only the order of the timestamps is used.
        position: int64 [n], ascending, the number of each interaction among the rows that were read.
        users, items: raw ids (str), each once. An id may have no interaction.
        quantity: uint32 [n], equal numbers are equal quantities. None if the source has no quantities. Interactions
            with different quantities are not repeats.
    """

    user: np.ndarray
    item: np.ndarray
    timestamp: np.ndarray
    position: np.ndarray
    users: pl.Series
    items: pl.Series
    quantity: np.ndarray | None = None

    @classmethod
    def collect(cls, frames: Iterable[pl.DataFrame], source: str) -> "Interactions":
        """Collect interactions part by part, so that each raw id is held once instead of once per row.

        Args:
            frames: with the columns `user` (str), `item` (str), `timestamp` (int or float), and optionally `quantity`
                (str).
            source: where they come from, for the error message.

        Raises:
            UserError: there is no interaction.
        """
        users, items, quantities = _StringCodes(), _StringCodes(), _StringCodes()
        columns = [users.encode("user"), items.encode("item"), pl.col("timestamp")]
        parts = [
            frame.select(columns + [quantities.encode("quantity")] * ("quantity" in frame.columns))
            for frame in frames
            if len(frame)
        ]
        if not parts:
            raise UserError(f"{source}: holds no interaction; expected rows with a user, an item and a timestamp")
        table = pl.concat(parts)
        user, item, timestamp = (table[column].to_numpy() for column in ("user", "item", "timestamp"))
        users_and_items = users.strings(int(user.max()) + 1), items.strings(int(item.max()) + 1)
        quantity = table["quantity"].to_numpy() if "quantity" in table.columns else None
        return cls(user, item, timestamp, np.arange(len(table)), *users_and_items, quantity)

    def __len__(self) -> int:
        return len(self.user)

    def take(self, rows: np.ndarray) -> "Interactions":
        """Select rows by indices or by a mask."""
        parts = (self.user[rows], self.item[rows], self.timestamp[rows], self.position[rows])
        return Interactions(*parts, self.users, self.items, None if self.quantity is None else self.quantity[rows])

    def key(self) -> list[str]:
        """The names of the columns in which repeated rows agree."""
        return ["user", "item", "timestamp"] + ([] if self.quantity is None else ["quantity"])

    def counts(self) -> dict[str, int]:
        """The number of `interactions`, `users` and `items`."""
        users, items = (np.count_nonzero(np.bincount(side)) for side in (self.user, self.item))
        return {"interactions": len(self), "users": int(users), "items": int(items)}

    def items_with_interactions(self) -> np.ndarray:
        """The indices in `items` of the items that have an interaction, int64, ascending."""
        return np.flatnonzero(np.bincount(self.item, minlength=len(self.items)))


class _StringCodes:
    """Maps strings to numbers. A string has the same number in every frame."""

    def __init__(self) -> None:
        self._type = pl.Categorical(pl.Categories.random())
        self._reference = pl.Series([None], dtype=self._type)  # Polars drops the numbers when no series uses them

    def encode(self, column: str) -> pl.Expr:
        return pl.col(column).cast(self._type).to_physical().cast(pl.UInt32).alias(column)

    def strings(self, count: int) -> pl.Series:
        """The strings of the numbers below `count`."""
        return pl.select(raw=pl.int_range(count, dtype=pl.UInt32).cat.to(self._type).cast(pl.String)).to_series()


def without_repeats(rows: Interactions) -> Interactions:
    """Keep only the first of the rows with the same user, item, timestamp and, if there are quantities, quantity."""
    timestamp = rows.timestamp.astype(np.float64) + 0.0 if rows.timestamp.dtype.kind == "f" else rows.timestamp
    pair = rows.user.astype(np.uint64) << np.uint64(32) | rows.item
    hashes = (pair ^ _mix_bits(timestamp.view(np.uint64))) * _ODD
    if rows.quantity is not None:
        hashes ^= _mix_bits(rows.quantity.astype(np.uint64))
    ordered = np.sort(hashes)
    # rows with equal hashes: nearly all of them are repeats
    candidates = np.flatnonzero(np.isin(hashes, ordered[1:][ordered[1:] == ordered[:-1]]))
    table = pl.DataFrame({column: getattr(rows, column)[candidates] for column in rows.key()} | {"row": candidates})
    first = table.unique(rows.key(), keep="first", maintain_order=True)["row"].to_numpy()
    keep = np.ones(len(rows), dtype=bool)
    keep[candidates] = False
    keep[first] = True
    return rows if keep.all() else rows.take(keep)


_ODD = np.uint64(0x9E3779B97F4A7C15)


def _mix_bits(numbers: np.ndarray) -> np.ndarray:
    """A one-to-one hash, uint64 [n] -> uint64 [n]."""
    mixed = (numbers ^ numbers >> np.uint64(31)) * _ODD
    return mixed ^ mixed >> np.uint64(29)


def k_core(rows: Interactions, user_k: int, item_k: int) -> Interactions:
    """Remove users with fewer than `user_k` and items with fewer than `item_k` interactions, until there are no more.

    The result does not depend on the order of the steps.
    """
    sides = [(rows.user, np.bincount(rows.user), user_k), (rows.item, np.bincount(rows.item), item_k)]
    keep = np.ones(len(rows), dtype=bool)
    while True:
        is_removed = np.zeros(len(rows), dtype=bool)
        for codes, counts, least in sides:
            is_removed |= (counts < least)[codes]
        is_removed &= keep
        removed = np.flatnonzero(is_removed)
        if not len(removed):
            return rows if keep.all() else rows.take(keep)
        keep[removed] = False
        for codes, counts, _ in sides:
            counts -= np.bincount(codes[removed], minlength=len(counts))


@dataclasses.dataclass
class OrderedInteractions:
    """All interactions, user after user, those of a user from the oldest to the newest.

    Attributes:
        item: int64 [n], item numbers.
        timestamp: int64 or float64 [n].
        offsets: int64 [users + 1], the interactions of user u are `offsets[u]:offsets[u + 1]`.
        users, items: raw ids in the order of their numbers.
    """

    item: np.ndarray
    timestamp: np.ndarray
    offsets: np.ndarray
    users: pl.Series
    items: pl.Series


def order_interactions(rows: Interactions, tie_seed: int | None = None) -> OrderedInteractions:
    """Sort the interactions by user and time, and number users and items.

    Users are numbered in the order of their first row. Items are numbered in the order in which they first appear in
    the sorted interactions.

    Args:
        rows: the interactions.
        tie_seed: seed of the random order of the interactions of a user with the same timestamp. None: they are sorted
            by position in the file.
    """
    if tie_seed is not None:
        rows = rows.take(np.random.default_rng(tie_seed).permutation(len(rows)))  # the sort below is stable
    by_user = _sort_by_user_and_time(rows.user, rows.timestamp)
    user, position = rows.user[by_user], rows.position[by_user]
    starts = np.flatnonzero(np.append(True, user[1:] != user[:-1]))
    order = np.argsort(np.minimum.reduceat(position, starts))  # by each user's first row
    lengths = np.diff(np.append(starts, len(user)))[order]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    chosen = by_user[np.repeat(starts[order] - offsets[:-1], lengths) + np.arange(len(user))]
    item = rows.item[chosen]
    numbers, order_of_items = _number_by_appearance(item, len(rows.items))
    return OrderedInteractions(
        numbers[item],
        rows.timestamp[chosen],
        offsets,
        rows.users.gather(user[starts[order]]),
        rows.items.gather(order_of_items),
    )


def _sort_by_user_and_time(user: np.ndarray, timestamp: np.ndarray) -> np.ndarray:
    """The row numbers sorted by user, then timestamp, then row."""
    if timestamp.dtype.kind == "i":
        since = (timestamp - timestamp.min()).view(np.uint64)
        bits = int(since.max()).bit_length()
        if int(user.max()).bit_length() + bits <= 64:
            # One key per row is sorted three times as fast as two. This sort is not stable, so ties are sorted again.
            keys = user.astype(np.uint64) << np.uint64(bits) | since
            order = pl.Series(keys).arg_sort().to_numpy().astype(np.int64)
            same = keys[order[1:]] == keys[order[:-1]]
            tied = np.flatnonzero(np.append(same, False) | np.append(False, same))
            order[tied] = order[tied][np.lexsort((order[tied], keys[order[tied]]))]
            return order
    return np.lexsort((timestamp, user))


def _number_by_appearance(codes: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Number codes below `size` by first appearance: the number of each code [size], and the codes in that order."""
    first = np.full(size, len(codes))
    first[codes[::-1]] = np.arange(len(codes))[::-1]  # reversed, because the last assignment to an index counts
    seen = np.flatnonzero(first < len(codes))
    order = seen[np.argsort(first[seen])]
    numbers = np.zeros(size, dtype=np.int64)
    numbers[order] = np.arange(len(order))
    return numbers, order
