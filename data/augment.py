"""The two augmentations of pre-training: item drop and word drop (paper, section 2.2.2)."""

import numpy as np


def augment(
    items: np.ndarray,
    scored: np.ndarray,
    n_items: int,
    generator: np.random.Generator,
    item_drop_ratio: float,
    item_drop_coefficient: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Make the second view of a batch of sequences. Each sequence is augmented independently of the others.

    Item drop removes items from the sequence and moves the remaining ones to the left. The first item is never removed.
    Word drop replaces items by the same items with a shortened text.

    Args:
        items: int64 [S, L], item ids, left-aligned, padded with 0.
        scored: int64 [P], flat positions in `items`.
        n_items: the id of an item with a shortened text is its own id + `n_items`.
        generator: the source of all random numbers.
        item_drop_ratio: the probability with which an item is removed, or gets a shortened text.
        item_drop_coefficient: the probability that a sequence is augmented by item drop. Otherwise it is by word drop.

    Returns:
        The augmented items, int64 [S, L], and the scored positions in them, int64 [P]. The position of a prediction is
        that of the last item before its target that was not removed.
    """
    uses_item_drop = generator.random(len(items)) < item_drop_coefficient
    selected = generator.random(items.shape) < item_drop_ratio
    real = items > 0
    keep = real & ~(uses_item_drop[:, None] & selected)
    keep[:, 0] = real[:, 0]
    shortened = np.where(~uses_item_drop[:, None] & selected & real, items + n_items, items)
    new_column = np.cumsum(keep, axis=1) - 1  # of a removed item: the column of the last kept item before it
    view = np.zeros_like(items)
    row, column = np.nonzero(keep)
    view[row, new_column[row, column]] = shortened[row, column]
    length = items.shape[1]
    return view, scored // length * length + new_column.ravel()[scored]
