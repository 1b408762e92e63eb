"""The two augmentations: drawn for each sequence, at the rates that are asked for."""

import numpy as np
import pytest

from data.augment import augment

N = 100_000


def batch(rows=200, longest=30, seed=0):
    """Sequences of distinct ids (so that a view tells what became of each item), every position scored."""
    random = np.random.default_rng(seed)
    lengths = random.integers(1, longest + 1, rows)
    items = np.zeros((rows, longest), np.int64)
    items[np.arange(longest) < lengths[:, None]] = random.permutation(N - 1)[: lengths.sum()] + 1
    scored = np.flatnonzero(items > 0)
    return items, scored[random.random(len(scored)) < 0.7]


def view_of(items, scored, coefficient, ratio=0.2, seed=1):
    return augment(items, scored, N, np.random.default_rng(seed), ratio, coefficient)


def reference_place(row, view_row, column):
    """The slow reference: where the newest of the kept items among row[:column + 1] stands in the view."""
    kept = (view_row[view_row > 0] - 1) % N + 1
    place = {item: number for number, item in enumerate(kept.tolist())}
    while row[column] not in place:
        column -= 1
    return place[row[column]]


def test_kept_items_close_ranks_and_the_first_stays():
    items, scored = batch()
    view, _ = view_of(items, scored, coefficient=1.0)
    assert view.shape == items.shape
    for row, changed in zip(items, view, strict=True):
        count = (changed > 0).sum()
        assert (changed[:count] > 0).all(), "no gaps"
        assert changed[0] == row[0]
        assert [item for item in row if item in set(changed[:count].tolist())] == changed[:count].tolist()


@pytest.mark.parametrize("coefficient", [0.0, 0.5, 1.0])
def test_scored_positions_point_to_the_last_kept_item(coefficient):
    items, scored = batch()
    view, places = view_of(items, scored, coefficient)
    assert len(places) == len(scored)
    width = items.shape[1]
    for position, place in zip(scored, places, strict=True):
        row, column = divmod(position, width)
        assert place == row * width + reference_place(items[row], view[row], column)


def test_about_a_fifth_of_the_items_is_dropped():
    items, scored = batch(rows=4000)
    view, _ = view_of(items, scored, coefficient=1.0)
    there = (items > 0).sum() - len(items)  # the first of each always stays
    dropped = (items > 0).sum() - (view > 0).sum()
    assert dropped / there == pytest.approx(0.2, abs=0.01)
    assert (view <= N).all(), "a sequence that drops items shortens no texts"


def test_about_a_fifth_of_the_texts_is_shortened():
    items, scored = batch(rows=4000)
    view, places = view_of(items, scored, coefficient=0.0)
    shortened = view != items
    np.testing.assert_array_equal(view[shortened], items[shortened] + N)
    assert shortened.sum() / (items > 0).sum() == pytest.approx(0.2, abs=0.01)
    assert shortened[:, 0].mean() == pytest.approx(0.2, abs=0.03), "the first item like any other"
    assert (view[items == 0] == 0).all()
    np.testing.assert_array_equal(places, scored)


def test_each_sequence_chooses_for_itself():
    items = np.arange(1, 1 + 1000 * 60).reshape(1000, 60)  # so long that each does lose something
    view, _ = view_of(items, np.arange(10), coefficient=0.9)
    drops, shortens = (view == 0).any(axis=1), (view > N).any(axis=1)
    assert (drops != shortens).all()
    assert drops.mean() == pytest.approx(0.9, abs=0.03)


def test_the_generator_fixes_the_view():
    items, scored = batch()
    one, same, other = (view_of(items, scored, 0.9, seed=seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(one[0], same[0])
    np.testing.assert_array_equal(one[1], same[1])
    assert (one[0] != other[0]).any()


def test_a_ratio_of_zero_changes_nothing():
    items, scored = batch()
    view, places = view_of(items, scored, 0.5, ratio=0.0)
    np.testing.assert_array_equal(view, items)
    np.testing.assert_array_equal(places, scored)
