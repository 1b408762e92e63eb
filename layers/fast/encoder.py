"""Fast versions of `AllPositions`. B sequences, L positions, T positions of all buckets, P predictions, H hidden size.

- Only attention is computed bucket by bucket. Everything else runs once, over the positions of all length buckets.
- The last layer computes its output only at the scored positions.
- In evaluation, only the last item of each sequence has an attention query in the last layer.
"""

import numpy as np
import torch
import torch.nn.functional as F
from recbole.model.layers import MultiHeadAttention
from torch import Tensor

from layers.encoder import AllPositions

_ROWS_AT_ONCE = 256  # histories of a block on the CPU. Rows are sorted by length, so a small block has little padding


def encode_scored(module: AllPositions, item_vectors: list[Tensor], scored: list[Tensor]) -> Tensor:
    """`AllPositions.encode_scored`: float [B, L, H] and int64 [P_b] per bucket -> float [P, H]."""
    shapes = [(vectors.size(0), vectors.size(1)) for vectors in item_vectors]
    starts = np.cumsum([0, *(batch * length for batch, length in shapes[:-1])]).tolist()
    flat_scored = torch.cat([part + start for part, start in zip(scored, starts, strict=True)])
    hidden = _add_positions(module, item_vectors)  # [T, H]
    *layers, last = module.trm_encoder.layer
    for layer in layers:
        hidden = layer.feed_forward(_attend(layer.multi_head_attention, hidden, shapes))
    return last.feed_forward(_attend(last.multi_head_attention, hidden, shapes, flat_scored))  # [P, H]


def encode_last(module: AllPositions, item_vectors: Tensor, lengths: Tensor) -> Tensor:
    """`AllPositions.encode_last`: float [B, L, H] and int64 [B] -> float [B, H]."""
    if torch.is_grad_enabled() or item_vectors.device.type != "cpu":
        return _encode_last(module, item_vectors, lengths)
    parts = zip(item_vectors.split(_ROWS_AT_ONCE), lengths.split(_ROWS_AT_ONCE), strict=True)
    return torch.cat([_encode_last(module, part[:, : own.max()], own) for part, own in parts])


def _encode_last(module, item_vectors, lengths):
    batch, length, size = item_vectors.shape
    *layers, last = module.trm_encoder.layer
    hidden = _add_positions(module, [item_vectors])
    for layer in layers:
        hidden = layer.feed_forward(_attend(layer.multi_head_attention, hidden, [(batch, length)]))
    return last.feed_forward(_attend_last(last.multi_head_attention, hidden.view(batch, length, size), lengths))


def _add_positions(module, item_vectors):
    """The input of the first layer, float [T, H], bucket after bucket."""
    vectors = torch.cat([vectors.flatten(0, 1) for vectors in item_vectors])
    positions = [torch.arange(part.size(1), device=part.device).repeat(len(part)) for part in item_vectors]
    return module.dropout(module.LayerNorm(vectors + module.position_embedding(torch.cat(positions))))


def _attend(
    attention: MultiHeadAttention, hidden: Tensor, shapes: list[tuple[int, int]], wanted: Tensor | None = None
) -> Tensor:
    """Causal self-attention within each bucket, with residual and LayerNorm.

    Args:
        attention: RecBole's layer.
        hidden: float [T, H], bucket after bucket.
        shapes: (B, L) of each bucket.
        wanted: int64 [P], the positions whose output is needed; None: all.

    Returns:
        float [T or P, H]
    """
    parts = (attention.query, attention.key, attention.value)
    weight, bias = torch.cat([part.weight for part in parts]), torch.cat([part.bias for part in parts])
    mixed = F.linear(hidden, weight, bias)  # [T, 3 H]
    heads, size = attention.num_attention_heads, attention.attention_head_size
    contexts = []
    for part, (batch, length) in zip(mixed.split([b * n for b, n in shapes]), shapes, strict=True):
        query, key, value = part.view(batch, length, 3, heads, size).permute(2, 0, 3, 1, 4)  # [B, heads, L, size] each
        contexts.append(_context(attention, query, key, value).transpose(1, 2).reshape(batch * length, heads * size))
    context = torch.cat(contexts)
    if wanted is not None:
        context, hidden = context[wanted], hidden[wanted]
    return attention.LayerNorm(attention.out_dropout(attention.dense(context)) + hidden)


def _context(attention, query, key, value):
    """Causal attention with dropout on the probabilities, float [B, heads, L, size]."""
    dropout = attention.attn_dropout
    if not dropout.training or not dropout.p or query.device.type != "cpu":
        p = dropout.p if dropout.training else 0.0
        return F.scaled_dot_product_attention(query, key, value, dropout_p=p, is_causal=True)
    length = query.size(2)
    future = torch.full((length, length), -torch.inf).triu(1)
    scores = query @ key.transpose(2, 3) / attention.sqrt_attention_head_size + future
    return dropout(scores.softmax(-1)) @ value


def _attend_last(attention: MultiHeadAttention, hidden: Tensor, lengths: Tensor) -> Tensor:
    """Self-attention with one query per sequence, that of its last item, with residual and LayerNorm.

    With one query q, the keys and values of the positions need not be computed. q . (W_k h + b_k) is (W_k^T q) . h + a
    constant, so the scores follow from h. A weighted mean of W_v h + b_v is W_v times the weighted mean of h, plus b_v.

    Args:
        attention: RecBole's layer.
        hidden: float [B, L, H].
        lengths: int64 [B].

    Returns:
        float [B, H]
    """
    heads, size = attention.num_attention_heads, attention.attention_head_size
    last = hidden[torch.arange(len(hidden), device=hidden.device), lengths - 1]
    query = attention.query(last).view(-1, heads, size) / attention.sqrt_attention_head_size
    query = torch.einsum("bnd,ndh->bnh", query, attention.key.weight.view(heads, size, -1))  # [B, heads, H]
    scores = query @ hidden.transpose(1, 2)  # [B, heads, L]
    padding = torch.arange(hidden.size(1), device=hidden.device) >= lengths[:, None, None]
    probabilities = attention.attn_dropout(scores.masked_fill(padding, -torch.inf).softmax(-1))
    context = torch.einsum("bnh,ndh->bnd", probabilities @ hidden, attention.value.weight.view(heads, size, -1))
    context = context + probabilities.sum(-1, keepdim=True) * attention.value.bias.view(heads, size)
    return attention.LayerNorm(attention.out_dropout(attention.dense(context.flatten(1))) + last)
