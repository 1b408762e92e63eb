"""Folding prefix rows into sequences loses no pair and invents none."""

import time
from collections import Counter
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import fold_rows
from data.sequences import _Folded, keep_users, without_items
from tests.small_data import prefix_rows, random_histories


def fold(rows, cut_length=None):
    """Fold rows (user, history, target)."""
    return fold_rows(
        np.array([user for user, _, _ in rows], np.int64),
        np.array([len(history) for _, history, _ in rows], np.int64),
        np.array([item for _, history, _ in rows for item in history], np.int32),
        np.array([target for _, _, target in rows], np.int32),
        cut_length,
    )


def pairs_of_rows(rows, cut_length):
    """The slow reference: each row's user, newest items and target, counted."""
    return Counter((user, tuple(history[-cut_length:]), target) for user, history, target in rows)


def pairs_of_sequences(sequences):
    """The same, read off the folded sequences."""
    pairs = Counter()
    for position, sequence in zip(*sequences.rows(), strict=True):
        start = max(sequences.offsets[sequence], position - sequences.cut_length)
        history = tuple(sequences.items[start:position].tolist())
        pairs[int(sequences.users[sequence]), history, int(sequences.items[position])] += 1
    return pairs


def random_rows(random):
    """Rows of a few users over few items, so that histories repeat and look like each other's continuation."""
    cut_length, items = int(random.integers(1, 6)), int(random.integers(1, 5))
    rows = []
    for user in random.permutation(40)[: random.integers(1, 6)].tolist():
        for _ in range(random.integers(1, 3)):  # sometimes two unrelated sequences of one user
            history = random.integers(1, items + 1, random.integers(2, 14)).tolist()
            own = prefix_rows(history, cut_length)
            keep = random.random(len(own)) < random.choice([0.5, 0.9, 1.0])
            copies = np.where(random.random(len(own)) < random.choice([0.0, 0.3]), 2, 1) * keep
            rows += [(user, *row) for row, times in zip(own, copies, strict=True) for _ in range(times)]
    return rows or [(1, [1], 1)]


def interleave(rows):
    """The users' rows taken in turn, each user's in their order."""
    place = Counter()
    keys = []
    for user, _, _ in rows:
        keys.append(place[user])
        place[user] += 1
    return [rows[number] for number in np.argsort(keys, kind="stable")]


@pytest.mark.parametrize("order", ["published", "ascending", "shuffled", "interleaved"])
def test_no_pair_is_lost_or_invented(order):
    random = np.random.default_rng(["published", "ascending", "shuffled", "interleaved"].index(order))
    for _ in range(200):
        rows = random_rows(random)
        if order == "ascending":
            rows = sorted(rows, key=lambda row: (row[0], len(row[1])))
        elif order == "shuffled":
            rows = [rows[number] for number in random.permutation(len(rows))]
        elif order == "interleaved":
            rows = interleave(rows)
        cut_length = None if random.random() < 0.5 else int(random.integers(1, 6))
        sequences = fold(rows, cut_length)
        assert sequences.cut_length == (cut_length or max(len(history) for _, history, _ in rows))
        assert pairs_of_sequences(sequences) == pairs_of_rows(rows, sequences.cut_length), rows
        assert sequences.n_predictions == len(rows)
        assert sequences.offsets[0] == 0 and sequences.offsets[-1] == len(sequences.items) == len(sequences.weights)
        assert (sequences.weights[sequences.offsets[:-1]] == 0).all(), "a first item has nothing before it"
        assert (sequences.items > 0).all()


def test_users_stay_in_the_order_in_which_they_come():
    random = np.random.default_rng(5)
    for _ in range(50):
        rows = random_rows(random)
        rows = [rows[number] for number in random.permutation(len(rows))]
        assert list(dict.fromkeys(fold(rows).users.tolist())) == list(dict.fromkeys(user for user, _, _ in rows))


def test_a_small_example_exactly():
    rows = [
        (7, [3, 1, 4], 1),
        (7, [3, 1], 4),
        (7, [3, 1], 4),  # twice: counts twice
        (2, [5, 9], 2),  # the row [5] -> 9 is missing: 9 is not predicted
        (4, [6], 6),
    ]
    sequences = fold(rows)
    assert sequences.users.tolist() == [7, 2, 4]
    assert sequences.offsets.tolist() == [0, 4, 7, 9]
    assert sequences.items.tolist() == [3, 1, 4, 1, 5, 9, 2, 6, 6]
    assert sequences.weights.tolist() == [0, 0, 2, 1, 0, 0, 1, 0, 1]
    assert (sequences.cut_length, sequences.n_predictions) == (3, 5)
    positions, row_sequences = sequences.rows()
    assert positions.tolist() == [2, 2, 3, 6, 8] and row_sequences.tolist() == [0, 0, 0, 1, 2]


def test_histories_cut_to_the_window_are_chained():
    rows = [(1, *row) for row in prefix_rows([1, 2, 3, 4, 5, 6], 3)]
    assert rows[0] == (1, [3, 4, 5], 6)
    sequences = fold(rows)
    assert sequences.items.tolist() == [1, 2, 3, 4, 5, 6] and sequences.weights.tolist() == [0, 1, 1, 1, 1, 1]


def test_a_row_that_fits_nowhere_stays_a_sequence_that_scores_its_last_position():
    sequences = fold([(1, [1, 2, 3], 4), (1, [9, 8], 7), (1, [1], 2)])
    assert sequences.items.tolist() == [1, 2, 3, 4, 9, 8, 7] and sequences.users.tolist() == [1, 1]
    assert sequences.weights.tolist() == [0, 1, 0, 1, 0, 0, 1]


@pytest.mark.parametrize("cut_length", [1, 8, 50])
def test_a_published_file_folds_to_one_sequence_a_user(cut_length):
    histories = random_histories(users=120, items=500, shortest=2, longest=2 * cut_length + 20)
    assert max(map(len, histories)) > cut_length + 1
    rows = [(user, *row) for user, history in enumerate(histories) for row in prefix_rows(history, cut_length)]
    sequences = fold(rows)
    assert sequences.users.tolist() == list(range(len(histories)))
    assert sequences.items.tolist() == [item for history in histories for item in history]
    firsts = np.zeros(len(sequences.items), bool)
    firsts[sequences.offsets[:-1]] = True
    np.testing.assert_array_equal(sequences.weights, ~firsts)


def test_a_row_that_occurs_very_often_keeps_its_count():
    for rest in ([], [(1, [5], 6)]):  # one chain, and a user whose rows form none
        sequences = fold([(1, [1], 2)] * 70_000 + rest)
        assert sequences.weights.tolist()[:2] == [0, 70_000]


def test_a_file_that_goes_upwards_folds_as_well():
    histories = random_histories(users=6, items=30, shortest=5, longest=25, seed=3)
    rows = [(user, *row) for user, history in enumerate(histories) for row in reversed(prefix_rows(history, 8))]
    sequences = fold(rows, 8)
    assert len(sequences) == len(histories)
    for user, history in enumerate(histories):
        assert sequences.items[sequences.offsets[user] : sequences.offsets[user + 1]].tolist() == history


# -- users whose rows form no chain ------------------------------------------------------------------------------------


def fold_one_user_slowly(rows, numbers, bar):
    """The plain way for the rows of a user, longest first: compare each row with all sequences so far."""
    sequences, weights = [], []
    for number in range(numbers.start, numbers.stop):
        row = rows.items[rows.starts[number] : rows.starts[number] + rows.sizes[number]]
        for sequence, weight in zip(sequences, weights, strict=True):
            if np.array_equal(sequence[: len(row)], row):
                weight[len(row) - 1] += 1
                break
        else:
            sequences.append(row)
            weights.append(np.zeros(len(row), np.uint32))
            weights[-1][-1] = 1
    lengths = np.array([len(sequence) for sequence in sequences], np.int64)
    users = np.full(len(lengths), rows.users[numbers.start], np.int64)
    return _Folded(users, lengths, np.concatenate(sequences), np.concatenate(weights))


few_items = st.integers(1, 3)
user_rows = st.tuples(st.integers(0, 3), st.lists(few_items, min_size=1, max_size=6), few_items)


@given(rows=st.lists(user_rows, min_size=1, max_size=40), cut_length=st.integers(1, 8))
@settings(max_examples=300, deadline=None)
def test_users_without_a_chain_fold_as_in_the_plain_way(rows, cut_length):
    found = fold(rows, cut_length)
    with mock.patch("data.sequences._fold_one_user", fold_one_user_slowly):
        expected = fold(rows, cut_length)
    for name in ("offsets", "items", "weights", "users"):
        own, plain = getattr(found, name), getattr(expected, name)
        assert own.dtype == plain.dtype and own.tolist() == plain.tolist(), name


@pytest.mark.parametrize("same_beginning", [False, True])
def test_many_rows_of_one_user_take_linear_time(same_beginning):
    """100,000 rows that form no chain. Comparing all pairs takes more than an hour."""
    random = np.random.default_rng(0)
    n_rows, length = 100_000, 20
    histories = random.integers(1, 1000, (n_rows, length)).astype(np.int32)
    if same_beginning:
        histories[:, :-1] = 7
    targets = random.integers(1, 1000, n_rows).astype(np.int32)
    start = time.perf_counter()
    folded = fold_rows(np.zeros(n_rows, np.int64), np.full(n_rows, length), histories.ravel(), targets)
    assert time.perf_counter() - start < 20
    assert folded.n_predictions == n_rows
    assert len(folded) == len(np.unique(np.column_stack([histories, targets]), axis=0))


# -- parts of the data -------------------------------------------------------------------------------------------------


@pytest.fixture
def many():
    """30 users, two of whom have rows that form no chain."""
    histories = [[item + 1 for item in history] for history in random_histories(30, 12, 3, 9)]
    rows = [(user, *row) for user, history in enumerate(histories) for row in prefix_rows(history, 50)]
    return fold([*rows, (4, [1, 2], 3), (9, [5], 6)], 50)


def test_a_share_of_the_users_keeps_all_their_pairs(many):
    everything = pairs_of_sequences(many)
    users = set()
    for fraction in (0.0, 0.1, 0.5, 0.9):
        part = keep_users(many, fraction, seed=3)
        assert users <= set(part.users), "a smaller share is a part of a larger one"
        users = set(part.users)
        assert len(users) == max(1, round(30 * fraction))
        expected = Counter({pair: count for pair, count in everything.items() if pair[0] in users})
        assert pairs_of_sequences(part) == expected and part.weights.dtype == many.weights.dtype
    assert set(keep_users(many, 0.5, seed=4).users) != set(keep_users(many, 0.5, seed=3).users)


def test_items_that_are_left_out_were_never_there(many):
    """Leaving items out of the sequences is the same as leaving them out of the users' histories."""
    left_out = np.zeros(13, bool)
    left_out[[2, 3, 11]] = True
    part = without_items(many, left_out)
    expected = Counter()
    for (user, history, target), count in pairs_of_sequences(many).items():
        kept = tuple(item for item in history if not left_out[item])
        if kept and not left_out[target]:
            expected[user, kept, target] += count
    assert pairs_of_sequences(part) == expected
    assert not left_out[part.items].any() and (np.diff(part.offsets) > 0).all()
    left_out[1:] = True
    assert len(without_items(many, left_out)) == 0
