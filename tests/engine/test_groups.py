"""Groups of rows of a table of ranks, worked by hand."""

import numpy as np
import pytest

from engine import groups
from engine.groups import by_history_length, by_popularity, by_repetition, format_groups, group_metrics
from tests.engine.test_metrics import table_of


def rows_of(masks):
    """label -> the numbers of its rows."""
    return {label: np.flatnonzero(mask).tolist() for label, mask in masks}


# items 1 to 10: item 1 is never seen, 2 to 6 twice, 7 and 8 five times, 9 and 10 ten times: 40 interactions. Ordered by
# count, the twos take the first quarter, the fives the second, the tens the second half
COUNTS = np.array([0, 0, 2, 2, 2, 2, 2, 5, 5, 10, 10])


def test_fifths_of_the_training_interactions():
    found = rows_of(by_popularity(table_of([1] * 5, target=[1, 2, 10, 7, 6]), COUNTS))
    assert found == {
        "never seen": [0],
        "fifth 1: seen 2 times": [1, 4],
        "fifth 2: seen 5 times": [3],
        "fifth 4: seen 10 times": [2],
    }, "the middles of the three counts are at 12.5%, 37.5% and 75% of the interactions"


def test_a_fifth_has_about_a_fifth_of_the_interactions():
    counts = np.concatenate([[0], np.arange(1, 101)])  # one item of each count
    table = table_of([1] * 100, target=np.arange(1, 101))
    masks = by_popularity(table, counts)
    shares = [counts[1:][mask].sum() / counts.sum() for _, mask in masks]
    assert shares == pytest.approx([0, 0.2, 0.2, 0.2, 0.2, 0.2], abs=0.01)
    assert [label for label, _ in masks[:3]] == [
        "never seen",
        "fifth 1: seen 1 to 44 times",
        "fifth 2: seen 45 to 63 times",
    ]
    assert np.sum([mask for _, mask in masks], axis=0).tolist() == [1] * 100


def test_no_interactions_at_all():
    assert rows_of(by_popularity(table_of([1, 2], target=[1, 2]), np.zeros(3, int))) == {"never seen": [0, 1]}


def test_history_lengths():
    found = rows_of(by_history_length(table_of([1] * 8, length=[1, 2, 3, 5, 9, 49, 50, 200]), COUNTS))
    assert found == {
        "1 to 2 items": [0, 1],
        "3 to 4 items": [2],
        "5 to 9 items": [3, 4],
        "10 to 19 items": [],
        "20 to 49 items": [5],
        "50 items or more": [6, 7],
    }


def test_targets_in_the_history():
    found = rows_of(by_repetition(table_of([1] * 3, in_history=[True, False, True]), COUNTS))
    assert found == {"new to the user": [1], "in the history": [0, 2]}


TABLE = table_of(
    [1, 3, 20, 2, 11], target=[1, 2, 9, 9, 10], length=[1, 2, 2, 12, 60], in_history=[False, False, True, True, False]
)


def test_metrics_of_each_group_that_has_rows():
    found = group_metrics(TABLE, COUNTS, ["recall", "mrr"], [10])
    assert list(found) == ["popularity", "history length", "repetition"]
    assert found["popularity"] == {
        "never seen": {"users": 1, "recall@10": 1.0, "mrr@10": 1.0},
        "fifth 1: seen 2 times": {"users": 1, "recall@10": 1.0, "mrr@10": pytest.approx(1 / 3)},
        "fifth 4: seen 10 times": {"users": 3, "recall@10": pytest.approx(1 / 3), "mrr@10": pytest.approx(1 / 6)},
    }
    assert found["history length"] == {
        "1 to 2 items": {"users": 3, "recall@10": pytest.approx(2 / 3), "mrr@10": pytest.approx(4 / 9)},
        "10 to 19 items": {"users": 1, "recall@10": 1.0, "mrr@10": 0.5},
        "50 items or more": {"users": 1, "recall@10": 0.0, "mrr@10": 0.0},
    }
    assert found["repetition"] == {
        "new to the user": {"users": 3, "recall@10": pytest.approx(2 / 3), "mrr@10": pytest.approx(4 / 9)},
        "in the history": {"users": 2, "recall@10": 0.5, "mrr@10": 0.25},
    }


def test_a_group_is_added_in_one_place(monkeypatch):
    even = lambda table, counts: [("even", table.user % 2 == 0), ("odd", table.user % 2 == 1)]  # noqa: E731
    monkeypatch.setitem(groups.GROUPS, "user", even)
    found = group_metrics(TABLE, COUNTS, ["recall"], [10])
    assert found["user"] == {
        "even": {"users": 2, "recall@10": 1.0},
        "odd": {"users": 3, "recall@10": pytest.approx(1 / 3)},
    }
    assert any("by user" in line for line in format_groups(found))


def test_the_printed_table_is_aligned():
    lines = format_groups(group_metrics(TABLE, COUNTS, ["recall", "mrr"], [10]))
    assert len({len(line) for line in lines}) == 1 and len(lines) == 11
    assert lines[0].split() == ["by", "popularity", "users", "recall@10", "mrr@10"]
    assert lines[3].split() == ["fifth", "4:", "seen", "10", "times", "3", "0.3333", "0.1667"]
