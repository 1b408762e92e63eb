"""UniSRec: sequential recommendation in which an item is its text (Hou et al., KDD 2022).

    item text -> frozen language model -> vector (made once, offline)
    vector    -> parametric whitening + mixture of experts (MoEAdaptor)  -> item representation
    items of a user, oldest first -> causal transformer (RecBole's SASRec) -> sequence representation
    score = cosine of the two

Legend of the shapes: B sequences, L positions, P scored positions, U distinct items, N catalogue, D text-feature
width, H hidden size, E experts.
"""

import numpy as np
import torch
import torch.nn.functional as F
from recbole.data.interaction import Interaction
from recbole.model.sequential_recommender.sasrec import SASRec
from torch import nn

from losses import catalogue_cross_entropy, in_batch_contrastive, keep_local

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
        whitened_bias = torch.einsum("ehd,ed->eh", self.weight, self.bias)
        seen, scale = x.unsqueeze(1), gates
        if self.training and self.dropout > 0:
            seen = seen * _keep_mask((len(x), *self.bias.shape), self.dropout, x.device)  # [U, E, D]
            scale = gates / (1 - self.dropout)
        gated = (seen * scale.unsqueeze(-1)).flatten(1)  # [U, E * D]
        return gated @ self.weight.transpose(1, 2).flatten(0, 1) - gates @ whitened_bias


def _keep_mask(shape, probability, device):
    """Which numbers survive a dropout, bool [shape].

    torch's CPU generator draws one number after another, which would take longer than the products; numpy's draws
    16-bit numbers ten times faster. It is seeded from torch's, so torch's seed and state still fix everything.
    """
    if device.type != "cpu":
        return torch.rand(shape, device=device) >= probability
    generator = np.random.Generator(np.random.SFC64(int(torch.randint(2**62, ()))))
    keep = generator.integers(0, 1 << 16, shape, dtype=np.uint16) >= round(probability * (1 << 16))
    return torch.from_numpy(keep)


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

    def encode(self, item_vectors):
        """Run the transformer over left-aligned sequences.

        Causal masking alone keeps padding out: it stands to the right of everything that is read.

        Args:
            item_vectors (float [B, L, H]).

        Returns:
            float [B, L, H]: position t has seen items 0..t.
        """
        length = item_vectors.size(1)
        hidden = self.dropout(self.LayerNorm(item_vectors + self.position_embedding.weight[:length]))
        mask = torch.full((length, length), -10000.0, device=hidden.device).triu(1)[None, None]
        return self.trm_encoder(hidden, mask, output_all_encoded_layers=False)[-1]

    def encode_scored(self, item_vectors, scored):
        """The states at the scored positions of several buckets of sequences, float [P, H]."""
        return torch.cat(
            [
                self.encode(vectors).flatten(0, 1)[positions]
                for vectors, positions in zip(item_vectors, scored, strict=True)
            ]
        )


class UniSRec(AllPositions, SASRec):
    """The model, in one of three stages.

    - `pretrain`: contrastive learning over several domains; reads `features.lookup`.
    - `inductive_ft`: cross entropy over one domain's catalogue, items by their text alone.
    - `transductive_ft`: the same, with an id embedding added to each item.

    Args:
        config (Config): RecBole's SASRec keys and `train_stage`, `temperature`, `lambda`, `n_exps`,
            `adaptor_dropout_prob`.
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
        if self.train_stage != "transductive_ft":
            del self.item_embedding
        self.temperature = config["temperature"]
        self.lam = config["lambda"]
        self.features = dataset.features
        self.moe_adaptor = MoEAdaptor(
            config["n_exps"], self.features.width, self.hidden_size, config["adaptor_dropout_prob"]
        )
        if self.train_stage != "pretrain":
            # a buffer moves with the model and is part of no checkpoint: it belongs to the data
            self.register_buffer("plm_embedding", self.features.table(), persistent=False)
        self._evaluation = None  # (item table, the same normalised), while evaluating

    # -- items --------------------------------------------------------------------------------------------------

    def item_table(self):
        """The representation of every item of the catalogue, float [N, H]; row i is item id i + 1."""
        table = self.moe_adaptor(self.plm_embedding.float())
        if self.train_stage == "transductive_ft":
            table = table + self.item_embedding.weight[1:]
        return table

    def item_representations(self, ids):
        """Represent items, each distinct one adapted once.

        Args:
            ids (list of int64 tensors): item ids; 0, padding, gets whatever vector: nothing looks at it.

        Returns:
            list of float tensors, shaped like `ids` with H behind.
        """
        flat = torch.cat([part.reshape(-1) for part in ids]).clamp(min=1)
        if self.train_stage == "pretrain":
            distinct, place = flat.unique(return_inverse=True)
            table = self.moe_adaptor(self.features.lookup(distinct))  # [U, H]
        else:
            table, place = self.item_table(), flat - 1
        vectors = F.embedding(place, table)
        return [
            part.view(*shape.shape, part.size(-1))
            for part, shape in zip(vectors.split([part.numel() for part in ids]), ids, strict=True)
        ]

    # -- sequences ----------------------------------------------------------------------------------------------

    def forward(self, item_seq, item_seq_len):
        """RecBole's way in: histories int64 [B, L] and lengths [B] -> sequence representations float [B, H]."""
        if self._evaluation is not None and not torch.is_grad_enabled():
            vectors = F.embedding((item_seq - 1).clamp(min=0), self._evaluation[0])
        else:
            vectors = self.item_representations([item_seq])[0]
        return self.gather_indexes(self.encode(vectors), item_seq_len - 1)

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
        return self.pretrain_loss(batch) if self.train_stage == "pretrain" else self.finetune_loss(batch)

    def pretrain_loss(self, batch):
        """Sequence-to-item and sequence-to-sequence contrast (paper, section 2.2.3)."""
        buckets = len(batch.items)
        vectors = self.item_representations([*batch.items, *batch.augmented_items, batch.targets])
        states = self.encode_scored(vectors[:buckets], batch.scored)
        views = self.encode_scored(vectors[buckets:-1], batch.augmented_scored)
        to_item, to_view = (
            in_batch_contrastive(states, key, batch.targets, batch.owners, self.temperature, batch.weights, self.gather)
            for key in (vectors[-1], views)
        )
        return to_item + self.lam * to_view

    def finetune_loss(self, batch):
        """Cross entropy over the catalogue, padding excluded (paper, section 2.3)."""
        table = self.item_table()
        vectors = [F.embedding((items - 1).clamp(min=0), table) for items in batch.items]
        return catalogue_cross_entropy(
            self.encode_scored(vectors, batch.scored), table, batch.targets - 1, self.temperature, batch.weights
        )

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
            self._evaluation = table, F.normalize(table, dim=-1)
        return self._evaluation[1]

    def full_sort_predict(self, interaction):
        """Cosine with every item, float [B, N + 1]; column = item id, column 0 (padding) is -inf."""
        candidates = self._candidates()
        states = F.normalize(self.forward(interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN]), dim=-1)
        scores = states.new_full((len(states), len(candidates) + 1), -torch.inf)
        scores[:, 1:] = states @ candidates.T
        return scores

    def predict(self, interaction):
        """Cosine with one given item each, float [B]."""
        candidates = self._candidates()[interaction[self.ITEM_ID] - 1]
        states = F.normalize(self.forward(interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN]), dim=-1)
        return (states * candidates).sum(-1)

    # -- transfer -----------------------------------------------------------------------------------------------

    def freeze_encoder(self):
        """Keep the transformer as it was pre-trained: adaptor, input LayerNorm and id embedding go on learning."""
        for part in (self.position_embedding, self.trm_encoder):
            part.requires_grad_(False)


class _OneItem:
    """Stands in for the data set where SASRec's id embedding is not wanted."""

    num = staticmethod(lambda field: 1)


class _RowsAsBatch:
    """Rows (history, length, target) as a batch of sequences that score their last position."""

    def __init__(self, item_seq, lengths, targets):
        self.items = [item_seq]
        self.scored = [torch.arange(len(item_seq), device=item_seq.device) * item_seq.size(1) + lengths - 1]
        self.targets, self.weights = targets, None
        self.owners = torch.arange(len(item_seq), device=item_seq.device)
