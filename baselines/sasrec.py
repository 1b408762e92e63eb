"""SASRec (Kang and McAuley, ICDM 2018) that learns from all positions of a sequence in one pass of the encoder.

RecBole's SASRec encodes each prefix separately. The loss of a row there is the loss of a position here, so both learn
the same. With `--predictions_per_row=1`, this model also encodes each prefix separately.
"""

import torch.nn.functional as F
from recbole.data.interaction import Interaction
from recbole.model.sequential_recommender.sasrec import SASRec as RowSASRec
from torch import Tensor

from layers.encoder import AllPositions


class SASRec(AllPositions, RowSASRec):
    """RecBole's SASRec that also takes a `data.batches.SequenceBatch`."""

    def calculate_loss(self, batch) -> Tensor:
        """Cross entropy over all rows of the id embedding, the padding row included as in RecBole; float []."""
        if isinstance(batch, Interaction):
            return super().calculate_loss(batch)
        states = self.encode_scored([self.item_embedding(items) for items in batch.items], batch.scored)  # [P, H]
        losses = F.cross_entropy(states @ self.item_embedding.weight.T, batch.targets, reduction="none")
        return losses.mean() if batch.weights is None else (losses * batch.weights).sum() / batch.weights.sum()
