"""Models to compare with a recommender: the same items, another model."""

import os

from common.errors import UserError
from engine.bundle import ITEMS
from serving.recommender import Recommender

UNTRAINED = "untrained"


def load_beside(name: str, recommender: Recommender) -> Recommender:
    """Load a model that recommends the items of a recommender.

    Args:
        name: `untrained`: the recommender's model with new weights. Otherwise the folder of a bundle. If the bundle has
            no items, the model is used without training on these (zero-shot). If it has, those that are not among
            these are removed, and those that are missing are added.
        recommender: whose items are taken over.

    Raises:
        UserError: the bundle is missing or damaged.
    """
    items = recommender.texts
    if name == UNTRAINED:
        return recommender.untrained()
    if not os.path.isdir(name):
        raise UserError(f"--compare {name}: no such folder; expected a bundle or {UNTRAINED}")
    if not os.path.isfile(os.path.join(name, ITEMS)):
        return Recommender.from_pretrained(name, items, recommender.columns)
    other = Recommender.from_pretrained(name)
    other.remove_items([item for item in other.texts if item not in items])
    other.add_items({item: text for item, text in items.items() if other.texts.get(item) != text})
    other.show({item: recommender.columns.get(item, {}) for item in items})
    return other
