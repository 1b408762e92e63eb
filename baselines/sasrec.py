"""SASRec (Kang and McAuley, ICDM 2018) that learns from all positions of a sequence in one pass of the encoder.

RecBole's SASRec encodes each prefix separately. The loss of a row there is the loss of a position here, so both learn
the same. With `--predictions_per_row=1`, this model also encodes each prefix separately.
"""

import torch.nn.functional as F
from recbole.data.interaction import Interaction
from recbole.model.sequential_recommender.sasrec import SASRec as RowSASRec
from torch import Tensor

from layers.encoder import AllPositions, RowsAsBatch
from layers.history import HistoryBias
from layers.item_to_item import ItemToItem
from layers.logits import DenseLogits


class SASRec(AllPositions, RowSASRec):
    """RecBole's SASRec that also takes a `data.batches.SequenceBatch`."""

    def calculate_loss(self, batch) -> Tensor:
        """Cross entropy over all rows of the id embedding, the padding row included as in RecBole; float []."""
        if isinstance(batch, Interaction):
            return super().calculate_loss(batch)
        losses = F.cross_entropy(self.logits(batch), batch.targets, reduction="none")
        return losses.mean() if batch.weights is None else (losses * batch.weights).sum() / batch.weights.sum()

    def logits(self, batch) -> Tensor:
        """The logits of all rows of the id embedding, float [P, N + 1]."""
        return self.states(batch) @ self.item_embedding.weight.T

    def states(self, batch) -> Tensor:
        """The sequence representation at each scored position, float [P, H]."""
        return self.encode_scored([self.item_embedding(items) for items in batch.items], batch.scored)


class SASRecHistory(SASRec):
    """SASRec with two parts of UniSRec: the history bias, and the item-to-item logits after training."""

    temperature = 1.0  # the scores of UniSRec are logits times the temperature, those of SASRec are logits

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        self.history_bias = HistoryBias(config["history_bias"])
        # without effect until `engine.item_to_item` has computed its weights and chosen its factor
        self.item_to_item = ItemToItem(self.n_items - 1, config["item_to_item"]) if config["item_to_item"] else None

    def calculate_loss(self, batch) -> Tensor:
        """Cross entropy as in `SASRec`, without the item-to-item logits; float []."""
        return super().calculate_loss(self._rows(batch) if isinstance(batch, Interaction) else batch)

    def logits(self, batch) -> Tensor:
        """The logits of all rows of the id embedding, float [P, N + 1]."""
        return self.history_bias.logits(batch).add_to(super().logits(batch))

    def full_sort_predict(self, interaction: Interaction) -> Tensor:
        """The score of every item, float [B, N + 1]. Column = item id."""
        scores = self.history_bias.logits(self._rows(interaction)).add_to(super().full_sort_predict(interaction))
        if self.item_to_item is None or not self.item_to_item.factor:
            return scores
        logits = self.item_to_item.logits(interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN])
        return scores + F.pad(logits, (1, 0))

    def predict(self, interaction: Interaction) -> Tensor:
        """The score of one given item per row, float [B]."""
        items = interaction[self.ITEM_ID]
        scores = super().predict(interaction) + self.history_bias.logits(self._rows(interaction)).at(items)
        if self.item_to_item is None or not self.item_to_item.factor:
            return scores
        logits = self.item_to_item.logits(interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN])
        return scores + DenseLogits(logits).at(items - 1)

    def _rows(self, interaction):
        return RowsAsBatch(interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN], interaction[self.ITEM_ID])
