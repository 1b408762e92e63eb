"""Ranks with ties, worked by hand."""

import pytest
import torch
import torch.nn.functional as F

import layers.ranking
from layers.logits import SparseLogits
from layers.ranking import expected_ranks, ranks_in_blocks


def rank(scores, target):
    return expected_ranks(torch.tensor([scores]), torch.tensor([target])).item()


def test_the_rank_is_one_more_than_the_number_of_higher_scores():
    assert [rank([0.3, 0.9, -0.5], target) for target in range(3)] == [2.0, 1.0, 3.0]


def test_half_of_the_equal_scores_precede():
    assert rank([0.5, 0.5, 0.5, 0.5, 0.5], 0) == 3.0, "a constant model ranks every target in the middle"
    assert rank([0.9, 0.5, 0.5, 0.1], 1) == 2.5
    assert rank([0.0, 0.0, 0.0], 2) == 2.0


def test_rounding_does_not_separate_equal_items():
    close = 0.1 + 3e-9
    assert torch.tensor(0.1) != torch.tensor(0.1 + 8e-9)
    assert rank([close, 0.1, 0.1 + 8e-9], 1) == 2.0
    assert rank([-0.1 - 8e-9, -0.1], 1) == 1.5
    assert rank([0.1001, 0.1], 1) == 2.0


def test_what_is_no_candidate_does_not_count():
    assert rank([-torch.inf, 0.2, -torch.inf], 1) == 1.0


def test_a_target_without_a_finite_score_is_ranked_like_any_other():
    assert rank([0.2, -torch.inf, 0.1], 1) == 3.0
    assert rank([0.2, torch.inf, 0.1], 1) == 1.0
    assert rank([-torch.inf, -torch.inf, -torch.inf], 1) == 2.0, "a model that scores nothing does not win"


def test_a_row_with_nan_has_no_rank():
    ranks = expected_ranks(torch.tensor([[0.1, torch.nan, 0.3], [0.1, 0.2, 0.3]]), torch.tensor([0, 0]))
    assert ranks.isnan().tolist() == [True, False] and ranks[1] == 3.0


def test_a_target_that_scores_almost_nothing_keeps_its_rank_in_blocks(monkeypatch):
    """Its score by itself and its score in a block are rounded differently, and the difference is no small share."""
    monkeypatch.setattr(layers.ranking, "_SCORES_AT_ONCE", 400 * 64)
    generator = torch.Generator().manual_seed(0)
    items = F.normalize(torch.randn(200, 300, generator=generator), dim=-1)
    items[100:] = items[:100]  # each item has a twin
    states = F.normalize(torch.randn(400, 300, generator=generator), dim=-1)
    targets = torch.arange(400) % 200
    scores = states.double() @ items.double().T
    own = scores.gather(1, targets[:, None])
    expected = (scores > own + 1e-9).sum(1) + 1.5  # the twin is equal
    assert torch.equal(ranks_in_blocks(lambda left, right: left @ right.mT, states, items, targets), expected.double())


@pytest.mark.parametrize("scores_at_once", [1 << 23, 7, 1])
def test_added_numbers_count_in_every_block(scores_at_once, monkeypatch):
    monkeypatch.setattr(layers.ranking, "_SCORES_AT_ONCE", scores_at_once)
    generator = torch.Generator().manual_seed(0)
    items = F.normalize(torch.randn(20, 6, generator=generator), dim=-1)
    states = F.normalize(torch.randn(5, 6, generator=generator), dim=-1)
    targets = torch.tensor([3, 0, 19, 7, 7])
    added = SparseLogits(
        torch.tensor([0, 0, 1, 2, 4]), torch.tensor([3, 5, 11, 19, 7]), torch.tensor([-0.5, 0.9, 1.0, 2.0, -3.0])
    )
    expected = expected_ranks(added.add_to(states @ items.T), targets)
    ranks = ranks_in_blocks(lambda left, right: left @ right.mT, states, items, targets, added)
    assert torch.equal(ranks, expected)
    assert ranks[2] == 1 and ranks[4] == 20
