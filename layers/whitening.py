"""Whitening with the statistics of a catalogue. U items, N items of the catalogue, D text width."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_ROWS_AT_ONCE = 1 << 13  # of the catalogue. Bounds the memory of `fit`: 8,192 rows of 768 float32 numbers take 25 MB
_LEAST_VARIANCE = 1e-10  # total variance of unit vectors that are equal, apart from rounding
_FLOOR = 1e-4  # of the mean variance, for directions without variance if the shrinkage is 0, as with two items


class Whitening(nn.Module):
    """ZCA whitening of text vectors. The layer has no parameters: `fit` computes its statistics from a catalogue.

    The vectors are cut to unit length, centred, multiplied by the inverse square root of the covariance, and cut to
    unit length again. ZCA, unlike PCA, keeps the axes of the text encoder. So weights that were learned on the whitened
    vectors of one domain fit those of another domain.

    The covariance is shrunk towards a multiple of the identity, so that the layer also works with fewer items than
    dimensions. The amount of shrinkage is that of Ledoit and Wolf (Journal of Multivariate Analysis 88, 2004).
    scikit-learn's `ledoit_wolf` computes the same, but needs several copies of the table. Here the sums run over blocks
    of rows. No sample is needed: of the fourth moments, the formula reads only the mean of |x|^4 over the centred rows
    x.

    Before `fit`, the layer only cuts to unit length. The statistics are buffers, so they are saved with the model.

    Args:
        width: D.

    Attributes:
        mean: float [D].
        matrix: float [D, D], symmetric.
    """

    mean: Tensor
    matrix: Tensor

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("matrix", torch.eye(width))

    @torch.no_grad()
    def fit(self, features: Tensor) -> "Whitening":
        """Compute mean and matrix from the text vectors of a catalogue. Returns the layer itself.

        If all items have the same vector, the matrix is 0, because the texts then say nothing.

        Args:
            features: float32 or float16 [N, D]. The table is read twice, in blocks of rows.
        """
        mean, covariance, fourth_moment = _moments(features)
        if covariance.trace() < _LEAST_VARIANCE:
            matrix = torch.zeros_like(covariance)
        else:
            variances, directions = torch.linalg.eigh(_shrunk(covariance, fourth_moment, len(features)))
            variances = variances.clamp(min=_FLOOR * variances.mean())
            matrix = directions / variances.sqrt() @ directions.T
        self.mean.copy_(mean)
        self.matrix.copy_(matrix)
        return self

    def forward(self, features: Tensor) -> Tensor:
        """Text vectors, float [U, D], to whitened unit vectors, float32 [U, D]. A vector that becomes 0 stays 0."""
        with torch.autocast(features.device.type, enabled=False):
            centred = F.normalize(features.float(), dim=-1) - self.mean
            return F.normalize(centred @ self.matrix, dim=-1)

    def whiten_table(self, table: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The whitened vectors of a catalogue, in blocks of rows: [N, D] -> [N, D] of the type `dtype`."""
        return torch.cat([self(block).to(dtype) for block in table.split(_ROWS_AT_ONCE)])


class DomainWhitening(nn.ModuleList):
    """A `Whitening` for each domain, with the statistics of its items.

    Args:
        tables: the text vectors of each domain, float [N_d, D]. Without rows, the statistics are loaded afterwards.
    """

    def __init__(self, tables: Sequence[Tensor]):
        layers = [Whitening(table.size(1)) for table in tables]
        super().__init__(layer.fit(table) if len(table) else layer for layer, table in zip(layers, tables, strict=True))
        # the first id of the next domain. A buffer moves to the GPU with the model
        self.register_buffer("_ends", torch.tensor([len(table) for table in tables]).cumsum(0) + 1, persistent=False)

    def forward(self, vectors: Tensor, ids: Tensor) -> Tensor:
        """Whiten the text vectors of items of any domains.

        Args:
            vectors: float [U, D].
            ids: int64 [U]. The ids of the domains follow one another from 1 to N. Id N + i is item i again.

        Returns:
            float32 [U, D], of unit length.
        """
        ends: Any = self._ends
        domains = torch.searchsorted(ends, (ids - 1) % (ends[-1] - 1) + 1, right=True)
        whitened = torch.empty_like(vectors, dtype=torch.float32)
        for domain in domains.unique().tolist():
            here = domains == domain
            whitened[here] = self[domain](vectors[here])
        return whitened

    def whiten_table(self, table: Tensor) -> Tensor:
        """The whitened text vectors of the catalogue of a single domain: [N, D] -> [N, D] of the same type."""
        whitening: Any
        (whitening,) = self
        return whitening.whiten_table(table, table.dtype)


def _moments(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean [D], covariance [D, D], and the mean of |x|^4 over the centred rows x [], of the rows cut to unit length.

    Each block of rows is computed in float32, and the sums over the blocks are float64.
    """
    n_rows, width = features.shape
    mean = torch.zeros(width, dtype=torch.float64, device=features.device)
    covariance = mean.new_zeros(width, width)
    fourth_moment = mean.new_zeros(())
    for block in features.split(_ROWS_AT_ONCE):
        mean += F.normalize(block.float(), dim=-1).sum(0, dtype=torch.float64) / n_rows
    for block in features.split(_ROWS_AT_ONCE):
        centred = F.normalize(block.float(), dim=-1) - mean.float()
        covariance += (centred.T @ centred).double() / n_rows
        fourth_moment += centred.square().sum(1).square().sum().double() / n_rows
    return mean, covariance, fourth_moment


def _shrunk(covariance: Tensor, fourth_moment: Tensor, n_rows: int) -> Tensor:
    """The covariance with the shrinkage of Ledoit and Wolf, [D, D].

    Args:
        covariance: [D, D], of the centred rows x.
        fourth_moment: the mean of |x|^4.
        n_rows: N.
    """
    variance = covariance.diagonal().mean()
    target = variance * torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    error = (fourth_moment - covariance.square().sum()) / n_rows  # expected squared error of the covariance
    distance = (covariance - target).square().sum()
    shrinkage = (error / distance).clamp(0, 1) if distance > 0 else 0.0
    return torch.lerp(covariance, target, shrinkage)
