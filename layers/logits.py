"""Logits that are added to those of a model. P predictions, N candidates, Z entries."""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class SparseLogits(NamedTuple):
    """Z entries of a matrix of logits [P, N]. All other entries are 0.

    Attributes:
        rows: int64 [Z], the prediction of each entry, ascending.
        columns: int64 [Z], the candidate of each entry. No two entries have the same row and column.
        values: float [Z].
    """

    rows: Tensor
    columns: Tensor
    values: Tensor

    def add_to(self, logits: Tensor) -> Tensor:
        """The sum of dense logits, float [P, N], and these: float [P, N]."""
        return logits.index_put((self.rows, self.columns), self.values.to(logits.dtype), accumulate=True)

    def at(self, columns: Tensor) -> Tensor:
        """The logit of one candidate per prediction: columns int64 [P] -> float [P]."""
        hit = columns[self.rows] == self.columns
        return self.values.new_zeros(len(columns)).index_add(0, self.rows[hit], self.values[hit])

    def select_rows(self, start: int, stop: int) -> "SparseLogits":
        """The entries of the predictions from `start` to `stop`, which are counted from 0 in the result."""
        low, high = torch.searchsorted(self.rows, self.rows.new_tensor([start, stop])).tolist()
        return SparseLogits(self.rows[low:high] - start, self.columns[low:high], self.values[low:high])

    def select_columns(self, start: int, stop: int) -> "SparseLogits":
        """The entries of the candidates from `start` to `stop`, which are counted from 0 in the result."""
        inside = (self.columns >= start) & (self.columns < stop)
        return SparseLogits(self.rows[inside], self.columns[inside] - start, self.values[inside])


class DenseLogits(NamedTuple):
    """A matrix of logits, with those methods of `SparseLogits` that prediction needs.

    Attributes:
        values: float [P, N].
    """

    values: Tensor

    def add_to(self, logits: Tensor) -> Tensor:
        """The sum of other logits, float [P, N], and these: float [P, N]."""
        return logits + self.values

    def at(self, columns: Tensor) -> Tensor:
        """The logit of one candidate per prediction: columns int64 [P] -> float [P]."""
        return self.values.gather(1, columns[:, None])[:, 0]

    def select_columns(self, start: int, stop: int) -> "DenseLogits":
        """The candidates from `start` to `stop`, which are counted from 0 in the result."""
        return DenseLogits(self.values[:, start:stop])


class SumOfLogits(NamedTuple):
    """The sum of several such matrices, with the methods of `DenseLogits`. The sum is never held as a whole."""

    parts: tuple[Any, ...]

    def add_to(self, logits: Tensor) -> Tensor:
        """The sum of other logits, float [P, N], and these: float [P, N]."""
        for part in self.parts:
            logits = part.add_to(logits)
        return logits

    def at(self, columns: Tensor) -> Tensor:
        """The logit of one candidate per prediction: columns int64 [P] -> float [P]."""
        return torch.stack([part.at(columns) for part in self.parts]).sum(0)

    def select_columns(self, start: int, stop: int) -> "SumOfLogits":
        """The candidates from `start` to `stop`, which are counted from 0 in the result."""
        return SumOfLogits(tuple(part.select_columns(start, stop) for part in self.parts))
