"""The data set with RecBole's interface. It stores compact sequences, not a table with one row per prefix."""

import copy
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from recbole.data.dataset import SequentialDataset
from recbole.data.interaction import Interaction, cat_interactions
from recbole.utils import FeatureSource, FeatureType
from scipy.sparse import coo_matrix, spmatrix

from common.errors import UserError
from data.catalogue import item_names, open_catalogue
from data.files import load_sequences
from data.sequences import DOMAIN_STRIDE, Sequences, keep_users, without_items

SPLITS = ("train", "valid", "test")


class UniSRecDataset(SequentialDataset):
    """A data set in the published format: `NAME.{train,valid,test}.inter` and text features of one or more domains.

    RecBole would read each row with pandas, pad it to 50 items and keep it in memory. This class keeps one sequence per
    user (`sequences`). When a batch needs rows, it builds them with RecBole's field names and ids. So RecBole's models,
    samplers, data loaders, trainers and evaluators work with it. The id of an item is its index in the feature file
    + 1. In a mixture, the ids of the domains follow one another.

    Args:
        config: with the keys `data_path`, `dataset`, `plm_suffix`, `plm_suffix_aug`, `plm_size`, `train_stage` and
            `MAX_ITEM_LIST_LENGTH`.

    Attributes:
        catalogue (Catalogue): the items.
        features (ItemFeatures or None): their text features. None for a model that does not read them.
        split (str or None): `train`, `valid` or `test` for the parts that `build` returns.

    Raises:
        UserError: files are missing or malformed.
    """

    def _from_scratch(self) -> None:
        """RecBole's constructor calls this. It replaces the reading and filtering of tables."""
        self._get_preset()
        self._get_field_from_config()
        config = self.config
        has_second_view = config["train_stage"] == "pretrain" and config["pretrain_loss"] == "contrastive"
        self.catalogue, self.features = open_catalogue(
            config["data_path"],
            self.dataset_name,
            config["plm_suffix"] or "auto",
            (config["plm_suffix_aug"] or "auto") if has_second_view else None,
            config["plm_size"],
            need_features=config.uses_item_text,
        )
        self._sequences: dict[str, Sequences] = {}
        self._user_numbers: np.ndarray | None = None
        self._inter_feat: Interaction | None = None
        self.split: str | None = None
        # For each row of a split, set by `build`: the index of its target in `items`, and the number of its sequence.
        self._targets = self._row_sequences = np.empty(0, np.int64)
        self._pads_to_batch = config.ignores_padding
        self.user_feat = self.item_feat = None
        self.feat_name_list = ["inter_feat"]
        self._set_fields()

    def _set_fields(self) -> None:
        """Tell RecBole the fields, their types and their tokens."""
        self.item_id_list_field = f"{self.iid_field}{self.config['LIST_SUFFIX']}"
        tokens = {self.uid_field: self._user_tokens, self.iid_field: self.catalogue.tokens}
        self.field2id_token = _LazyDict(tokens)
        self.field2token_id = _LazyDict({field: partial(self._ids_of_tokens, field) for field in tokens})
        for field, kind, length in (
            (self.uid_field, FeatureType.TOKEN, 1),
            (self.iid_field, FeatureType.TOKEN, 1),
            (self.item_id_list_field, FeatureType.TOKEN_SEQ, self.max_item_list_len),
            (self.item_list_length_field, FeatureType.TOKEN, 1),
        ):
            self.set_field_property(field, kind, FeatureSource.INTERACTION, length)

    def _benchmark_presets(self) -> None:
        """RecBole measures list lengths with pandas here. `_set_fields` has done it."""

    # -- content ------------------------------------------------------------------------------------------------

    def sequences(self, split: str) -> Sequences:
        """The sequences of `train`, `valid` or `test`. They are read once.

        Those of `train` are without what `train_fraction` and `holdout_items` leave out.
        """
        if split not in self._sequences:
            path = os.path.join(self.config["data_path"], f"{self.dataset_name}.{split}.inter")
            sequences = load_sequences(
                path, self.catalogue, self.catalogue.is_mixture, bool(self.config["show_progress"])
            )
            self._sequences[split] = self._reduced(sequences) if split == "train" else sequences
        return self._sequences[split]

    def _reduced(self, sequences):
        """The training sequences of `train_fraction` of the users, without `holdout_items` of the items."""
        users, items = self.config["train_fraction"], self.config["holdout_items"]
        if users == 1 and not items:
            return sequences  # memory-mapped and not read yet
        if users < 1:
            sequences = keep_users(sequences, users, self.config["seed"])
        if items:
            sequences = without_items(sequences, self.held_out_items())
        if not sequences.weights.any():
            raise UserError(
                f"{self.dataset_name}: no prediction is left to learn from with train_fraction {users} and "
                f"holdout_items {items}; choose a larger train_fraction or a smaller holdout_items"
            )
        return sequences

    def held_out_items(self) -> np.ndarray:
        """Which items `holdout_items` leaves out of the training sequences: bool [N + 1], by id."""
        count = self.catalogue.n_items
        order = np.random.default_rng([self.config["seed"], 2]).permutation(count) + 1
        left_out = np.zeros(count + 1, bool)
        left_out[order[: round(self.config["holdout_items"] * count)]] = True
        return left_out

    @property
    def max_history(self) -> int:
        """The most history items that a prediction sees: MAX_ITEM_LIST_LENGTH, or less if the file was cut shorter."""
        return min(self.max_item_list_len, self.sequences(self.split or "train").cut_length)

    def num(self, field: str) -> int:
        """The number of ids of a field, including padding."""
        if field in (self.iid_field, self.item_id_list_field):
            return self.catalogue.n_items + 1
        if field == self.uid_field:
            return len(self._users()) + 1
        return super().num(field)

    def item_names(self) -> list[str]:
        """The item of each row of an id embedding, `[PAD]` first, in names that do not depend on the numbering."""
        return item_names(self.config["data_path"], self.catalogue)

    def _users(self) -> np.ndarray:
        """The numbers of all users as in the files, ascending, int64. A user's id is its place here + 1."""
        if self._user_numbers is None:
            self._user_numbers = np.unique(np.concatenate([self.sequences(split).users for split in SPLITS]))
        return self._user_numbers

    def _user_tokens(self) -> np.ndarray:
        users = self._users()
        tokens = (users % DOMAIN_STRIDE).astype(str)
        if self.catalogue.is_mixture:
            tokens = np.char.add(np.char.add((users // DOMAIN_STRIDE).astype(str), "-"), tokens)
        return np.concatenate([["[PAD]"], tokens])

    def _ids_of_tokens(self, field: str) -> dict[str, int]:
        return {token: row for row, token in enumerate(self.field2id_token[field])}

    # -- RecBole's view: rows -----------------------------------------------------------------------------------

    def build(self) -> list["UniSRecDataset"]:
        """The three parts [train, valid, test], split as the files are."""
        self._users()
        return [self._part(split) for split in SPLITS]

    def _own_sequences(self) -> Sequences:
        assert self.split, "only the parts that `build` returns have rows"
        return self.sequences(self.split)

    def _part(self, split: str) -> "UniSRecDataset":
        part = copy.copy(self)
        part.split = split
        part._targets, part._row_sequences = self.sequences(split).rows()
        if not len(part._targets):
            raise UserError(f"{self.dataset_name}.{split}.inter: holds no rows; expected one per history and target")
        part._inter_feat = None
        return part

    @property
    def inter_feat(self) -> Interaction:
        """The columns of all rows, which RecBole's samplers and some of its models read."""
        if self._inter_feat is None:
            self._inter_feat = (
                _LazyHistories(self._columns(slice(None)).interaction, self.item_id_list_field, self)
                if self.split
                else cat_interactions([part.inter_feat for part in self.build()])
            )
        return self._inter_feat

    def _columns(self, index: np.ndarray | slice) -> Interaction:
        """User, target and history length of rows, without the history itself."""
        sequences = self._own_sequences()
        targets, row_sequences = self._targets[index], self._row_sequences[index]
        lengths = np.minimum(targets - sequences.offsets[row_sequences], self.max_history)
        return Interaction(
            {
                self.uid_field: torch.from_numpy(np.searchsorted(self._users(), sequences.users[row_sequences]) + 1),
                self.iid_field: torch.from_numpy(sequences.items[targets].astype(np.int64)),
                self.item_list_length_field: torch.from_numpy(lengths),
            }
        )

    def __len__(self) -> int:
        return len(self._targets) if self.split else self.sequences("train").n_predictions

    def __getitem__(self, index: Any, join: bool = True) -> Interaction:
        """Build rows in the form that RecBole's models read.

        Args:
            index: int, slice, list or int array [B], the numbers of the rows.
            join: not used. RecBole passes it.

        Returns:
            user_id [B], item_id_list [B, L] padded with 0 on the right, item_length [B], item_id [B]. For models that
            ignore padding, L is the longest history of the batch. For other models, and for slices, which RecBole's
            loader for sampled negatives concatenates, L is MAX_ITEM_LIST_LENGTH.
        """
        index = np.atleast_1d(np.asarray(index)) if not isinstance(index, slice) else index
        rows = self._columns(index)
        lengths = rows[self.item_list_length_field].numpy()
        pads_to_batch = self._pads_to_batch and not isinstance(index, slice)
        column = np.arange(int(lengths.max(initial=1)) if pads_to_batch else self.max_item_list_len)
        source = (self._targets[index] - lengths)[:, None] + column
        inside = column < lengths[:, None]
        items = self._own_sequences().items
        history = np.where(inside, items[np.where(inside, source, 0)], 0).astype(np.int64)
        rows.update(Interaction({self.item_id_list_field: torch.from_numpy(history)}))
        return rows

    def sort(self, by: str, ascending: bool = True) -> None:
        """Sort the rows by a field. RecBole's loader for sampled negatives expects the rows of a user together."""
        order = np.argsort(self.inter_feat[by].numpy() * (1 if ascending else -1), kind="stable")
        self._keep_rows(order)

    def share(self, rank: int, world_size: int) -> None:
        """Keep the share of one process: every `world_size`-th row, starting with row `rank`."""
        self._keep_rows(slice(rank, None, world_size))

    def _keep_rows(self, index: np.ndarray | slice) -> None:
        self._targets, self._row_sequences = self._targets[index], self._row_sequences[index]
        self._inter_feat = None

    def join(self, df: Interaction) -> Interaction:
        """RecBole adds the attributes of users and items here. Our data sets have none."""
        return df

    def inter_matrix(self, form: str = "coo", value_field: str | None = None) -> spmatrix:
        """Which user interacted with which item: sparse [users, items]. First items, which are no target, count too."""
        assert value_field is None, "rows have no values"
        sequences = self.sequences(self.split or "train")
        users = np.repeat(np.searchsorted(self._users(), sequences.users) + 1, np.diff(sequences.offsets))
        matrix = coo_matrix((np.ones(len(users)), (users, sequences.items)), shape=(self.user_num, self.item_num))
        return matrix if form == "coo" else matrix.asformat(form)

    def __str__(self) -> str:
        domains = f" ({', '.join(self.catalogue.domains)})" if self.catalogue.is_mixture else ""
        train = self.sequences("train")
        return (
            f"{self.dataset_name}{domains}: {self.catalogue.n_items:,} items, {len(train):,} training sequences, "
            f"{train.n_predictions:,} predictions to learn from"
        )

    __repr__ = __str__


class _LazyHistories(Interaction):
    """All rows of a split. The padded histories, by far the largest column, are built on first access."""

    def __init__(self, columns: dict[str, torch.Tensor], histories: str, dataset: UniSRecDataset):
        super().__init__(columns)
        self._histories, self._dataset = histories, dataset

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, str) and index == self._histories and index not in self.interaction:
            self.interaction[index] = self._dataset[:].interaction[index]
        return super().__getitem__(index)


class _LazyDict(dict):
    """A dict whose values are built on first access. The tokens of a million users are never needed in training."""

    def __init__(self, builders: dict[str, Callable[[], Any]]):
        super().__init__()
        self._builders = builders

    def __missing__(self, key: str) -> Any:
        self[key] = self._builders[key]()
        return self[key]
