"""The items of a batch, each represented once. U distinct items, H hidden size."""

import torch
import torch.nn.functional as F
from torch import Tensor


def distinct_ids(ids: list[Tensor]) -> Tensor:
    """The distinct ids of several int64 tensors, ascending: int64 [U]. Padding (0) is read as item 1."""
    return torch.cat([part.flatten() for part in ids]).clamp(min=1).unique()


class ItemTable:
    """The representations of some items, each item once.

    Args:
        ids: int64 [U], ascending and distinct.
        vectors: float [U, H].
        log_counts: float [U] or None. Where the items are a sample of the catalogue: the logarithm of how many items
            each one stands for.
    """

    def __init__(self, ids: Tensor, vectors: Tensor, log_counts: Tensor | None = None):
        self.ids, self.vectors, self.log_counts = ids, vectors, log_counts

    def rows(self, ids: Tensor) -> Tensor:
        """The rows of items, shaped like `ids`, all of which must be in the table. Padding (0) gets row 0, which no
        result depends on."""
        return torch.searchsorted(self.ids, ids.contiguous())

    def __getitem__(self, ids: Tensor) -> Tensor:
        """int64 [...] -> float [..., H]."""
        return F.embedding(self.rows(ids), self.vectors)
