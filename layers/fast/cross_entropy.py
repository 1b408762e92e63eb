"""Cross entropy that never holds all B x K logits. B queries, K keys, H hidden size."""

from collections.abc import Sequence

import torch
from torch import Tensor

from layers.logits import SparseLogits

_LOGITS = 1 << 22  # logits of a block
_FEW_ROWS = 64  # if a block would have fewer queries than this, the keys are split into blocks instead


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
    """`layers.losses.cross_entropy`, with gradients that are computed block by block in the forward pass."""
    entries = (None, None, None) if added is None else added
    return _CrossEntropy.apply(query, keys, positives, weights, log_counts, left_out, *entries)


class _CrossEntropy(torch.autograd.Function):
    """The loss is one number, so the backward pass only scales the gradients of the forward pass."""

    @staticmethod
    def forward(ctx, query, keys, positives, weights, log_counts, left_out, rows, columns, values):
        with_gradients = any(ctx.needs_input_grad)
        added = None if values is None else SparseLogits(rows, columns, values)
        gradients = torch.zeros_like(query), torch.zeros_like(keys), None if added is None else torch.zeros_like(values)
        arguments = (query, keys, positives, weights, gradients, with_gradients, added)
        with torch.autocast(query.device.type, enabled=False):
            if log_counts is None and not left_out and _LOGITS // max(1, len(keys)) < _FEW_ROWS:
                loss = _by_keys(*arguments)
            else:
                loss = _by_queries(*arguments, log_counts, left_out)
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    def backward(ctx, gradient):
        for_query, for_keys, for_values = ctx.saved_tensors
        for_values = None if for_values is None else for_values * gradient
        return for_query * gradient, for_keys * gradient, None, None, None, None, None, None, for_values


def _by_queries(query, keys, positives, weights, gradients, with_gradients, added, log_counts, left_out):
    """The loss, float [], by blocks of queries, each against all keys. Adds to the gradients in place."""
    loss = query.new_zeros(())
    rows = max(1, _LOGITS // max(1, len(keys)))
    done = 0  # entries of `added`
    for start in range(0, len(query), rows):
        block = slice(start, start + rows)
        positive, weight = positives[block, None], weights[block, None]
        logits = query[block] @ keys.T  # [b, K]
        if added is not None:
            own_added = added.select_rows(start, start + rows)
            place = own_added.rows, own_added.columns
            logits.index_put_(place, own_added.values, accumulate=True)
        own = logits.gather(1, positive)
        if log_counts is not None:
            logits += log_counts
        if left_out:
            excluded = torch.stack([labels[block, None] == others for labels, others in left_out]).any(0)
            logits.masked_fill_(excluded, -torch.inf)
        logits.scatter_(1, positive, own)
        highest = logits.amax(dim=1, keepdim=True)
        powers = logits.sub_(highest).exp_()
        total = powers.sum(dim=1, keepdim=True)
        loss += ((total.log() + highest - own) * weight).sum()
        if with_gradients:
            share = powers.mul_(weight / total)
            share.scatter_add_(1, positive, -weight)
            torch.mm(share, keys, out=gradients[0][block])
            gradients[1].addmm_(share.T, query[block])
            if added is not None:
                gradients[2][done : done + len(own_added.rows)] = share[place]
                done += len(own_added.rows)
    return loss


def _by_keys(query, keys, positives, weights, gradients, with_gradients, added):
    """The same by blocks of keys, each against all queries. For so many keys that a block of `_by_queries` would have
    few queries. It needs one more matrix product, but it writes the gradient of the keys only once."""
    for_query, for_keys, for_values = gradients
    columns = max(1, _LOGITS // max(1, len(query)))
    blocks = [slice(start, start + columns) for start in range(0, len(keys), columns)]
    parts = [torch.logsumexp(_logits(query, keys, block, added), dim=1) for block in blocks]
    total = torch.logsumexp(torch.stack(parts), dim=0)  # [B]
    own = (query * keys[positives]).sum(dim=1) + (0 if added is None else added.at(positives))
    if with_gradients:
        for block in blocks:
            share = _logits(query, keys, block, added).sub_(total[:, None]).exp_().mul_(weights[:, None])  # [B, k]
            for_query.addmm_(share, keys[block])
            torch.mm(share.T, query, out=for_keys[block])
            if added is not None:
                inside = (added.columns >= block.start) & (added.columns < block.stop)
                for_values[inside] = share[added.rows[inside], added.columns[inside] - block.start]
        for_query.sub_(keys[positives] * weights[:, None])
        for_keys.index_add_(0, positives, query * -weights[:, None])
        if added is not None:
            for_values.sub_(weights[added.rows] * (added.columns == positives[added.rows]))
    return ((total - own) * weights).sum()


def _logits(query, keys, block, added):
    """The logits of a block of keys, float [B, k]."""
    logits = query @ keys[block].T
    return logits if added is None else added.select_columns(block.start, block.stop).add_to(logits)
