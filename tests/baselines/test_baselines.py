"""SASRec from all positions equals RecBole's row by row; the untrained rows equal their formulas."""

import numpy as np
import pytest
import torch
from recbole.data.interaction import Interaction
from recbole.model.general_recommender.ease import EASE as RecBoleEASE
from sklearn.covariance import ledoit_wolf

from baselines.item_to_item import EASE, ItemKNN, ItemTransitions, TextAndTransitions
from baselines.sasrec import SASRec, SASRecHistory
from baselines.session_knn import VSKNN
from baselines.untrained import LastText, MeanText, Popularity, WhitenedText
from common.errors import UserError
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


def test_sasrec_with_a_history_bias_adds_it_in_training_and_prediction(small):
    options = {"hidden_size": 16, "inner_size": 12}
    plain, dataset, _ = small(SASRec, **options)
    model, _, _ = small(SASRecHistory, **options, history_bias=2)
    model.load_state_dict(plain.state_dict(), strict=False)
    rows = dataset.build()[2][slice(None)]
    with torch.no_grad():
        expected = plain.full_sort_predict(rows)
        torch.testing.assert_close(model.full_sort_predict(rows), expected)
        model.history_bias.weight.copy_(torch.tensor([-0.02, 0.01]))
        newest, older = model.history_bias.values().tolist()
        for row, length in enumerate(rows["item_length"].tolist()):
            history = rows["item_id_list"][row, :length].flip(0).tolist()
            for item in set(history):
                expected[row, item] += newest if history.index(item) == 0 else older
        torch.testing.assert_close(model.full_sort_predict(rows), expected)
        given = expected.gather(1, rows["item_id"][:, None])[:, 0]
        torch.testing.assert_close(model.predict(rows), given)
        loss = torch.nn.functional.cross_entropy(expected, rows["item_id"])
    torch.testing.assert_close(model.calculate_loss(Interaction(rows.interaction)), loss)
    (batch,) = SequenceBatches(dataset.sequences("train"), 10**6, dataset.max_history, 50)
    model.calculate_loss(batch).backward()
    assert (model.history_bias.weight.grad != 0).all()


def test_sasrec_adds_item_to_item_logits_in_prediction(small):
    model, dataset, _ = small(SASRecHistory, hidden_size=16, inner_size=12, item_to_item=30)
    rows = dataset.build()[2][slice(None)]
    with torch.no_grad():
        expected = model.full_sort_predict(rows)
        model.item_to_item.fit(dataset.sequences("train"))
        loss = model.calculate_loss(Interaction(rows.interaction))
        model.item_to_item.factor.fill_(4.0)
        added = 4 * model.item_to_item(rows["item_id_list"], rows["item_length"], 1.0)
        assert added.abs().max() > 0.1
        expected[:, 1:] += added
        torch.testing.assert_close(model.full_sort_predict(rows), expected)
        torch.testing.assert_close(model.predict(rows), expected.gather(1, rows["item_id"][:, None])[:, 0])
        assert torch.equal(model.calculate_loss(Interaction(rows.interaction)), loss)


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


def whitened_texts(dataset):
    """The whitened text vectors by numpy, float64 [N, D]."""
    texts = dataset.features.table().double().numpy().copy()
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    texts -= texts.mean(0)
    values, vectors = np.linalg.eigh(ledoit_wolf(texts, assume_centered=True)[0])
    texts = texts @ vectors @ np.diag(values**-0.5) @ vectors.T
    return texts / np.linalg.norm(texts, axis=1, keepdims=True)


def user_matrix(dataset):
    """Which items each user has in training, float64 [users, N]."""
    sequences = dataset.sequences("train")
    matrix = np.zeros((sequences.users.max() + 1, dataset.num("item_id") - 1))
    matrix[np.repeat(sequences.users, np.diff(sequences.offsets)), sequences.items - 1] = 1
    return matrix[matrix.any(1)]


def histories_and_weights(rows, decay):
    """The distinct items of each history (columns), and their weights: the newest occurrence counts."""
    for history, length in zip(rows["item_id_list"].numpy(), rows["item_length"].tolist(), strict=True):
        weights = {}
        for age, item in enumerate(history[:length][::-1]):
            weights.setdefault(int(item) - 1, decay**age)
        yield np.array(list(weights)), np.array(list(weights.values()))


def test_item_knn_equals_its_formula(small):
    model, dataset, _ = small(ItemKNN, neighbors=4, shrink=2.0, decay=0.6)
    rows, matrix = dataset.build()[2][slice(None)], user_matrix(dataset)
    cosines = matrix.T @ matrix
    degrees = cosines.diagonal() + 2.0
    cosines /= np.sqrt(degrees[:, None] * degrees)
    np.fill_diagonal(cosines, 0)
    smallest_kept = np.sort(cosines)[:, -4, None]
    assert (np.sort(cosines)[:, -5, None] < smallest_kept).mean() > 0.5
    scores = model.full_sort_predict(rows)[:, 1:].numpy()
    for row, (items, weights) in enumerate(histories_and_weights(rows, 0.6)):
        low = weights @ np.where(cosines > smallest_kept, cosines, 0)[items]
        high = weights @ np.where(cosines >= smallest_kept, cosines, 0)[items]
        assert (low - 1e-5 <= scores[row]).all() and (scores[row] <= high + 1e-5).all(), "but for ties at the border"


def test_vsknn_leaves_out_items_without_weight(small):
    model, dataset, _ = small(VSKNN, decay=0.0)
    rows = dataset.build()[2][slice(None)]
    scores = model.full_sort_predict(rows)
    for row, length in enumerate(rows["item_length"].tolist()):
        assert (scores[row, rows["item_id_list"][row, :length]] == 0).all()
    assert (scores[:, 1:] > 0).any()


@pytest.mark.parametrize("recommend_history", [False, True])
def test_vsknn_equals_its_formula(small, recommend_history):
    model, dataset, _ = small(VSKNN, neighbors=100, decay=0.6, recommend_history=recommend_history)
    few, _, _ = small(VSKNN, neighbors=3, decay=0.6, recommend_history=recommend_history)
    rows, matrix = dataset.build()[2][slice(None)], user_matrix(dataset)
    scores, of_few = (each.full_sort_predict(rows)[:, 1:].numpy() for each in (model, few))
    for row, (items, weights) in enumerate(histories_and_weights(rows, 0.6)):
        similarity = matrix[:, items] @ weights / np.sqrt(matrix.sum(1))
        newest = (matrix[:, items] * weights).max(1)
        nearest = np.argsort(-similarity, kind="stable")
        for found, kept in ((scores[row], nearest), (of_few[row], nearest[:3])):
            expected = (similarity * newest)[kept] @ matrix[kept]
            expected[items] *= recommend_history
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    one = rows["item_id"]
    torch.testing.assert_close(model.predict(rows), model.full_sort_predict(rows)[torch.arange(len(one)), one])


def ease_of_the_paper(dataset, reg_weight):
    """Steck, algorithm 1, on the set of each user's training items."""
    matrix = user_matrix(dataset)
    inverse = np.linalg.inv(matrix.T @ matrix + reg_weight * np.eye(matrix.shape[1]))
    weights = inverse / -np.diag(inverse)
    np.fill_diagonal(weights, 0)
    return weights


def transitions_by_loop(dataset, window=5, decay=0.6, backward=0.3, damping=5.0):
    sequences, n_items = dataset.sequences("train"), dataset.num("item_id") - 1
    counts = np.zeros((n_items, n_items))
    for items in np.split(sequences.items - 1, sequences.offsets[1:-1]):
        for new in range(len(items)):
            for distance in range(1, min(window, new) + 1):
                counts[items[new - distance], items[new]] += decay ** (distance - 1)
                counts[items[new], items[new - distance]] += backward * decay ** (distance - 1)
    return counts / np.sqrt((counts.sum(1) + damping)[:, None] * (counts.sum(0) + damping))


def recencies(rows, row, decay):
    """The items of a history and their weights. An item that occurs again later is left out."""
    history = rows["item_id_list"][row, : rows["item_length"][row]].numpy() - 1
    newest = {item: decay**age for age, item in reversed(list(enumerate(history[::-1])))}
    return np.array(list(newest)), np.array(list(newest.values()))


def item_to_item_weights(model_class, dataset):
    """The weight of each history item (row) for each item (column), float64 [N, N]."""
    if model_class is EASE:
        return ease_of_the_paper(dataset, 3.0)
    if model_class is ItemTransitions:
        return transitions_by_loop(dataset)
    texts = whitened_texts(dataset)
    similarity = texts @ texts.T
    np.fill_diagonal(similarity, 0)
    return similarity + 4 * transitions_by_loop(dataset)


@pytest.mark.parametrize("decay", [0.7, 1.0])
@pytest.mark.parametrize("model_class", [WhitenedText, EASE, ItemTransitions, TextAndTransitions])
def test_sums_over_the_history_equal_their_formula(small, model_class, decay):
    options = {"reg_weight": 3.0} if model_class is EASE else {}
    model, dataset, _ = small(model_class, decay=decay, **options)
    rows = dataset.build()[1][slice(None)]
    scores = model.full_sort_predict(rows)
    assert scores.shape == (25, 31) and torch.isneginf(scores[:, 0]).all()
    repeats = 0
    for row in range(25):
        items, weights = recencies(rows, row, decay)
        repeats += len(items) < rows["item_length"][row]
        if model_class is WhitenedText:
            state = weights @ whitened_texts(dataset)[items]
            expected = whitened_texts(dataset) @ state / np.linalg.norm(state)
        else:
            expected = weights @ item_to_item_weights(model_class, dataset)[items]
        np.testing.assert_allclose(scores[row, 1:], expected, atol=1e-4)
    assert repeats > 3
    one = rows["item_id"]
    torch.testing.assert_close(model.predict(rows), scores[torch.arange(25), one])


def test_ease_without_decay_is_recboles_on_the_training_rows(small, monkeypatch):
    """For users whose history is their training row, RecBole's EASE gives the same scores."""
    model, dataset, config = small(EASE, decay=1.0, reg_weight=10.0)
    train, valid, _ = dataset.build()
    matrix = train.inter_matrix("csr")
    matrix.data[:] = 1  # RecBole's class counts repeated items, the paper does not
    monkeypatch.setattr(train, "inter_matrix", lambda form: matrix)
    rows = valid[slice(None)]
    whole = rows["item_length"] < dataset.max_history  # a longer history was cut, but not the training row
    expected = RecBoleEASE(config, train).full_sort_predict(rows).view(25, 31)
    assert whole.sum() > 5
    torch.testing.assert_close(model.full_sort_predict(rows)[whole, 1:], expected[whole, 1:], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("model_class", "options"),
    [
        (WhitenedText, {"decay": 0.2}),
        (EASE, {"reg_weight": 5.0}),
        (ItemTransitions, {"transition_window": 1}),
        (ItemTransitions, {"transition_decay": 0.1}),
        (ItemTransitions, {"transition_backward": 0.0}),
        (ItemTransitions, {"transition_damping": 0.0}),
        (TextAndTransitions, {"transition_weight": 1.0}),
    ],
)
def test_each_setting_reaches_the_scores(small, model_class, options):
    default, dataset, _ = small(model_class)
    rows = dataset.build()[2][slice(None)]
    found, expected = small(model_class, **options)[0].full_sort_predict(rows), default.full_sort_predict(rows)
    assert not torch.allclose(found[:, 1:], expected[:, 1:], rtol=1e-3)


def test_ease_refuses_a_large_catalogue_in_one_line(small, monkeypatch):
    monkeypatch.setattr("layers.item_to_item.EASE_MAX_ITEMS", 29)
    with pytest.raises(UserError, match="model EASE: found a catalogue of 30 items, expected at most 29.*; choose I"):
        small(EASE)


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
