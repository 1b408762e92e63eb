"""Recommenders without training. B rows, N items, D text width.

They show which metrics are reached without learning. Compare trained models with them.
"""

import numpy as np
import torch
import torch.nn.functional as F
from recbole.data.interaction import Interaction
from recbole.model.abstract_recommender import SequentialRecommender
from recbole.utils import InputType
from torch import Tensor

from layers.item_to_item import recency_weights, sum_over_history
from layers.whitening import Whitening


class _Untrained(SequentialRecommender):
    """The scores are the products of `states(interaction)`, float [B, K], and `candidates`, float [N, K]."""

    input_type = InputType.POINTWISE

    def full_sort_predict(self, interaction: Interaction) -> Tensor:
        """The score of every item, float [B, N + 1]. Column = item id; column 0 (padding) is -inf."""
        return F.pad(self.states(interaction) @ self.candidates.T, (1, 0), value=-torch.inf)

    def predict(self, interaction: Interaction) -> Tensor:
        """The score of one given item per row, float [B]."""
        return (self.states(interaction) * self.candidates[interaction[self.ITEM_ID] - 1]).sum(-1)


class Popularity(_Untrained):
    """The score of an item is the number of times that it occurs in the training sequences."""

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        counts = np.bincount(dataset.sequences("train").items, minlength=dataset.num(self.ITEM_ID))[1:]
        self.register_buffer("candidates", torch.from_numpy(counts).float()[:, None])

    def states(self, interaction: Interaction) -> Tensor:
        return torch.ones(len(interaction), 1, device=self.candidates.device)


class LastText(_Untrained):
    """The score of an item is the cosine of its text vector and that of the last item of the history."""

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        table = dataset.features.table().float()
        self.register_buffer("candidates", F.normalize(table, dim=-1), persistent=False)  # features belong to the data

    def states(self, interaction: Interaction) -> Tensor:
        last = interaction[self.ITEM_SEQ].gather(1, interaction[self.ITEM_SEQ_LEN][:, None] - 1)[:, 0]
        return self.candidates[last - 1]


class MeanText(LastText):
    """The score of an item is the cosine of its text vector and the mean of the unit text vectors of the history."""

    def states(self, interaction: Interaction) -> Tensor:
        history = interaction[self.ITEM_SEQ]
        total = history.new_zeros(len(history), self.candidates.size(1), dtype=torch.float32)
        for items in history.T:  # one position after the other: [B, D] instead of [B, L, D] in memory
            total += self.candidates[items - 1] * (items > 0)[:, None]
        return F.normalize(total, dim=-1)


class WhitenedText(_Untrained):
    """The score of an item is the cosine of its whitened text vector and the decayed mean of those of the history.

    The newest item has the weight 1, the item before it `decay`, then `decay`^2, and so on. An item that occurs more
    than once counts at its newest position only.
    """

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        self.decay = config["decay"]
        table = dataset.features.table()
        self.whitening = Whitening(table.size(1)).fit(table)
        self.register_buffer("candidates", self.whitening.whiten_table(table), persistent=False)

    def states(self, interaction: Interaction) -> Tensor:
        history = interaction[self.ITEM_SEQ]
        weights = recency_weights(history, interaction[self.ITEM_SEQ_LEN], self.decay)
        return F.normalize(sum_over_history(history, weights, self.candidates), dim=-1)
