"""Interactions as three columns of numbers: who, what, when. Repeated rows, the k-core, and the order of everything."""

import dataclasses

import numpy as np
import polars as pl

from common.errors import UserError


@dataclasses.dataclass
class Interactions:
    """n interactions in file order.

    Attributes:
        user, item (numpy.ndarray): uint32 [n], places in `users` and `items`. The places themselves mean nothing.
        timestamp (numpy.ndarray): int64 or float64 [n]; only the order counts.
        position (numpy.ndarray): int64 [n], increasing: the number of each among the rows that were read.
        users, items (polars.Series): raw ids (str), each once; some may have no interaction.
    """

    user: np.ndarray
    item: np.ndarray
    timestamp: np.ndarray
    position: np.ndarray
    users: pl.Series
    items: pl.Series

    @classmethod
    def collect(cls, frames, source):
        """Take up interactions part by part, so that the raw ids are held once each and not once a row.

        Args:
            frames (iterable of polars.DataFrame): columns `user` (str), `item` (str), `timestamp` (int or float).
            source (str): where they come from, for the message.

        Raises:
            UserError: there are none.
        """
        users, items = _Codes(), _Codes()
        parts = [
            frame.select(users.encode("user"), items.encode("item"), pl.col("timestamp"))
            for frame in frames
            if len(frame)
        ]
        if not parts:
            raise UserError(f"{source}: holds no interaction; expected rows with a user, an item and a time")
        table = pl.concat(parts)
        user, item, timestamp = (table[column].to_numpy() for column in ("user", "item", "timestamp"))
        raw = (codes.raw(int(side.max()) + 1) for codes, side in ((users, user), (items, item)))
        return cls(user, item, timestamp, np.arange(len(table)), *raw)

    def __len__(self):
        return len(self.user)

    def take(self, rows):
        """Some of the rows: indices in file order, or a mask."""
        parts = (self.user[rows], self.item[rows], self.timestamp[rows], self.position[rows])
        return Interactions(*parts, self.users, self.items)

    def counts(self):
        """How many interactions, users and items there are. Returns dict."""
        users, items = (np.count_nonzero(np.bincount(side)) for side in (self.user, self.item))
        return {"interactions": len(self), "users": int(users), "items": int(items)}

    def items_left(self):
        """The places in `items` of those with an interaction, int64, increasing."""
        return np.flatnonzero(np.bincount(self.item, minlength=len(self.items)))


class _Codes:
    """Strings to numbers, the same one for the same string in every frame."""

    def __init__(self):
        kind = pl.Categorical(pl.Categories.random())
        self._values = pl.Series([None], dtype=kind)  # holds on to the numbers given so far between two frames
        self._kind = kind

    def encode(self, column):
        return pl.col(column).cast(self._kind).to_physical().cast(pl.UInt32).alias(column)

    def raw(self, size):
        """The strings of the numbers below `size`. Returns polars.Series."""
        return pl.select(raw=pl.int_range(size, dtype=pl.UInt32).cat.to(self._kind).cast(pl.String)).to_series()


def without_repeats(rows):
    """Of rows with the same user, item and timestamp the first stays. Returns Interactions."""
    when = rows.timestamp.astype(np.float64) + 0.0 if rows.timestamp.dtype.kind == "f" else rows.timestamp
    who = rows.user.astype(np.uint64) << np.uint64(32) | rows.item
    keys = (who ^ _scattered(when.view(np.uint64))) * _ODD
    ordered = np.sort(keys)
    suspects = np.flatnonzero(np.isin(keys, ordered[1:][ordered[1:] == ordered[:-1]]))  # equal keys: nearly all repeats
    table = pl.DataFrame([rows.user[suspects], rows.item[suspects], when[suspects], suspects], list("uitr"))
    first = table.unique(list("uit"), keep="first", maintain_order=True)["r"].to_numpy()
    keep = np.ones(len(rows), dtype=bool)
    keep[suspects] = False
    keep[first] = True
    return rows if keep.all() else rows.take(keep)


_ODD = np.uint64(0x9E3779B97F4A7C15)


def _scattered(numbers):
    """uint64 [n] -> uint64 [n], one to one; neighbours end far apart."""
    mixed = (numbers ^ numbers >> np.uint64(31)) * _ODD
    return mixed ^ mixed >> np.uint64(29)


def k_core(rows, user_k, item_k):
    """Leave out users and items with too few interactions, again and again until none is left.

    Args:
        rows (Interactions): of these.
        user_k, item_k (int): the fewest interactions of a user and of an item.

    Returns:
        Interactions: the remaining rows in their order; the largest such set, so the order of the steps is all one.
    """
    sides = [(rows.user, np.bincount(rows.user), user_k), (rows.item, np.bincount(rows.item), item_k)]
    keep = np.ones(len(rows), dtype=bool)
    while True:
        leaving = np.zeros(len(rows), dtype=bool)
        for codes, counts, least in sides:
            leaving |= (counts < least)[codes]
        leaving &= keep
        gone = np.flatnonzero(leaving)
        if not len(gone):
            return rows if keep.all() else rows.take(keep)
        keep[gone] = False
        for codes, counts, _ in sides:
            counts -= np.bincount(codes[gone], minlength=len(counts))


@dataclasses.dataclass
class Walk:
    """All interactions, user by user, each from the oldest to the newest.

    Attributes:
        item (numpy.ndarray): int64 [n], item numbers.
        timestamp (numpy.ndarray): [n].
        offsets (numpy.ndarray): int64 [users + 1]; user u has offsets[u] up to, not including, offsets[u + 1].
        users, items (polars.Series): raw ids in the order of their numbers.
    """

    item: np.ndarray
    timestamp: np.ndarray
    offsets: np.ndarray
    users: pl.Series
    items: pl.Series


def walk(rows):
    """Number users and items and put the interactions in order. Ties in time are ordered by position in the file.

    Users are numbered in the order of their first row; items in the order in which they appear when one walks the users
    0, 1, 2, ... through, each from the oldest interaction to the newest.

    Returns:
        Walk
    """
    by_user = _order(rows.user, rows.timestamp)
    user, position = rows.user[by_user], rows.position[by_user]
    starts = np.flatnonzero(np.append(True, user[1:] != user[:-1]))
    order = np.argsort(np.minimum.reduceat(position, starts))  # by each user's first row
    lengths = np.diff(np.append(starts, len(user)))[order]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    chosen = by_user[np.repeat(starts[order] - offsets[:-1], lengths) + np.arange(len(user))]
    item = rows.item[chosen]
    numbers, firsts = _numbered(item, len(rows.items))
    return Walk(
        numbers[item],
        rows.timestamp[chosen],
        offsets,
        rows.users.gather(user[starts[order]]),
        rows.items.gather(firsts),
    )


def _order(user, timestamp):
    """The row numbers by user, then timestamp, then row."""
    if timestamp.dtype.kind == "i":
        since = (timestamp - timestamp.min()).view(np.uint64)
        bits = int(since.max()).bit_length()
        if int(user.max()).bit_length() + bits <= 64:
            # One number a row sorts three times as fast as two. Equal ones may come in any order and are put right.
            keys = user.astype(np.uint64) << np.uint64(bits) | since
            order = pl.Series(keys).arg_sort().to_numpy().astype(np.int64)
            same = keys[order[1:]] == keys[order[:-1]]
            tied = np.flatnonzero(np.append(same, False) | np.append(False, same))
            order[tied] = order[tied][np.lexsort((order[tied], keys[order[tied]]))]
            return order
    return np.lexsort((timestamp, user))


def _numbered(codes, size):
    """Number codes in the order of their first appearance: (number of each code [size], the codes in that order)."""
    first = np.full(size, len(codes))
    first[codes[::-1]] = np.arange(len(codes))[::-1]  # of several values given to one place the last one stays
    seen = np.flatnonzero(first < len(codes))
    order = seen[np.argsort(first[seen])]
    numbers = np.zeros(size, dtype=np.int64)
    numbers[order] = np.arange(len(order))
    return numbers, order
