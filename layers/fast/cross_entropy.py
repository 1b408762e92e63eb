"""Cross entropy that never holds all B x K logits. B queries, K keys, H hidden size."""

from collections.abc import Sequence

import torch
from torch import Tensor

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
) -> Tensor:
    """`layers.losses.cross_entropy`, with gradients that are computed block by block in the forward pass."""
    return _CrossEntropy.apply(query, keys, positives, weights, log_counts, left_out)


class _CrossEntropy(torch.autograd.Function):
    """The loss is one number, so the backward pass only scales the gradients of the forward pass."""

    @staticmethod
    def forward(ctx, query, keys, positives, weights, log_counts, left_out):
        with_gradients = any(ctx.needs_input_grad)
        gradients = torch.zeros_like(query), torch.zeros_like(keys)
        arguments = (query, keys, positives, weights, gradients, with_gradients)
        with torch.autocast(query.device.type, enabled=False):
            if log_counts is None and not left_out and _LOGITS // max(1, len(keys)) < _FEW_ROWS:
                loss = _by_keys(*arguments)
            else:
                loss = _by_queries(*arguments, log_counts, left_out)
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    def backward(ctx, gradient):
        for_query, for_keys = ctx.saved_tensors
        return for_query * gradient, for_keys * gradient, None, None, None, None


def _by_queries(query, keys, positives, weights, gradients, with_gradients, log_counts, left_out):
    """The loss, float [], by blocks of queries, each against all keys. Adds to the gradients in place."""
    loss = query.new_zeros(())
    rows = max(1, _LOGITS // max(1, len(keys)))
    for start in range(0, len(query), rows):
        block = slice(start, start + rows)
        positive, weight = positives[block, None], weights[block, None]
        logits = query[block] @ keys.T  # [b, K]
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
    return loss


def _by_keys(query, keys, positives, weights, gradients, with_gradients):
    """The same by blocks of keys, each against all queries. For so many keys that a block of `_by_queries` would have
    few queries. It needs one more matrix product, but it writes the gradient of the keys only once."""
    for_query, for_keys = gradients
    columns = max(1, _LOGITS // max(1, len(query)))
    blocks = [slice(start, start + columns) for start in range(0, len(keys), columns)]
    parts = [torch.logsumexp(query @ keys[block].T, dim=1) for block in blocks]
    total = torch.logsumexp(torch.stack(parts), dim=0)  # [B]
    if with_gradients:
        for block in blocks:
            share = (query @ keys[block].T).sub_(total[:, None]).exp_().mul_(weights[:, None])  # [B, k]
            for_query.addmm_(share, keys[block])
            torch.mm(share.T, query, out=for_keys[block])
        for_query.sub_(keys[positives] * weights[:, None])
        for_keys.index_add_(0, positives, query * -weights[:, None])
    return ((total - (query * keys[positives]).sum(dim=1)) * weights).sum()
