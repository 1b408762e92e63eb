"""The rank of a target among scores. B rows, N candidates, H hidden size."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from layers.logits import DenseLogits, SparseLogits, SumOfLogits

TIE = 1e-6  # scores with a smaller relative difference count as equal: rounding may separate equal items
_SCORES_AT_ONCE = 1 << 23  # held by `ranks_in_blocks`


def expected_ranks(scores: Tensor, targets: Tensor) -> Tensor:
    """The rank of each target, counted from 1. Half of the other candidates with the same score as the target count as
    better: this is the expected rank if equal scores are in random order.

    Args:
        scores: float [B, N]; -inf for an item that is not a candidate.
        targets: int64 [B], the column of each row's target.

    Returns:
        float64 [B]; NaN where a score of the row is NaN.
    """
    own = scores.gather(1, targets[:, None])
    return _twice_preceding(scores, own, own.abs()).add(1) / 2


def ranks_in_blocks(
    score: Callable[[Tensor, Tensor], Tensor],
    states: Tensor,
    items: Tensor,
    targets: Tensor,
    added: DenseLogits | SparseLogits | SumOfLogits | None = None,
) -> Tensor:
    """`expected_ranks` without holding the scores of all items.

    The target is scored twice, by itself and in a block, and the two scores may be rounded differently. The rounding
    depends on the vectors, however small their score. So scores are equal where they differ by less than a share of the
    target's score with itself: for unit vectors, a share of 1.

    Args:
        score: float [..., B, H] and [..., n, H] -> float [..., B, n].
        states: float [B, H].
        items: float [N, H].
        targets: int64 [B], rows of `items`.
        added: numbers [B, N] that are added to the scores. None: 0.

    Returns:
        float64 [B]
    """
    target_items = items[targets][:, None]  # [B, 1, H]
    own = score(states[:, None], target_items)[:, 0]  # [B, 1]
    size = score(target_items, target_items)[:, 0].abs().maximum(own.abs())
    if added is not None:
        own = own + added.at(targets)[:, None]
        size = size.maximum(own.abs())
    points: Any = 1
    length = max(1, _SCORES_AT_ONCE // max(1, len(states)))
    for start in range(0, len(items), length):
        scores = score(states, items[start : start + length])
        if added is not None:
            scores = added.select_columns(start, start + length).add_to(scores)
        points = points + _twice_preceding(scores, own, size)
    return points / 2


def _twice_preceding(scores, own, size):
    """2 for each score above that of the target (`own`), 1 for each equal score: float64 [B].

    Scores are equal if they differ by less than `TIE` of `size`, float [B, 1]. The target's own score is one of the
    equal ones. The result is NaN where a score or `own` is NaN.
    """
    margin = (TIE * size).masked_fill(own.isinf(), 0.0)  # inf - inf is NaN
    points = (scores > own + margin).to(torch.int8).add_(scores >= own - margin)
    total = points.sum(1, dtype=torch.int32).double()  # int64, the default, takes four times as long
    return total + 0 * (scores.amax(1) + own[:, 0]).nan_to_num(torch.nan, 0.0, 0.0)  # maxima keep NaN
