"""SASRec from all positions equals RecBole's row by row; the untrained rows equal their formulas."""

import numpy as np
import pytest
import torch
from recbole.data.interaction import Interaction

from baselines.sasrec import SASRec
from baselines.untrained import LastText, MeanText, Popularity
from data import SequenceBatches, UniSRecDataset
from engine.config import build_config
from engine.evaluate import Evaluation
from tests.small_data import write_downstream


@pytest.fixture
def small(tmp_path):
    """Opens the small data set for a model: (model in evaluation mode, data set, config)."""
    write_downstream(str(tmp_path), users=25, items=30, cut_length=8, longest=14, repeat=(3, 40))

    def open_for(model_class, **options):
        settings = {"data_path": str(tmp_path), "plm_size": 24, "show_progress": False, **options}
        config = build_config(model_class, "Small", "baseline", settings)
        dataset = UniSRecDataset(config)
        torch.manual_seed(0)
        return model_class(config, dataset).eval(), dataset, config

    return open_for


def test_sasrec_learns_the_same_from_sequences_as_recbole_from_rows(small):
    model, dataset, _ = small(SASRec, hidden_size=16, inner_size=12)
    rows = dataset.build()[0]
    by_row = model.calculate_loss(Interaction(rows[slice(None)].interaction))
    by_row.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    (batch,) = SequenceBatches(dataset.sequences("train"), 10**6, dataset.max_history, 1)
    assert batch.weights is not None and len(batch.items) > 1
    loss = model.calculate_loss(batch)
    loss.backward()
    assert loss.item() == pytest.approx(by_row.item(), rel=1e-5)
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=0, atol=1e-5 * float(largest), msg=name)


def test_popularity_counts_the_training_sequences(small):
    model, dataset, _ = small(Popularity)
    rows = dataset.build()[2][slice(None)]
    with torch.no_grad():
        scores = model.full_sort_predict(rows)
    sequences = dataset.sequences("train")
    for item in range(1, dataset.num("item_id")):
        assert scores[0, item] == (sequences.items == item).sum()
    assert scores.shape == (25, 31) and torch.isneginf(scores[:, 0]).all()


@pytest.mark.parametrize("model_class", [LastText, MeanText])
def test_nearest_text_equals_its_formula(small, model_class):
    model, dataset, _ = small(model_class)
    rows = dataset.build()[1][slice(None)]
    texts = dataset.features.table().numpy().copy()
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    scores = model.full_sort_predict(rows)
    for row in range(len(rows["item_id"])):
        history = rows["item_id_list"][row, : rows["item_length"][row]].numpy() - 1
        state = texts[history[-1]] if model_class is LastText else texts[history].mean(0)
        state = state / np.linalg.norm(state)
        np.testing.assert_allclose(scores[row, 1:], texts @ state, atol=1e-5)
    one = rows["item_id"]
    torch.testing.assert_close(model.predict(rows), scores[torch.arange(len(one)), one])


def test_evaluation_of_popularity_by_hand(small):
    model, dataset, config = small(Popularity, topk=[10], valid_metric="NDCG@10")
    counts = np.bincount(dataset.sequences("train").items, minlength=31)[1:]
    targets = dataset.build()[2][slice(None)]["item_id"].numpy() - 1
    higher = (counts[None] > counts[targets][:, None]).sum(1)
    equal = (counts[None] == counts[targets][:, None]).sum(1)
    recall = Evaluation(config, dataset)(model, "test")["recall@10"]
    # ties stand in any order: each user's hit lies between the worst and the best place
    assert (higher + equal <= 10).mean() <= recall <= (higher < 10).mean()
    assert (higher < 10).any()
