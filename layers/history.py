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
DECAYS = (0.7, 0.3, 0.4, 0.5, 0.6, 0.8, 0.9, 1.0)  # from which `HistoryMean.start` chooses. The first is the default
PRIOR_REPEATS = 5.0  # how many repeats count as few


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

    @torch.no_grad()
    def start(self, batch: Any, loss: Callable[[Any], Tensor], rounds: int = 3) -> None:
        """Choose the values so that a batch has about as many repeats as the model expects.

        A repeat is a target that is in the history. With few users, training is over before the bias has been learned.

        First all recencies get one value, for which the expected number of repeats is the true one. Then each recency
        gets its own value. A recency with few repeats, true and expected, stays close to the common value.

        The expected number follows from the loss of any model: the derivative of a mean cross entropy with respect to a
        bias is the expected number minus the true one, divided by the number of predictions.

        Args:
            batch: a `SequenceBatch`, or another batch with `items`, `scored`, `targets` and `weights`.
            loss: the mean cross entropy of the model with this bias, without dropout and label smoothing.
            rounds: rounds of the search for the common value. One is not exact, because probabilities vary.
        """
        rows, ids, recencies = history_entries(batch.items, batch.scored)
        weights = torch.ones(len(batch.targets), device=ids.device) if batch.weights is None else batch.weights
        weights = weights * (len(weights) / weights.sum())  # [P], 1 on average
        repeats = torch.zeros_like(self.weight)  # [size], number of repeats by recency
        is_repeat = weights[rows] * (ids == batch.targets[rows])
        repeats.index_add_(0, recencies.clamp(max=len(repeats) - 1), is_repeat)

        def expected():
            with torch.enable_grad():
                (gradient,) = torch.autograd.grad(loss(batch), self.weight)
            return (gradient * len(weights) / BIAS_STEP + repeats).clamp(min=0)  # [size]

        rate = (repeats.sum() + 0.5) / (len(rows) + 1)
        for _ in range(rounds):
            change = rate.logit() - (expected().sum() / len(rows)).logit(eps=1e-9)
            self.weight.add_(change / BIAS_STEP)
        self.weight.add_(((repeats + PRIOR_REPEATS) / (expected() + PRIOR_REPEATS)).log() / BIAS_STEP)


class HistoryMean(nn.Module):
    """The mean of the items of the history, with a learned weight for each recency. It is added to the state.

    w sqrt(H) normalize(sum_k exp(a_k) normalize(v_k)), where v_k is the item of recency k. The state is the output of a
    LayerNorm, so its length is its gain times sqrt(H). At first w is 1 and exp(a_k) is decay^k.

    Args:
        max_length: the most items of a history.
        decay: initial ratio of the weight of an item to that of the next newer one.
    """

    def __init__(self, max_length: int, decay: float = DECAYS[0]):
        super().__init__()
        self.recency = nn.Parameter(torch.empty(max_length))
        self.weight = nn.Parameter(torch.tensor(1 / MEAN_STEP))
        with torch.no_grad():
            self._set_decay(decay)

    def switch_off(self) -> None:
        """Set w to 0. It can still be learned."""
        nn.init.zeros_(self.weight)

    @torch.no_grad()
    def start(self, batch: Any, loss: Callable[[Any], Tensor]) -> None:
        """Choose the decay with the lowest loss on a batch.

        Args:
            batch: a training batch.
            loss: the loss of the model with this mean, without dropout.
        """
        losses = []
        for decay in DECAYS:
            self._set_decay(decay)
            losses.append(loss(batch).item())
        self._set_decay(DECAYS[losses.index(min(losses))])

    def _set_decay(self, decay):
        # no weight is so small that it cannot grow
        recencies = torch.arange(float(len(self.recency)), device=self.recency.device).clamp(max=12)
        self.recency.copy_(math.log(decay) * recencies / MEAN_STEP)

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
