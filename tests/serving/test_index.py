"""Approximate search: what it finds, and that everything but the choice of candidates is exact."""

import pytest
import torch

from common.errors import UserError
from serving import index
from serving.index import Index
from serving.recommender import Recommender
from tests.serving.conftest import ids


@pytest.fixture
def both(made, request):
    """Two recommenders with the same 3,030 items, one with an index."""
    stage = getattr(request, "param", "transductive_ft")
    new = {f"new{number}": f"a new thing, number {number}" for number in range(3000)}
    exact, approximate = (Recommender.from_pretrained(made[stage][1]) for _ in range(2))
    exact.add_items(new)
    approximate.add_items(new)
    assert approximate.build_index() > 0.98
    return exact, approximate


def assert_same(found, expected):
    """The same items, best first. Equal scores may be in any order."""
    assert [item.score for item in found] == pytest.approx([item.score for item in expected], abs=1e-5)
    assert len({item.id for item in found}) == len(found)
    assert len({item.id for item in found} ^ {item.id for item in expected}) <= len(found) // 5
    assert [item.source for item in found] == [item.source for item in expected]


HISTORIES = [[*ids(3, 4), "new7"], ["new1", "new2"], ids(*range(30)), [], ids(8, 8, 9), [f"new{n}" for n in range(200)]]


@pytest.mark.parametrize("both", ["inductive_ft", "transductive_ft"], indirect=True)
@pytest.mark.parametrize("keep", [True, False])
def test_recommendations_are_those_of_exact_search(both, keep):
    exact, approximate = both
    assert any(exact.model.history_bias.values() != 0)
    pairs = [each.recommend(HISTORIES, k=20, exclude_history=not keep) for each in both]
    for history, expected, found in zip(HISTORIES, *pairs, strict=True):
        assert_same(found, expected)
        assert keep or not {item.id for item in found} & set(history)
    (score,) = exact.score(HISTORIES[0], [pairs[1][0][0].id])
    assert pairs[1][0][0].score == pytest.approx(score, abs=1e-6), "scores are exact"


def test_items_that_come_and_go(both):
    for each in both:
        best = both[0].recommend(ids(3, 4), k=3)
        each.add_items({"twin": best[1].text, "new5": "quite another text", "new3001": "a newer thing"})
    assert len(both[1]._index) == 3032
    for each in both[::-1]:
        each.remove_items([best[0].id, "new6"])
    assert len(both[1]._index) == 3030
    for history in (ids(3, 4), ["new3001", "new5"]):
        expected, found = (each.recommend(history, k=10) for each in both)
        assert_same(found, expected)
        assert not {item.id for item in found} & {best[0].id, "new6"}
    allowed = ["twin", "new5", "new3001"]
    expected, found = (each.recommend(ids(3), allowed=allowed) for each in both)
    assert found == expected and len(found) == 3, "exact"
    expected, found = (each.similar("new5", k=5) for each in both)
    assert_same(found, expected)


def test_many_recommendations(both):
    expected, found = (each.recommend(ids(3, 4), k=99_999) for each in both)
    assert len(found) == len(expected) == 3028 and [item.id for item in found][:5] == [item.id for item in expected][:5]


def test_an_item_with_a_logit_is_found_whatever_its_cosine(both):
    """The item that is farthest from the user gets the history bias, and then is the best."""
    exact, approximate = both
    history = ids(5, 6)
    scores = exact.score(history, list(exact.texts))
    worst = list(exact.texts)[scores.index(min(scores))]
    for each in both:
        with torch.no_grad():
            each.model.history_bias.weight.fill_(1.0)
    found = approximate.recommend([worst, *history], k=3, exclude_history=False)
    assert {item.id for item in found} == {worst, *history}


def test_an_index_excludes_replaces_and_removes():
    units = torch.nn.functional.normalize(torch.randn(2000, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    rows = torch.arange(0, 2000, 2)
    built = Index(units, rows)
    assert set(built.search(units[4], 50, torch.zeros(0).long()).tolist()) <= set(rows.tolist())
    assert built.search(units[4], 5, torch.zeros(0).long())[0] == 4
    assert 4 not in built.search(units[4], 999, torch.tensor([4, 6]))
    built.set(torch.tensor([8, 1]), units[[4, 4]])
    assert len(built) == 1001 and {4, 8, 1} <= set(built.search(units[4], 20, torch.zeros(0).long()).tolist())
    built.remove(torch.tensor([4, 8, 3]))
    assert len(built) == 999
    assert {4, 8, 1} & set(built.search(units[4], 20, torch.zeros(0).long()).tolist()) == {1}
    assert len(built.search(units[4], 5000, torch.zeros(0).long())) == 999


def test_an_index_is_built_on_request_and_for_many_items(made, monkeypatch):
    with pytest.raises(UserError, match="index: found 30 items, expected 1,000 or more"):
        Recommender.from_pretrained(made["inductive_ft"][1], index=True)
    monkeypatch.setattr("serving.recommender._EXACT_UP_TO", 29)
    monkeypatch.setattr(index, "LEAST_ITEMS", 20)
    assert Recommender.from_pretrained(made["inductive_ft"][1])._index is not None
    assert Recommender.from_pretrained(made["inductive_ft"][1], index=False)._index is None
