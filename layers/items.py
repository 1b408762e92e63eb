"""The items of a batch, each represented once. U distinct items, H hidden size."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def distinct_ids(ids: list[Tensor], first: int = 1) -> Tensor:
    """The distinct ids in several int64 tensors, ascending: int64 [U]. Padding (0) is replaced by the item `first`, the
    smallest id that occurs."""
    return torch.cat([part.flatten() for part in ids]).clamp(min=first).unique()


def look_up(ids: list[Tensor], represent: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Represent items, each distinct item once.

    Args:
        ids: int64 [...] each. Padding (0) gets the representation of some item.
        represent: the representations of distinct ids, int64 [U] -> float [U, H].

    Returns:
        float [..., H] each.
    """
    distinct = distinct_ids(ids)
    table = ItemTable(distinct, represent(distinct))
    return [table[part] for part in ids]


class ItemTable:
    """The representations of some items, each item once.

    Args:
        ids: int64 [U], ascending and distinct.
        vectors: float [U, H].
        log_counts: float [U], if the items are a sample of the catalogue: the logarithm of the number of items that
            each of them stands for. Else None.
    """

    def __init__(self, ids: Tensor, vectors: Tensor, log_counts: Tensor | None = None):
        self.ids, self.vectors, self.log_counts = ids, vectors, log_counts

    def rows(self, ids: Tensor) -> Tensor:
        """The row of each item, shaped like `ids`, all of which must be in the table. Padding (0) gets row 0. No result
        depends on it."""
        return torch.searchsorted(self.ids, ids.contiguous())

    def __getitem__(self, ids: Tensor) -> Tensor:
        """The representations of items: ids int64 [...] -> float [..., H]."""
        return F.embedding(self.rows(ids), self.vectors)
