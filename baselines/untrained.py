"""Recommenders that need no training; an honest table shows them beside those that do. B rows, N items, D width."""

import numpy as np
import torch
import torch.nn.functional as F
from recbole.model.abstract_recommender import SequentialRecommender
from recbole.utils import InputType


class _Untrained(SequentialRecommender):
    """Scores from `states` and `candidates`: float [B, K] and [N, K]."""

    input_type = InputType.POINTWISE

    def full_sort_predict(self, interaction):
        """Score of every item, float [B, N + 1]; column = item id, column 0 (padding) is -inf."""
        return F.pad(self.states(interaction) @ self.candidates.T, (1, 0), value=-torch.inf)

    def predict(self, interaction):
        """Score of one given item each, float [B]."""
        return (self.states(interaction) * self.candidates[interaction[self.ITEM_ID] - 1]).sum(-1)


class Popularity(_Untrained):
    """How often an item occurs in the training sequences."""

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        counts = np.bincount(dataset.sequences("train").items, minlength=dataset.num(self.ITEM_ID))[1:]
        self.register_buffer("candidates", torch.from_numpy(counts).float()[:, None])

    def states(self, interaction):
        return torch.ones(len(interaction), 1, device=self.candidates.device)


class LastText(_Untrained):
    """Cosine of an item's text with that of the last item of the history."""

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        self.register_buffer("candidates", F.normalize(dataset.features.table().float(), dim=-1))

    def states(self, interaction):
        last = interaction[self.ITEM_SEQ].gather(1, interaction[self.ITEM_SEQ_LEN][:, None] - 1)[:, 0]
        return self.candidates[last - 1]


class MeanText(LastText):
    """Cosine of an item's text with the mean text of the history."""

    def states(self, interaction):
        history = interaction[self.ITEM_SEQ]
        total = history.new_zeros(len(history), self.candidates.size(1), dtype=torch.float32)
        for items in history.T:  # position by position: [B, D] at a time instead of [B, L, D]
            total += self.candidates[items - 1] * (items > 0)[:, None]
        return F.normalize(total, dim=-1)
