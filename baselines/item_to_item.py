"""Recommenders from item-to-item weights that need no gradients. B rows, N items, D text width."""

import torch
import torch.nn.functional as F
from recbole.data.interaction import Interaction
from recbole.model.abstract_recommender import SequentialRecommender
from recbole.utils import InputType
from torch import Tensor

from layers.item_to_item import (
    cosine_neighbors,
    ease_weights,
    normalized_transitions,
    recency_weights,
    sum_over_history,
    to_torch,
    transition_counts,
)
from layers.whitening import Whitening


class _ItemToItem(SequentialRecommender):
    """The score of an item is the sum of its item-to-item weights over the history.

    The newest item of the history counts with the factor 1, the item before it with `decay`, then `decay`^2, and so
    on. An item that occurs more than once counts at its newest position only.

    A derived class sets the buffer `weights`, float [N, N], dense or sparse, from a history item (row) to the scored
    item (column).
    """

    input_type = InputType.POINTWISE

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        self.decay = config["decay"]

    def scores(self, history: Tensor, weights: Tensor) -> Tensor:
        """The score of every item, float [B, N].

        Args:
            history: int64 [B, L].
            weights: float [B, L], the factor of each history item.
        """
        return sum_over_history(history, weights, self.weights)

    def full_sort_predict(self, interaction: Interaction) -> Tensor:
        """The score of every item, float [B, N + 1]. Column = item id; column 0 (padding) is -inf."""
        history = interaction[self.ITEM_SEQ]
        weights = recency_weights(history, interaction[self.ITEM_SEQ_LEN], self.decay)
        return F.pad(self.scores(history, weights), (1, 0), value=-torch.inf)

    def predict(self, interaction: Interaction) -> Tensor:
        """The score of one given item per row, float [B]."""
        return self.full_sort_predict(interaction).gather(1, interaction[self.ITEM_ID][:, None])[:, 0]


class ItemTransitions(_ItemToItem):
    """How often an item follows those of the history in the training sequences, see `transition_counts`."""

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        self.register_buffer("weights", _transitions(config, dataset))


class ItemKNN(_ItemToItem):
    """Item-based nearest neighbors (Sarwar et al., WWW 2001): the cosine of the sets of users, see `cosine_neighbors`.

    RecBole's ItemKNN is a general recommender, which cannot score the histories that the other models see (`EASE`).
    """

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        n_items = dataset.num(self.ITEM_ID) - 1
        weights = cosine_neighbors(dataset.sequences("train"), n_items, config["neighbors"], config["shrink"])
        self.register_buffer("weights", to_torch(weights))


class EASE(_ItemToItem):
    """EASE (Steck, WWW 2019), see `ease_weights`, with a decay over the history. With a decay of 1, it is the paper's.

    RecBole's EASE is a general recommender. It scores a user by the row of the user number in the training matrix. In
    valid and test, this row does not hold the items after the training split, and a user without training rows has
    none. So RecBole's class cannot score the histories that the other models see.
    """

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        weights = ease_weights(dataset.sequences("train"), dataset.num(self.ITEM_ID) - 1, config["reg_weight"])
        self.register_buffer("weights", weights)


class TextAndTransitions(_ItemToItem):
    """The weight of two items is the cosine of their whitened texts plus `transition_weight` times their transitions.

    The cosine of an item with itself counts as 0, so that the history is not recommended again.
    """

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        self.register_buffer("weights", config["transition_weight"] * _transitions(config, dataset))
        table = dataset.features.table()
        self.whitening = Whitening(table.size(1)).fit(table)
        self.register_buffer("texts", self.whitening.whiten_table(table), persistent=False)  # [N, D]

    def scores(self, history: Tensor, weights: Tensor) -> Tensor:
        scores = sum_over_history(history, weights, self.texts) @ self.texts.T
        items = (history - 1).clamp(min=0)
        own = weights * self.texts.square().sum(1)[items]  # the cosine with itself: 1, or 0 for a vector of zeros
        return scores.scatter_add_(1, items, -own).add_(super().scores(history, weights))


def _transitions(config, dataset) -> Tensor:
    counts = transition_counts(
        dataset.sequences("train"),
        dataset.num(config["ITEM_ID_FIELD"]) - 1,
        config["transition_window"],
        config["transition_decay"],
        config["transition_backward"],
    )
    return to_torch(normalized_transitions(counts, config["transition_damping"]))
