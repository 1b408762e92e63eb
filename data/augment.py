"""The two augmentations of pre-training (paper, section 2.2.2), drawn for each sequence by itself."""

import numpy as np


def augment(items, scored, n_items, generator, item_drop_ratio, item_drop_coefficient):
    """A second view of some sequences: either items are dropped, or their texts lose words.

    Dropped items go and the kept ones close ranks; the first always stays. The view of a prefix is the state at its
    last kept item.

    Args:
        items (int64 [S, L]): ids, left-aligned, padded with 0.
        scored (int64 [P]): flat positions in `items`.
        n_items (int): id + n_items stands for the same item with a shortened text.
        generator (numpy.random.Generator): drawn from.
        item_drop_ratio (float): the share of items dropped, or given a shortened text.
        item_drop_coefficient (float): the probability that a sequence drops items rather than words.

    Returns:
        (items, scored): the view, shaped like the arguments.
    """
    drops_items = generator.random(len(items)) < item_drop_coefficient
    chance = generator.random(items.shape)
    real = items > 0
    keep = real & ~(drops_items[:, None] & (chance < item_drop_ratio))
    keep[:, 0] = real[:, 0]
    shortened = np.where(~drops_items[:, None] & (chance < item_drop_ratio) & real, items + n_items, items)
    place = np.cumsum(keep, axis=1) - 1  # of an item among the kept; of a dropped one, the last kept before it
    view = np.zeros_like(items)
    row, column = np.nonzero(keep)
    view[row, place[row, column]] = shortened[row, column]
    width = items.shape[1]
    return view, scored // width * width + place.ravel()[scored]
