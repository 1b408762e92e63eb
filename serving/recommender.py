"""Recommendations from a bundle: for any history, of any item that has a text.

    recommender = Recommender.from_pretrained("saved/bundle")
    recommender.recommend(["sku1", "sku2"], k=10)
    recommender.add_items({"sku9": "Wireless keyboard, German layout"})

Shapes: B histories, L items of the longest one, N items, D text width, H hidden size.
"""

import dataclasses
import logging
import os
import tempfile
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import polars as pl
import torch
import torch.nn.functional as F
from huggingface_hub import HfApi, snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from common.errors import UserError, did_you_mean
from dataset.preprocessing.encoder import Encoder, encode_with
from dataset.preprocessing.item_table import check_show_names
from dataset.preprocessing.texts import UNKNOWN_TEXT, has_words
from engine.bundle import ITEMS, VECTORS, read_bundle, write_bundle
from layers.encoder import RowsAsBatch
from serving.catalogue import Columns, columns_to_show
from serving.model import build_model, shop_of, untrained_model
from unisrec import UniSRec

BLOCK = 1024  # items that are scored at once. Each product of matrices has the same shape, whatever the number of items
_MOST_COMPARED = 5000  # ids with which an unknown id is compared. With 100,000 it would take seconds
_MOST_SCORES = 1 << 26  # at once. With many items, a batch has fewer histories
_EXACT_UP_TO = 1_000_000  # items. A bundle with more is loaded with an index
_CANDIDATES = 1000  # at least so many items of an index are scored exactly
_ENOUGH_RECALL = 0.98  # of an index. A lower recall is a warning
logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Recommendation:
    """A recommended item.

    Attributes:
        id: the raw id.
        score: the higher, the better. Scores of different histories are not comparable.
        text: the text of the item.
        source: `model`, or `popularity` if the history was empty.
        columns: to show, such as title, image and url: name -> value.
    """

    id: str
    score: float
    text: str
    source: str = "model"
    columns: Mapping[str, str] = dataclasses.field(default_factory=dict, hash=False)


class Recommender:
    """A model and its items.

    An item that was not in the training data is represented by its text alone, also by a transductive model. Items can
    be added and removed at any time. This does not change the scores of the other items. Only one thread at a time may
    use a recommender, apart from `represent`.

    Args:
        model: built by `serving.model.build_model`.
        content: of the bundle, from `engine.bundle.read_bundle`.

    Attributes:
        texts: raw id -> text of each item, in the order in which they were added.
        columns: raw id -> the columns to show, name -> value, of the items that have some.
        encoding: `encoder` and `pooling` of the text features that the model was trained on.
        max_history: how many items of a history the model sees.
        unseen_bias: added to the logits of items that were not in the training data, unless all are new. Above 0, new
            items are recommended more often. None: items of the catalogue have the bias of the model, items that were
            added later have none. It is not saved.
    """

    def __init__(self, model: UniSRec, content: Mapping[str, Any]):
        self.model, self._content = model.eval(), dict(content)
        self.encoding = _encoding_of(content)
        self.texts: dict[str, str] = {}
        self.columns: dict[str, Mapping[str, str]] = {}
        self.max_history = model.max_seq_length
        self.unseen_bias: float | None = None
        self._slots: dict[str, int] = {}  # the row of an item in the tables. The row of a removed item stays empty
        self._ids: list[str | None] = []  # the item of each row
        self._counts: list[int | None] = []  # how often the item of each row occurs in the training data; see `append`
        self._units = torch.zeros(0, model.hidden_size)  # whole blocks, padded with zeros
        self._lengths = torch.zeros(0, 1)
        self._present = torch.zeros(0, dtype=torch.bool)  # whether a row has an item
        self._unseen = torch.zeros(0, dtype=torch.bool)  # whether the item of a row was not in the training data
        self._new = torch.zeros(0, dtype=torch.bool)  # whether it was added later
        self._trained = model.n_items - 1  # the first rows are the items that the model was built for
        self._index: Any = None  # a `serving.index.Index` of all items. None: exact search
        self._encoder: Encoder | None = None
        self._encoding = threading.Lock()

    # -- loading -------------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        folder: str,
        items: Mapping[str, str] | None = None,
        columns: Columns | None = None,
        index: bool | None = None,
        unseen_bias: float | None = None,
    ) -> "Recommender":
        """Load a bundle.

        Args:
            folder: the bundle, or its name on the Hugging Face hub.
            items: raw id -> text of a catalogue, for a bundle without items of its own, as pre-training makes it. The
                texts are encoded and whitened with the statistics of this catalogue.
            columns: of these items, to show with them.
            index: whether to search with an approximate index, see `build_index`. None: above a million items.
            unseen_bias: see the attribute.

        Raises:
            UserError: the bundle is damaged, or has no items and none are given, or has items and some are given.
        """
        folder = _local(folder)
        content = read_bundle(folder)
        has_items = os.path.isfile(os.path.join(folder, ITEMS))
        if has_items and items is not None:
            raise UserError(f"{folder}: has items of its own; load it without items and add new ones with add_items")
        if not has_items and content["train_stage"] != "pretrain":
            raise UserError(
                f"{os.path.join(folder, ITEMS)}: no such file; the bundle is incomplete, copy or write it again"
            )
        if not has_items and not items:
            raise UserError(f"{folder}: has no items of its own; give those of a catalogue (items)")
        recommender = cls._with_catalogue(content, items) if items else cls._with_own_items(folder, content)
        if items:
            recommender.show(columns or {})
        recommender.unseen_bias = unseen_bias
        if index or (index is None and len(recommender) > _EXACT_UP_TO):
            recommender.build_index()
        return recommender

    @classmethod
    def _with_own_items(cls, folder, content):
        table, vectors = _read_items(folder)
        trained = len(content["item_tokens"]) - 1 if content["item_tokens"] else len(table)
        recommender = cls(build_model(content, shop_of(trained, content["features"]["width"])), content)
        if vectors.shape[1:] != (recommender.model.hidden_size,):
            raise UserError(
                f"{os.path.join(folder, VECTORS)}: vectors of width {vectors.size(-1)}, expected "
                f"{recommender.model.hidden_size}, the hidden_size of the model; copy or write the bundle again"
            )
        recommender.append(table["id"].to_list(), table["text"].to_list(), vectors, table["count"].to_list())
        recommender.columns |= columns_to_show(table)
        return recommender

    @classmethod
    def _with_catalogue(cls, content, items, build=build_model):
        encoding = _encoding_of(content)
        encoder = Encoder(encoding["encoder"], encoding.get("pooling"))
        features = _encode(encoder, items.values(), encoding)
        recommender = cls(build(content, shop_of(len(items), encoder.width, features)), content)
        recommender._encoder = encoder
        recommender.append(list(items), list(items.values()), recommender._represent(features), [0] * len(items))
        return recommender

    def untrained(self) -> "Recommender":
        """The same model with new weights, and the same items. It shows what training has brought."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            other = self._with_catalogue(self._content, self.texts, _build_untrained)
        other.show(self.columns)
        return other

    def save_pretrained(self, folder: str) -> None:
        """Write a bundle with the items as they are now.

        Args:
            folder: created if it is missing. A model card that is already there is kept.
        """
        rows = len(self._ids)
        texts = ["" if item is None else self.texts[item] for item in self._ids]
        own = {"id": self._ids, "text": texts, "count": self._counts}
        shown = [self.columns.get(item or "", {}) for item in self._ids]
        names = dict.fromkeys(name for columns in shown for name in columns)
        more = {name: [columns.get(name) for columns in shown] for name in names}
        table = pl.DataFrame(own | more, schema_overrides={"id": pl.String, "count": pl.Int64})
        content = self._content | {"state_dict": self.model.state_dict(), "train_stage": self.model.train_stage}
        vectors = (self._units * self._lengths * self._present[:, None])[:rows]
        write_bundle(folder, content, (table, vectors))

    def push_to_hub(self, name: str, private: bool = False, token: str | None = None) -> str:
        """Upload a bundle with the items as they are now to the Hugging Face hub. Returns its address.

        Args:
            name: such as `me/my-shop`. Created if it is missing.
            private: of a new repository.
            token: default: that of `hf auth login`.
        """
        api = HfApi(token=token)
        api.create_repo(name, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(os.path.join(folder, os.path.basename(name)))
            return str(api.upload_folder(repo_id=name, folder_path=os.path.join(folder, os.path.basename(name))))

    # -- items ---------------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.texts)

    def add_items(
        self, items: Mapping[str, str], columns: Columns | None = None, vectors: Tensor | None = None
    ) -> None:
        """Add items, or replace the text and the columns of known items. Only these texts are encoded.

        A known item keeps its id embedding, its item-to-item weights and its count.

        Args:
            items: raw id -> text.
            columns: raw id -> the columns to show, such as title, image and url: name -> value.
            vectors: what `represent` returned for the texts. None: it is called here.
        """
        if not items:
            return
        vectors = self.represent(list(items.values())) if vectors is None else vectors
        self.show({item: (columns or {}).get(item, {}) for item in items})
        known = [number for number, item in enumerate(items) if item in self._slots]
        new = [number for number, item in enumerate(items) if item not in self._slots]
        names, texts = list(items), list(items.values())
        if known:
            slots = [self._slots[names[number]] for number in known]
            self._set(slots, vectors[known] + self._id_embeddings(slots))
            self.texts |= {names[number]: texts[number] for number in known}
        self.append([names[n] for n in new], [texts[n] for n in new], vectors[new], [None] * len(new))

    def show(self, columns: Columns) -> None:
        """Replace the columns to show of items: raw id -> name -> value.

        Raises:
            UserError: a column has a name that it cannot have.
        """
        check_show_names({name for each in columns.values() for name in each}, "columns")
        for item, values in columns.items():
            if values:
                self.columns[item] = dict(values)
            else:
                self.columns.pop(item, None)

    @torch.no_grad()
    def represent(self, texts: Sequence[str]) -> Tensor:
        """The representations of texts, float32 [n, H]. The encoder is loaded when it is needed first."""
        with self._encoding:
            return self._represent(self.encode(texts))

    def encode(self, texts: Sequence[str]) -> Tensor:
        """The text vectors of texts as in the training data, not whitened: float32 [n, D]."""
        if self._encoder is None:
            self._encoder = Encoder(self.encoding["encoder"], self.encoding.get("pooling"))
        return _encode(self._encoder, texts, self.encoding)

    @torch.no_grad()
    def _id_embeddings(self, slots):
        """The id embeddings of rows, float32 [n, H]. 0 for items that were not in the training data."""
        vectors = torch.zeros(len(slots), self.model.hidden_size)
        if self.model.train_stage == "transductive_ft":
            trained = torch.tensor(slots) < self._trained
            vectors[trained] = self.model.item_embedding.weight[torch.tensor(slots)[trained] + 1]
        return vectors

    def remove_items(self, ids: Collection[str]) -> None:
        """Remove items. They are no longer recommended, and unknown in a history.

        Raises:
            UserError: an item is unknown. Then none is removed.
        """
        slots = [self._slot(item, "remove_items") for item in dict.fromkeys(ids)]
        for slot in slots:
            item = self._ids[slot]
            assert item is not None
            del self.texts[item], self._slots[item]
            self.columns.pop(item, None)
            self._ids[slot] = None
            self._present[slot] = False
        if self._index is not None:
            self._index.remove(torch.tensor(slots))

    def append(
        self, ids: Sequence[str | None], texts: Sequence[str], vectors: Tensor, counts: Sequence[int | None]
    ) -> None:
        """Add n items whose representations are known.

        Args:
            ids: the raw ids, all new. None is an empty row.
            texts: their texts.
            vectors: float32 [n, H].
            counts: how often each occurs in the training data. None: it was added later.
        """
        start, end = len(self._ids), len(self._ids) + len(ids)
        room = max(-(-end // BLOCK) * BLOCK - len(self._units), 0)
        self._units, self._lengths = (F.pad(table, (0, 0, 0, room)) for table in (self._units, self._lengths))
        tables = self._present, self._unseen, self._new
        self._present, self._unseen, self._new = (F.pad(table, (0, room)) for table in tables)
        self._set(slice(start, end), vectors)
        self._present[start:end] = torch.tensor([item is not None for item in ids], dtype=torch.bool)
        self._unseen[start:end] = torch.tensor([not count for count in counts], dtype=torch.bool)
        self._new[start:end] = torch.tensor([count is None for count in counts], dtype=torch.bool)
        self._ids += ids
        self._counts += counts
        self.texts |= {item: text for item, text in zip(ids, texts, strict=True) if item is not None}
        self._slots |= {item: start + number for number, item in enumerate(ids) if item is not None}

    def _set(self, rows, vectors):
        """Set the representations of rows of the tables."""
        lengths = vectors.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        self._units[rows], self._lengths[rows] = vectors / lengths, lengths
        if self._index is not None:
            self._index.set(torch.arange(len(self._units))[rows], vectors / lengths)

    @torch.no_grad()
    def _represent(self, features):
        """Text vectors to item representations, float32 [n, D] -> [n, H]."""
        whitened = features if self.model.whitening is None else self.model.whitening.whiten_table(features)
        return self.model.moe_adaptor(whitened).clone()

    def _slot(self, item, where):
        if item not in self._slots:
            hint = did_you_mean(item, self._slots) if len(self._slots) <= _MOST_COMPARED else ""
            raise UserError(f"{where}: unknown item {item!r}{hint}")
        return self._slots[item]

    # -- recommendations -----------------------------------------------------------------------------------------------

    def recommend(
        self,
        history: Sequence[str] | Sequence[Sequence[str]],
        k: int = 10,
        *,
        exclude_history: bool = True,
        allowed: Collection[str] | None = None,
        on_unknown: str = "error",
        batch_size: int = 512,
    ) -> Any:
        """Recommend items.

        Args:
            history: the raw ids of a user's items, oldest first, or a list of such histories. An empty list is an empty
                history. The newest items count, as many as the model sees.
            k: the number of recommendations. There are fewer if fewer items are left.
            exclude_history: leave out the items of the history.
            allowed: recommend only these items. None: all.
            on_unknown: what to do with an unknown item in a history: `error` or `skip`.
            batch_size: histories that are encoded at once.

        Returns:
            list of `Recommendation`, best first; for several histories a list of such lists. An empty history gets the
            most popular items of the training data.

        Raises:
            UserError: an unknown item, a k below 1, or an empty history without training data.
        """
        if k < 1:
            raise UserError(f"k: found {k}, expected 1 or more")
        if isinstance(history, str):
            raise UserError(f"history: found {history!r}, expected a list of ids")
        batch_size = max(1, min(batch_size, _MOST_SCORES // max(1, len(self._units))))
        single = all(isinstance(item, str) for item in history)
        histories = [history] if single else history
        rows = [self._rows(each, on_unknown) for each in histories]
        candidates = self._present
        if allowed is not None:
            candidates = torch.zeros_like(candidates)
            candidates[[self._slot(item, "allowed") for item in allowed]] = True
        found = []
        for start in range(0, len(rows), batch_size):
            if allowed is None and self._index is not None and self._unseen_scores() is None:
                found += self._best_of_index(rows[start : start + batch_size], k, exclude_history)
            else:
                found += self._best(rows[start : start + batch_size], k, candidates, exclude_history)
        return found[0] if single else found

    def _best(self, rows, k, candidates, exclude_history):
        """The recommendations for a batch of histories, as rows of the tables."""
        scores = self._scores(rows)
        scores.masked_fill_(~candidates, -torch.inf)
        if exclude_history:
            for number, own in enumerate(rows):
                scores[number, own] = -torch.inf
        best = scores.topk(min(k, scores.size(1)))
        return [
            self._recommendations(slots, values, "model" if own else "popularity")
            for own, values, slots in zip(rows, best.values, best.indices, strict=True)
        ]

    @torch.no_grad()
    def _best_of_index(self, rows, k, exclude_history):
        """The same by the index. Items with an added logit are always candidates, and all scores are exact."""
        full = [number for number, own in enumerate(rows) if own]
        results = [[] if own else self._best([own], k, self._present, exclude_history)[0] for own in rows]
        if not full:
            return results
        ids, lengths = self._padded([rows[number] for number in full])
        for number, unit, own_ids, length in zip(full, self._unit_states(ids, lengths), ids, lengths, strict=True):
            added = self._add_logits(torch.zeros(1, len(self._units)), own_ids[None], length[None])[0]
            with_logit, history = added.nonzero()[:, 0], torch.tensor(rows[number])
            excluded = torch.cat([with_logit, history]) if exclude_history else with_logit
            slots = torch.cat([with_logit, self._index.search(unit, max(_CANDIDATES, 4 * k), excluded)])
            scores = self._units[slots] @ unit + added[slots]
            dropped = ~self._present[slots]
            if exclude_history:
                dropped |= torch.isin(slots, history)
            best = scores.masked_fill(dropped, -torch.inf).topk(min(k, len(slots)))
            results[number] = self._recommendations(slots[best.indices], best.values, "model")
        return results

    def _recommendations(self, slots, scores, source):
        pairs = zip(slots.tolist(), scores.tolist(), strict=True)
        return [self._recommendation(slot, score, source) for slot, score in pairs if score > -torch.inf]

    def _recommendation(self, slot, score, source):
        item = self._ids[slot]
        return Recommendation(item, score, self.texts[item], source, self.columns.get(item, {}))

    def score(self, history: Sequence[str], ids: Sequence[str], on_unknown: str = "error") -> list[float]:
        """The scores of given items for a history, in the order of `ids`. See `recommend`."""
        scores = self._scores([self._rows(history, on_unknown)])[0]
        return scores[[self._slot(item, "ids") for item in ids]].tolist()

    def nearest_of(self, history: Sequence[str], ids: Sequence[str]) -> list[str | None]:
        """For each of the items `ids`, the item of the history whose representation has the highest cosine with it.

        It explains a recommendation. Unknown items of the history are skipped. None if no item of the history is known.
        """
        known = [item for item in history if item in self._slots]
        if not known:
            return [None] * len(ids)
        units = self._units[[self._slot(item, "ids") for item in ids]]
        best = (units @ self._units[[self._slots[item] for item in known]].T).argmax(1)
        return [known[number] for number in best.tolist()]

    def similar(self, item: str, k: int = 10) -> list[Recommendation]:
        """The items whose representation has the highest cosine with that of an item.

        Args:
            item: a raw id, or any text.
            k: the number of items.
        """
        if k < 1:
            raise UserError(f"k: found {k}, expected 1 or more")
        slot = self._slots.get(item)
        if slot is None:
            return self.nearest(self.represent([item])[0], k)
        return [found for found in self.nearest(self._units[slot], k + 1) if found.id != item][:k]

    def nearest(self, vector: Tensor, k: int = 10) -> list[Recommendation]:
        """The items whose representation has the highest cosine with a vector, float [H]. See `represent`."""
        unit = F.normalize(vector, dim=-1)
        if self._index is not None:
            slots = self._index.search(unit, max(_CANDIDATES, 4 * k), torch.zeros(0, dtype=torch.int64))
            scores = self._units[slots] @ unit
        else:
            slots, scores = torch.arange(len(self._units)), self._products(unit[None])[0]
        best = scores.masked_fill(~self._present[slots], -torch.inf).topk(min(k, len(slots)))
        return self._recommendations(slots[best.indices], best.values, "model")

    # -- approximate search --------------------------------------------------------------------------------------------

    def build_index(self) -> float:
        """Build an approximate index of the items. `recommend`, `similar` and `nearest` then use it.

        Only the choice of candidates is approximate. Scores are exact, and so is `recommend` with `allowed` or with a
        bias of unseen items. Items that
        are added or removed later are added to the index or removed from it.

        Returns:
            The share of the ten best items of exact search that the index finds, over 200 histories of three random
            items. It is also logged.

        Raises:
            UserError: there are too few items.
        """
        from serving.index import LEAST_ITEMS, Index  # imported here: FAISS is used only with an index

        if len(self) < LEAST_ITEMS:
            raise UserError(f"index: found {len(self)} items, expected {LEAST_ITEMS:,} or more; leave the index out")
        start, present = time.perf_counter(), self._present.nonzero()[:, 0]
        drawn = present[torch.randint(len(present), (200, 3), generator=torch.Generator().manual_seed(0))]
        histories = [[str(self._ids[slot]) for slot in row] for row in drawn.tolist()]
        self._index = None
        exact = self.recommend(histories)
        self._index = Index(self._units, present)
        recall = _recall(exact, self.recommend(histories))
        say = logger.info if recall >= _ENOUGH_RECALL else logger.warning
        say("index of %s items: recall@10 %.4f, %.0f s", f"{len(self):,}", recall, time.perf_counter() - start)
        return recall

    @torch.no_grad()
    def ranks_of(self, vector: Tensor, histories: Sequence[Sequence[str]], k: int = 10) -> list[int | None]:
        """The rank that a new item would have among the recommendations for each history. None: below the first k.

        Args:
            vector: of the new item, float [H]. See `represent`.
            histories: at least one, each with at least one known item.
            k: the number of recommendations.
        """
        best = self.recommend(histories, k)
        bias = 0.0 if self._unseen_scores() is None else self.unseen_biases()[1]
        states = self._unit_states(*self._padded([self._rows(each, "error") for each in histories]))
        scores = (states @ F.normalize(vector, dim=-1) + bias).tolist()
        ranks = [1 + sum(item.score >= score for item in found) for found, score in zip(best, scores, strict=True)]
        return [rank if rank <= k else None for rank in ranks]

    def _rows(self, history, on_unknown):
        """The rows of a history's items in the tables, oldest first."""
        if on_unknown not in ("error", "skip"):
            raise UserError(f"on_unknown: found {on_unknown!r}, expected error or skip")
        known = history if on_unknown == "error" else [item for item in history if item in self._slots]
        return [self._slot(item, "history") for item in known]

    @torch.no_grad()
    def _scores(self, rows: list[list[int]]) -> Tensor:
        """The scores of all rows of the tables for B histories, float [B, rows]."""
        scores = torch.zeros(len(rows), len(self._units))
        empty = [number for number, own in enumerate(rows) if not own]
        if empty:
            scores[empty] = self._popularity()
        full = [number for number, own in enumerate(rows) if own]
        if full:
            scores[full] = self._model_scores(*self._padded([rows[number] for number in full]))
        return scores

    def _padded(self, rows):
        """The newest rows of histories + 1, int64 [B, L], padded with 0, and their lengths, int64 [B]."""
        newest = [torch.tensor(own[-self.max_history :]) + 1 for own in rows]
        return torch.nn.utils.rnn.pad_sequence(newest, batch_first=True), torch.tensor([len(each) for each in newest])

    def _popularity(self):
        if not any(self._counts):
            raise UserError("history: is empty, and this model knows no popular items; give at least one item")
        logger.warning("a history is empty: the most popular items are recommended")
        return F.pad(
            torch.tensor([count or 0 for count in self._counts], dtype=torch.float),
            (0, len(self._units) - len(self._counts)),
        )

    def _model_scores(self, ids, lengths):
        """Scores for histories from `_padded`, float [B, rows]."""
        return self._add_logits(self._products(self._unit_states(ids, lengths)), ids, lengths)

    def unseen_rows(self) -> list[int]:
        """The rows of the items of the catalogue that were not in the training data, as in the table of the bundle."""
        return (self._unseen & ~self._new)[: len(self._ids)].nonzero()[:, 0].tolist()

    def _unit_states(self, ids, lengths):
        """User vectors of length 1, float [B, H]."""
        rows = (ids - 1).clamp(min=0)
        vectors = F.embedding(rows, self._units) * F.embedding(rows, self._lengths)  # [B, L, H]
        return F.normalize(self.model.encode_histories(vectors, lengths), dim=-1)

    def _add_logits(self, scores, ids, lengths):
        """Add history bias, item-to-item logits and the bias of unseen items to scores, float [B, rows]."""
        model = self.model
        if model.history_bias is not None:  # a score is a logit times the temperature
            bias = model.history_bias.logits(RowsAsBatch(ids, lengths, lengths), lambda ids: ids - 1)
            scores = bias._replace(values=bias.values * model.temperature).add_to(scores)
        if model.item_to_item is not None and model.item_to_item.factor:
            known = ids.masked_fill(ids > self._trained, 0)  # new items have no weights
            scores[:, : self._trained] += model.item_to_item.logits(known, lengths, model.temperature)
        unseen = self._unseen_scores()
        return scores if unseen is None else scores + unseen

    def unseen_biases(self) -> tuple[float, float]:
        """What is added to the score of an item of the catalogue that was not in the training data, and to that of an
        item that was added later."""
        own = self.model.unseen_bias if self.unseen_bias is None else self.unseen_bias
        return float(own or 0) * self.model.temperature, float(self.unseen_bias or 0) * self.model.temperature

    def _unseen_scores(self):
        """What is added to the scores of all rows, float [rows]. None if it makes no difference."""
        biases = self.unseen_biases()
        if not any(biases) or self._unseen[: len(self._ids)].all():
            return None
        return self._unseen * torch.where(self._new, biases[1], biases[0])

    def _products(self, units):
        """Cosines with all items, block by block: float [B, H] -> float [B, rows]."""
        return torch.cat([units @ block.T for block in self._units.split(BLOCK)], dim=1)


def _recall(exact, found):
    """The share of the best items that were found. Items with equal scores are equally good."""
    pairs = zip(exact, found, strict=True)
    hits = [item.score > best[-1].score - 1e-6 for best, own in pairs for item in own]
    return sum(hits) / sum(len(best) for best in exact)


def _encoding_of(content):
    """How the text features of a bundle's training data were made, dict. Features without an encoder are MiniLM's."""
    return {"encoder": "minilm"} | (content["features"] or {})


def _build_untrained(content, shop):
    return untrained_model(shop, content["config"] | {"train_stage": "inductive_ft"})


def _encode(encoder, texts, encoding):
    """Text vectors as those of the training data: float32 [n, D]."""
    vectors = torch.from_numpy(encode_with(encoder, [text if has_words(text) else UNKNOWN_TEXT for text in texts]))
    return F.normalize(vectors, dim=-1) if encoding.get("normalised") else vectors


def _local(name):
    """Download a bundle from the Hugging Face hub and return its folder. A local path is returned unchanged."""
    if os.path.isdir(name) or name.count("/") != 1 or name.startswith((".", "/")):
        return name
    try:
        return snapshot_download(name)
    except Exception as failure:  # three libraries raise errors of their own
        reason = (str(failure).strip().splitlines() or [type(failure).__name__])[0]
        raise UserError(
            f"{name}: no such folder, and cannot be loaded from the Hugging Face hub ({reason})"
        ) from failure


def _read_items(folder):
    """The table of a bundle's items, and their representations, float32 [N, H]."""
    path = os.path.join(folder, ITEMS)
    try:
        table = pl.read_parquet(path)
        vectors = load_file(os.path.join(folder, VECTORS))["vectors"]
    except (pl.exceptions.PolarsError, SafetensorError, OSError, KeyError) as error:
        raise UserError(f"{folder}: its items cannot be read ({error}); write the bundle again") from None
    if not {"id", "text", "count"} <= set(table.columns) or len(table) != len(vectors):
        raise UserError(
            f"{path}: does not fit {VECTORS} ({len(table)} rows, {len(vectors)} vectors); write the bundle again"
        )
    return table, vectors
