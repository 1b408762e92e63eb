"""RecBole's view of a data set: the rows are those of the files."""

import functools
import os
import shutil
from collections import Counter

import numpy as np
import pytest
import torch

from common.errors import UserError
from data import UniSRecDataset
from engine.config import build_config
from tests.conftest import small_config
from tests.small_data import SPLITS, write_downstream, write_inter, write_mixture

STAGES = {"Small": "inductive_ft", "Mix": "pretrain", "Tiny": "inductive_ft", "AB": "pretrain"}


@pytest.fixture(params=STAGES, scope="module")
def published(request, tmp_path_factory):
    """A data set's name and the folder that holds it; two are written here, two come with recorded outputs."""
    name, tmp_path = request.param, tmp_path_factory.mktemp(request.param)
    if name == "Small":
        write_downstream(tmp_path, repeat=(3, 4, 50))
    elif name == "Mix":
        write_mixture(tmp_path)
    else:
        parent = "downstream" if name == "Tiny" else "pretrain"
        source = os.path.join(request.getfixturevalue("golden_folder"), "dataset", parent, name)
        shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns(".*"))
    return name, str(tmp_path)


@functools.cache
def config_of(stage, name, folder, **options):
    """Reading the YAML files takes longer than the data sets."""
    return small_config(stage, name, folder, **options)


def open_published(published, **options):
    name, folder = published
    return UniSRecDataset(config_of(STAGES[name], name, folder, **options))


def file_rows(published, split):
    """What the text says: list of (user, history, target), all as written."""
    name, folder = published
    with open(os.path.join(folder, name, f"{name}.{split}.inter"), encoding="utf-8") as file:
        header, *lines = file.read().splitlines()
    columns = [column.split(":")[0] for column in header.split("\t")]
    rows = [dict(zip(columns, line.split("\t"), strict=True)) for line in lines]
    return [(row["user_id"], tuple(row["item_id_list"].split()), row["item_id"]) for row in rows]


def dataset_rows(part, index=slice(None)):
    """The same, read off a built data set."""
    rows = part[index]
    histories, lengths = rows["item_id_list"], rows["item_length"]
    assert histories.dtype == lengths.dtype == rows["item_id"].dtype == rows["user_id"].dtype == torch.int64
    inside = torch.arange(histories.size(1)) < lengths[:, None]
    assert (histories[~inside] == 0).all() and (histories[inside] > 0).all(), "left-aligned, padded with 0"
    users = part.id2token("user_id", rows["user_id"].numpy())
    targets = part.id2token("item_id", rows["item_id"].numpy())
    items = part.id2token("item_id", histories.numpy())
    return [
        (str(user), tuple(str(item) for item in history[:length]), str(target))
        for user, history, length, target in zip(users, items, lengths.tolist(), targets, strict=True)
    ]


def test_the_rows_are_those_of_the_files(published):
    dataset = open_published(published)
    for split, part in zip(SPLITS, dataset.build(), strict=True):
        expected = file_rows(published, split)
        assert part.split == split and len(part) == len(expected) == part.inter_num
        assert Counter(dataset_rows(part)) == Counter(expected)
        numbers = np.random.default_rng(0).integers(0, len(part), 7)
        assert dataset_rows(part, numbers) == [dataset_rows(part)[number] for number in numbers]
        assert dataset_rows(part, 3) == [dataset_rows(part)[3]]
    assert len(dataset) == len(file_rows(published, "train"))


def test_tokens_and_ids(published):
    dataset = open_published(published)
    rows = [row for split in SPLITS for row in file_rows(published, split)]
    users = {user for user, _, _ in rows}
    items = {item for _, history, target in rows for item in (*history, target)}
    assert dataset.num("user_id") == dataset.user_num == len(users) + 1
    assert dataset.num("item_id") == dataset.item_num == dataset.num("item_id_list") == dataset.features.n_items + 1
    for field, tokens in (("user_id", users), ("item_id", items)):
        ids = [dataset.token2id(field, token) for token in sorted(tokens)]
        assert len(set(ids)) == len(tokens) and min(ids) > 0 and max(ids) < dataset.num(field)
        assert dataset.id2token(field, ids).tolist() == sorted(tokens)
        assert dataset.field2token_id[field]["[PAD]"] == 0 and dataset.field2id_token[field][0] == "[PAD]"
        assert len(dataset.field2id_token[field]) == dataset.num(field)
        with pytest.raises(ValueError):
            dataset.token2id(field, "no such token")
    if not dataset.catalogue.is_mixture:  # row i of the features is item i
        assert [dataset.token2id("item_id", str(index)) for index in (0, 5, 14)] == [1, 6, 15]


def test_features_belong_to_their_items(published):
    """An item's token, its id and its row of the feature file go together."""
    name, folder = published
    dataset = open_published(published)
    ids = torch.arange(1, dataset.item_num)
    vectors = dataset.features.lookup(ids)
    for item, vector in zip(dataset.id2token("item_id", ids.numpy()), vectors, strict=True):
        domain, index = item.split("-") if dataset.catalogue.is_mixture else (0, item)
        path = os.path.join(folder, name, f"{dataset.catalogue.domains[int(domain)]}.feat1CLS")
        stored = np.fromfile(path, np.float32).reshape(-1, 24)
        np.testing.assert_array_equal(vector.numpy(), stored[int(index)])


def test_histories_may_be_cut_further_and_keep_their_newest_items(published):
    dataset = open_published(published, MAX_ITEM_LIST_LENGTH=3)
    assert dataset.max_history == 3 and dataset.max_item_list_len == 3
    for split, part in zip(SPLITS, dataset.build(), strict=True):
        expected = [(user, history[-3:], target) for user, history, target in file_rows(published, split)]
        assert Counter(dataset_rows(part)) == Counter(expected)


def test_rows_are_ordered_by_any_field(published):
    test = open_published(published).build()[2]
    before = Counter(dataset_rows(test))
    for field in ("item_length", "user_id", "item_id"):
        for ascending in (True, False):
            test.sort(field, ascending)
            values = test.inter_feat[field].tolist()
            assert values == sorted(values, reverse=not ascending)
            assert values == test[slice(None)][field].tolist() and Counter(dataset_rows(test)) == before


def test_the_parts_do_not_disturb_each_other(published):
    dataset = open_published(published)
    first, again = dataset.build()[2], dataset.build()[2]
    rows = dataset_rows(first)
    again.sort("item_id", ascending=False)
    assert dataset_rows(first) == rows


def test_all_rows_and_their_histories_as_a_table(published):
    """RecBole's samplers and some models read whole columns of `inter_feat`."""
    dataset = open_published(published)
    for part in dataset.build():
        part.sort("user_id")
        rows = part[slice(None)]
        for field in ("user_id", "item_id", "item_length", "item_id_list"):
            assert torch.equal(part.inter_feat[field], rows[field])
        assert part.inter_feat["item_id_list"].size(1) == dataset.max_item_list_len
        assert part.item_counter == Counter(rows["item_id"].tolist())
    every = [row for split in SPLITS for row in file_rows(published, split)]
    items = dataset.id2token("item_id", dataset.inter_feat["item_id"].numpy())
    assert Counter(items.tolist()) == Counter(target for _, _, target in every), "before build: all splits"


def test_the_matrix_of_users_and_items(published):
    dataset = open_published(published)
    matrix = dataset.build()[0].inter_matrix("csr")
    assert matrix.shape == (dataset.user_num, dataset.item_num)
    expected = {
        (dataset.token2id("user_id", user), dataset.token2id("item_id", item))
        for user, history, target in file_rows(published, "train")
        for item in (*history, target)
    }
    assert set(zip(*(axis.tolist() for axis in matrix.nonzero()), strict=True)) == expected
    assert (dataset.inter_matrix("coo") != matrix).nnz == 0


# -- how far rows are padded ---------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path):
    write_downstream(tmp_path)
    return str(tmp_path)


def open_for(model, small):
    options = {"data_path": small, "show_progress": False, "MAX_ITEM_LIST_LENGTH": 15, "loss_type": "CE"}
    return UniSRecDataset(build_config(model, "Small", "baseline", options))


def short_rows(part, longest):
    return np.flatnonzero(part.inter_feat["item_length"].numpy() <= longest)


def test_rows_are_padded_to_the_longest_of_their_batch_where_that_is_exact(small):
    for dataset in (open_for("SASRec", small), UniSRecDataset(small_config("inductive_ft", "Small", small))):
        train = dataset.build()[0]
        assert train[short_rows(train, 4)]["item_id_list"].size(1) == 4
        assert train[short_rows(train, 1)]["item_id_list"].size(1) == 1


def test_rows_are_padded_fully_where_a_model_may_look_at_the_padding(small):
    from recbole.model.sequential_recommender import SASRec

    class Mine(SASRec):
        """A user's own."""

    own_name_again = type("SASRec", (SASRec,), {})
    for model in ("NextItNet", Mine, own_name_again):
        train = open_for(model, small).build()[0]
        assert train[short_rows(train, 4)]["item_id_list"].shape[1] == 15

    class Careful(SASRec):
        ignores_padding = True

    train = open_for(Careful, small).build()[0]
    assert train[short_rows(train, 4)]["item_id_list"].shape[1] == 4


def test_slices_are_padded_fully_so_that_they_can_be_joined(small):
    """RecBole's loader for sampled negatives takes each user's rows as a slice and joins them."""
    train = open_for("SASRec", small).build()[0]
    assert train[slice(0, 1)]["item_id_list"].size(1) == train[slice(5, 9)]["item_id_list"].size(1) == 15


# -- errors ------------------------------------------------------------------------------------------------------


def test_a_split_without_rows_is_named(small):
    path = os.path.join(small, "Small", "Small.valid.inter")
    write_inter(path, [])
    with pytest.raises(UserError, match="Small.valid.inter: holds no rows"):
        UniSRecDataset(small_config("inductive_ft", "Small", small)).build()
    os.remove(path)
    with pytest.raises(UserError, match="Small.valid.inter: no such file"):
        UniSRecDataset(small_config("inductive_ft", "Small", small)).build()


def test_training_on_less_leaves_valid_and_test_whole(published):
    whole, part = open_published(published), open_published(published, train_fraction=0.5, holdout_items=0.25)
    left_out = part.held_out_items()
    assert left_out.sum() == round(0.25 * part.catalogue.n_items) and not left_out[0]
    train = part.sequences("train")
    assert not left_out[train.items].any() and 0 < train.n_predictions < whole.sequences("train").n_predictions / 2
    for one, other in zip(whole.build()[1:], part.build()[1:], strict=True):
        assert dataset_rows(one) == dataset_rows(other)
    other_seed = open_published(published, holdout_items=0.25, seed=7)
    assert (other_seed.held_out_items() != left_out).any()


def test_nothing_to_learn_from_is_an_error(published):
    with pytest.raises(UserError, match="no prediction is left to learn from with train_fraction 1.0 and"):
        open_published(published, holdout_items=0.999).sequences("train")


def test_it_says_what_it_is(small, tmp_path):
    said = str(UniSRecDataset(small_config("inductive_ft", "Small", small)))
    train = len(file_rows(("Small", small), "train"))
    assert said == f"Small: 40 items, 30 training sequences, {train:,} predictions to learn from"
    write_mixture(tmp_path)
    assert "Mix (Domain0, Domain1, Domain2): 29 items" in str(
        UniSRecDataset(small_config("pretrain", "Mix", str(tmp_path)))
    )
