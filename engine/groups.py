"""Metrics by groups of rows: by popularity of the target, by history length, by repetition of the target."""

from collections.abc import Callable, Iterable

import numpy as np

from engine.metrics import RankTable, mean_metrics

Masks = list[tuple[str, np.ndarray]]

FIFTHS = 5
_LENGTHS = (1, 3, 5, 10, 20, 50)  # the shortest history of each group


def by_popularity(table: RankTable, item_counts: np.ndarray) -> Masks:
    """Groups by how often the target occurs in the training data: never, then five groups, the rarest items first.

    Each of the five groups has about a fifth of the training interactions. Fifths of the items would be too uneven:
    most users would be in the last group. Items with equal counts are in the same group, so a group may be empty.
    """
    values, n_items = np.unique(item_counts[1:], return_counts=True)  # ascending; item_counts[0] is padding
    interactions = values * n_items
    middle = interactions.cumsum() - interactions / 2  # interactions up to the middle of each count's range
    fifth = 1 + np.minimum(FIFTHS * middle // max(interactions.sum(), 1), FIFTHS - 1).astype(int)
    fifth[values == 0] = 0
    of_target = fifth[np.searchsorted(values, item_counts[table.target])]
    masks = [("never seen", of_target == 0)]
    for number in range(1, FIFTHS + 1):
        counts = values[fifth == number]
        if len(counts):
            masks.append((f"fifth {number}: seen {_interval(counts[0], counts[-1])} times", of_target == number))
    return masks


def by_history_length(table: RankTable, item_counts: np.ndarray) -> Masks:
    """Groups by how many items of history the model sees."""
    ends = [first - 1 for first in _LENGTHS[1:]]
    masks = [
        (f"{_interval(first, last)} items", (first <= table.history_length) & (table.history_length <= last))
        for first, last in zip(_LENGTHS, ends, strict=False)
    ]
    return [*masks, (f"{_LENGTHS[-1]} items or more", table.history_length >= _LENGTHS[-1])]


def by_repetition(table: RankTable, item_counts: np.ndarray) -> Masks:
    """Groups by whether the target already occurs in the history that the model sees."""
    return [("new to the user", ~table.in_history), ("in the history", table.in_history)]


# To add a group, write its function and name it here. The function takes the table, and how often each item occurs in
# the training data, int64 [N + 1]. It returns labels and masks, bool [R].
GROUPS: dict[str, Callable[[RankTable, np.ndarray], Masks]] = {
    "popularity": by_popularity,
    "history length": by_history_length,
    "repetition": by_repetition,
}


def group_metrics(table: RankTable, item_counts: np.ndarray, names: Iterable[str], topk: Iterable[int]) -> dict:
    """The metrics of each group that has rows.

    Args:
        item_counts: int64 [N + 1], how often each item occurs in the training data.
        names, topk: as for `mean_metrics`.

    Returns:
        dict: group -> label -> {"users": number of rows, "recall@10": ...}.
    """
    names, topk = list(names), list(topk)
    return {
        group: {
            label: {"users": int(mask.sum()), **mean_metrics(table[mask], names, topk)}
            for label, mask in masks(table, item_counts)
            if mask.any()
        }
        for group, masks in GROUPS.items()
    }


def format_groups(groups: dict) -> list[str]:
    """The lines of an aligned table of what `group_metrics` returns."""
    lines = []
    for group, labels in groups.items():
        names = list(next(iter(labels.values())))[1:]
        lines.append("  ".join([f"{'by ' + group:32}{'users':>9}", *(f"{name:>{_width(name)}}" for name in names)]))
        for label, found in labels.items():
            values = (f"{found[name]:{_width(name)}.4f}" for name in names)
            lines.append("  ".join([f"  {label:30}{found['users']:9,}", *values]))
    return lines


def _interval(first: int, last: int) -> str:
    return f"{first}" if first == last else f"{first} to {last}"


def _width(name: str) -> int:
    return max(len(name), 6)
