"""UniSRec: sequential recommendation in which an item is its text (Hou et al., KDD 2022).

    item text -> frozen language model -> vector (made once, offline)
    vector    -> parametric whitening + mixture of experts (MoEAdaptor)  -> item representation
    items of a user, oldest first -> causal transformer (RecBole's SASRec) -> sequence representation
    score = cosine of the two

Legend of the shapes: B sequences, L positions, P scored positions, U distinct items, N catalogue, D text-feature
width, H hidden size, E experts.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from recbole.data.interaction import Interaction
from recbole.model.layers import FeedForward
from recbole.model.sequential_recommender.sasrec import SASRec
from torch import nn
from torch.utils.checkpoint import checkpoint

from layers.losses import catalogue_cross_entropy, draw_others, in_batch_contrastive, keep_local

_ROWS_AT_ONCE = 256  # histories scored together on the CPU: sorted by length, few of them need little padding
_ITEMS_AT_ONCE = 1 << 12  # items adapted together where nothing is kept for a backward pass
_ITEMS_KEPT = 1 << 16  # with more items in the catalogue, the backward pass adapts them again, so many at a time
STAGES = ("pretrain", "inductive_ft", "transductive_ft")


class PWLayer(nn.Module):
    """Parametric whitening (paper, equation 4), for all experts at once: sum_e g_e W_e (dropout(x) - b_e).

    Each expert draws its own dropout. The gates go first, then one product serves all experts.

    Args:
        n_experts, input_size, output_size (int): E, D, H.
        dropout (float): probability.
    """

    def __init__(self, n_experts, input_size, output_size, dropout):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(n_experts, input_size))
        self.weight = nn.Parameter(torch.empty(n_experts, output_size, input_size).normal_(0.0, 0.02))
        self.dropout = dropout

    def forward(self, x, gates):
        """x float [U, D], gates float [U, E] -> float [U, H]."""
        kept, scale = None, 1.0
        if self.training and self.dropout > 0:
            kept, scale = keep_mask((len(self.bias), *x.shape), self.dropout, x.device), 1 / (1 - self.dropout)
        whitened_bias = torch.einsum("ehd,ed->eh", self.weight, self.bias)
        weight = self.weight
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, gates, weight = x.to(dtype), gates.to(dtype), weight.to(dtype)
        return _GatedExperts.apply(x, gates * scale, weight, kept) - gates @ whitened_bias


class _GatedExperts(torch.autograd.Function):
    """sum_e g_e W_e (k_e x), x [U, D], g [U, E], W [E, H, D], k bool [E, U, D] or None -> [U, H].

    Expert by expert, so that nothing of the size [U, E, D] is held but the mask, one byte a number. Left to itself,
    autograd would keep three such arrays of floats, and take one product more for the gradient of the gates.
    """

    @staticmethod
    def forward(ctx, x, gates, weight, kept):
        outputs = x.new_empty(len(weight), len(x), weight.size(1))  # [E, U, H], before the gates
        total = x.new_zeros(outputs.shape[1:])
        for expert, output in enumerate(outputs):
            torch.mm(_seen(x, kept, expert), weight[expert].T, out=output)
            total.addcmul_(output, gates[:, expert, None])
        ctx.save_for_backward(x, gates, weight, kept, outputs)
        return total

    @staticmethod
    def backward(ctx, gradient):
        x, gates, weight, kept, outputs = ctx.saved_tensors
        gradient = gradient.to(x.dtype)
        for_x = torch.zeros_like(x) if ctx.needs_input_grad[0] else None  # text features need none
        for_gates, for_weight = torch.empty_like(gates), torch.empty_like(weight)
        for expert, output in enumerate(outputs):
            for_gates[:, expert] = torch.linalg.vecdot(gradient, output)
            gated = gradient * gates[:, expert, None]  # [U, H]
            torch.mm(gated.T, _seen(x, kept, expert), out=for_weight[expert])
            if for_x is not None:
                for_x += _seen(gated @ weight[expert], kept, expert)
        return for_x, for_gates, for_weight, None


def _seen(x, kept, expert):
    """What an expert sees of x [U, D]."""
    if kept is None:
        return x
    if x.device.type == "cpu" and x.dtype == torch.float32:
        # numpy multiplies floats by booleans in one go; torch converts them first
        return torch.from_numpy(x.detach().numpy() * kept[expert].numpy())
    return x * kept[expert]


def keep_mask(shape, probability, device):
    """Which numbers survive a dropout, bool [shape].

    torch's CPU generator draws one number after another, which would take longer than the products; numpy's draws
    16-bit numbers ten times faster. It is seeded from torch's, so torch's seed and state still fix everything.
    """
    if device.type != "cpu":
        return torch.rand(shape, device=device) >= probability
    generator = np.random.SFC64(int(torch.randint(2**62, ())))
    size = math.prod(shape)
    drawn = generator.random_raw(-(-size // 4)).view(np.uint16)[:size]
    return torch.from_numpy(drawn >= round(probability * (1 << 16))).view(shape)


class Dropout(nn.Dropout):
    """torch's dropout with `keep_mask`: on the CPU several times faster."""

    def forward(self, x):
        """float [...] -> float [...]."""
        if not self.training or not self.p or x.device.type != "cpu":
            return super().forward(x)
        kept = keep_mask(x.shape, self.p, x.device).numpy()
        return x * torch.from_numpy(np.multiply(kept, np.float32(1 / (1 - self.p)), dtype=np.float32))


class MoEAdaptor(nn.Module):
    """Mixture of whitening experts, weighed by a gate that is noisy while training (paper, equations 5 and 6).

    Args:
        n_experts, input_size, output_size (int): E, D, H.
        dropout (float): before the whitening.
        noise (bool): whether the gate is noisy while training.
    """

    def __init__(self, n_experts, input_size, output_size, dropout, noise=True):
        super().__init__()
        self.noise = noise
        self.experts = PWLayer(n_experts, input_size, output_size, dropout)
        self.w_gate = nn.Parameter(torch.zeros(input_size, n_experts))
        self.w_noise = nn.Parameter(torch.zeros(input_size, n_experts))

    def gates(self, x):
        """The weight of each expert, float [U, E]; rows sum to one. All experts take part."""
        logits = x @ self.w_gate
        if self.noise and self.training:
            logits = logits + torch.randn_like(logits) * (F.softplus(x @ self.w_noise) + 0.01)
        return logits.softmax(-1)

    def forward(self, x):
        """x float [U, D] -> float [U, H]."""
        return self.experts(x, self.gates(x))


class AllPositions:
    """For SASRec and what derives from it: the states at all positions of left-aligned sequences, in one pass."""

    ignores_padding = True  # so the data set pads rows to the longest of their batch only

    def encode_scored(self, item_vectors, scored):
        """The states at the scored positions of several buckets of left-aligned sequences.

        Everything but attention is done for all buckets in one go, and the end of the last layer for the scored
        positions only. Causal masking alone keeps padding out: it stands to the right of everything that is read.

        Args:
            item_vectors (list of float [B, L, H]): one a bucket.
            scored (list of int64 [P_b]): which of a bucket's B * L positions are asked for.

        Returns:
            float [P, H]: position t has seen items 0..t.
        """
        shapes = [vectors.shape[:2] for vectors in item_vectors]
        ends = np.cumsum([batch * length for batch, length in shapes]).tolist()
        scored = torch.cat([part + start for part, start in zip(scored, [0, *ends], strict=False)])
        hidden = self._placed(item_vectors)  # [T, H]
        for layer in self.trm_encoder.layer:
            wanted = scored if layer is self.trm_encoder.layer[-1] else None
            hidden = layer.feed_forward(_attend(layer.multi_head_attention, hidden, shapes, wanted))
        return hidden

    def encode_last(self, item_vectors, lengths):
        """The states after the last item of left-aligned sequences: float [B, L, H], int64 [B] -> float [B, H]."""
        batch, length, size = item_vectors.shape
        *layers, last = self.trm_encoder.layer
        hidden = self._placed([item_vectors])
        for layer in layers:
            hidden = layer.feed_forward(_attend(layer.multi_head_attention, hidden, [(batch, length)]))
        return last.feed_forward(_attend_last(last.multi_head_attention, hidden.view(batch, length, size), lengths))

    def _placed(self, item_vectors):
        """What the first layer reads: item vectors with their positions, float [T, H], bucket after bucket."""
        vectors = torch.cat([vectors.flatten(0, 1) for vectors in item_vectors])
        places = [torch.arange(part.size(1), device=part.device).repeat(len(part)) for part in item_vectors]
        return self.dropout(self.LayerNorm(vectors + F.embedding(torch.cat(places), self.position_embedding.weight)))


def _attend(attention, hidden, shapes, wanted=None):
    """RecBole's MultiHeadAttention over several buckets, with a causal mask.

    Args:
        attention (recbole.model.layers.MultiHeadAttention)
        hidden (float [T, H]): the positions of all buckets, one after another.
        shapes (list of (B, L)): of the buckets.
        wanted (int64 [P] or None): the positions asked for; None: all.

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


def _attend_last(attention, hidden, lengths):
    """RecBole's MultiHeadAttention for the last item of each sequence alone.

    One query a sequence needs no keys and values of all positions: q . (W_k h + b_k) = (W_k^T q) . h + what is the same
    for all positions, and a mean of W_v h + b_v is W_v of the mean of h.

    Args:
        attention (recbole.model.layers.MultiHeadAttention)
        hidden (float [B, L, H])
        lengths (int64 [B])

    Returns:
        float [B, H]
    """
    heads, size = attention.num_attention_heads, attention.attention_head_size
    last = hidden[torch.arange(len(hidden), device=hidden.device), lengths - 1]
    query = attention.query(last).view(-1, heads, size) / attention.sqrt_attention_head_size
    query = torch.einsum("bnd,ndh->bnh", query, attention.key.weight.view(heads, size, -1))  # [B, heads, H]
    scores = query @ hidden.transpose(1, 2)  # [B, heads, L]
    padding = torch.arange(hidden.size(1), device=hidden.device) >= lengths[:, None, None]
    shares = attention.attn_dropout(scores.masked_fill(padding, -torch.inf).softmax(-1))
    context = torch.einsum("bnh,ndh->bnd", shares @ hidden, attention.value.weight.view(heads, size, -1))
    context = context + shares.sum(-1, keepdim=True) * attention.value.bias.view(heads, size)
    return attention.LayerNorm(attention.out_dropout(attention.dense(context.flatten(1))) + last)


def _context(attention, query, key, value):
    """Causal attention with dropout on the probabilities, [B, heads, L, size]."""
    dropout = attention.attn_dropout
    if not dropout.training or not dropout.p or query.device.type != "cpu":
        p = dropout.p if dropout.training else 0.0
        return F.scaled_dot_product_attention(query, key, value, dropout_p=p, is_causal=True)
    length = query.size(2)
    future = torch.full((length, length), -torch.inf).triu(1)
    scores = query @ key.transpose(2, 3) / attention.sqrt_attention_head_size + future
    return dropout(scores.softmax(-1)) @ value


def _use_fast_parts(module):
    """Put `Dropout` in the place of every nn.Dropout, and torch's gelu, one operation, in that of RecBole's, four."""
    for name, child in module.named_children():
        if type(child) is nn.Dropout:
            setattr(module, name, Dropout(child.p))
        else:
            _use_fast_parts(child)
    if isinstance(module, FeedForward) and module.intermediate_act_fn == module.gelu:
        module.intermediate_act_fn = F.gelu


class UniSRec(AllPositions, SASRec):
    """The model, in one of three stages.

    - `pretrain`: contrastive learning over several domains; reads `features.lookup`.
    - `inductive_ft`: cross entropy over one domain's catalogue, items by their text alone.
    - `transductive_ft`: the same, with an id embedding added to each item.

    Args:
        config (Config): RecBole's SASRec keys and `train_stage`, `temperature`, `lambda`, `n_exps`,
            `adaptor_dropout_prob`, `sampled_negatives`.
        dataset (UniSRecDataset): gives `num(item_id)` and `features`.
    """

    uses_item_text = True
    # a function that joins tensors over all processes; the model knows of no processes itself
    gather = staticmethod(keep_local)

    def __init__(self, config, dataset):
        self.train_stage = config["train_stage"]
        assert self.train_stage in STAGES, self.train_stage
        # SASRec makes an id embedding for the whole catalogue; only the transductive stage has one
        super().__init__(config, dataset if self.train_stage == "transductive_ft" else _OneItem)
        self.n_items = dataset.num(self.ITEM_ID)
        _use_fast_parts(self)
        if self.train_stage != "transductive_ft":
            del self.item_embedding
        self.temperature = config["temperature"]
        self.lam = config["lambda"]
        self.sampled_negatives = config["sampled_negatives"]
        self.features = dataset.features
        self.moe_adaptor = MoEAdaptor(
            config["n_exps"], self.features.width, self.hidden_size, config["adaptor_dropout_prob"]
        )
        if self.train_stage != "pretrain":
            # a buffer moves with the model and is part of no checkpoint: it belongs to the data
            self.register_buffer("plm_embedding", self.features.table(), persistent=False)
        if self.sampled_negatives and self.train_stage == "transductive_ft":
            self.item_embedding.sparse = True  # a step touches few rows: neither gradient nor optimiser need the others
        self._evaluation = None  # (item table normalised, norms), while evaluating

    # -- items --------------------------------------------------------------------------------------------------

    def item_table(self):
        """The representation of every item of the catalogue, float [N, H]; row i is item id i + 1."""
        if torch.is_grad_enabled():
            table = self._adapt_and_keep(self.plm_embedding)
            return table + self.item_embedding.weight[1:] if self.train_stage == "transductive_ft" else table
        table = torch.empty(len(self.plm_embedding), self.hidden_size, device=self.plm_embedding.device)
        for features, place in zip(self.plm_embedding.split(_ITEMS_AT_ONCE), table.split(_ITEMS_AT_ONCE), strict=True):
            place.copy_(self.moe_adaptor(features.float()))
        if self.train_stage == "transductive_ft":
            table += self.item_embedding.weight[1:]
        return table

    def _adapt_and_keep(self, features):
        """The adaptor on [N, D]; of a large catalogue a backward pass keeps the result only, and adapts again."""
        if len(features) <= _ITEMS_KEPT:
            return self.moe_adaptor(features.float())
        parts = features.split(_ITEMS_KEPT)
        return torch.cat([checkpoint(lambda x: self.moe_adaptor(x.float()), x, use_reentrant=False) for x in parts])

    def _adapt(self, rows):
        """Represent some rows of the catalogue, int64 [U] -> float [U, H]."""
        table = self.moe_adaptor(self.plm_embedding[rows].float())
        return table + self.item_embedding(rows + 1) if self.train_stage == "transductive_ft" else table

    def item_representations(self, ids):
        """Represent items, each distinct one adapted once.

        Args:
            ids (list of int64 tensors): item ids; 0, padding, gets whatever vector: nothing looks at it.

        Returns:
            list of float tensors, shaped like `ids` with H behind.
        """
        if self.train_stage == "pretrain":
            distinct, places = _distinct(ids)
            table = self.moe_adaptor(self.features.lookup(distinct))  # [U, H]
        else:
            table, places = self.item_table(), [(part - 1).clamp(min=0) for part in ids]
        return [F.embedding(place, table) for place in places]

    # -- sequences ----------------------------------------------------------------------------------------------

    def forward(self, item_seq, item_seq_len):
        """RecBole's way in: histories int64 [B, L] and lengths [B] -> sequence representations float [B, H]."""
        if self._evaluation is not None and not torch.is_grad_enabled():
            rows = (item_seq - 1).clamp(min=0)
            vectors = F.embedding(rows, self._evaluation[0]) * self._evaluation[1][rows]
        else:
            vectors = self.item_representations([item_seq])[0]
        if torch.is_grad_enabled() or item_seq.device.type != "cpu":
            return self.encode_last(vectors, item_seq_len)
        parts = zip(vectors.split(_ROWS_AT_ONCE), item_seq_len.split(_ROWS_AT_ONCE), strict=True)
        return torch.cat([self.encode_last(part[:, : lengths.max()], lengths) for part, lengths in parts])

    # -- learning -----------------------------------------------------------------------------------------------

    def calculate_loss(self, batch):
        """The loss of the model's stage.

        Args:
            batch: a `data.batches.SequenceBatch` (all positions of sequences), or RecBole's Interaction (one row per
                prefix; fine-tuning only, since the second view of pre-training is drawn by the data set).

        Returns:
            float []
        """
        if isinstance(batch, Interaction):
            batch = _RowsAsBatch(batch[self.ITEM_SEQ], batch[self.ITEM_SEQ_LEN], batch[self.POS_ITEM_ID])
        if self.train_stage == "pretrain":
            return self.pretrain_loss(batch, self.represent(batch))
        return self.finetune_loss(batch)

    def represent(self, batch):
        """What the loss compares of a batch, each float [P, H]: the states, and in pre-training their target items and
        the states of their second views. A batch may be represented part by part, its loss is of the whole."""
        if self.train_stage != "pretrain":
            ids, places = _distinct(batch.items)
            table = self._adapt(ids - 1)
            return [self.encode_scored([F.embedding(place, table) for place in places], batch.scored)]
        buckets = len(batch.items)
        vectors = self.item_representations([*batch.items, *batch.augmented_items, batch.targets])
        states = self.encode_scored(vectors[:buckets], batch.scored)
        return [states, vectors[-1], self.encode_scored(vectors[buckets:-1], batch.augmented_scored)]

    def compare(self, batch, represented):
        """The loss of a batch from what `represent` gave for its parts, joined."""
        if self.train_stage == "pretrain":
            return self.pretrain_loss(batch, represented)
        return self.finetune_loss(batch, *represented)

    def pretrain_loss(self, batch, represented):
        """Sequence-to-item and sequence-to-sequence contrast (paper, section 2.2.3)."""
        states, *keys = represented
        to_item, to_view = (
            in_batch_contrastive(states, key, batch.targets, batch.users, self.temperature, batch.weights, self.gather)
            for key in keys
        )
        return to_item + self.lam * to_view

    def finetune_loss(self, batch, states=None):
        """Cross entropy over the catalogue, padding excluded (paper, section 2.3). With `sampled_negatives`, over the
        batch's items and that many others, each of which stands for its share of the rest."""
        ids = [*(batch.items if states is None else ()), batch.targets]
        if self.sampled_negatives:
            table, places, log_counts = self._sampled_table(ids)
        else:
            table, places, log_counts = self.item_table(), [(part - 1).clamp(min=0) for part in ids], None
        *histories, targets = places
        if states is None:
            states = self.encode_scored([F.embedding(history, table) for history in histories], batch.scored)
        return catalogue_cross_entropy(states, table, targets, self.temperature, batch.weights, log_counts, self.gather)

    def _sampled_table(self, ids):
        """Represent the items of a batch and a sample of the others, and no more.

        Returns:
            float [U + K, H], the place of each of `ids` in it, and how many items each row stands for (log, [U + K]).
        """
        named, places = _distinct(ids)
        others, log_share = draw_others(named - 1, self.n_items - 1, self.sampled_negatives)
        table = self._adapt(torch.cat([named - 1, others]))
        log_counts = table.new_zeros(len(table), dtype=torch.float32)
        log_counts[len(named) :] = log_share
        return table, places, log_counts

    # -- predicting ---------------------------------------------------------------------------------------------

    def train(self, mode=True):
        """Switch between training and evaluation; the evaluation's table of items is made anew after each switch."""
        self._evaluation = None
        return super().train(mode)

    def _candidates(self):
        """Normalised item representations [N, H], computed once per evaluation, not once per batch."""
        if self.training or torch.is_grad_enabled():
            return F.normalize(self.item_table(), dim=-1)
        if self._evaluation is None:
            table = self.item_table()
            norms = table.norm(dim=-1, keepdim=True).clamp_(min=1e-12)
            self._evaluation = table.div_(norms), norms  # in place: a large catalogue's table is there but once
        return self._evaluation[0]

    def _states(self, interaction):
        """Normalised sequence representations of rows, float [B, H]."""
        return F.normalize(self.forward(interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN]), dim=-1)

    def full_sort_predict(self, interaction):
        """Cosine with every item, float [B, N + 1]; column = item id, column 0 (padding) is -inf."""
        candidates = self._candidates()
        states = self._states(interaction)
        scores = states.new_empty((len(states), len(candidates) + 1))
        scores[:, 0] = -torch.inf
        if torch.is_grad_enabled():
            scores[:, 1:] = states @ candidates.T
        else:
            torch.mm(states, candidates.T, out=scores[:, 1:])  # in place, the copy would take as long as the product
        return scores

    @torch.no_grad()
    def ranks(self, interaction):
        """The place of each row's target among all items, without ever holding all scores.

        Returns:
            int64 [B]: how many other items score higher (0: the best). Of equal scores rounding decides; a score that
            is no number counts as higher than any.
        """
        candidates, targets = self._candidates(), interaction[self.ITEM_ID] - 1
        states = self._states(interaction)
        own = (states * candidates[targets]).sum(-1, keepdim=True)
        lower = torch.zeros_like(targets)
        for start in range(0, len(candidates), _ITEMS_AT_ONCE):
            scores = states @ candidates[start : start + _ITEMS_AT_ONCE].T
            here = ((targets >= start) & (targets < start + scores.size(1))).nonzero()[:, 0]
            scores[here, targets[here] - start] = torch.nan  # the target is not among the others
            lower += (scores <= own).sum(1, dtype=torch.int32)
        return len(candidates) - 1 - lower

    def predict(self, interaction):
        """Cosine with one given item each, float [B]."""
        candidates = self._candidates()[interaction[self.ITEM_ID] - 1]
        states = self._states(interaction)
        return (states * candidates).sum(-1)

    # -- transfer -----------------------------------------------------------------------------------------------

    def freeze_encoder(self):
        """Keep the transformer as it was pre-trained: adaptor, input LayerNorm and id embedding go on learning."""
        for part in (self.position_embedding, self.trm_encoder):
            part.requires_grad_(False)


def _distinct(ids):
    """The distinct ids among several tensors, ascending, padding (0) as 1; and each tensor's places among them."""
    flat = torch.cat([part.reshape(-1) for part in ids]).clamp(min=1)
    distinct, place = flat.unique(return_inverse=True)
    places = place.split([part.numel() for part in ids])
    return distinct, [own.view_as(part) for own, part in zip(places, ids, strict=True)]


class _OneItem:
    """Stands in for the data set where SASRec's id embedding is not wanted."""

    num = staticmethod(lambda field: 1)


class _RowsAsBatch:
    """Rows (history, length, target) as a batch of sequences that score their last position."""

    def __init__(self, item_seq, lengths, targets):
        self.items = [item_seq]
        self.scored = [torch.arange(len(item_seq), device=item_seq.device) * item_seq.size(1) + lengths - 1]
        self.targets, self.weights = targets, None
        self.users = torch.arange(len(item_seq), device=item_seq.device)
