"""UniSRec as the published code computes it. The fast model must equal it, and benchmarks compare with it.

The input is one row per prefix, padded to the longest history. Every position of every row goes through the adaptor,
one expert after the other. The transformer is RecBole's. Parameters have the published names.

Shapes: B rows, L positions, N items, D text width, H hidden size, E experts.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from recbole.model.layers import TransformerEncoder
from torch import Tensor, nn


class ReferenceExpert(nn.Module):
    """One whitening expert (paper, equation 4): W (dropout(x) - b)."""

    def __init__(self, input_size: int, output_size: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.bias = nn.Parameter(torch.zeros(input_size))
        self.lin = nn.Linear(input_size, output_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """float [..., D] -> float [..., H]."""
        return self.lin(self.dropout(x) - self.bias)


class ReferenceAdaptor(nn.Module):
    """The mixture of experts (paper, equations 5 and 6), with a loop over the experts."""

    def __init__(self, n_experts: int, input_size: int, output_size: int, dropout: float) -> None:
        super().__init__()
        self.experts = nn.ModuleList([ReferenceExpert(input_size, output_size, dropout) for _ in range(n_experts)])
        self.w_gate = nn.Parameter(torch.zeros(input_size, n_experts))
        self.w_noise = nn.Parameter(torch.zeros(input_size, n_experts))

    def forward(self, x: Tensor) -> Tensor:
        """float [..., D] -> float [..., H]."""
        logits = x @ self.w_gate
        if self.training:
            logits = logits + torch.randn_like(logits) * (F.softplus(x @ self.w_noise) + 0.01)
        gates = logits.softmax(-1).unsqueeze(-1)  # [..., E, 1]
        outputs = torch.stack([expert(x) for expert in self.experts], dim=-2)  # [..., E, H]
        return (gates * outputs).sum(dim=-2)


class ReferenceUniSRec(nn.Module):
    """The model.

    Args:
        config: keys of props/UniSRec.yaml.
        features: float [N + 1, D] or [2N + 1, D]. Row 0 is padding. In pre-training, rows N + 1 to 2N are the features
            of the shortened texts.
        n_items: N + 1, for the id embedding and the candidates.
    """

    def __init__(self, config: Mapping[str, Any], features: Tensor, n_items: int) -> None:
        super().__init__()
        hidden = config["hidden_size"]
        self.stage, self.temperature, self.lam = config["train_stage"], config["temperature"], config["lambda"]
        self.n_items = n_items
        self.register_buffer("plm", features, persistent=False)
        self.position_embedding = nn.Embedding(config["MAX_ITEM_LIST_LENGTH"], hidden)
        self.trm_encoder = TransformerEncoder(
            config["n_layers"],
            config["n_heads"],
            hidden,
            config["inner_size"],
            config["hidden_dropout_prob"],
            config["attn_dropout_prob"],
            config["hidden_act"],
            config["layer_norm_eps"],
        )
        self.LayerNorm = nn.LayerNorm(hidden, eps=config["layer_norm_eps"])
        self.dropout = nn.Dropout(config["hidden_dropout_prob"])
        self.moe_adaptor = ReferenceAdaptor(config["n_exps"], features.size(1), hidden, config["adaptor_dropout_prob"])
        if self.stage == "transductive_ft":
            self.item_embedding = nn.Embedding(n_items, hidden, padding_idx=0)

    def encode(self, items: Tensor, lengths: Tensor) -> Tensor:
        """Left-aligned histories int64 [B, L] and lengths int64 [B] -> sequence representations float [B, H]."""
        vectors = self.moe_adaptor(self.plm[items])  # [B, L, H]
        if self.stage == "transductive_ft":
            vectors = vectors + self.item_embedding(items)
        positions = torch.arange(items.size(1), device=items.device)
        hidden = self.dropout(self.LayerNorm(vectors + self.position_embedding(positions)))
        visible = (items != 0)[:, None, None, :] & (positions[None, :] <= positions[:, None])  # [B, 1, L, L]
        mask = torch.where(visible, 0.0, -10000.0)
        hidden = self.trm_encoder(hidden, mask, output_all_encoded_layers=False)[-1]
        return hidden[torch.arange(len(items)), lengths - 1]

    def candidates(self, with_padding: bool = False) -> Tensor:
        """Item representations, the classes of the softmax: float [N, H], or [N + 1, H] with padding."""
        start = 0 if with_padding else 1
        table = self.moe_adaptor(self.plm[start : self.n_items])
        return table + self.item_embedding.weight[start:] if self.stage == "transductive_ft" else table

    def finetune_loss(self, items: Tensor, lengths: Tensor, targets: Tensor, with_padding: bool = False) -> Tensor:
        """Cross entropy over the catalogue (paper, section 2.3). In the published code padding is a class, too."""
        states = F.normalize(self.encode(items, lengths), dim=-1)
        table = F.normalize(self.candidates(with_padding), dim=-1)
        return F.cross_entropy(states @ table.T / self.temperature, targets if with_padding else targets - 1)

    def pretrain_loss(
        self, items: Tensor, lengths: Tensor, targets: Tensor, view: Tensor, view_lengths: Tensor
    ) -> Tensor:
        """Sequence-to-item and sequence-to-sequence contrast (paper, section 2.2.3).

        Pairs with the same target are not negatives of each other.
        """
        states = F.normalize(self.encode(items, lengths), dim=-1)
        views = F.normalize(self.encode(view, view_lengths), dim=-1)
        positives = F.normalize(self.moe_adaptor(self.plm[targets]), dim=-1)
        same_target = (targets[:, None] == targets) & ~torch.eye(len(targets), dtype=torch.bool)

        def contrast(keys):
            logits = (states @ keys.T / self.temperature).masked_fill(same_target, -torch.inf)
            return F.cross_entropy(logits, torch.arange(len(targets)))

        return contrast(positives) + self.lam * contrast(views)

    def scores(self, items: Tensor, lengths: Tensor) -> Tensor:
        """Cosine with every item, float [B, N]. The item table is computed again for every batch."""
        return F.normalize(self.encode(items, lengths), dim=-1) @ F.normalize(self.candidates(), dim=-1).T
