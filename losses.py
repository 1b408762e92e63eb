"""The losses, as pure functions of tensors. B and K: queries and keys; N candidates; H hidden size."""

import torch
import torch.nn.functional as F


def keep_local(*tensors):
    """The gather function of a single process: everything is here already. Returns (tensors, offset, processes)."""
    return tensors, 0, 1


def in_batch_contrastive(query, key, targets, owners, temperature, weights=None, gather=keep_local):
    """S(a, b): each query against the keys of the whole batch (paper, equations 7 and 8).

    mean_i [ log sum_j exp(a_i . b_j / t) - a_i . b_i / t ], all vectors normalised. Left out as negatives: keys j != i
    with the same target item as i, and keys that belong to the same user. They are left out exactly (-inf before
    the log-sum-exp).

    Args:
        query, key (float [B, H]): key i is the positive of query i.
        targets (int64 [B]): the target item of each pair.
        owners (int64 [B] or None): the user of each pair; None where each is another's.
        temperature (float): t.
        weights (float [B] or None): a pair that counts w times is w queries, and w negatives of the others.
        gather (callable): joins tensors over all processes, with gradients; gives (tensors, place of ours, processes).

    Returns:
        float []: the mean over the queries of all processes, times the number of processes where gradients are
        averaged over them; for one process the plain mean.
    """
    query, key = F.normalize(query.float(), dim=-1), F.normalize(key.float(), dim=-1)
    count = torch.ones(len(query), device=query.device) if weights is None else weights
    same = targets if owners is None else owners
    (all_keys, all_targets, all_same, all_count), offset, processes = gather(key, targets, same, count)
    place = torch.arange(len(query), device=query.device) + offset
    excluded = (targets[:, None] == all_targets) | (same[:, None] == all_same)  # [B, K]
    excluded[place - offset, place] = False
    logits = ((query / temperature) @ all_keys.T).masked_fill_(excluded, -torch.inf)
    if weights is not None:
        extra = all_count.log().repeat(len(query), 1)
        extra[place - offset, place] = 0.0
        logits = logits + extra
    return (F.cross_entropy(logits, place, reduction="none") * count).sum() * processes / all_count.sum()


def catalogue_cross_entropy(query, candidates, targets, temperature, weights=None):
    """Cross entropy of cos(s, t) / temperature over the candidates (paper, equations 9 and 10).

    Args:
        query (float [B, H]): sequence representations.
        candidates (float [N, H]): item representations.
        targets (int64 [B]): the row of each query's item in `candidates`.
        temperature (float).
        weights (float [B] or None): how often each query counts.

    Returns:
        float []: the mean.
    """
    query, candidates = F.normalize(query.float(), dim=-1), F.normalize(candidates.float(), dim=-1)
    logits = (query / temperature) @ candidates.T  # [B, N]
    if weights is None:
        return F.cross_entropy(logits, targets)
    return (F.cross_entropy(logits, targets, reduction="none") * weights).sum() / weights.sum()
