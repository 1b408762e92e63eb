"""UniSRec: sequential recommendation in which an item is its text (Hou et al., KDD 2022).

    item text -> frozen language model -> vector, computed once, offline                          (section 2.1)
    vector -> parametric whitening and mixture of experts (layers/adaptor.py) -> item representation (section 2.1)
    items of a user, oldest first -> causal transformer (RecBole's SASRec) -> sequence representation (section 2.2)
    pre-training: contrastive losses over several domains, or cross entropy over each of them     (section 2.2)
    fine-tuning: cross entropy over the catalogue of one domain; the score is a cosine            (section 2.3)

Six parts are not in the paper. `props/published.yaml` switches them off:

    whitened texts: the text vectors of a domain are whitened with their own covariance (layers/whitening.py)
    cosine start: at first, the adaptor keeps the cosines between the text vectors
    spectral ids: id embeddings start from the co-occurrence of items instead of noise (layers/item_to_item.py)
    history mean: the mean of the history's items is added to the sequence representation (layers/history.py)
    history bias: a learned number is added to the scores of the items of the history (layers/history.py)
    item to item: after training, logits from the co-occurrence of items are added (layers/item_to_item.py)

This file is the plain model. `layers/fast/` has faster versions of some parts. `engine.building.build_model` puts them
into the model, unless `--fast=false` is set.

Shapes: B sequences, L positions, P predictions, U distinct items, N catalogue, D text width, H hidden size, E experts.
"""

import numpy as np
import torch
import torch.nn.functional as F
from recbole.data.interaction import Interaction
from recbole.model.sequential_recommender.sasrec import SASRec
from torch import Tensor, nn

from layers.adaptor import MoEAdaptor
from layers.encoder import AllPositions, RowsAsBatch
from layers.history import HistoryBias, HistoryMean
from layers.item_to_item import ItemToItem, spectral_vectors
from layers.items import ItemTable, distinct_ids, look_up
from layers.logits import DenseLogits, SumOfLogits
from layers.losses import catalogue_cross_entropy, cross_entropy, draw_negatives, in_batch_contrastive, keep_local
from layers.ranking import ranks_in_blocks
from layers.whitening import DomainWhitening

ID_LENGTH = 0.3  # root mean square length of spectral id embeddings. An adapted text has about the length 1
STATE_START = 0.25  # at first, the transformer's state has this length, relative to that of the history mean
STAGES = ("pretrain", "inductive_ft", "transductive_ft")


class UniSRec(AllPositions, SASRec):
    """The model in one of three stages.

    - `pretrain`: over several domains, on text alone. `pretrain_loss` says whether it learns by cross entropy over the
      catalogue of one domain at a time, as in fine-tuning, or by contrastive losses.
    - `inductive_ft`: cross entropy over the catalogue of one domain, on text alone.
    - `transductive_ft`: the same, with an id embedding added to the representation of each item.

    Args:
        config (Config): keys of props/UniSRec.yaml, and `train_stage`.
        dataset (UniSRecDataset): its `num("item_id")`, `catalogue` and `features` are used.
    """

    uses_item_text = True
    gather = staticmethod(keep_local)  # joins tensors over all processes; engine.building sets another for several
    cross_entropy = staticmethod(cross_entropy)  # engine.fast_parts sets a faster one

    def __init__(self, config, dataset):
        self.train_stage = config["train_stage"]
        assert self.train_stage in STAGES, self.train_stage
        self.is_contrastive = self.train_stage == "pretrain" and config["pretrain_loss"] == "contrastive"
        # SASRec always creates an id embedding. Without need of it, it gets one row and is deleted below.
        super().__init__(config, dataset if self.train_stage == "transductive_ft" else _OneItem)
        self.n_items = dataset.num(self.ITEM_ID)  # N + 1: padding has id 0
        self.temperature = config["temperature"]
        self.lam = config["lambda"]
        self.label_smoothing = config["label_smoothing"]
        self.sampled_negatives = config["sampled_negatives"]
        self.features = dataset.features
        self.domain_ends = np.cumsum(dataset.catalogue.counts)  # the last id of each domain
        self.unseen_negatives = config["unseen_negatives"]
        self._seen: list[Tensor] | None = None  # per domain, the items of the training data; None: all items
        if self.unseen_negatives and config["unseen_bias"]:
            raise ValueError("unseen_bias needs unseen_negatives False")
        bias = None if self.unseen_negatives else torch.tensor(float(config["unseen_bias"] or 0.0))
        self.register_buffer("unseen_bias", bias)
        self.unseen: Tensor | None = None  # float [N], 1 for the items that are not in the training data; see below
        self.moe_adaptor = MoEAdaptor(
            config["n_exps"],
            self.features.width,
            self.hidden_size,
            config["adaptor_dropout_prob"],
            start=config["adaptor_start"],
        )
        self.history_mean = HistoryMean(self.max_seq_length) if config["history_mean"] else None
        if self.history_mean is not None:  # an untrained transformer says nothing about the next item
            nn.init.constant_(self.trm_encoder.layer[-1].feed_forward.LayerNorm.weight, STATE_START)
        with_bias = config["history_bias"] and not self.is_contrastive
        self.history_bias = HistoryBias(config["history_bias"]) if with_bias else None
        with_weights = config["item_to_item"] and self.train_stage == "transductive_ft"
        # without effect until `engine.item_to_item` has computed its weights and chosen its factor
        self.item_to_item = ItemToItem(self.n_items - 1, config["item_to_item"]) if with_weights else None
        self.id_dropout = config["id_dropout_prob"]
        self.id_start = config["id_start"]
        if self.train_stage != "transductive_ft":
            del self.item_embedding
        elif self.sampled_negatives:
            self.item_embedding.sparse = True  # a step changes few rows
        self.whitening = DomainWhitening(self.features.domain_tables()) if config["whiten_texts"] else None
        if self.train_stage != "pretrain":
            texts = self.features.table()  # [N, D]
            if self.whitening is not None:
                texts = self.whitening.whiten_table(texts)
            # A buffer moves to the GPU with the model. It is not saved: features belong to the data, not the checkpoint
            self.register_buffer("plm_embedding", texts, persistent=False)
        self._evaluation = None  # during an evaluation: (unit vectors [N, H], their norms [N, 1]) of all items

    # -- items ---------------------------------------------------------------------------------------------------------

    def represent_items(self, ids: Tensor) -> Tensor:
        """The representation of items: adapted text, plus the id embedding in the transductive stage.

        Args:
            ids: int64 [U], 1..N. In pre-training, N + i is item i with its shortened text.

        Returns:
            float [U, H]
        """
        if self.train_stage == "pretrain":
            texts = self.features.lookup(ids)
            return self.moe_adaptor(texts if self.whitening is None else self.whitening(texts, ids))
        vectors = self.moe_adaptor(self.plm_embedding[ids - 1].float())
        if self.train_stage == "inductive_ft":
            return vectors
        # an item loses its whole id embedding, so that the text has to represent it
        kept = F.dropout(torch.ones_like(vectors[:, :1]), self.id_dropout, self.training).sign()
        return vectors + self.item_embedding(ids) * kept

    @torch.no_grad()
    def start_ids(self, sequences) -> None:
        """Set the id embeddings to spectral vectors of the training sequences (`id_start: spectral`).

        In the other stages, and with `id_start: normal`, this does nothing.

        Args:
            sequences: `dataset.sequences("train")`.
        """
        if self.train_stage == "transductive_ft" and self.id_start == "spectral":
            vectors = spectral_vectors(sequences, self.n_items - 1, self.hidden_size)
            self.item_embedding.weight[1:] = ID_LENGTH * vectors

    def note_unseen(self, sequences) -> None:
        """Note which items do not occur in the training data.

        They are left out of the softmax (`unseen_negatives: False`): such an item is never a target, and as a negative
        of every prediction it would only be pushed away. So training says nothing about how their scores compare with
        those of other items. `unseen_bias` is added to their logits; `engine.unseen` chooses it.

        Args:
            sequences: `dataset.sequences("train")`.
        """
        is_seen = np.bincount(sequences.items, minlength=self.n_items) > 0
        device = self.position_embedding.weight.device
        self.unseen = torch.from_numpy(~is_seen[1:]).float().to(device)
        if not self.unseen_negatives:
            seen = np.flatnonzero(is_seen)
            by_domain = np.split(seen, np.searchsorted(seen, self.domain_ends[:-1], side="right"))
            self._seen = [torch.from_numpy(ids).to(device) for ids in by_domain]

    def item_table(self, ids: Tensor | None = None) -> Tensor:
        """The representations of many items, float [n, H].

        Args:
            ids: int64 [n]. None: all items of the catalogue, so that row i is item i + 1.
        """
        return self.represent_items(self.all_ids() if ids is None else ids)

    def all_ids(self) -> Tensor:
        """The ids of all items of the catalogue, int64 [N]."""
        return torch.arange(1, self.n_items, device=self.position_embedding.weight.device)

    def item_representations(self, ids: list[Tensor]) -> list[Tensor]:
        """Represent items, each distinct item once: list of int64 [...] -> list of float [..., H]."""
        return look_up(ids, self.represent_items)

    def _distinct_items(self, ids):
        distinct = distinct_ids(ids)
        return ItemTable(distinct, self.represent_items(distinct))

    def _candidates(self, batch):
        """The items in the softmax: those of the batch's domain, or the batch items and a sample of the others."""
        ids = self._softmax_ids(batch)
        if not self.sampled_negatives:
            return ItemTable(ids, self.item_table(ids))
        batch_items = distinct_ids([*batch.items, batch.targets], int(ids[0]))
        drawn, log_count = draw_negatives(torch.searchsorted(ids, batch_items) + 1, len(ids), self.sampled_negatives)
        ids, order = torch.cat([batch_items, ids[drawn - 1]]).sort()
        # a batch item stands for itself, a negative for many items
        log_counts = torch.full(ids.shape, log_count, device=ids.device).masked_fill(order < len(batch_items), 0.0)
        return ItemTable(ids, self.represent_items(ids), log_counts)

    def _softmax_ids(self, batch):
        """The items of the domain of a batch that may be in the softmax, ascending. All batch items are among them."""
        several = len(self.domain_ends) > 1
        domain = int(np.searchsorted(self.domain_ends, batch.items[0][0, 0].item())) if several else 0
        if self._seen is not None:
            return self._seen[domain]
        before = int(self.domain_ends[domain - 1]) if domain else 0
        return torch.arange(before + 1, int(self.domain_ends[domain]) + 1, device=self.position_embedding.weight.device)

    # -- losses: `represent` turns a batch into vectors, `loss` compares them ------------------------------------------

    def calculate_loss(self, batch) -> Tensor:
        """The loss of the stage, float [].

        Args:
            batch: a `data.batches.SequenceBatch`, or RecBole's Interaction with one row per prefix. Contrastive losses
                need a `SequenceBatch`, which holds the second view of each sequence.
        """
        if isinstance(batch, Interaction):
            batch = RowsAsBatch(batch[self.ITEM_SEQ], batch[self.ITEM_SEQ_LEN], batch[self.POS_ITEM_ID])
        if self.is_contrastive:
            return self.loss(batch, self.represent(batch))
        candidates = self._candidates(batch)  # they include the batch items, so each item is represented once
        return self.loss(batch, self.represent(batch, candidates), candidates)

    def represent(self, batch, items: ItemTable | None = None) -> list[Tensor]:
        """The vectors that the loss compares. Gradient caching (`--accumulate`) calls this for each part of a batch.

        Args:
            batch: a `SequenceBatch` or a part of one.
            items: a table that contains the batch items; None to compute their representations here.

        Returns:
            list of float [P, H]: the sequence representation at each scored position. For contrastive losses also the
            representations of the target items, and the sequence representations of the second views.
        """
        if not self.is_contrastive:
            if items is None:
                items = self._distinct_items(batch.items)
            return [self._states(items, batch.items, batch.scored)]
        if items is None:
            items = self._distinct_items([*batch.items, *batch.augmented_items, batch.targets])
        states = self._states(items, batch.items, batch.scored)
        views = self._states(items, batch.augmented_items, batch.augmented_scored)
        return [states, items[batch.targets], views]

    def _states(self, items, ids, scored):
        """The sequence representations at the scored positions, float [P, H]."""
        vectors = [items[part] for part in ids]
        states = self.encode_scored(vectors, scored)
        return states if self.history_mean is None else states + self.history_mean.scored(vectors, scored)

    def loss(self, batch, represented: list[Tensor], candidates: ItemTable | None = None) -> Tensor:
        """The loss of a whole batch, float []. A new loss term is added here.

        Args:
            batch: a `SequenceBatch`.
            represented: from `represent`, for the whole batch.
            candidates: the items in the softmax; None to compute their representations here. Contrastive losses have
                none.
        """
        options = {"temperature": self.temperature, "weights": batch.weights}  # of all losses
        options |= {"gather": self.gather, "cross_entropy": self.cross_entropy}
        if self.is_contrastive:  # section 2.2: sequence to item, and sequence to sequence
            states, target_items, views = represented
            options |= {"targets": batch.targets, "users": batch.users}
            to_item = in_batch_contrastive(states, target_items, **options)
            to_sequence = in_batch_contrastive(states, views, **options)
            return to_item + self.lam * to_sequence
        if candidates is None:  # section 2.3
            candidates = self._candidates(batch)
        options |= {"targets": candidates.rows(batch.targets), "log_counts": candidates.log_counts}
        options |= {"added": self._history_logits(batch, candidates.rows), "label_smoothing": self.label_smoothing}
        return catalogue_cross_entropy(represented[0], candidates.vectors, **options)

    def _history_logits(self, batch, columns):
        """The history bias as logits. `columns` gives the column of each item id."""
        return None if self.history_bias is None else self.history_bias.logits(batch, columns)

    # -- prediction ----------------------------------------------------------------------------------------------------

    def forward(self, item_seq: Tensor, item_seq_len: Tensor) -> Tensor:
        """Sequence representations: histories int64 [B, L] and their lengths int64 [B] -> float [B, H]."""
        if self._evaluation is None or torch.is_grad_enabled():
            vectors = self.item_representations([item_seq])[0]
        else:
            units, lengths = self._evaluation
            rows = (item_seq - 1).clamp(min=0)
            vectors = F.embedding(rows, units) * lengths[rows]
        return self.encode_histories(vectors, item_seq_len)

    def encode_histories(self, vectors: Tensor, lengths: Tensor) -> Tensor:
        """Sequence representations: item vectors float [B, L, H] and lengths int64 [B] -> float [B, H]."""
        states = self.encode_last(vectors, lengths)
        return states if self.history_mean is None else states + self.history_mean.last(vectors, lengths)

    def train(self, mode: bool = True):
        """Switch between training and evaluation. The next evaluation computes the item table again."""
        self._evaluation = None
        return super().train(mode)

    def _unit_items(self):
        """The unit vectors of all items, float [N, H]. An evaluation computes them once."""
        if self.training or torch.is_grad_enabled():
            return F.normalize(self.item_table(), dim=-1)
        if self._evaluation is None:
            table = self.item_table()
            lengths = table.norm(dim=-1, keepdim=True).clamp_(min=1e-12)
            self._evaluation = table.div_(lengths), lengths  # in place: one copy of a large catalogue
        return self._evaluation[0]

    def _unit_states(self, interaction):
        """Sequence representations of rows, normalized to length 1, float [B, H]."""
        return F.normalize(self.forward(interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN]), dim=-1)

    def _added_scores(self, interaction):
        """What is added to the cosines, [B, N]: the history bias, the bias of unseen items and the item-to-item logits.
        None if there is nothing to add."""
        history, lengths = interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN]
        batch = RowsAsBatch(history, lengths, interaction[self.ITEM_ID])
        bias = self._history_logits(batch, lambda ids: ids - 1)
        # the losses divide cosines by the temperature, and a score is a cosine
        parts = [] if bias is None else [bias._replace(values=bias.values * self.temperature)]
        if self.unseen is not None and self.unseen_bias is not None and self.unseen_bias:
            values = self.unseen * (self.unseen_bias * self.temperature)
            parts.append(DenseLogits(values.expand(len(lengths), -1)))
        if self.item_to_item is not None and self.item_to_item.factor:
            logits = self.item_to_item.logits(history, lengths, self.temperature)
            return DenseLogits(SumOfLogits(tuple(parts)).add_to(logits))  # these logits are dense in any case
        return SumOfLogits(tuple(parts)) if parts else None

    def score(self, unit_states: Tensor, unit_items: Tensor) -> Tensor:
        """Cosines: float [..., B, H] and [..., n, H] -> float [..., B, n]. The losses compute their own."""
        return unit_states @ unit_items.mT

    def full_sort_predict(self, interaction: Interaction) -> Tensor:
        """The score of every item, float [B, N + 1]. Column = item id; column 0 (padding) is -inf."""
        scores = self.score(self._unit_states(interaction), self._unit_items())
        added = self._added_scores(interaction)
        return F.pad(scores if added is None else added.add_to(scores), (1, 0), value=-torch.inf)

    def predict(self, interaction: Interaction) -> Tensor:
        """The score of one given item per row, float [B]."""
        columns = interaction[self.ITEM_ID] - 1
        items = self._unit_items()[columns]
        scores = self.score(self._unit_states(interaction)[:, None], items[:, None])[:, 0, 0]
        added = self._added_scores(interaction)
        return scores if added is None else scores + added.at(columns)

    @torch.no_grad()
    def ranks(self, interaction: Interaction) -> Tensor:
        """The rank of each row's target among all items, float64 [B]; see `layers.ranking.expected_ranks`.

        Without item-to-item logits, the scores of all items are never held at once.
        """
        items, states = self._unit_items(), self._unit_states(interaction)
        added = self._added_scores(interaction)
        return ranks_in_blocks(self.score, states, items, interaction[self.ITEM_ID] - 1, added)

    # -- transfer ------------------------------------------------------------------------------------------------------

    def freeze_encoder(self) -> None:
        """Freeze the transformer and the position embedding. All other parameters are still trained."""
        for part in (self.position_embedding, self.trm_encoder):
            part.requires_grad_(False)


class _OneItem:
    """A data set without items, with which SASRec creates the smallest id embedding."""

    num = staticmethod(lambda field: 1)
