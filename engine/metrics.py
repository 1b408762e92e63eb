"""Metrics of a table of ranks, one short function each. `engine.groups` breaks them down.

An evaluated row has one target. Ranks count from 1. Where scores are equal, the rank is the expected rank if they are
in random order. It may be a fraction: if two items have the highest score, each of them has rank 1.5. A target is
within the first k if its rank is at most k. The gain (of NDCG, MRR) is computed from its rank: it is the
gain of the expected rank, not the expected gain.
"""

import dataclasses
from collections.abc import Callable, Iterable

import numpy as np


@dataclasses.dataclass(frozen=True)
class RankTable:
    """The ranks of an evaluation: one row per row of the split, R in all. Usually that is one row per user.

    Attributes:
        user (int64 [R]): user ids; raw ids, str [R], in a table that was read from a file.
        target (int64 [R]): item ids; raw ids, str [R], in a table that was read from a file.
        history_length (int64 [R]): number of history items that the model sees.
        rank (float64 [R]): expected rank of the target among the candidates, from 1; NaN where a score is NaN.
        candidates (int64 [R]): number of candidates, the target included.
        in_history (bool [R]): whether the target occurs in the history.
    """

    user: np.ndarray
    target: np.ndarray
    history_length: np.ndarray
    rank: np.ndarray
    candidates: np.ndarray
    in_history: np.ndarray

    def __len__(self) -> int:
        return len(self.rank)

    def __getitem__(self, index: np.ndarray) -> "RankTable":
        """Some rows, given by indices or by a mask."""
        return RankTable(**{field: column[index] for field, column in vars(self).items()})


# -- metrics: float64 [R], one value per row --------------------------------------------------------------------------


def recall(table: RankTable, k: int) -> np.ndarray:
    """1 where the target is within the first k, else 0. With one target per row, Recall and Hit are the same."""
    return (table.rank <= k).astype(np.float64)


def precision(table: RankTable, k: int) -> np.ndarray:
    """The share of the first k that are targets: 1 / k where the target is among them, else 0."""
    return recall(table, k) / k


def ndcg(table: RankTable, k: int) -> np.ndarray:
    """1 / log2(rank + 1) where the target is within the first k, else 0."""
    return recall(table, k) / np.log2(table.rank + 1)


def mrr(table: RankTable, k: int) -> np.ndarray:
    """1 / rank where the target is within the first k, else 0. With one target per row, MRR and MAP are the same."""
    return recall(table, k) / table.rank


# Names in lower case, those of RecBole where it has the metric. To add a metric, write its function and name it here. A
# larger value is better.
METRICS: dict[str, Callable[[RankTable, int], np.ndarray]] = {
    "recall": recall,
    "hit": recall,
    "precision": precision,
    "ndcg": ndcg,
    "mrr": mrr,
    "map": mrr,
}


def mean_metrics(table: RankTable, names: Iterable[str], topk: Iterable[int]) -> dict[str, float]:
    """The mean over all rows of each metric of `METRICS` at each k, for example {"recall@10": 0.0963}, unrounded."""
    topk = list(topk)
    return {f"{name}@{k}": float(METRICS[name](table, k).mean()) for name in names for k in topk}
