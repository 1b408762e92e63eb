"""Compact sequences: the content of a published `.inter` file as one sequence per user.

A published training file holds one row per prefix of a sequence (`1 -> 2`, `1 2 -> 3`, ...). A causal encoder computes
all those rows as positions of one sequence, so `fold_rows` folds them into it.
"""

import dataclasses
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

# Users and items of mixtures are numbered within their domain. One int64 holds both: domain * DOMAIN_STRIDE + index.
DOMAIN_STRIDE = 1 << 32

_TOKENS_PER_BLOCK = 1 << 23  # bounds the temporary index arrays of the comparisons


@dataclasses.dataclass
class Sequences:
    """Sequences of items, and how often each item is predicted from the items before it.

    Attributes:
        offsets: int64 [S + 1], sequence s is `items[offsets[s]:offsets[s + 1]]`, oldest item first.
        items: int32 [T], item ids 1..N. Padding (0) does not occur.
        weights: uint32 [T], how many rows of the file predict this item from those before it in its sequence.
        users: int64 [S], the user's number in the file, in mixtures `domain * DOMAIN_STRIDE + number`.
        cut_length: the history length at which the file was cut. A prediction sees at most this many items.
    """

    offsets: np.ndarray
    items: np.ndarray
    weights: np.ndarray
    users: np.ndarray
    cut_length: int

    def __len__(self) -> int:
        return len(self.users)

    @property
    def n_predictions(self) -> int:
        """The number of rows in the file."""
        return int(self.weights.sum(dtype=np.int64))

    def rows(self) -> tuple[np.ndarray, np.ndarray]:
        """The rows of the file, in the order of the sequences.

        Returns:
            The index of each row's target in `items`, and the sequence that the row belongs to, both int64 [R].
        """
        targets = np.flatnonzero(self.weights)
        targets = np.repeat(targets, self.weights[targets])
        return targets, np.searchsorted(self.offsets, targets, side="right") - 1


def keep_users(sequences: Sequences, fraction: float, seed: int) -> Sequences:
    """The sequences of a random part of the users, at least of one.

    With the same seed, the users of a small fraction are among those of a larger one.
    """
    users = np.unique(sequences.users)
    chosen = np.random.default_rng([seed, 1]).permutation(users)[: max(1, round(fraction * len(users)))]
    return _keep_items(sequences, np.repeat(np.isin(sequences.users, chosen), np.diff(sequences.offsets)))


def without_items(sequences: Sequences, left_out: np.ndarray) -> Sequences:
    """The sequences without some items, as if nobody had interacted with them.

    Args:
        sequences: any.
        left_out: bool [N + 1], by item id.
    """
    return _keep_items(sequences, ~left_out[sequences.items])


def _keep_items(sequences, kept):
    """The sequences with some of their items, bool [T]. The first item of a sequence is no target."""
    numbers = np.repeat(np.arange(len(sequences)), np.diff(sequences.offsets))  # [T], the sequence of each item
    lengths = np.bincount(numbers[kept], minlength=len(sequences))
    offsets = np.concatenate([[0], np.cumsum(lengths[lengths > 0])]).astype(np.int64)
    weights = sequences.weights[kept]
    weights[offsets[:-1]] = 0
    return Sequences(offsets, sequences.items[kept], weights, sequences.users[lengths > 0], sequences.cut_length)


def concatenated_ranges(sizes: np.ndarray) -> np.ndarray:
    """0, 1, ... size - 1 for each of the sizes, one range after another: int64 [sum of sizes]."""
    return np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)


def fold_rows(
    users: np.ndarray,
    lengths: np.ndarray,
    tokens: np.ndarray,
    targets: np.ndarray,
    cut_length: int | None = None,
    show_progress: bool = False,
) -> Sequences:
    """Fold rows (history -> target) into sequences.

    A row whose history and target are the beginning of a longer row of the same user becomes a position of that row's
    sequence. Rows with histories cut to the newest `cut_length` items are joined where each row is the next one shifted
    by one item. Such a sequence is longer than `cut_length`, but a prediction still sees only `cut_length` items. Any
    other row becomes a sequence of its own, of which only the last position is scored. No pair of history and target is
    lost or invented. A row that occurs twice counts twice.

    Args:
        users: int64 [R], the user of each row.
        lengths: int64 [R], the number of history items of each row, at least 1.
        tokens: int32 [sum of lengths], the histories, one after another, oldest item first.
        targets: int32 [R], the item to predict.
        cut_length: the history length at which the file was cut. Default: its longest history.
        show_progress: show a progress bar if users whose rows form no single chain take more than a second.

    Returns:
        The sequences, in the order in which their users first occur.
    """
    cut_length = int(cut_length or lengths.max(initial=1))
    rows = _flat_rows(users, lengths, tokens, targets)
    order = _user_order(users, rows.sizes)
    if order is not None:
        rows = rows.take(order)

    follows, shifted = _find_chains(rows, cut_length)
    is_first = rows.is_first_of_user()
    first_row = np.flatnonzero(is_first)
    last_row = np.append(first_row[1:], len(rows.users))
    user_of_row = np.cumsum(is_first) - 1
    irregular = np.zeros(len(first_row), bool)  # users whose rows do not form one chain
    irregular[user_of_row[~(follows | is_first)]] = True

    regular_rows = np.flatnonzero(~irregular[user_of_row])
    folded = [_fold_chains(rows.take(regular_rows), shifted[regular_rows])]
    rest = len(rows.users) - len(regular_rows)
    with tqdm(total=rest, desc="Folding", unit="row", delay=1, disable=None if show_progress else True) as bar:
        for user in np.flatnonzero(irregular):
            folded.append(_fold_one_user(rows, slice(first_row[user], last_row[user]), bar))
    return _join(folded, rows.users[first_row], cut_length)


class _Rows(NamedTuple):
    """Rows of a file. Row r is `items[starts[r]:starts[r] + sizes[r]]`: its history, then its target."""

    users: np.ndarray
    sizes: np.ndarray
    starts: np.ndarray
    items: np.ndarray

    def take(self, rows: np.ndarray) -> "_Rows":
        return _Rows(self.users[rows], self.sizes[rows], self.starts[rows], self.items)

    def is_first_of_user(self) -> np.ndarray:
        """Whether a row is the first of its user, bool [R]. The rows of a user stand together."""
        return _differs_from_previous(self.users)


class _Folded(NamedTuple):
    """Sequences without offsets: the users and lengths of all sequences, their items and weights."""

    users: np.ndarray
    lengths: np.ndarray
    items: np.ndarray
    weights: np.ndarray


def _differs_from_previous(values: np.ndarray) -> np.ndarray:
    return np.concatenate([[True], values[1:] != values[:-1]])


def _flat_rows(users: np.ndarray, lengths: np.ndarray, tokens: np.ndarray, targets: np.ndarray) -> _Rows:
    """Put the target of each row behind its history."""
    ends = np.cumsum(lengths + 1)
    items = np.empty(len(tokens) + len(targets), np.int32)
    is_target = np.zeros(len(items), bool)
    is_target[ends - 1] = True
    items[is_target] = targets
    items[~is_target] = tokens
    return _Rows(users, lengths + 1, ends - lengths - 1, items)


def _user_order(users: np.ndarray, sizes: np.ndarray) -> np.ndarray | None:
    """The order that puts the rows of a user together, the longest first. Users stay in the order in which they occur.

    Returns:
        int64 [R], or None if the rows are in this order already.
    """
    new_user = _differs_from_previous(users)
    distinct, first_seen = np.unique(users, return_index=True)
    if new_user.sum() == len(distinct) and not np.any((sizes[1:] > sizes[:-1]) & ~new_user[1:]):
        return None
    seen = first_seen[np.searchsorted(distinct, users)]
    # Rows that were cut all have the same size. In a file with ascending sizes, the oldest of them comes first.
    ascending = np.sign(np.diff(sizes))[~new_user[1:]].sum() > 0
    return np.lexsort((np.arange(len(users)) * (-1 if ascending else 1), -sizes, seen))


def _find_chains(rows: _Rows, cut_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Find the rows that continue the chain of the row above.

    Returns:
        Whether a row continues the chain, and whether it does so as the row above shifted by one item, bool [R].
    """
    follows, shifted = np.zeros(len(rows.users), bool), np.zeros(len(rows.users), bool)
    starts, sizes = rows.starts, rows.sizes
    same_user = np.flatnonzero(rows.users[1:] == rows.users[:-1]) + 1
    is_prefix = same_user[_equal(rows.items, starts[same_user], starts[same_user - 1], sizes[same_user])]
    follows[is_prefix] = True
    cut = same_user[(sizes[same_user] == cut_length + 1) & (sizes[same_user - 1] == cut_length + 1)]
    cut = cut[~follows[cut]]
    is_shifted = cut[_equal(rows.items, starts[cut] + 1, starts[cut - 1], sizes[cut] - 1)]
    follows[is_shifted] = shifted[is_shifted] = True
    return follows, shifted


def _equal(items: np.ndarray, left: np.ndarray, right: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Whether items[left:left + size] equals items[right:right + size], for each pair, bool [pairs]."""
    result = np.ones(len(sizes), bool)
    ends = np.cumsum(sizes)
    begin = 0
    while begin < len(sizes):
        done = ends[begin] - sizes[begin]
        end = max(begin + 1, int(np.searchsorted(ends, done + _TOKENS_PER_BLOCK)))
        size = sizes[begin:end]
        within = concatenated_ranges(size)
        same = items[np.repeat(left[begin:end], size) + within] == items[np.repeat(right[begin:end], size) + within]
        result[begin:end] = np.logical_and.reduceat(same, np.cumsum(size) - size)
        begin = end
    return result


def _fold_chains(rows: _Rows, shifted: np.ndarray) -> _Folded:
    """Fold the rows of users into one sequence per user. All rows of a user form one chain."""
    if not len(rows.users):
        return _Folded(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.int32), np.empty(0, np.uint32))
    users, sizes, starts, full = rows
    first = np.flatnonzero(rows.is_first_of_user())
    chain = np.repeat(np.arange(len(first)), np.diff(np.append(first, len(users))))
    shifts = np.cumsum(shifted)
    shifts -= shifts[first][chain]  # of each row, relative to its user's first row
    most_shifts = np.maximum.reduceat(shifts, first)
    lengths = most_shifts + sizes[first]
    offsets = np.cumsum(lengths) - lengths
    # each row contributes its target. The row that was shifted most often also contributes the oldest items
    target = offsets[chain] + most_shifts[chain] - shifts + sizes - 1
    items = np.zeros(lengths.sum(), np.int32)
    items[target] = full[starts + sizes - 1]
    step = shifts.max() + 1
    oldest = np.searchsorted(shifts + chain * step, most_shifts + np.arange(len(first)) * step)
    within = concatenated_ranges(sizes[oldest])
    items[np.repeat(offsets, sizes[oldest]) + within] = full[np.repeat(starts[oldest], sizes[oldest]) + within]
    weights = np.bincount(target, minlength=len(items)).astype(np.uint32)
    return _Folded(users[first], lengths, items, weights)


def _fold_one_user(rows: _Rows, numbers: slice, bar: tqdm) -> _Folded:
    """Fold the rows of a user (longest first) that do not form one chain.

    A row becomes a position of the first row that begins with it. Often this is the row itself: a new sequence.
    """
    starts, sizes = rows.starts[numbers], rows.sizes[numbers]
    ends = (starts + sizes).tolist()
    texts = [rows.items[start:end].tobytes() for start, end in zip(starts.tolist(), ends, strict=True)]
    first = _first_that_begins_with(texts, bar)
    new = np.flatnonzero(first == np.arange(len(first)))
    lengths = sizes[new]
    offsets = np.cumsum(lengths) - lengths
    target = offsets[np.searchsorted(new, first)] + sizes - 1
    weights = np.bincount(target, minlength=lengths.sum()).astype(np.uint32)
    items = np.frombuffer(b"".join(texts[row] for row in new.tolist()), rows.items.dtype)
    return _Folded(rows.users[numbers][new], lengths, items, weights)


def _first_that_begins_with(texts: list[bytes], bar: tqdm) -> np.ndarray:
    """For each text, the first text of the list that begins with it, int64.

    When the texts are sorted, those that begin with a text stand directly behind it. So each text is compared only with
    the one before it and the beginnings of that one.
    """
    first = list(range(len(texts)))
    open_texts: list[int] = []  # each begins with the one before it
    for text in sorted(reversed(range(len(texts))), key=texts.__getitem__):  # of equal texts, the first comes last
        while open_texts and not texts[text].startswith(texts[open_texts[-1]]):
            _close_last(open_texts, first)
        open_texts.append(text)
        bar.update()
    while open_texts:
        _close_last(open_texts, first)
    return np.array(first)


def _close_last(open_texts: list[int], first: list[int]) -> None:
    """All texts that begin with the last open text are known. They also begin with the one before it."""
    last = open_texts.pop()
    if open_texts:
        first[open_texts[-1]] = min(first[open_texts[-1]], first[last])


def _join(folded: list[_Folded], user_order: np.ndarray, cut_length: int) -> Sequences:
    """Concatenate folded sequences and put the users into the order in which they first occur (`user_order`)."""
    users, lengths, items, weights = (np.concatenate(parts) for parts in zip(*folded, strict=True))
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    by_number = np.argsort(user_order, kind="stable")
    rank = by_number[np.searchsorted(user_order[by_number], users)]
    if np.any(rank[1:] < rank[:-1]):
        order = np.argsort(rank, kind="stable")
        source = np.repeat(offsets[:-1][order], lengths[order]) + concatenated_ranges(lengths[order])
        users, lengths, items, weights = users[order], lengths[order], items[source], weights[source]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
    return Sequences(offsets.astype(np.int64), items, weights, users, cut_length)
