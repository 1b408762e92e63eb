"""SASRec's transformer over all positions of a sequence. B sequences, L positions, P predictions, H hidden size."""

from typing import Any

import torch
from torch import Tensor, nn


class AllPositions:
    """A mixin for RecBole's SASRec and models derived from it.

    Sequences are left-aligned and attention is causal. So the state at position t (from 0) encodes the first t + 1
    items of the sequence, and one pass computes the states of all prefixes. Padding stands to the right of all items,
    so the causal mask hides it from them.
    """

    ignores_padding = True  # rows may be padded to the longest history of their batch
    position_embedding: nn.Embedding  # SASRec creates this and the following attributes
    LayerNorm: nn.LayerNorm
    dropout: nn.Dropout
    trm_encoder: Any  # RecBole's TransformerEncoder

    def encode(self, item_vectors: Tensor) -> Tensor:
        """The states at all positions, float [B, L, H] -> float [B, L, H]."""
        length = item_vectors.size(1)
        positions = torch.arange(length, device=item_vectors.device)
        hidden = self.dropout(self.LayerNorm(item_vectors + self.position_embedding(positions)))
        future = torch.full((length, length), -torch.inf, device=item_vectors.device).triu(1)
        return self.trm_encoder(hidden, future, output_all_encoded_layers=False)[-1]

    def encode_scored(self, item_vectors: list[Tensor], scored: list[Tensor]) -> Tensor:
        """The states at the scored positions, those from which an item is predicted.

        Args:
            item_vectors: float [B, L, H] per length bucket.
            scored: int64 [P_b] per bucket, flat positions among the B * L positions of the bucket.

        Returns:
            float [P, H], bucket after bucket.
        """
        pairs = zip(item_vectors, scored, strict=True)
        return torch.cat([self.encode(vectors).flatten(0, 1)[positions] for vectors, positions in pairs])

    def encode_last(self, item_vectors: Tensor, lengths: Tensor) -> Tensor:
        """The states after the last item: float [B, L, H] and lengths int64 [B] -> float [B, H]."""
        return self.encode(item_vectors)[torch.arange(len(lengths), device=lengths.device), lengths - 1]


class RowsAsBatch:
    """RecBole's rows as a batch of sequences. Only the last position of each sequence is scored.

    Args:
        item_seq: int64 [B, L], histories, left-aligned and padded with 0.
        lengths: int64 [B].
        targets: int64 [B].
    """

    def __init__(self, item_seq: Tensor, lengths: Tensor, targets: Tensor):
        rows = torch.arange(len(item_seq), device=item_seq.device)
        self.items, self.scored = [item_seq], [rows * item_seq.size(1) + lengths - 1]
        self.targets, self.users, self.weights = targets, rows, None
