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
    margin = (TIE * own.abs()).masked_fill(own.isinf(), 0.0)  # inf - inf is NaN
    higher = (scores > own + margin).sum(1, dtype=torch.int32)  # int64, the default, takes four times as long
    not_lower = (scores >= own - margin).sum(1, dtype=torch.int32)  # the target included
    ranks = (higher + not_lower - 1).double() / 2
    return ranks.masked_fill(scores.amax(1).isnan(), torch.nan)  # the maximum of a row with a NaN is NaN
