"""Compact sequences: what the rows of a published `.inter` file say, one sequence a user.

A published training file holds one row per prefix (`1 -> 2`, `1 2 -> 3`, ...). Under a causal encoder all those rows
are positions of one sequence, so they are folded into it; see `fold_rows` for what happens to rows that do not fit.
"""

import dataclasses

import numpy as np

_TOKENS_AT_A_TIME = 1 << 23  # bounds the temporary index arrays of the comparisons


@dataclasses.dataclass
class Sequences:
    """Sequences of items, and how often each item is to be predicted from the items before it.

    Attributes:
        offsets (int64 [S + 1]): sequence s is `items[offsets[s]:offsets[s + 1]]`, oldest first.
        items (int32 [T]): item ids, 1..N; 0 is padding and does not occur.
        weights (uint32 [T]): how many rows of the file predict this item from those before it in its sequence;
            0 where none does.
        users (int64 [S]): the user's number as written in the file (mixtures: domain * 2**32 + number).
        window (int): the longest history of the source rows; a prediction sees at most so many items.
    """

    offsets: np.ndarray
    items: np.ndarray
    weights: np.ndarray
    users: np.ndarray
    window: int

    def __len__(self):
        return len(self.users)

    @property
    def n_predictions(self):
        """How many rows the file held: positions, counted with their weights."""
        return int(self.weights.sum(dtype=np.int64))

    def rows(self):
        """The positions to predict, repeated rows repeated: indices into `items`, int64 [P], and their sequences."""
        positions = np.flatnonzero(self.weights)
        positions = np.repeat(positions, self.weights[positions])
        return positions, np.searchsorted(self.offsets, positions, side="right") - 1


def places_within(sizes):
    """0, 1, ... size - 1 for each of several sizes, one after another: int64 [sum of sizes]."""
    return np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)


def fold_rows(users, lengths, tokens, targets, window=None):
    """Fold rows (history -> target) into sequences.

    Rows of one user whose history and target are the beginning of a longer row become positions of that row's
    sequence. Histories cut to the newest `window` items are chained where each is the next one shifted by one item:
    the sequence then is longer than the window, and a prediction still sees `window` items only. Rows that fit
    nowhere stay sequences of their own that score their last position. No pair is lost or invented; a row that occurs
    twice counts twice.

    Args:
        users (int64 [R]), lengths (int64 [R]): the user and the number of history items of each row, at least 1.
        tokens (int32 [sum of lengths]): the histories, one after another, oldest item first.
        targets (int32 [R]): the item to predict.
        window (int, optional): the history length at which the file cuts; by default its longest history.

    Returns:
        Sequences: in the order in which the users come first.
    """
    window = int(window or lengths.max(initial=1))
    full, starts = _append_targets(lengths, tokens, targets)
    sizes = lengths + 1
    order = _user_order(users, sizes)
    if order is not None:
        users, sizes, starts = users[order], sizes[order], starts[order]

    follows, shifted = _links(users, sizes, starts, full, window)
    first_row = np.flatnonzero(np.concatenate([[True], users[1:] != users[:-1]]))
    user_of_row = np.cumsum(np.concatenate([[True], users[1:] != users[:-1]])) - 1
    is_first = np.zeros(len(users), bool)
    is_first[first_row] = True
    irregular = np.zeros(len(first_row), bool)
    irregular[user_of_row[~(follows | is_first)]] = True

    regular_rows = np.flatnonzero(~irregular[user_of_row])
    pieces = [_fold_chains(regular_rows, users, sizes, starts, shifted, full)]
    last_row = np.append(first_row[1:], len(users))
    for user in np.flatnonzero(irregular):
        rows = range(first_row[user], last_row[user])
        pieces.append(_fold_one_user(users[rows[0]], [full[starts[r] : starts[r] + sizes[r]] for r in rows]))
    return _join(pieces, users[first_row], window)


def _append_targets(lengths, tokens, targets):
    """Rows as history + target in one flat array; returns it and the start of each row."""
    ends = np.cumsum(lengths + 1)
    full = np.empty(len(tokens) + len(targets), np.int32)
    is_target = np.zeros(len(full), bool)
    is_target[ends - 1] = True
    full[is_target] = targets
    full[~is_target] = tokens
    return full, ends - lengths - 1


def _user_order(users, sizes):
    """The order that puts a user's rows together (users as they first come), longest first; None if they stand so."""
    new_user = np.concatenate([[True], users[1:] != users[:-1]])
    distinct, first_seen = np.unique(users, return_index=True)
    if new_user.sum() == len(distinct) and not np.any((sizes[1:] > sizes[:-1]) & ~new_user[1:]):
        return None
    seen = first_seen[np.searchsorted(distinct, users)]
    # rows cut to the window are of one size: a file that goes upwards holds them oldest first
    upwards = np.sign(np.diff(sizes))[~new_user[1:]].sum() > 0
    return np.lexsort((np.arange(len(users)) * (-1 if upwards else 1), -sizes, seen))


def _links(users, sizes, starts, full, window):
    """For each row: does it continue the chain of the row above, and is it that row shifted back by one item?"""
    follows, shifted = np.zeros(len(users), bool), np.zeros(len(users), bool)
    same_user = np.flatnonzero(users[1:] == users[:-1]) + 1
    is_prefix = same_user[_equal(full, starts[same_user], starts[same_user - 1], sizes[same_user])]
    follows[is_prefix] = True
    at_window = same_user[(sizes[same_user] == window + 1) & (sizes[same_user - 1] == window + 1)]
    at_window = at_window[~follows[at_window]]
    moved = at_window[_equal(full, starts[at_window] + 1, starts[at_window - 1], sizes[at_window] - 1)]
    follows[moved] = shifted[moved] = True
    return follows, shifted


def _equal(full, left, right, sizes):
    """Whether full[left:left + size] equals full[right:right + size], for each pair, bool [pairs]."""
    result = np.ones(len(sizes), bool)
    ends = np.cumsum(sizes)
    begin = 0
    while begin < len(sizes):
        done = ends[begin] - sizes[begin]
        end = max(begin + 1, int(np.searchsorted(ends, done + _TOKENS_AT_A_TIME)))
        size = sizes[begin:end]
        within = places_within(size)
        same = full[np.repeat(left[begin:end], size) + within] == full[np.repeat(right[begin:end], size) + within]
        result[begin:end] = np.logical_and.reduceat(same, np.cumsum(size) - size)
        begin = end
    return result


def _fold_chains(rows, users, sizes, starts, shifted, full):
    """Fold users all of whose rows form one chain. Returns (users, lengths, items, weights)."""
    if not len(rows):
        return np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.int32), np.empty(0, np.uint32)
    users, sizes, starts, shifted = users[rows], sizes[rows], starts[rows], shifted[rows]
    first = np.flatnonzero(np.concatenate([[True], users[1:] != users[:-1]]))
    chain = np.repeat(np.arange(len(first)), np.diff(np.append(first, len(rows))))
    shifts = np.cumsum(shifted)
    shifts -= shifts[first][chain]  # shifts down to each row, from the user's first
    all_shifts = np.maximum.reduceat(shifts, first)
    lengths = all_shifts + sizes[first]
    offsets = np.cumsum(lengths) - lengths
    # where each row's target stands; the row that was shifted most often holds the oldest items
    place = offsets[chain] + all_shifts[chain] - shifts + sizes - 1
    items = np.zeros(lengths.sum(), np.int32)
    items[place] = full[starts + sizes - 1]
    step = shifts.max() + 1
    oldest = np.searchsorted(shifts + chain * step, all_shifts + np.arange(len(first)) * step)
    within = places_within(sizes[oldest])
    items[np.repeat(offsets, sizes[oldest]) + within] = full[np.repeat(starts[oldest], sizes[oldest]) + within]
    weights = np.bincount(place, minlength=len(items)).astype(np.uint32)
    return users[first], lengths, items, weights


def _fold_one_user(user, rows):
    """Fold one user's rows, longest first, where they form no single chain: plain and slow, for the few."""
    sequences, weights = [], []
    for row in rows:
        for sequence, weight in zip(sequences, weights, strict=True):
            if np.array_equal(sequence[: len(row)], row):
                weight[len(row) - 1] += 1
                break
        else:
            sequences.append(row)
            weights.append(np.zeros(len(row), np.uint32))
            weights[-1][-1] = 1
    lengths = np.array([len(s) for s in sequences], np.int64)
    return np.full(len(lengths), user, np.int64), lengths, np.concatenate(sequences), np.concatenate(weights)


def _join(pieces, user_order, window):
    """Put the folded pieces together, users as they first come."""
    users, lengths, items, weights = (np.concatenate(parts) for parts in zip(*pieces, strict=True))
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    if len(pieces) > 1:
        rank = np.argsort(user_order, kind="stable")
        position = rank[np.searchsorted(user_order[rank], users)]
        order = np.argsort(position, kind="stable")
        take = np.repeat(offsets[:-1][order], lengths[order]) + places_within(lengths[order])
        users, lengths, items, weights = users[order], lengths[order], items[take], weights[take]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
    return Sequences(offsets.astype(np.int64), items, weights, users, window)
