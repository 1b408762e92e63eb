"""Item-to-item weights that are counted or solved instead of trained, and their sum over a history.

B rows, L history items, N items of the catalogue, K weights of an item. Row and column i of a matrix belong to the item
with the id i + 1.
"""

import warnings
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse import csr_matrix, diags
from torch import Tensor, nn

from common.errors import UserError

if TYPE_CHECKING:
    from data import Sequences

EASE_MAX_ITEMS = 30_000  # two matrices of 30,000 x 30,000 float32 numbers take 7.2 GB
# `ItemToItem` solves EASE for at most this many items: 3.2 GB, and a minute or two on a processor
_SOLVED_MAX_ITEMS = 20_000
_REG_WEIGHT = 20.0  # lambda of EASE in `ItemToItem`


def transition_counts(
    sequences: "Sequences", n_items: int, window: int = 5, decay: float = 0.6, backward: float = 0.3
) -> csr_matrix:
    """Count how often one item follows another.

    A pair of items at the distance k in a sequence counts decay^(k - 1) from the older to the newer item, and
    `backward` times as much from the newer to the older. An item that follows itself is counted as well. Each sequence
    counts once, whatever its weights. If the rows of a user were folded into several sequences, each of them counts.

    Args:
        sequences: the training sequences.
        n_items: N.
        window: the largest distance.
        decay: the weight per further step.
        backward: the weight of the opposite direction.

    Returns:
        float32 [N, N], from row to column.
    """
    items = sequences.items - 1
    ends = np.repeat(sequences.offsets[1:], np.diff(sequences.offsets))  # [T], of each item's sequence
    counts = csr_matrix((n_items, n_items), dtype=np.float32)
    for distance in range(1, window + 1):
        older = np.flatnonzero(np.arange(distance, len(items) + distance) < ends)
        pairs = items[older], items[older + distance]
        weights = np.full(len(older), decay ** (distance - 1), np.float32)
        counts += csr_matrix((weights, pairs), shape=counts.shape)
    return counts + backward * counts.T.tocsr() if backward else counts


def normalized_transitions(counts: csr_matrix, damping: float = 5.0) -> csr_matrix:
    """Divide each count by the square roots of the degrees of both items, so that frequent items do not dominate.

    The degree of an item is the sum of its row (for the item before) or of its column (for the item after).

    Args:
        counts: [N, N], from `transition_counts`.
        damping: is added to each degree. Without it, the transitions of rare items have the largest weights.

    Returns:
        float32 [N, N].
    """
    before, after = (np.asarray(counts.sum(axis)).ravel() + damping for axis in (1, 0))
    scales = [diags(np.where(degree > 0, degree, 1) ** -0.5) for degree in (before, after)]
    return (scales[0] @ counts @ scales[1]).astype(np.float32).tocsr()


def ease_weights(sequences: "Sequences", n_items: int, reg_weight: float) -> Tensor:
    """The item-to-item weights of EASE (Steck, WWW 2019, equation 8).

    They are the ridge regression of each item on all other items, over the users. A user either has an item in the
    training sequences or not, however often it occurs, and in however many sequences.

    Args:
        sequences: the training sequences.
        n_items: N, at most `EASE_MAX_ITEMS`.
        reg_weight: lambda, above 0.

    Returns:
        float32 [N, N], from row to column. The diagonal is 0.

    Raises:
        UserError: the catalogue is too large.
    """
    if n_items > EASE_MAX_ITEMS:
        raise UserError(
            f"model EASE: found a catalogue of {n_items:,} items, expected at most {EASE_MAX_ITEMS:,}, because EASE "
            "holds a number for each pair of items; choose ItemTransitions"
        )
    matrix = user_items(sequences, n_items)
    gram = torch.from_numpy((matrix.T @ matrix).toarray())
    gram.diagonal().add_(reg_weight)
    factor = torch.linalg.cholesky(gram)
    del gram  # at most two matrices at a time
    inverse = torch.cholesky_inverse(factor).mT  # symmetric; transposed, its rows lie together in memory
    return inverse.div_(-inverse.diagonal().clone()).fill_diagonal_(0)


def user_items(sequences: "Sequences", n_items: int) -> csr_matrix:
    """Which items each user has in the training sequences: float32 [users, N], 0 or 1."""
    users = np.repeat(np.unique(sequences.users, return_inverse=True)[1], np.diff(sequences.offsets))
    matrix = csr_matrix((np.ones(len(users), np.float32), (users, sequences.items - 1)), (users.max() + 1, n_items))
    matrix.data[:] = 1  # scipy has summed repeated pairs
    return matrix


def cosine_neighbors(sequences: "Sequences", n_items: int, neighbors: int, shrink: float) -> csr_matrix:
    """The cosines of the sets of users of two items, for the nearest items of each item.

    Args:
        sequences: the training sequences.
        n_items: N.
        neighbors: how many items an item keeps, at most.
        shrink: added to the number of users of each item.

    Returns:
        float32 [N, N], from row to column. The diagonal is 0.
    """
    matrix = user_items(sequences, n_items)
    degrees = np.asarray(matrix.sum(0)).ravel() + shrink
    scale = diags(np.where(degrees > 0, degrees, 1) ** -0.5)
    cosines = (scale @ (matrix.T @ matrix) @ scale).tocsr()
    cosines.setdiag(0)
    columns, values = (part.numpy() for part in _largest_of_sparse(cosines, min(neighbors, n_items)))
    kept = values > 0
    return csr_matrix((values[kept], (kept.nonzero()[0], columns[kept])), cosines.shape)


def spectral_vectors(
    sequences: "Sequences", n_items: int, size: int, window: int = 5, decay: float = 0.7, damping: float = 5.0
) -> Tensor:
    """Vectors of items whose inner products approximate how often two items occur near each other.

    They are the leading singular vectors of the symmetric transition counts, which `normalized_transitions` divides by
    the degrees, times the square roots of the singular values. An item that occurs in no training sequence has the
    vector 0. The decomposition is randomized (Halko, Martinsson and Tropp, SIAM Review 53, 2011): it needs products of
    the sparse matrix with few vectors.

    Args:
        sequences: the training sequences.
        n_items: N.
        size: H.
        window, decay: see `transition_counts`.
        damping: see `normalized_transitions`. It makes the vectors of rare items shorter.

    Returns:
        float32 [N, H]. The root mean square of the lengths of all rows is 1. If N < H, the last H - N columns are 0.
    """
    from sklearn.utils.extmath import randomized_svd  # 1 s to import, and few runs need it

    counts = transition_counts(sequences, n_items, window, decay, backward=1.0)
    matrix = normalized_transitions(counts, damping)
    # always the same random numbers: processes and seeds of a training share the vectors
    left, values, _ = randomized_svd(matrix, min(size, n_items), n_iter=6, random_state=0)
    vectors = torch.from_numpy(left * np.sqrt(values)).float()
    vectors = F.pad(vectors, (0, size - vectors.size(1)))
    return vectors / vectors.square().sum(1).mean().sqrt().clamp(min=1e-12)


def recency_weights(history: Tensor, lengths: Tensor, decay: float) -> Tensor:
    """Weights of the items of a history: 1 for the newest position, then decay, decay^2, ...

    An item that occurs more than once has a weight at its newest position only, 0 at the others. So with a decay of 1
    the weights select the set of items. Padding has the weight 0.

    Args:
        history: int64 [B, L], oldest item first, padded with 0 on the right.
        lengths: int64 [B].
        decay: from 0 to 1.

    Returns:
        float32 [B, L].
    """
    age = lengths[:, None] - 1 - torch.arange(history.size(1), device=history.device)  # [B, L]
    ordered, places = history.sort(dim=1, stable=True)
    repeated_later = F.pad(ordered[:, 1:] == ordered[:, :-1], (0, 1))
    ignored = (history == 0).scatter(1, places, repeated_later) | (history == 0)
    return (decay ** age.clamp(min=0).float()).masked_fill(ignored, 0.0)


def sum_over_history(history: Tensor, weights: Tensor, table: Tensor) -> Tensor:
    """The weighted sum of the rows of the history's items.

    Args:
        history: int64 [B, L], padded with 0.
        weights: float32 [B, L], 0 for padding.
        table: float32 [N, K], dense or sparse COO; item i has the row i - 1.

    Returns:
        float32 [B, K], dense.
    """
    if not table.is_sparse:
        return F.embedding_bag((history - 1).clamp(min=0), table, per_sample_weights=weights, mode="sum")
    rows, columns = weights.nonzero(as_tuple=True)
    places = torch.stack([rows, history[rows, columns] - 1])
    selection = _sparse(places, weights[rows, columns], (len(history), len(table)))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")  # torch.sparse.mm uses it inside
        return torch.sparse.mm(selection, table).to_dense()


def to_torch(matrix: csr_matrix) -> Tensor:
    """A sparse matrix of scipy as a sparse COO tensor."""
    coo = matrix.tocoo()
    places = torch.from_numpy(np.stack([coo.row, coo.col]).astype(np.int64))
    return _sparse(places, torch.from_numpy(coo.data), coo.shape).coalesce()


def _sparse(places, values, shape):
    return torch.sparse_coo_tensor(places, values, shape, check_invariants=False)  # torch warns without the argument


class ItemToItem(nn.Module):
    """Logits that are the sum of item-to-item weights over the history, times a factor. Nothing here is trained.

    The weights are those of EASE, or normalized transitions if the catalogue is too large to solve EASE. An item keeps
    only the largest of its weights. The logit of an item of the history is 0.

    A low-rank model, such as a product of id embeddings, cannot represent these weights: their information is spread
    over more dimensions than the hidden size has.

    Args:
        n_items: N.
        size: K, the number of weights that an item keeps, at most N.

    Attributes:
        columns: int32 [N, K], the items to which the weights of an item lead.
        values: float32 [N, K], the weights.
        factor: float32 [], of the logits. At first 0.
        decay: float32 [], the weight of an item of the history relative to the next newer one.
    """

    columns: Tensor
    values: Tensor
    factor: Tensor
    decay: Tensor

    def __init__(self, n_items: int, size: int):
        super().__init__()
        size = min(size, n_items)
        self.register_buffer("columns", torch.zeros(n_items, size, dtype=torch.int32))
        self.register_buffer("values", torch.zeros(n_items, size))
        self.register_buffer("factor", torch.tensor(0.0))
        self.register_buffer("decay", torch.tensor(1.0))

    def switch_off(self) -> None:
        """Set the factor to 0."""
        self.factor.zero_()

    def fit(self, sequences: "Sequences") -> None:
        """Compute the weights from the training sequences."""
        n_items, size = self.values.shape
        if n_items <= _SOLVED_MAX_ITEMS:
            columns, values = _largest_of_dense(ease_weights(sequences, n_items, _REG_WEIGHT), size)
        else:
            weights = normalized_transitions(transition_counts(sequences, n_items))
            columns, values = _largest_of_sparse(weights, size)
        self.columns.copy_(columns)
        self.values.copy_(values)

    def forward(self, history: Tensor, lengths: Tensor, decay: float, factor: float = 1.0) -> Tensor:
        """The logits for a decay and a factor: histories int64 [B, L], their lengths int64 [B] -> float32 [B, N]."""
        n_items = len(self.values)
        weights = recency_weights(history, lengths, decay)  # [B, L]
        rows, places = weights.nonzero(as_tuple=True)
        items = history[rows, places] - 1  # [Z]
        targets = rows[:, None] * n_items + self.columns[items]  # [Z, K]
        values = self.values[items] * (factor * weights[rows, places, None])  # not the sums, which are many more
        sums = values.new_zeros(len(history), n_items)
        sums.view(-1).scatter_add_(0, targets.flatten(), values.flatten())
        sums[rows, items] = 0
        return sums

    def logits(self, history: Tensor, lengths: Tensor, scale: float = 1.0) -> Tensor:
        """The logits times `scale`: histories int64 [B, L] and their lengths int64 [B] -> float32 [B, N]."""
        return self(history, lengths, float(self.decay), scale * float(self.factor))


def _largest_of_dense(matrix: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The largest absolute values of each row: columns int64 [N, size] and values float [N, size]."""
    columns = torch.cat([block.abs().topk(size).indices for block in matrix.split(1024)])
    return columns, matrix.gather(1, columns)


def _largest_of_sparse(matrix: csr_matrix, size: int) -> tuple[Tensor, Tensor]:
    """The same for a sparse matrix. A row with fewer entries is filled with zeros."""
    coo = matrix.tocoo()
    order = np.lexsort((-np.abs(coo.data), coo.row))
    rows = coo.row[order]
    place = np.arange(len(rows)) - np.searchsorted(rows, rows)  # within the row, the largest first
    order, rows, place = (column[place < size] for column in (order, rows, place))
    columns, values = np.zeros((matrix.shape[0], size), np.int64), np.zeros((matrix.shape[0], size), np.float32)
    columns[rows, place], values[rows, place] = coo.col[order], coo.data[order]
    return torch.from_numpy(columns), torch.from_numpy(values)
