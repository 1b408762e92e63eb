"""The rank of a target among scores. B rows, N candidates."""

import torch
from torch import Tensor

TIE = 1e-6  # scores that differ by less than this share are equal: float32 rounding may separate equal items


def expected_ranks(scores: Tensor, targets: Tensor) -> Tensor:
    """How many candidates precede each target. Equal scores count one half, their expectation under random order.

    Args:
        scores: float [B, N]; -inf for what is no candidate.
        targets: int64 [B], the column of each row's target.

    Returns:
        float64 [B], 0 for the best place; NaN where a score of the row is NaN.
    """
    own = scores.gather(1, targets[:, None])
    margin = TIE * own.abs()
    higher = (scores > own + margin).sum(1)
    not_lower = (scores >= own - margin).sum(1)  # the target included
    ranks = (higher + not_lower - 1).double() / 2
    return ranks.masked_fill(scores.isnan().any(1), torch.nan)
