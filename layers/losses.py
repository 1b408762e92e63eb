"""The losses, as pure functions of tensors. B and K: queries and keys; N candidates; H hidden size."""

import math

import numpy as np
import torch
import torch.nn.functional as F

_LOGITS = 1 << 22  # of the cross entropy held at a time
_FEW_ROWS = 64  # queries at a time: with fewer, candidates are taken in parts instead


def keep_local(*tensors):
    """The gather function of a single process: everything is here already. Returns (tensors, offset, processes)."""
    return tensors, 0, 1


def in_batch_contrastive(query, key, targets, users, temperature, weights=None, gather=keep_local):
    """S(a, b): each query against the keys of the whole batch (paper, equations 7 and 8).

    mean_i [ log sum_j exp(a_i . b_j / t) - a_i . b_i / t ], all vectors normalised. Left out as negatives: keys j != i
    with the same target item as i, and keys that belong to the same user. They are left out exactly (-inf before
    the log-sum-exp).

    Args:
        query, key (float [B, H]): key i is the positive of query i.
        targets (int64 [B]): the target item of each pair.
        users (int64 [B] or None): the user of each pair; None where each is another's.
        temperature (float): t.
        weights (float [B] or None): a pair that counts w times is w queries, and w negatives of the others.
        gather (callable): joins tensors over all processes, with gradients; gives (tensors, place of ours, processes).

    Returns:
        float []: the mean over the queries of all processes, times the number of processes where gradients are
        averaged over them; for one process the plain mean.
    """
    query, key = F.normalize(query.float(), dim=-1), F.normalize(key.float(), dim=-1)
    count = torch.ones(len(query), device=query.device) if weights is None else weights
    same = targets if users is None else users
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


def catalogue_cross_entropy(query, candidates, targets, temperature, weights=None, log_counts=None, gather=keep_local):
    """Cross entropy of cos(s, t) / temperature over the candidates (paper, equations 9 and 10).

    Args:
        query (float [B, H]): sequence representations.
        candidates (float [N, H]): item representations.
        targets (int64 [B]): the row of each query's item in `candidates`.
        temperature (float).
        weights (float [B] or None): how often each query counts.
        log_counts (float [N] or None): the logarithm of how many items each candidate stands for, itself included,
            where the candidates are a sample of a catalogue (see `draw_others`); 0 for every target.
        gather (callable): as in `in_batch_contrastive`; each process has queries of its own and all candidates.

    Returns:
        float []: the mean over the queries of all processes, times the number of processes where gradients are
        averaged over them; for one process the plain mean.
    """
    query, candidates = F.normalize(query.float(), dim=-1), F.normalize(candidates.float(), dim=-1)
    count = torch.ones_like(query[:, 0]) if weights is None else weights.float()
    (all_count,), _, processes = gather(count)
    share = count * (processes / all_count.sum())

    def correct(here, logits):
        logits += log_counts

    change = None if log_counts is None else correct
    return _CrossEntropy.apply(query / temperature, candidates, targets, share, change)


def draw_others(named, n_items, count):
    """Negatives for a sampled softmax: items drawn evenly, without replacement, from those that a batch does not name.

    With the named items counted once and each drawn one as the exponential of the second value returned, the sum over
    the candidates of a softmax has the sum over the whole catalogue as its mean: the correction of sampled softmax
    (Jean et al., ACL 2015, section 3) for a stratum taken whole and one taken evenly.

    Args:
        named (int64 [U]): distinct rows of the catalogue, ascending; never drawn.
        n_items (int): the catalogue's size N.
        count (int): K, how many to draw; all others where there are fewer.

    Returns:
        (int64 [min(K, N - U)], float): the rows drawn, and log((N - U) / K), the logarithm of how many each stands for.
    """
    rest = n_items - len(named)
    count = min(count, rest)
    if not count:
        return named[:0], 0.0
    generator = np.random.default_rng(int(torch.randint(2**62, ())))
    drawn = torch.from_numpy(generator.choice(rest, count, replace=False, shuffle=False)).to(named.device)
    # the r-th of the others stands behind as many named rows as have at most r others before them
    before = torch.searchsorted(named - torch.arange(len(named), device=named.device), drawn, right=True)
    return drawn + before, math.log(rest / count)


class _CrossEntropy(torch.autograd.Function):
    """sum_i w_i [ log sum_j exp(q_i . c_j) - q_i . c_t(i) ] without ever holding all B x N logits.

    `change(rows, logits)` may alter the logits [b, N] of some queries in place, such as leave some out (-inf).

    The loss is one number, so its gradients can be made in the forward pass, part by part, and are scaled in the
    backward pass: three products, no logits kept.
    """

    @staticmethod
    def forward(ctx, query, candidates, targets, weights, change):
        with_gradients = any(ctx.needs_input_grad)
        for_query, for_candidates = torch.zeros_like(query), torch.zeros_like(candidates)
        arguments = (query, candidates, targets, weights, for_query, for_candidates, with_gradients)
        with torch.autocast(query.device.type, enabled=False):
            if change is None and _LOGITS // max(1, len(candidates)) < _FEW_ROWS:
                loss = _by_candidates(*arguments)
            else:
                loss = _by_queries(*arguments, change)
        ctx.save_for_backward(for_query, for_candidates)
        return loss

    @staticmethod
    def backward(ctx, gradient):
        for_query, for_candidates = ctx.saved_tensors
        return for_query * gradient, for_candidates * gradient, None, None, None


def _by_queries(query, candidates, targets, weights, for_query, for_candidates, with_gradients, change):
    """The loss, float [], some queries at a time, each with all candidates; puts the gradients in place."""
    loss = query.new_zeros(())
    rows = max(1, _LOGITS // max(1, len(candidates)))
    for start in range(0, len(query), rows):
        here = slice(start, start + rows)
        logits = query[here] @ candidates.T  # [b, N]
        if change is not None:
            change(here, logits)
        highest = logits.amax(dim=1, keepdim=True)
        own = logits.gather(1, targets[here, None])
        powers = logits.sub_(highest).exp_()
        total = powers.sum(dim=1, keepdim=True)
        loss += ((total.log() + highest - own)[:, 0] * weights[here]).sum()
        if with_gradients:
            share = powers.mul_(weights[here, None] / total)
            share.scatter_add_(1, targets[here, None], -weights[here, None])
            torch.mm(share, candidates, out=for_query[here])
            for_candidates.addmm_(share.T, query[here])
    return loss


def _by_candidates(query, candidates, targets, weights, for_query, for_candidates, with_gradients):
    """The same, some candidates at a time, each for all queries: one product more, for catalogues so large that few
    queries at a time would mean going through all candidates' gradients again and again."""
    columns = max(1, _LOGITS // max(1, len(query)))
    blocks = [slice(start, start + columns) for start in range(0, len(candidates), columns)]
    parts = [torch.logsumexp(query @ candidates[block].T, dim=1) for block in blocks]
    total = torch.logsumexp(torch.stack(parts), dim=0)  # [B]
    if with_gradients:
        for block in blocks:
            share = (query @ candidates[block].T).sub_(total[:, None]).exp_().mul_(weights[:, None])  # [B, n]
            for_query.addmm_(share, candidates[block])
            torch.mm(share.T, query, out=for_candidates[block])
        for_query.sub_(candidates[targets] * weights[:, None])
        for_candidates.index_add_(0, targets, query * -weights[:, None])
    return ((total - (query * candidates[targets]).sum(dim=1)) * weights).sum()
