"""Transitions against a double loop, EASE against one regression per item, sums over histories against loops."""

import warnings

import numpy as np
import pytest
import torch

import layers.item_to_item
from common.errors import UserError
from data import Sequences
from layers.item_to_item import (
    ItemToItem,
    ease_weights,
    normalized_transitions,
    recency_weights,
    spectral_vectors,
    sum_over_history,
    to_torch,
    transition_counts,
)


def sequences_of(*lists, users=None):
    """`Sequences` of lists of item ids, one user each unless `users` are given."""
    offsets = np.cumsum([0, *map(len, lists)])
    items = np.concatenate([np.array(items, np.int32) for items in lists])
    users = np.arange(len(lists)) if users is None else np.array(users)
    return Sequences(offsets, items, np.ones(len(items), np.uint32), users, 50)


def random_lists(n_items, n_sequences=40, longest=12, seed=0):
    generator = np.random.default_rng(seed)
    return [generator.integers(1, n_items + 1, generator.integers(1, longest + 1)).tolist() for _ in range(n_sequences)]


# -- transitions -----------------------------------------------------------------------------------------------------


def test_transitions_worked_out_by_hand():
    """1 2 3 with the decay .6: the pairs 1-2 and 2-3 count 1, 1-3 counts .6. 3 1 adds the pair 3-1."""
    counts = transition_counts(sequences_of([1, 2, 3], [3, 1]), 4, window=2, decay=0.6, backward=0).toarray()
    np.testing.assert_allclose(counts, [[0, 1, 0.6, 0], [0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]])
    counts = transition_counts(sequences_of([1, 2, 3], [3, 1]), 4, window=1, decay=0.6, backward=0.5).toarray()
    np.testing.assert_allclose(counts, [[0, 1, 0.5, 0], [0.5, 0, 1, 0], [1, 0.5, 0, 0], [0, 0, 0, 0]])


@pytest.mark.parametrize(("window", "backward"), [(1, 0.3), (5, 0.3), (5, 0.0), (30, 1.0)])
def test_transitions_equal_a_double_loop(window, backward):
    lists = random_lists(n_items=9)
    assert any(a == b for items in lists for a, b in zip(items, items[1:], strict=False)), "an item follows itself"
    expected = np.zeros((9, 9))
    for items in lists:
        for old in range(len(items)):
            for new in range(old + 1, min(len(items), old + window + 1)):
                expected[items[old] - 1, items[new] - 1] += 0.6 ** (new - old - 1)
                expected[items[new] - 1, items[old] - 1] += backward * 0.6 ** (new - old - 1)
    found = transition_counts(sequences_of(*lists), 9, window, 0.6, backward)
    assert found.shape == (9, 9) and found.dtype == np.float32
    np.testing.assert_allclose(found.toarray(), expected, rtol=1e-5)


def test_the_weights_of_a_sequence_do_not_count():
    sequences = sequences_of([1, 2, 3], [2, 3])
    expected = transition_counts(sequences, 3).toarray()
    sequences.weights[:] = [0, 3, 0, 0, 7]
    np.testing.assert_array_equal(transition_counts(sequences, 3).toarray(), expected)


def test_normalization_by_hand():
    """Item 1 comes before others 4 times, item 2 after others 3 times: their 3 transitions become 3 / sqrt(4 * 3)."""
    counts = transition_counts(sequences_of([1, 2], [1, 2], [1, 2], [1, 3]), 4, backward=0)
    expected = np.zeros((4, 4))
    expected[0, 1:3] = 3 / (4 * 3) ** 0.5, 1 / (4 * 1) ** 0.5
    np.testing.assert_allclose(normalized_transitions(counts, damping=0).toarray(), expected, rtol=1e-6)
    expected[0, 1:3] = 3 / (6 * 5) ** 0.5, 1 / (6 * 3) ** 0.5
    np.testing.assert_allclose(normalized_transitions(counts, damping=2).toarray(), expected, rtol=1e-6)


# -- EASE ------------------------------------------------------------------------------------------------------------


def test_ease_of_two_items_by_hand():
    """Two of three users have both items: the regression of each on the other has the weight 2 / (count + lambda)."""
    weights = ease_weights(sequences_of([1, 2], [2, 1], [1]), 2, reg_weight=1.0)
    torch.testing.assert_close(weights, torch.tensor([[0, 2 / (3 + 1)], [2 / (2 + 1), 0]]))


@pytest.mark.parametrize("reg_weight", [0.5, 50.0])
def test_ease_equals_a_ridge_regression_per_item(reg_weight):
    lists = random_lists(n_items=7, seed=1)
    matrix = np.zeros((len(lists), 8))
    for user, items in enumerate(lists):
        matrix[user, np.array(items) - 1] = 1  # item 8 occurs nowhere
    expected = np.zeros((8, 8))
    for item in range(8):
        rest = np.delete(np.arange(8), item)
        x, y = matrix[:, rest], matrix[:, item]
        expected[rest, item] = np.linalg.solve(x.T @ x + reg_weight * np.eye(7), x.T @ y)
    found = ease_weights(sequences_of(*lists), 8, reg_weight)
    assert found.dtype == torch.float32 and not found.diagonal().any()
    assert found.is_contiguous(), "reading its rows would be slow"
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_ease_joins_the_sequences_of_a_user():
    """Rows that form no chain are folded into several sequences."""
    split = ease_weights(sequences_of([1, 2], [3, 2], [1, 3], users=[7, 7, 9]), 3, 1.0)
    torch.testing.assert_close(split, ease_weights(sequences_of([1, 2, 3, 2], [1, 3]), 3, 1.0))


def test_ease_refuses_a_catalogue_that_does_not_fit_into_memory(monkeypatch):
    monkeypatch.setattr(layers.item_to_item, "EASE_MAX_ITEMS", 3)
    ease_weights(sequences_of([1, 2]), 3, 1.0)
    message = "model EASE: found a catalogue of 4 items, expected at most 3, because EASE holds a number for each pair"
    with pytest.raises(UserError, match=message):
        ease_weights(sequences_of([1, 2]), 4, 1.0)


# -- histories -------------------------------------------------------------------------------------------------------

HISTORY = torch.tensor([[3, 1, 3, 2], [2, 2, 0, 0], [4, 0, 0, 0]])
LENGTHS = torch.tensor([4, 2, 1])


def test_an_item_counts_at_its_newest_position():
    expected = torch.tensor([[0, 0.25, 0.5, 1], [0, 1, 0, 0], [1, 0, 0, 0]])
    torch.testing.assert_close(recency_weights(HISTORY, LENGTHS, 0.5), expected)
    torch.testing.assert_close(recency_weights(HISTORY, LENGTHS, 1.0), expected.ceil())
    torch.testing.assert_close(recency_weights(HISTORY, LENGTHS, 0.0), expected.floor())


@pytest.mark.parametrize("sparse", [False, True])
def test_the_sum_over_a_history(sparse):
    table = torch.arange(12.0).view(4, 3) * (torch.arange(12).view(4, 3) % 3 != 1)  # one column is 0
    weights = recency_weights(HISTORY, LENGTHS, 0.5)
    expected = torch.stack([0.25 * table[0] + 0.5 * table[2] + table[1], table[1], table[3]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = sum_over_history(HISTORY, weights, table.to_sparse() if sparse else table)
    assert not found.is_sparse
    torch.testing.assert_close(found, expected)


def test_a_sparse_matrix_of_scipy_becomes_one_of_torch():
    counts = transition_counts(sequences_of(*random_lists(6)), 8)
    np.testing.assert_array_equal(to_torch(counts).to_dense(), counts.toarray())


# -- spectral vectors ------------------------------------------------------------------------------------------------


def test_spectral_vectors_multiply_to_the_co_occurrence():
    """With as many dimensions as items, X X' is the symmetric matrix with its eigenvalues made positive."""
    sequences = sequences_of(*random_lists(12))
    matrix = normalized_transitions(transition_counts(sequences, 12, 5, 0.7, 1.0), 5.0).toarray().astype(np.float64)
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-6)
    values, directions = np.linalg.eigh(matrix)
    expected = directions * np.abs(values) @ directions.T
    vectors = spectral_vectors(sequences, 12, 12).double().numpy()
    np.testing.assert_allclose(vectors @ vectors.T, expected / np.trace(expected) * 12, atol=1e-3)


def test_spectral_vectors_have_one_scale_and_leave_unseen_items_at_zero():
    sequences = sequences_of(*random_lists(12))
    state = torch.get_rng_state()
    vectors = spectral_vectors(sequences, 15, 20)  # items 13 to 15 occur nowhere, and columns 16 to 20 are left over
    assert torch.equal(torch.get_rng_state(), state)
    assert vectors.dtype == torch.float32 and vectors.shape == (15, 20)
    assert vectors.square().sum(1).mean().item() == pytest.approx(1.0)
    assert vectors[12:].abs().max() < 1e-5 and (vectors[:, 15:] == 0).all()
    assert (vectors[:12].norm(dim=1) > 0.1).all()
    assert torch.equal(spectral_vectors(sequences, 15, 20), vectors), "always the same"


# -- logits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solved", [True, False], ids=["EASE", "transitions"])
@pytest.mark.parametrize("size", [1, 3, 8, 20])
def test_an_item_keeps_its_largest_weights(solved, size, monkeypatch):
    sequences = sequences_of(*random_lists(9))
    if not solved:
        monkeypatch.setattr(layers.item_to_item, "_SOLVED_MAX_ITEMS", 11)
    part = ItemToItem(12, size)
    part.fit(sequences)
    if solved:
        expected = ease_weights(sequences, 12, 20.0).numpy()
    else:
        expected = normalized_transitions(transition_counts(sequences, 12)).toarray()
    for row in expected:
        if size < 12:
            row[np.abs(row) < np.sort(np.abs(row))[-size]] = 0
    found = np.zeros((12, 12))
    np.add.at(found, (np.arange(12)[:, None], part.columns.numpy()), part.values.numpy())
    np.testing.assert_array_equal(found, expected)
    assert part.values.shape == (12, min(size, 12)) and (found[:9] != 0).any(1).all() and not found[9:].any()


def test_the_logits_are_a_sum_over_the_history_and_0_at_its_items():
    part = ItemToItem(6, 4)
    part.fit(sequences_of(*random_lists(5)))
    matrix = torch.zeros(6, 6).scatter_add_(1, part.columns.long(), part.values)
    expected = torch.stack([0.25 * matrix[0] + 0.5 * matrix[2] + matrix[1], matrix[1], matrix[3]])
    for row, items in enumerate(HISTORY):
        expected[row, items[items > 0] - 1] = 0
    assert expected.count_nonzero() > 5
    torch.testing.assert_close(part(HISTORY, LENGTHS, 0.5), expected)
    assert not part.logits(HISTORY, LENGTHS).any(), "without effect at first"
    part.factor.fill_(3.0)
    part.decay.fill_(0.5)
    torch.testing.assert_close(part.logits(HISTORY, LENGTHS), 3 * expected)
    part.switch_off()
    assert not part.logits(HISTORY, LENGTHS).any()
