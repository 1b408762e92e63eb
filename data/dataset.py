"""The data set as RecBole sees it, over compact sequences instead of a table with a row per prefix."""

import copy
import os

import numpy as np
import torch
from recbole.data.dataset import SequentialDataset
from recbole.data.interaction import Interaction, cat_interactions
from recbole.utils import FeatureSource, FeatureType
from scipy.sparse import coo_matrix

from common.errors import UserError
from data.catalogue import item_names, open_catalogue
from data.files import DOMAIN, load_sequences

SPLITS = ("train", "valid", "test")


class UniSRecDataset(SequentialDataset):
    """A data set in the published format: `NAME.{train,valid,test}.inter`, text features, possibly of many domains.

    RecBole would read every prefix row through pandas, pad it to 50 and keep it; this class keeps one sequence a user
    (`sequences`) and makes rows when a batch asks for them, with RecBole's field names and ids. So RecBole's models,
    samplers, data loaders, trainers and evaluators work on it. An item's id is its index in the feature file + 1
    (mixtures: the domains one after another).

    Attributes:
        catalogue (Catalogue): the items.
        features (ItemFeatures or None): their text features.
        split (str or None): after `build`, which part this data set is.

    Args:
        config (engine.config.Config): keys `data_path`, `dataset`, `plm_suffix`, `plm_suffix_aug`, `plm_size`,
            `train_stage`, `MAX_ITEM_LIST_LENGTH`; what the model needs, `uses_item_text` and `ignores_padding`.

    Raises:
        UserError: missing or malformed files.
    """

    def _from_scratch(self):
        self._get_preset()
        self._get_field_from_config()
        config = self.config
        self.catalogue, self.features = open_catalogue(
            config["data_path"],
            self.dataset_name,
            config["plm_suffix"] or "auto",
            (config["plm_suffix_aug"] or "auto") if config["train_stage"] == "pretrain" else None,
            config["plm_size"],
            need_features=config.uses_item_text,
        )
        self._sequences = {}
        self._user_numbers = None
        self.split = self._columns = None
        self._trims = config.ignores_padding
        self.user_feat = self.item_feat = None
        self.feat_name_list = ["inter_feat"]
        self.item_id_list_field = f"{self.iid_field}{config['LIST_SUFFIX']}"
        self.field2id_token = _Tokens({self.uid_field: self._user_tokens, self.iid_field: self.catalogue.tokens})
        self.field2token_id = _Tokens(
            {
                field: lambda field=field: {token: i for i, token in enumerate(self.field2id_token[field])}
                for field in (self.uid_field, self.iid_field)
            }
        )
        for field, kind, length in (
            (self.uid_field, FeatureType.TOKEN, 1),
            (self.iid_field, FeatureType.TOKEN, 1),
            (self.item_id_list_field, FeatureType.TOKEN_SEQ, self.max_item_list_len),
            (self.item_list_length_field, FeatureType.TOKEN, 1),
        ):
            self.set_field_property(field, kind, FeatureSource.INTERACTION, length)

    def _benchmark_presets(self):
        """Nothing to do: `_from_scratch` has named the fields (RecBole counts list lengths with pandas here)."""

    # -- what is in it ------------------------------------------------------------------------------------------

    def sequences(self, split):
        """The sequences of `train`, `valid` or `test`, read once. Returns Sequences."""
        if split not in self._sequences:
            path = os.path.join(self.config["data_path"], f"{self.dataset_name}.{split}.inter")
            self._sequences[split] = load_sequences(
                path, self.catalogue, self.catalogue.is_mixture, bool(self.config["show_progress"])
            )
        return self._sequences[split]

    @property
    def window(self):
        """How many items of history a prediction sees: int."""
        return min(self.max_item_list_len, self.sequences(self.split or "train").window)

    def num(self, field):
        """How many ids a field has, padding included."""
        if field in (self.iid_field, self.item_id_list_field):
            return self.catalogue.n_items + 1
        if field == self.uid_field:
            return len(self._users()) + 1
        return super().num(field)

    def item_names(self):
        """What each row of an id embedding stands for, `[PAD]` first: list of str."""
        return item_names(self.config["data_path"], self.catalogue)

    def _users(self):
        """The users' numbers as written, ascending: int64; user id = place + 1."""
        if self._user_numbers is None:
            self._user_numbers = np.unique(np.concatenate([self.sequences(split).users for split in SPLITS]))
        return self._user_numbers

    def _user_tokens(self):
        users = self._users()
        tokens = (users % DOMAIN).astype(str)
        if self.catalogue.is_mixture:
            tokens = np.char.add(np.char.add((users // DOMAIN).astype(str), "-"), tokens)
        return np.concatenate([["[PAD]"], tokens])

    # -- RecBole's view: rows -----------------------------------------------------------------------------------

    def build(self):
        """Split as the files do. Returns [train, valid, test], each a UniSRecDataset."""
        self._users()
        return [self._part(split) for split in SPLITS]

    def _part(self, split):
        part = copy.copy(self)
        part.split = split
        part._positions, part._row_sequences = self.sequences(split).rows()
        if not len(part._positions):
            raise UserError(f"{self.dataset_name}.{split}.inter: holds no rows; expected one per history and target")
        part._columns = None
        return part

    @property
    def inter_feat(self):
        """The columns of all rows, as RecBole's samplers and some models read them. Returns Interaction."""
        if self._columns is None:
            self._columns = (
                _Columns(self._plain_columns(slice(None)).interaction, self.item_id_list_field, self)
                if self.split
                else cat_interactions([part.inter_feat for part in self.build()])
            )
        return self._columns

    def _plain_columns(self, index):
        """User, target and history length of rows, without the history itself. Returns Interaction."""
        sequences = self.sequences(self.split)
        positions, sequence_of = self._positions[index], self._row_sequences[index]
        history = np.minimum(positions - sequences.offsets[sequence_of], self.window)
        return Interaction(
            {
                self.uid_field: torch.from_numpy(np.searchsorted(self._users(), sequences.users[sequence_of]) + 1),
                self.iid_field: torch.from_numpy(sequences.items[positions].astype(np.int64)),
                self.item_list_length_field: torch.from_numpy(history),
            }
        )

    def __len__(self):
        return len(self._positions) if self.split else self.sequences("train").n_predictions

    def __getitem__(self, index, join=True):
        """Rows as RecBole's models want them.

        Args:
            index (int, slice, list or int array [B]): which rows.

        Returns:
            Interaction: user_id [B], item_id_list [B, L] padded with 0 on the right, item_length [B], item_id [B];
            L is the longest history of the batch for models that ignore padding, else MAX_ITEM_LIST_LENGTH; and so for
            a slice, since RecBole's loader for sampled negatives joins several.
        """
        index = np.atleast_1d(np.asarray(index)) if not isinstance(index, slice) else index
        rows = self._plain_columns(index)
        lengths = rows[self.item_list_length_field].numpy()
        trims = self._trims and not isinstance(index, slice)
        width = int(lengths.max(initial=1)) if trims else self.max_item_list_len
        place = np.arange(width)
        source = (self._positions[index] - lengths)[:, None] + place
        inside = place < lengths[:, None]
        items = self.sequences(self.split).items
        history = np.where(inside, items[np.where(inside, source, 0)], 0).astype(np.int64)
        rows.update(Interaction({self.item_id_list_field: torch.from_numpy(history)}))
        return rows

    def sort(self, by, ascending=True):
        """Order the rows by a field; RecBole's loader for sampled negatives wants a user's rows together."""
        order = np.argsort(self.inter_feat[by].numpy() * (1 if ascending else -1), kind="stable")
        self._positions, self._row_sequences = self._positions[order], self._row_sequences[order]
        self._columns = None

    def share(self, rank, world_size):
        """Keep every world_size-th row from the rank-th on."""
        self._positions, self._row_sequences = (
            rows[rank::world_size] for rows in (self._positions, self._row_sequences)
        )
        self._columns = None

    def join(self, df):
        """RecBole adds user and item attributes here; there are none."""
        return df

    def inter_matrix(self, form="coo", value_field=None):
        """Which user had which item, as a sparse matrix [users, items]; the first item of a history counts too."""
        assert value_field is None, "rows have no values"
        sequences = self.sequences(self.split or "train")
        users = np.repeat(np.searchsorted(self._users(), sequences.users) + 1, np.diff(sequences.offsets))
        matrix = coo_matrix((np.ones(len(users)), (users, sequences.items)), shape=(self.user_num, self.item_num))
        return matrix if form == "coo" else matrix.asformat(form)

    def __str__(self):
        domains = f" ({', '.join(self.catalogue.domains)})" if self.catalogue.is_mixture else ""
        train = self.sequences("train")
        return (
            f"{self.dataset_name}{domains}: {self.catalogue.n_items:,} items, {len(train):,} training sequences, "
            f"{train.n_predictions:,} predictions to learn from"
        )

    __repr__ = __str__


class _Columns(Interaction):
    """All rows of a split; the padded histories, by far the largest column, are made when somebody asks for them."""

    def __init__(self, columns, histories, dataset):
        super().__init__(columns)
        self._histories, self._dataset = histories, dataset

    def __getitem__(self, index):
        if isinstance(index, str) and index == self._histories and index not in self.interaction:
            self.interaction[index] = self._dataset[:].interaction[index]
        return super().__getitem__(index)


class _Tokens(dict):
    """Maps that are made when first asked for: a mixture has a million users whom training never names."""

    def __init__(self, makers):
        super().__init__()
        self._makers = makers

    def __missing__(self, field):
        self[field] = self._makers[field]()
        return self[field]
