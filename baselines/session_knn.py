"""Recommendations from similar training sequences. B rows, S training sequences, N items."""

import numpy as np
import torch
import torch.nn.functional as F
from recbole.data.interaction import Interaction
from recbole.model.abstract_recommender import SequentialRecommender
from recbole.utils import InputType
from torch import Tensor

from layers.item_to_item import recency_weights, user_items


class VSKNN(SequentialRecommender):
    """V-SKNN (Ludewig and Jannach, UMUAI 28, 2018): nearest neighbors of a history among the training sequences.

    All training items of a user are one sequence here.

    The items of the history have weights that decay from the newest item to older ones. The similarity of a training
    sequence is the sum of the weights of the items that it shares, divided by the square root of its number of items.
    The score of an item is the sum, over the nearest sequences that hold it, of their similarity times the largest
    weight of a shared item. The published weights are linear in the position. Here they are powers of `decay`, as in
    the other models of this package.
    """

    input_type = InputType.POINTWISE

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        self.decay, self.neighbors, self.recommend_history = (
            config[key] for key in ("decay", "neighbors", "recommend_history")
        )
        matrix = user_items(dataset.sequences("train"), dataset.num(self.ITEM_ID) - 1)
        self.matrix, self.columns = matrix, matrix.tocsc()  # [S, N], which items a sequence holds
        self.lengths = np.sqrt(np.diff(matrix.indptr)).astype(np.float32)

    def full_sort_predict(self, interaction: Interaction) -> Tensor:
        """The score of every item, float [B, N + 1]. Column = item id; column 0 (padding) is -inf."""
        history, lengths = interaction[self.ITEM_SEQ].cpu(), interaction[self.ITEM_SEQ_LEN].cpu()
        weights = recency_weights(history, lengths, self.decay)  # [B, L]
        scores = np.zeros((len(history), self.matrix.shape[1]), np.float32)
        for row, (items, own) in enumerate(zip(history.numpy(), weights.numpy(), strict=True)):
            scores[row] = self._scores(items[own > 0] - 1, own[own > 0])
            if not self.recommend_history:
                scores[row, items[items > 0] - 1] = 0
        return F.pad(torch.from_numpy(scores), (1, 0), value=-torch.inf).to(interaction[self.ITEM_SEQ].device)

    def predict(self, interaction: Interaction) -> Tensor:
        """The score of one given item per row, float [B]."""
        return self.full_sort_predict(interaction).gather(1, interaction[self.ITEM_ID][:, None])[:, 0]

    def _scores(self, items, weights):
        """The scores for one history: items int [L] (columns), their weights float [L] -> float [N]."""
        shared = self.columns[:, items]  # sparse [S, L]
        similarity = shared @ weights / self.lengths
        nearest = np.flatnonzero(similarity)
        if len(nearest) > self.neighbors:
            nearest = nearest[np.argpartition(-similarity[nearest], self.neighbors)[: self.neighbors]]
        if not len(nearest):
            return np.zeros(self.matrix.shape[1], np.float32)
        newest = shared[nearest].multiply(weights).max(axis=1).toarray()[:, 0]
        return (similarity[nearest] * newest) @ self.matrix[nearest]
