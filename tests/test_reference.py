"""The plain reference of the benchmarks computes what the published code computes, and so does the fast model."""

import os

import numpy as np
import pytest
import torch

from benchmarks.reference import ReferenceUniSRec
from engine.checkpoint import to_published_layout
from tests.conftest import MAX_HISTORY, PUBLISHED, small_config
from tests.small_data import write_downstream, write_mixture
from tests.small_models import one_batch, open_model
from tests.test_golden import GRADIENT_TOLERANCE, LOSS_TOLERANCE, ids_of, open_stage


def open_reference(stage, golden, golden_folder):
    """The reference with the recorded parameters, the fast model with the same, and the data set."""
    model, dataset = open_stage(stage, golden, golden_folder)
    folder, name = ("pretrain", "AB") if stage == "pretrain" else ("downstream", "Tiny")
    config = small_config(stage, name, os.path.join(golden_folder, "dataset", folder))
    views = 2 if stage == "pretrain" else 1
    features = dataset.features.lookup(torch.arange(1, views * dataset.catalogue.n_items + 1))
    features = torch.cat([torch.zeros_like(features[:1]), features])
    reference = ReferenceUniSRec(config, features, dataset.catalogue.n_items + 1).eval()
    reference.load_state_dict(to_published_layout(model.state_dict()))
    return reference, model, dataset


@pytest.mark.parametrize(("predictions_per_row", "cut_length"), [(1, MAX_HISTORY), (2, 16), (16, 16)])
@pytest.mark.parametrize("stage", ["inductive_ft", "transductive_ft", "pretrain"])
def test_the_model_has_the_loss_and_gradients_of_the_reference(stage, predictions_per_row, cut_length, tmp_path):
    """On every row of a training file, no dropout; one prediction a row, where histories are longer than the cut."""
    write_downstream(tmp_path, users=14, cut_length=cut_length, longest=16, repeat=(0, 1, 20))
    write_mixture(tmp_path, users=6, cut_length=cut_length, longest=14)
    model, dataset = open_model(stage, str(tmp_path), **PUBLISHED)
    count = dataset.catalogue.n_items
    features = dataset.features.lookup(torch.arange(1, count * (2 if stage == "pretrain" else 1) + 1))
    features = torch.cat([torch.zeros_like(features[:1]), features])
    reference = ReferenceUniSRec(dataset.config, features, count + 1).eval()
    reference.load_state_dict(to_published_layout(model.state_dict()))
    train = dataset.build()[0]
    rows = train[np.arange(len(train))]
    history = rows["item_id_list"], rows["item_length"]
    batch = one_batch(dataset, predictions_per_row)
    if stage == "pretrain":
        batch.users = torch.arange(len(batch))  # the published loss has other targets of a user as negatives
        loss = reference.pretrain_loss(*history, rows["item_id"], *history)
    else:
        loss = reference.finetune_loss(*history, rows["item_id"])
    loss.backward()
    ours = model.calculate_loss(batch)
    ours.backward()
    assert ours.item() == pytest.approx(loss.item(), rel=LOSS_TOLERANCE)
    found = to_published_layout({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    expected = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    largest = max(gradient.abs().max() for gradient in expected.values())
    assert found.keys() == expected.keys() and len(found) > 40 and largest > 1e-3
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() <= 1e-5 * largest, name


def recorded_gradients(golden, prefix):
    return {key.removeprefix(prefix): value for key, value in golden.items() if key.startswith(prefix)}


def check(reference, recorded, order=None):
    largest = max(np.abs(value).max() for value in recorded.values())
    parameters = dict(reference.named_parameters())
    assert len(recorded) > 40
    for name, value in recorded.items():
        mine = parameters[name].grad
        mine = torch.zeros_like(parameters[name]) if mine is None else mine
        mine = mine[order] if name == "item_embedding.weight" else mine
        assert np.abs(mine.numpy() - value).max() <= GRADIENT_TOLERANCE * largest, name


@pytest.mark.parametrize("stage", ["inductive_ft", "transductive_ft"])
def test_finetuning(stage, golden, golden_folder):
    reference, _, dataset = open_reference(stage, golden, golden_folder)
    items, lengths = ids_of(golden[f"{stage}/item_seq"], dataset), torch.tensor(golden[f"{stage}/item_length"])
    targets = ids_of(golden[f"{stage}/pos_item"], dataset)[0]
    loss = reference.finetune_loss(items, lengths, targets, with_padding=True)
    assert loss.item() == pytest.approx(float(golden[f"{stage}/loss"]), rel=LOSS_TOLERANCE)
    loss.backward()
    order = [0] + [dataset.token2id("item_id", str(t)) for t in golden[f"{stage}/item_tokens"][1:]]
    check(reference, recorded_gradients(golden, f"{stage}/grad/"), order)


def test_pretraining(golden, golden_folder):
    reference, _, dataset = open_reference("pretrain", golden, golden_folder)
    items, lengths = ids_of(golden["pretrain/item_seq"], dataset), torch.tensor(golden["pretrain/item_length"])
    view = ids_of(golden["pretrain/item_seq_aug_itemdrop"], dataset)
    view_lengths = torch.tensor(golden["pretrain/item_length_aug_itemdrop"])
    loss = reference.pretrain_loss(items, lengths, ids_of(golden["pretrain/pos_item"], dataset)[0], view, view_lengths)
    assert loss.item() == pytest.approx(float(golden["pretrain/loss_itemdrop"]), rel=LOSS_TOLERANCE)
    loss.backward()
    check(reference, recorded_gradients(golden, "pretrain/grad_itemdrop/"))
