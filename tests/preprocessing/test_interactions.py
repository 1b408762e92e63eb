"""Repeated rows, the k-core and the order of everything, each against the plainest way to do it."""

import random
from collections import Counter

import numpy as np
import polars as pl
import pytest

from common.errors import UserError
from dataset.preprocessing import interactions as module
from dataset.preprocessing.interactions import Interactions, k_core, order_interactions, without_repeats
from tests.preprocessing.shops import interactions


def plain(rows):
    """Back to a list of (user, item, timestamp)."""
    users, items = rows.users.to_list(), rows.items.to_list()
    return [
        (users[user], items[item], when)
        for user, item, when in zip(rows.user.tolist(), rows.item.tolist(), rows.timestamp.tolist(), strict=True)
    ]


def random_rows(seed, count=600, users=60, items=80, times=50, kind=int):
    luck = random.Random(seed)
    return [
        (f"u{luck.randrange(users)}", f"i{int(luck.paretovariate(0.6)) % items}", kind(luck.randrange(-5, times)))
        for _ in range(count)
    ]


@pytest.mark.parametrize("parts", [1, 7, 600])
def test_the_same_id_is_the_same_number_in_every_part(parts):
    rows = random_rows(1)
    taken = interactions(rows, parts)
    assert plain(taken) == rows
    assert len(set(taken.users)) == len(taken.users) == len({row[0] for row in rows})
    assert taken.position.tolist() == list(range(600))


def test_numbers_outlive_the_parts_that_they_were_given_in():
    """Polars forgets the strings of a categorical type when nothing uses it any more."""

    def parts():
        for start in range(0, 200_000, 1000):
            ids = [f"u{start + number}" for number in range(1000)]
            yield pl.DataFrame({"user": ids, "item": ["i"] * 1000, "timestamp": [0] * 1000})

    taken = Interactions.collect(parts(), "rows")
    assert taken.user.tolist() == list(range(200_000))
    assert taken.users[123_456] == "u123456"
    assert len(taken.items) == 1


@pytest.mark.parametrize("kind", [int, float])
def test_of_repeated_rows_the_first_stays(kind):
    rows = random_rows(2, count=2000, users=8, items=6, times=20, kind=kind)
    expected = list(dict.fromkeys(rows))
    left = without_repeats(interactions(rows))
    assert plain(left) == expected
    assert len(expected) < len(rows)
    assert [rows[place] for place in left.position] == expected
    assert left.position.tolist() == [rows.index(row) for row in expected]


def test_equal_checksums_are_not_taken_for_equal_rows(monkeypatch):
    monkeypatch.setattr(module, "_mix_bits", lambda numbers: numbers * np.uint64(0))  # now only user and item count
    rows = [("u", "a", 1), ("u", "a", 2), ("u", "a", 1)]
    assert plain(without_repeats(interactions(rows))) == rows[:2]


@pytest.mark.parametrize("parts", [1, 7])
def test_rows_that_differ_in_quantity_are_not_repeats(parts):
    luck = random.Random(3)
    rows = [(*row, str(luck.randrange(3))) for row in random_rows(3, count=2000, users=8, items=6, times=20)]
    table = pl.DataFrame(rows, ["user", "item", "timestamp", "quantity"], orient="row")
    size = -(-len(rows) // parts)
    taken = Interactions.collect([table[start : start + size] for start in range(0, len(rows), size)], "rows")
    left = without_repeats(taken)
    expected = list(dict.fromkeys(rows))
    assert [rows[place] for place in left.position] == expected
    assert plain(left) == [row[:3] for row in expected]
    assert len(set(plain(left))) < len(expected) < len(rows)
    assert left.key() == ["user", "item", "timestamp", "quantity"]
    assert without_repeats(left) is left


def test_equal_checksums_are_not_taken_for_equal_quantities(monkeypatch):
    monkeypatch.setattr(module, "_mix_bits", lambda numbers: numbers * np.uint64(0))
    table = pl.DataFrame({"user": ["u"] * 3, "item": ["a"] * 3, "timestamp": [1] * 3, "quantity": ["6", "1", "6"]})
    assert without_repeats(Interactions.collect([table], "rows")).position.tolist() == [0, 1]


def test_minus_zero_is_zero():
    assert len(without_repeats(interactions([("u", "a", 0.0), ("u", "a", -0.0)]))) == 1


@pytest.mark.parametrize("seed", range(4))
def test_k_core_is_what_repeated_plain_filtering_leaves(seed):
    rows = random_rows(seed)
    expected = rows
    while True:
        users = [row[0] for row in expected]
        fewer = [row for row in expected if users.count(row[0]) >= 6]
        items = [row[1] for row in fewer]
        fewer = [row for row in fewer if items.count(row[1]) >= 5]
        if len(fewer) == len(expected):
            break
        expected = fewer
    assert 0 < len(expected) < len(rows)
    core = k_core(interactions(rows), 6, 5)
    assert plain(core) == expected
    assert core.counts() == {
        "interactions": len(expected),
        "users": len({row[0] for row in expected}),
        "items": len({row[1] for row in expected}),
    }
    assert plain(k_core(interactions(rows), 0, 0)) == rows
    assert not len(k_core(interactions(rows), 1000, 0))


@pytest.mark.parametrize("kind", [int, float])
@pytest.mark.parametrize("scale", [1, 10**17])  # the second leaves no room for user and time in one number
def test_walk_goes_user_by_user_through_time_and_through_the_file(kind, scale):
    rows = [(user, item, when * scale) for user, item, when in random_rows(5, times=12, kind=kind)]
    users = list(dict.fromkeys(row[0] for row in rows))
    histories = [sorted((row for row in rows if row[0] == user), key=lambda row: row[2]) for user in users]
    items = list(dict.fromkeys(row[1] for history in histories for row in history))

    found = order_interactions(interactions(rows, parts=5))
    assert found.users.to_list() == users
    assert found.items.to_list() == items
    assert found.item.tolist() == [items.index(row[1]) for history in histories for row in history]
    assert found.timestamp.tolist() == [row[2] for history in histories for row in history]
    assert np.diff(found.offsets).tolist() == [len(history) for history in histories]


def test_walk_of_a_part_knows_only_what_is_left():
    rows = [("gone", "x", 1), ("late", "b", 5), ("late", "a", 4), ("gone", "b", 2)]
    taken = interactions(rows)
    found = order_interactions(taken.take(np.array([1, 2])))
    assert (found.users.to_list(), found.items.to_list(), found.item.tolist()) == (["late"], ["a", "b"], [0, 1])


@pytest.mark.parametrize("kind", [int, float])
def test_shuffled_ties_keep_the_order_of_time_and_of_the_users(kind):
    taken = interactions(random_rows(5, times=6, kind=kind))
    in_file_order, shuffled = order_interactions(taken), order_interactions(taken, tie_seed=1)
    assert shuffled.users.to_list() == in_file_order.users.to_list()
    assert shuffled.offsets.tolist() == in_file_order.offsets.tolist()
    assert shuffled.timestamp.tolist() == in_file_order.timestamp.tolist()

    def items(ordered):
        return [ordered.items[number] for number in ordered.item.tolist()]

    def interactions_of(ordered):
        user = np.repeat(np.arange(len(ordered.users)), np.diff(ordered.offsets)).tolist()
        return list(zip(user, ordered.timestamp.tolist(), items(ordered), strict=True))

    assert sorted(interactions_of(shuffled)) == sorted(interactions_of(in_file_order))
    assert items(shuffled) != items(in_file_order)
    assert items(order_interactions(taken, tie_seed=1)) == items(shuffled)
    assert items(order_interactions(taken, tie_seed=2)) != items(shuffled)


def test_all_orders_of_a_tie_are_equally_likely():
    taken = interactions([("u", item, 1) for item in "abc"])
    orders = Counter("".join(order_interactions(taken, tie_seed=seed).items) for seed in range(600))
    assert set(orders) == {"abc", "acb", "bac", "bca", "cab", "cba"}
    assert 60 < min(orders.values()) and max(orders.values()) < 140  # 100 each are expected, standard deviation 9


def test_no_interaction_at_all():
    with pytest.raises(UserError, match=r"r\.csv: holds no interaction"):
        Interactions.collect(iter([]), "r.csv")
