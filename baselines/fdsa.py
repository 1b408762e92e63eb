"""FDSA (Zhang et al., IJCAI 2019): one transformer over item ids, one over item features, here the item texts.

B sequences, L positions, P predictions, U distinct items, N items, D text width, H hidden size.
"""

import torch
from recbole.model.layers import TransformerEncoder
from torch import Tensor, nn

from baselines.sasrec import SASRec
from baselines.texts import TextProjection
from layers.encoder import AllPositions
from layers.items import look_up


class FDSA(SASRec):
    """Two transformers read the ids and the texts of the same history. A linear layer joins their states.

    The computation is that of RecBole's FDSA, which also shares position embedding, LayerNorm and dropout between the
    two transformers. Two things differ. RecBole's features are embeddings of categories, here a feature is the
    projected text vector. The attention over several features of an item is left out, because with one feature its
    weight is 1.

    Unlike RecBole's class, this one learns from all positions of a sequence in one pass, as `SASRec` does.
    """

    uses_item_text = True

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        self.texts = TextProjection(config, dataset.features, self.hidden_size)
        self.feature_stream = _Stream(self, config)
        self.concat_layer = nn.Linear(2 * self.hidden_size, self.hidden_size)
        for part in (self.texts, self.feature_stream.trm_encoder, self.concat_layer):
            part.apply(self._init_weights)

    def forward(self, item_seq: Tensor, item_seq_len: Tensor) -> Tensor:
        """Sequence representations: histories int64 [B, L] and their lengths int64 [B] -> float [B, H]."""
        (features,) = look_up([item_seq], self.texts)
        states = self.encode_last(self.item_embedding(item_seq), item_seq_len)
        return self._join(states, self.feature_stream.encode_last(features, item_seq_len))

    def states(self, batch) -> Tensor:
        """The sequence representation at each scored position, float [P, H]."""
        states = super().states(batch)
        features = look_up(batch.items, self.texts)
        return self._join(states, self.feature_stream.encode_scored(features, batch.scored))

    def _join(self, states, feature_states):
        return self.dropout(self.LayerNorm(self.concat_layer(torch.cat([states, feature_states], -1))))


class _Stream(AllPositions, nn.Module):
    """The transformer over the features. It shares position embedding, LayerNorm and dropout with that over the ids."""

    def __init__(self, model, config):
        super().__init__()
        self.max_seq_length, self.hidden_size = model.max_seq_length, model.hidden_size
        self.position_embedding, self.LayerNorm, self.dropout = model.position_embedding, model.LayerNorm, model.dropout
        sizes = ("n_layers", "n_heads", "hidden_size", "inner_size", "hidden_dropout_prob", "attn_dropout_prob")
        self.trm_encoder = TransformerEncoder(**{key: config[key] for key in (*sizes, "hidden_act", "layer_norm_eps")})
