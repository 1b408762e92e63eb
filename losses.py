"""The losses, as pure functions of tensors. B and K: queries and keys; N candidates; H hidden size."""

import torch
import torch.nn.functional as F

_LOGITS = 1 << 22  # of the cross entropy held at a time


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

    def leave_out(here, logits):
        """Change the logits [b, K] of some queries in place."""
        own = logits.gather(1, place[here, None])
        if weights is not None:
            logits += all_count.log()  # a positive counts once, however often it is there
        excluded = (targets[here, None] == all_targets) | (same[here, None] == all_same)
        logits.masked_fill_(excluded, -torch.inf).scatter_(1, place[here, None], own)

    share = count * (processes / all_count.sum())
    return _CrossEntropy.apply(query / temperature, all_keys, place, share, leave_out)


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
    share = torch.full_like(query[:, 0], 1 / len(query)) if weights is None else weights / weights.sum()
    return _CrossEntropy.apply(query / temperature, candidates, targets, share.float(), None)


class _CrossEntropy(torch.autograd.Function):
    """sum_i w_i [ log sum_j exp(q_i . c_j) - q_i . c_t(i) ] without ever holding all B x N logits.

    `change(rows, logits)` may alter the logits [b, N] of some queries in place, such as leave some out (-inf).

    The loss is one number, so its gradients can be made in the forward pass, chunk by chunk, and are scaled in the
    backward pass: three products, no logits kept.
    """

    @staticmethod
    def forward(ctx, query, candidates, targets, weights, change):
        loss = query.new_zeros(())
        for_query, for_candidates = torch.zeros_like(query), torch.zeros_like(candidates)
        rows = max(1, _LOGITS // max(1, len(candidates)))
        with torch.autocast(query.device.type, enabled=False):
            for start in range(0, len(query), rows):
                here = slice(start, start + rows)
                logits = query[here] @ candidates.T  # [b, N]
                if change is not None:
                    change(here, logits)
                loss += _chunk(logits, query[here], candidates, targets[here], weights[here],
                               for_query[here], for_candidates, any(ctx.needs_input_grad))  # fmt: skip
        ctx.save_for_backward(for_query, for_candidates)
        return loss

    @staticmethod
    def backward(ctx, gradient):
        for_query, for_candidates = ctx.saved_tensors
        return for_query * gradient, for_candidates * gradient, None, None, None


def _chunk(logits, query, candidates, targets, weights, for_query, for_candidates, with_gradients):
    """The loss of some queries, float []; puts their gradients in place, and uses the logits up."""
    highest = logits.amax(dim=1, keepdim=True)
    own = logits.gather(1, targets[:, None])
    powers = logits.sub_(highest).exp_()
    total = powers.sum(dim=1, keepdim=True)
    if with_gradients:
        share = powers.mul_(weights[:, None] / total)
        share.scatter_add_(1, targets[:, None], -weights[:, None])
        torch.mm(share, candidates, out=for_query)
        for_candidates.addmm_(share.T, query)
    return ((total.log() + highest - own)[:, 0] * weights).sum()
