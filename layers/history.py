"""What the history says about the next item directly: which items it holds, and what they are on average.

B sequences, L positions, P predictions, Z entries, H hidden size. The recency of an item in a history is 0 for the
newest item, 1 for the item before it, and so on.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers.logits import SparseLogits

# Adam moves every parameter by about the learning rate per step. The parameters of this file have to move further than
# the entries of a weight matrix, so they are stored divided by these numbers.
BIAS_STEP = 300.0  # logits: with the default learning rate of 0.001, a step moves them by at most about 0.3
MEAN_STEP = 30.0  # weights of a mean and their logarithms


def history_entries(items: Sequence[Tensor], scored: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The distinct items of the history of each prediction. An item that occurs twice has the recency of its newest
    occurrence.

    Args:
        items: per bucket, int64 [B, L], left-aligned and padded with 0.
        scored: per bucket, int64 [P_b], flat positions. The history of a prediction ends at its position.

    Returns:
        (rows, ids, recencies), each int64 [Z]: the prediction of an entry, ascending, the item and its recency.
    """
    columns: list[tuple[Tensor, ...]] = []
    before = 0
    for bucket, positions in zip(items, scored, strict=True):
        length = bucket.size(1)
        sequence, last = positions // length, positions % length  # [P_b]
        place = torch.arange(length, device=bucket.device)
        same = (bucket[:, :, None] == bucket[:, None, :]) & (place > place[:, None])  # [B, L, L]: the same item later
        later = torch.where(same, place, length).amin(2)  # [B, L]: the place of the next occurrence
        rows, places = ((place <= last[:, None]) & (later[sequence] > last[:, None])).nonzero(as_tuple=True)
        columns.append((rows + before, bucket[sequence[rows], places], last[rows] - places))
        before += len(positions)
    rows, ids, recencies = (torch.cat(column) for column in zip(*columns, strict=True))
    return rows, ids, recencies


class HistoryBias(nn.Module):
    """A learned logit for the items of the history, by recency.

    In many shops people hardly ever buy an item again, but the items of the history are the most similar to it. The
    bias learns how much less, or more, likely a repeat is.

    Args:
        size: the number of values. The last one is that of all older items.
    """

    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))

    def switch_off(self) -> None:
        """Set all values to 0."""
        nn.init.zeros_(self.weight)

    def values(self) -> Tensor:
        """The logit of each recency, float [size]."""
        return self.weight * BIAS_STEP

    def forward(self, recencies: Tensor) -> Tensor:
        """int64 [Z] -> float [Z]."""
        return self.values()[recencies.clamp(max=len(self.weight) - 1)]

    def logits(self, batch: Any, columns: Callable[[Tensor], Tensor] = lambda ids: ids) -> SparseLogits:
        """The bias of each prediction's history, as logits [P, N].

        Args:
            batch: has `items` and `scored`, see `history_entries`.
            columns: the column of each item id, int64 [Z] -> int64 [Z]. By default, the id itself.
        """
        rows, ids, recencies = history_entries(batch.items, batch.scored)
        return SparseLogits(rows, columns(ids), self(recencies))


class HistoryMean(nn.Module):
    """The mean of the items of the history, with a learned weight for each recency. It is added to the state.

    w sqrt(H) normalize(sum_k exp(a_k) normalize(v_k)), where v_k is the item of recency k. The state is the output of a
    LayerNorm, so its length is about sqrt(H). At first w is 1 and exp(a_k) is decay^k.

    Args:
        max_length: the most items of a history.
        decay: initial ratio of the weight of an item to that of the next newer one.
    """

    def __init__(self, max_length: int, decay: float = 0.7):
        super().__init__()
        # no weight is so small at first that it cannot grow
        recencies = torch.arange(float(max_length)).clamp(max=12)
        self.recency = nn.Parameter(math.log(decay) * recencies / MEAN_STEP)
        self.weight = nn.Parameter(torch.tensor(1 / MEAN_STEP))

    def switch_off(self) -> None:
        """Set w to 0. It can still be learned."""
        nn.init.zeros_(self.weight)

    def scored(self, vectors: Sequence[Tensor], scored: Sequence[Tensor]) -> Tensor:
        """The means up to the scored positions: per bucket float [B, L, H] and int64 [P_b] -> float [P, H]."""
        return torch.cat([self._all(part).flatten(0, 1)[own] for part, own in zip(vectors, scored, strict=True)])

    def last(self, vectors: Tensor, lengths: Tensor) -> Tensor:
        """The means of whole histories: float [B, L, H] and lengths int64 [B] -> float [B, H]."""
        recencies = lengths[:, None] - 1 - torch.arange(vectors.size(1), device=vectors.device)  # [B, L]
        weights = self._weights(recencies)
        return self._scaled((weights[:, None] @ F.normalize(vectors, dim=-1))[:, 0])

    def _all(self, vectors):
        """The means up to all positions, float [B, L, H] -> float [B, L, H]."""
        places = torch.arange(vectors.size(1), device=vectors.device)
        weights = self._weights(places[:, None] - places)  # [L, L], 0 above the diagonal
        return self._scaled(weights @ F.normalize(vectors, dim=-1))

    def _weights(self, recencies):
        """exp(a_k) for recencies k, 0 for negative ones, shaped like `recencies`."""
        return (self.recency * MEAN_STEP).exp()[recencies.clamp(min=0)] * (recencies >= 0)

    def _scaled(self, sums):
        return self.weight * MEAN_STEP * math.sqrt(sums.size(-1)) * F.normalize(sums, dim=-1)
