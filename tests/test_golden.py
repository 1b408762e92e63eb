"""Parity with the published implementation: losses, scores and gradients of all three stages."""

import os
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from recbole.data.interaction import Interaction

from data import UniSRecDataset
from engine.checkpoint import from_published_layout, load_weights, read_checkpoint, to_published_layout
from engine.fast_parts import use_fast_parts
from layers.losses import catalogue_cross_entropy
from tests.conftest import PUBLISHED, small_config
from unisrec import UniSRec

LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4


@pytest.fixture(params=["plain", "fast"])
def version(request):
    """The plain model, and the model with its fast parts."""
    return request.param


def open_stage(stage, golden, golden_folder, version="fast"):
    """The model of a stage with the recorded parameters, and its data set."""
    folder, name = ("pretrain", "AB") if stage == "pretrain" else ("downstream", "Tiny")
    config = small_config(stage, name, os.path.join(golden_folder, "dataset", folder), **PUBLISHED)
    dataset = UniSRecDataset(config)
    model = UniSRec(config, dataset).eval()
    if version == "fast":
        use_fast_parts(model)
    state = from_published_layout(
        {
            key.split("/", 2)[2]: torch.from_numpy(value)
            for key, value in golden.items()
            if key.startswith(f"{stage}/state/")
        }
    )
    if stage == "transductive_ft":
        order = [0] + [dataset.token2id("item_id", str(token)) for token in golden[f"{stage}/item_tokens"][1:]]
        rows = torch.empty_like(state["item_embedding.weight"])
        rows[order] = state["item_embedding.weight"]
        state["item_embedding.weight"] = rows
    model.load_state_dict(state)
    return model, dataset


def ids_of(tokens, dataset):
    """Recorded item tokens (str arrays, '[PAD]' or '' for padding) as this data set's ids, int64 tensor."""
    table = dataset.field2token_id["item_id"]
    return torch.tensor([[table.get(str(token), 0) for token in row] for row in np.atleast_2d(tokens)])


def check_gradients(model, golden, prefix, dataset=None):
    """Compare all gradients within the tolerance, relative to the largest entry."""
    recorded = {key.removeprefix(prefix): value for key, value in golden.items() if key.startswith(prefix)}
    own = to_published_layout({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    if dataset is not None:
        order = [0] + [dataset.token2id("item_id", str(t)) for t in golden["transductive_ft/item_tokens"][1:]]
        own["item_embedding.weight"] = own["item_embedding.weight"][order]
    largest = max(np.abs(value).max() for value in recorded.values())
    assert len(recorded) > 40
    for name, value in recorded.items():
        mine = own[name].numpy() if name in own else np.zeros_like(value)
        assert np.abs(mine - value).max() <= GRADIENT_TOLERANCE * largest, name


@pytest.mark.parametrize("view", ["itemdrop", "worddrop"])
def test_pretraining_loss_and_gradients(view, golden, golden_folder, version):
    model, dataset = open_stage("pretrain", golden, golden_folder, version)
    items, lengths = ids_of(golden["pretrain/item_seq"], dataset), torch.tensor(golden["pretrain/item_length"])
    targets = ids_of(golden["pretrain/pos_item"], dataset)[0]
    if view == "itemdrop":
        augmented = ids_of(golden["pretrain/item_seq_aug_itemdrop"], dataset)
        augmented_lengths = torch.tensor(golden["pretrain/item_length_aug_itemdrop"])
    else:
        kept = torch.from_numpy(golden["pretrain/word_keep_mask"])
        augmented = torch.where(kept | (items == 0), items, items + dataset.catalogue.n_items)
        augmented_lengths = lengths
    rows = torch.arange(len(items))
    batch = types.SimpleNamespace(
        items=[items],
        scored=[rows * items.size(1) + lengths - 1],
        targets=targets,
        weights=None,
        users=rows,
        augmented_items=[augmented],
        augmented_scored=[rows * augmented.size(1) + augmented_lengths - 1],
    )
    loss = model.calculate_loss(batch)
    assert loss.item() == pytest.approx(float(golden[f"pretrain/loss_{view}"]), rel=LOSS_TOLERANCE)
    loss.backward()
    check_gradients(model, golden, f"pretrain/grad_{view}/")
    output = model.encode_scored(model.item_representations([items]), batch.scored)
    np.testing.assert_allclose(output.detach().numpy(), golden["pretrain/seq_output"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stage", ["inductive_ft", "transductive_ft"])
def test_finetuning_loss_and_gradients(stage, golden, golden_folder, version):
    model, dataset = open_stage(stage, golden, golden_folder, version)
    items, lengths = ids_of(golden[f"{stage}/item_seq"], dataset), torch.tensor(golden[f"{stage}/item_length"])
    targets = ids_of(golden[f"{stage}/pos_item"], dataset)[0]
    # the published softmax has the padding item (a zero vector) as a class; ours does not, so the table gets it here
    table = model.moe_adaptor(F.pad(model.plm_embedding, (0, 0, 1, 0)))
    if stage == "transductive_ft":
        table = table + model.item_embedding.weight
    states = model.encode_scored([F.embedding(items, table)], [torch.arange(len(items)) * items.size(1) + lengths - 1])
    loss = catalogue_cross_entropy(
        states, table, targets=targets, temperature=model.temperature, cross_entropy=model.cross_entropy
    )
    assert loss.item() == pytest.approx(float(golden[f"{stage}/loss"]), rel=LOSS_TOLERANCE)
    loss.backward()
    check_gradients(model, golden, f"{stage}/grad/", dataset if stage == "transductive_ft" else None)


@pytest.mark.parametrize("stage", ["inductive_ft", "transductive_ft"])
def test_scores_of_the_test_users(stage, golden, golden_folder, version):
    model, dataset = open_stage(stage, golden, golden_folder, version)
    test = dataset.build()[2]
    rows = {
        int(token): row for row, token in enumerate(dataset.id2token("user_id", test.inter_feat["user_id"].numpy()))
    }
    wanted = [rows[int(user)] for user in np.ravel(golden[f"{stage}/test_user"])]
    with torch.no_grad():
        scores = model.full_sort_predict(test[wanted]).numpy()
    columns = [dataset.token2id("item_id", str(token)) for token in golden[f"{stage}/item_tokens"][1:]]
    assert np.isneginf(scores[:, 0]).all()
    np.testing.assert_allclose(scores[:, columns], golden[f"{stage}/test_scores"][:, 1:], rtol=1e-4, atol=1e-5)


def test_published_checkpoint_loads_and_runs_nothing(golden, golden_folder):
    path = os.path.join(golden_folder, "UniSRec-AB-300.pth")
    checkpoint = read_checkpoint(path)
    config = small_config("pretrain", "AB", os.path.join(golden_folder, "dataset", "pretrain"))
    model = UniSRec(config, UniSRecDataset(config))
    load_weights(model, checkpoint, path)
    assert set(to_published_layout(checkpoint["state_dict"])) == {
        key.removeprefix("pretrain/state/") for key in golden if key.startswith("pretrain/state/")
    }
    assert type(checkpoint["config"]).__mro__[1].__name__ == "Inert"


def test_recbole_trainers_rows_give_the_same_loss_as_ours(golden, golden_folder):
    """An Interaction (one row per prefix) goes the same way as a batch of sequences."""
    model, dataset = open_stage("inductive_ft", golden, golden_folder)
    rows = dataset.build()[0][list(range(40))]
    loss = model.calculate_loss(Interaction(rows.interaction))
    assert loss.item() > 0 and torch.isfinite(loss)
