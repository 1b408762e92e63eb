"""FDSA and S3-Rec: equal to RecBole's where both do the same, aligned, and the text matters."""

import math

import numpy as np
import pytest
import recbole.model.sequential_recommender.fdsa as recboles
import torch
import torch.nn.functional as F
from recbole.data.interaction import Interaction
from torch import nn

from baselines.fdsa import FDSA
from baselines.s3rec import TASKS, Corruption, S3Rec
from data import SequenceBatches, UniSRecDataset
from engine.building import build_model
from engine.config import build_config
from engine.finetuning import load_pretrained
from tests.small_data import write_downstream, write_splits

SIZES = {"hidden_size": 16, "inner_size": 12, "show_progress": False}
GROUPS, EACH = 4, 12  # groups of items whose texts are similar


def open_model(model_class, folder, name="Small", **options):
    """(model in evaluation mode, data set)"""
    options = {"data_path": str(folder), "plm_size": 24, **SIZES, **options}
    dataset = UniSRecDataset(build_config(model_class, name, "baseline", options))
    return build_model(model_class, dataset.config, dataset).eval(), dataset


@pytest.fixture
def small(tmp_path):
    write_downstream(tmp_path, users=25, items=30, cut_length=8, longest=14, repeat=(3, 40))
    return tmp_path


# -- FDSA ----------------------------------------------------------------------------------------------------------


def recboles_fdsa(model, dataset, monkeypatch):
    """RecBole's FDSA with the weights of a model. Its single feature is the projected text."""

    class Texts(nn.Module):
        def __init__(self, *_):
            super().__init__()

        def forward(self, user, item_seq):
            vectors = F.embedding(item_seq, F.pad(model.texts(torch.arange(1, model.n_items)), (0, 0, 1, 0)))
            return {"item": vectors[:, :, None]}, {"item": None}

    monkeypatch.setattr(recboles, "FeatureSeqEmbLayer", Texts)
    config = dict(dataset.config.plain(), selected_features=["text"], pooling_mode="mean", device=torch.device("cpu"))
    theirs = recboles.FDSA(config, dataset).eval()
    pairs = {
        "item_embedding": model.item_embedding,
        "position_embedding": model.position_embedding,
        "item_trm_encoder": model.trm_encoder,
        "feature_trm_encoder": model.feature_stream.trm_encoder,
        "LayerNorm": model.LayerNorm,
        "concat_layer": model.concat_layer,
    }
    for name, own in pairs.items():
        theirs.get_submodule(name).load_state_dict(own.state_dict())
    left = {name.split(".")[0] for name in theirs.state_dict()} - pairs.keys()
    assert left == {"feature_att_layer"}, "whose weight of a single feature is always 1"
    return theirs


def test_fdsa_equals_recboles(small, monkeypatch):
    model, dataset = open_model(FDSA, small, adapter_layers=[24, 20, 16])
    for parameter in model.parameters():
        parameter.data.normal_(0.0, 0.3)
    theirs = recboles_fdsa(model, dataset, monkeypatch)
    rows = Interaction(dataset.build()[0][slice(None)].interaction)
    with torch.no_grad():
        torch.testing.assert_close(model.full_sort_predict(rows), theirs.full_sort_predict(rows), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model.predict(rows), theirs.predict(rows), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model.calculate_loss(rows), theirs.calculate_loss(rows))
        expected = theirs.calculate_loss(rows)
        (batch,) = SequenceBatches(dataset.sequences("train"), 10**6, dataset.max_history, 1)
        torch.testing.assert_close(model.calculate_loss(batch), expected)


def test_the_projection_must_lead_from_the_text_to_the_hidden_size(small):
    with pytest.raises(ValueError, match=r"adapter_layers \[768, 16\] must begin with the text width 24"):
        FDSA(*_config_and_dataset(small, adapter_layers=[768, 16]))


def _config_and_dataset(folder, **options):
    dataset = open_model(FDSA, folder)[1]
    for key, value in options.items():
        dataset.config[key] = value
    return dataset.config, dataset


# -- the tasks of S3-Rec -------------------------------------------------------------------------------------------


def test_each_task_compares_what_stands_at_the_same_place(small):
    """Two sequences of different lengths with a corruption made by hand, against a loop over positions."""
    model, _ = open_model(S3Rec, small)
    for parameter in model.parameters():
        parameter.data.normal_(0.0, 0.3)
    items = torch.tensor([[3, 5, 7, 9], [4, 6, 0, 0]])
    hidden = Corruption(
        masked=torch.tensor([[False, True, False, True], [True, False, False, False]]),
        negatives=torch.tensor([[1, 11, 1, 12], [13, 1, 1, 1]]),
        segment=torch.tensor([[False, True, True, False], [False, True, False, False]]),
        other=torch.tensor([[1, 14, 15, 1], [1, 16, 1, 1]]),
    )
    with torch.no_grad():
        texts = model.texts(torch.arange(1, model.n_items))
        found = dict(model.tasks(items, hidden, texts))

        def states(ids, mask):
            """Of one sequence, without padding."""
            vectors = torch.stack(
                [model.mask if m else model.item_embedding.weight[i] for i, m in zip(ids, mask, strict=True)]
            )
            summed = model.LayerNorm(vectors + model.position_embedding.weight[: len(ids)])[None]
            return model.trm_encoder(summed, torch.zeros(1, 1, 1, len(ids)), output_all_encoded_layers=False)[-1][0]

        expected = {task: [] for task in TASKS}
        sequences = [([3, 5, 7, 9], [0, 1, 0, 1], [1, 11, 1, 12], [0, 1, 1, 0], [3, 14, 15, 9])]
        sequences += [([4, 6], [1, 0], [13, 1], [0, 1], [4, 16])]
        for ids, mask, negatives, segment, with_other in sequences:
            for place, state in enumerate(states(ids, mask)):
                head = model.map_norm if mask[place] else model.aap_norm
                loss = F.cross_entropy((head(state) @ texts.T)[None], torch.tensor([ids[place] - 1]))
                expected["map" if mask[place] else "aap"].append(loss)
                if mask[place]:
                    difference = model.item_embedding.weight[ids[place]] - model.item_embedding.weight[negatives[place]]
                    expected["mip"].append(-F.logsigmoid(model.mip_norm(state) @ difference))
            outside = [1 - inside for inside in segment]
            context, own, other = (
                states(*pair)[-1] for pair in ((ids, segment), (ids, outside), (with_other, outside))
            )
            expected["sp"].append(-F.logsigmoid(model.sp_norm(context) @ (own - other)))
    assert [len(found[task]) for task in TASKS] == [3, 3, 3, 2]
    for task in TASKS:
        torch.testing.assert_close(found[task], torch.stack(expected[task]), rtol=1e-4, atol=1e-5)


def test_what_is_hidden_lies_within_the_sequences(small):
    model, _ = open_model(S3Rec, small, mask_ratio=0.4)
    items = torch.tensor([[3, 5, 7, 9, 11, 13], [4, 6, 8, 0, 0, 0], [2, 0, 0, 0, 0, 0]]).repeat(200, 1)
    torch.manual_seed(0)
    masked, negatives, segment, other = model.corrupt(items)
    present = items > 0
    assert not (masked & ~present).any() and not (segment & ~present).any()
    assert masked.sum() / present.sum() == pytest.approx(0.4, abs=0.03)
    assert not (negatives[:, :, None] == items[:, None])[present].any() and negatives.min() >= 1
    assert negatives.max() == model.n_items - 1 == 30
    sizes = segment.sum(1).view(-1, 3)
    assert [set(column.tolist()) for column in sizes.T] == [{1, 2, 3}, {1}, {0}]
    edges = F.pad(segment.int(), (1, 1)).diff(dim=1)
    assert ((edges == 1).sum(1) == (segment.sum(1) > 0)).all(), "a segment is one piece"
    assert (segment[::3].any(0)).all(), "it may lie anywhere"
    assert set(other[segment].tolist()) == set(items[present].tolist())


def test_the_loss_is_the_weighted_sum_per_sequence(small):
    weights = {f"{task}_weight": weight for task, weight in zip(TASKS, (1.0, 0.2, 3.0, 0.5), strict=True)}
    model, dataset = open_model(S3Rec, small, **weights)
    (batch,) = SequenceBatches(dataset.sequences("train"), 10**6, dataset.max_history, 50)
    with torch.no_grad():
        torch.manual_seed(4)
        loss = model.calculate_loss(batch)
        torch.manual_seed(4)
        texts, total = model.texts(torch.arange(1, model.n_items)), 0.0
        for items in batch.items:
            for task, losses in model.tasks(items, model.corrupt(items), texts):
                total += weights[f"{task}_weight"] * losses.sum()
    assert loss.item() == pytest.approx(float(total) / sum(map(len, batch.items)), rel=1e-5)


def test_a_sequence_without_scored_positions_counts_for_nothing(small):
    """Another process has its predictions."""
    model, dataset = open_model(S3Rec, small)
    batches = SequenceBatches(dataset.sequences("train"), 10**6, dataset.max_history, 50)
    idle = batches.make_batch(np.arange(1), scored=False)
    loss = model.calculate_loss(idle)
    loss.backward()
    assert loss == 0 and all((parameter.grad == 0).all() for parameter in model.parameters())


# -- the text matters ----------------------------------------------------------------------------------------------


@pytest.fixture
def planted(tmp_path):
    """Writes a data set: after two items of a group comes the target of the group.

    Half of the items of each group stand in such training rows. The other half are followed by one and the same item in
    training, and by the target of their group in test. Only their texts tell the group.
    """

    def write(noise):
        random = np.random.default_rng(5)
        members = np.arange(2 * GROUPS * EACH).reshape(GROUPS, 2, EACH)  # group, whether only the text tells it
        targets = 2 * GROUPS * EACH + np.arange(GROUPS)
        nothing = targets[-1] + 1
        rows = {split: [] for split in ("train", "valid", "test")}
        for split, half, count in (("train", 0, 240), ("train", 1, 60), ("valid", 1, 40), ("test", 1, 200)):
            for number in range(count):
                group = number % GROUPS
                history = random.choice(members[group, half], 2, replace=False).tolist()
                target = nothing if (split, half) == ("train", 1) else targets[group]
                rows[split].append((half * 1000 + number, history, target))
        name = "Noise" if noise else "Texts"
        (tmp_path / name).mkdir()
        write_splits(tmp_path / name, name, rows)
        texts = random.standard_normal((nothing + 1, 24))
        if not noise:
            texts[members.ravel()] = np.repeat(random.standard_normal((GROUPS, 24)), 2 * EACH, 0)
            texts[members.ravel()] += 0.2 * random.standard_normal((members.size, 24))
        texts.astype(np.float32).tofile(tmp_path / name / f"{name}.feat1CLS")
        return tmp_path, name, targets

    return write


def learn(model, dataset, epochs):
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    batches = SequenceBatches(dataset.sequences("train"), 100, dataset.max_history, 50)
    model.train()
    for epoch in range(epochs):
        batches.set_epoch(epoch)
        for batch in batches:
            optimizer.zero_grad()
            loss = model.calculate_loss(batch)
            loss.backward()
            optimizer.step()
    assert math.isfinite(loss.item())
    return model.eval()


def share_of_groups_found(model, dataset, targets):
    """How often the target of the own group has the highest score among those of all groups, in test."""
    rows = dataset.build()[2][slice(None)]
    with torch.no_grad():
        tokens = dataset.field2token_id["item_id"]
        columns = torch.tensor([tokens[str(target)] for target in targets])
        best = columns[model.full_sort_predict(rows)[:, columns].argmax(1)]
    return (best == rows["item_id"]).float().mean().item()


def fdsa(folder, name):
    model, dataset = open_model(FDSA, folder, name)
    return learn(model, dataset, 15), dataset


def s3rec(folder, name):
    first, dataset = open_model(S3Rec, folder, name)
    learn(first, dataset, 25)
    model, dataset = open_model(S3Rec, folder, name, train_stage="finetune")
    names = dataset.item_names()
    checkpoint = {"state_dict": first.state_dict(), "item_tokens": list(names), "train_stage": "pretrain"}
    load_pretrained(model, checkpoint, "a checkpoint", names)
    assert torch.equal(model.item_embedding.weight, first.item_embedding.weight)
    return learn(model, dataset, 6), dataset


@pytest.mark.parametrize(("train", "expected"), [(fdsa, 0.9), (s3rec, 0.55)])
def test_only_the_text_tells_the_group(train, expected, planted):
    """Of four groups. Texts of noise leave a guess."""
    folder, name, targets = planted(noise=False)
    assert share_of_groups_found(*train(folder, name), targets) > expected
    folder, name, targets = planted(noise=True)
    assert share_of_groups_found(*train(folder, name), targets) < 0.4
