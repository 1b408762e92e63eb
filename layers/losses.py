"""The losses, plain functions of tensors. B queries, K keys, N candidates, H hidden size."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from layers.logits import SparseLogits


def keep_local(*tensors: Tensor) -> tuple[tuple[Tensor, ...], int, int]:
    """The gather function of a single process. It returns the tensors unchanged.

    Returns:
        (the tensors of all processes, the row at which the part of this process starts, the number of processes)
    """
    return tensors, 0, 1


def cross_entropy(
    query: Tensor,
    keys: Tensor,
    positives: Tensor,
    *,
    weights: Tensor,
    log_counts: Tensor | None = None,
    left_out: Sequence[tuple[Tensor, Tensor]] = (),
    added: SparseLogits | None = None,
) -> Tensor:
    """sum_i w_i [ log sum_j n_j exp(l_ij) - l_ip(i) ] with the logits l_ij = q_i . k_j + a_ij.

    Args:
        query: float [B, H].
        keys: float [K, H].
        positives: int64 [B], the index p(i) of the positive key of each query. It counts once, whatever `log_counts`
            says.
        weights: float [B], w_i.
        log_counts: float [K], log n_j. None: every n_j is 1.
        left_out: pairs of labels, int64 [B] of the queries and int64 [K] of the keys. A key that shares a label with a
            query is not a negative of that query.
        added: a_ij. None: 0.

    Returns:
        float []
    """
    with torch.autocast(query.device.type, enabled=False):
        logits = query @ keys.T  # [B, K]
        logits = logits if added is None else added.add_to(logits)
        counted = logits if log_counts is None else logits + log_counts
        for query_labels, key_labels in left_out:
            counted = counted.masked_fill(query_labels[:, None] == key_labels, -torch.inf)
        # the positive keeps its own logit: it counts once and is never left out
        logits = counted.scatter(1, positives[:, None], logits.gather(1, positives[:, None]))
        return (weights * F.cross_entropy(logits, positives, reduction="none")).sum()


def in_batch_contrastive(
    query: Tensor,
    key: Tensor,
    *,
    targets: Tensor,
    users: Tensor | None,
    temperature: float,
    weights: Tensor | None = None,
    gather: Callable = keep_local,
    cross_entropy: Callable[..., Tensor] = cross_entropy,
) -> Tensor:
    """Each query against the keys of the whole batch (paper, section 2.2).

    mean_i [ log sum_j exp(a_i . b_j / t) - a_i . b_i / t ] over normalized vectors. The negatives of query i are the
    keys j that have both another target item and another user. The published code keeps other pairs
    of the same user.

    Args:
        query, key: float [B, H]; key i is the positive of query i.
        targets: int64 [B], the target item of each pair.
        users: int64 [B], the user of each pair; None if no two pairs have the same user.
        temperature: t.
        weights: float [B]. A pair of weight w counts as w pairs, both as a query and as a negative. None: every pair
            counts once.
        gather: concatenates tensors over all processes, with gradients; see `keep_local`.
        cross_entropy: the plain function of this module or a faster one.

    Returns:
        float []: the mean over the queries of all processes, times the number of processes, because gradients are
        averaged over processes.
    """
    query, key = F.normalize(query.float(), dim=-1), F.normalize(key.float(), dim=-1)
    count = torch.ones(len(query), device=query.device) if weights is None else weights
    users = targets if users is None else users
    (keys, all_targets, all_users, all_count), offset, processes = gather(key, targets, users, count)
    return cross_entropy(
        query / temperature,
        keys,
        torch.arange(len(query), device=query.device) + offset,
        weights=count * (processes / all_count.sum()),
        log_counts=None if weights is None else all_count.log(),
        left_out=[(targets, all_targets), (users, all_users)],
    )


def catalogue_cross_entropy(
    query: Tensor,
    candidates: Tensor,
    *,
    targets: Tensor,
    temperature: float,
    weights: Tensor | None = None,
    log_counts: Tensor | None = None,
    added: SparseLogits | None = None,
    label_smoothing: float = 0.0,
    gather: Callable = keep_local,
    cross_entropy: Callable[..., Tensor] = cross_entropy,
) -> Tensor:
    """Cross entropy of cos(query, candidate) / temperature over the candidates (paper, section 2.3).

    Args:
        query: float [B, H], sequence representations.
        candidates: float [N, H], item representations.
        targets: int64 [B], the row of each query's target item in `candidates`.
        temperature: divides the cosines.
        weights: float [B], how often each query counts; None: once.
        log_counts: float [N], if the candidates are a sample of the catalogue: the logarithm of the number of items
            that each of them stands for, see `draw_negatives`. It is 0 for every target. None: the whole catalogue.
        added: logits [B, N] that are added to the divided cosines. None: 0.
        label_smoothing: the share of the probability that the target gives to all candidates in equal parts (Szegedy et
            al., CVPR 2016, section 7).
        gather: as in `in_batch_contrastive`. Each process has its own queries and all candidates.
        cross_entropy: the plain function of this module or a faster one.

    Returns:
        float []: the mean as in `in_batch_contrastive`.
    """
    query, candidates = F.normalize(query.float(), dim=-1) / temperature, F.normalize(candidates.float(), dim=-1)
    count = torch.ones_like(query[:, 0]) if weights is None else weights.float()
    (all_count,), _, processes = gather(count)
    weights = count * (processes / all_count.sum())
    loss = cross_entropy(query, candidates, targets, weights=weights, log_counts=log_counts, added=added)
    if not label_smoothing:
        return loss
    share = torch.ones_like(candidates[:, 0]) if log_counts is None else log_counts.exp()
    excess = _target_minus_mean_logit(query, candidates, targets, share / share.sum(), added)
    return loss + label_smoothing * (weights * excess).sum()


def _target_minus_mean_logit(query, candidates, targets, share, added):
    """The logit of the target minus the mean logit of the candidates, weighted by `share` [N]; float [B].

    Smoothed labels subtract (1 - s) times the target's logit and s times this mean from the logarithm of the sum.
    """
    excess = (query * (candidates[targets] - share @ candidates)).sum(-1)
    if added is None:
        return excess
    mean = torch.zeros_like(excess).index_add(0, added.rows, added.values * share[added.columns])
    return excess + added.at(targets) - mean


def draw_negatives(batch_items: Tensor, n_items: int, count: int) -> tuple[Tensor, float]:
    """Sample negatives uniformly, without replacement, from the items that are not in the batch.

    In the sum of a softmax, each batch item counts once, and each negative counts for the (N - U) / K items that it
    stands for. This sum is an unbiased estimate of the sum over the whole catalogue. It is the correction of sampled
    softmax (Jean et al., ACL 2015, section 3) for two strata: the batch items, all of which are used, and the other
    items, which are sampled uniformly.

    Args:
        batch_items: int64 [U], distinct item ids from 1 on, ascending. They are never drawn.
        n_items: the size N of the catalogue.
        count: K, how many to draw. If fewer items are left, all of them are drawn, and K is their number.

    Returns:
        (int64 [K], float): the ids drawn, and log((N - U) / K).
    """
    rest = n_items - len(batch_items)
    count = min(count, rest)
    if not count:
        return batch_items[:0], 0.0
    generator = np.random.default_rng(int(torch.randint(2**62, ())))
    drawn = torch.from_numpy(generator.choice(rest, count, replace=False, shuffle=False)).to(batch_items.device)
    # `drawn` numbers the items outside the batch from 0. The id of number r is r + 1, plus the number of batch items
    # before it. These are the batch items that have at most r outside items before them.
    outside_before = batch_items - 1 - torch.arange(len(batch_items), device=batch_items.device)
    return drawn + torch.searchsorted(outside_before, drawn, right=True) + 1, math.log(rest / count)
