"""Metrics of a table of ranks, each worked by hand, and RecBole's on the same scores."""

import numpy as np
import pytest
import torch
from recbole.evaluator import Collector, Evaluator

from engine.compat import patch_recbole
from engine.metrics import METRICS, RankTable, mean_metrics, mrr, ndcg, precision, recall
from layers.ranking import expected_ranks


def table_of(rank, target=None, length=None, in_history=None):
    """A table of users 1, 2, ... with these ranks."""
    count = len(rank)
    return RankTable(
        user=np.arange(1, count + 1),
        target=np.ones(count, np.int64) if target is None else np.array(target),
        history_length=np.ones(count, np.int64) if length is None else np.array(length),
        rank=np.array(rank, np.float64),
        candidates=np.full(count, 100),
        in_history=np.zeros(count, bool) if in_history is None else np.array(in_history),
    )


# three whole ranks and two of ties: of two items that share the first place, and of four that share 2 to 5
RANKS = table_of([1, 3, 10, 1.5, 3.5])


def test_recall_counts_the_ranks_up_to_k():
    assert recall(RANKS, 1).tolist() == [1, 0, 0, 0, 0]
    assert recall(RANKS, 3).tolist() == [1, 1, 0, 1, 0], "rank 3.5 is not within the first 3"
    assert recall(RANKS, 10).tolist() == [1, 1, 1, 1, 1]
    assert recall(RANKS, 3).dtype == np.float64


def test_precision_is_a_hit_among_k_items():
    assert precision(RANKS, 1).tolist() == [1, 0, 0, 0, 0]
    assert precision(RANKS, 4).tolist() == [0.25, 0.25, 0, 0.25, 0.25]


def test_ndcg_discounts_by_the_logarithm_of_the_rank():
    assert ndcg(RANKS, 3) == pytest.approx([1.0, 0.5, 0.0, 0.7564708, 0.0], abs=1e-7)  # log2 of 2, 4 and 2.5
    assert ndcg(RANKS, 10)[2:] == pytest.approx([0.2890648, 0.7564708, 0.4608454], abs=1e-7)  # log2 of 11, 2.5 and 4.5


def test_mrr_is_the_reciprocal_rank():
    assert mrr(RANKS, 3) == pytest.approx([1.0, 1 / 3, 0.0, 2 / 3, 0.0])
    assert mrr(RANKS, 10) == pytest.approx([1.0, 1 / 3, 0.1, 2 / 3, 2 / 7])


def test_hit_and_map_with_one_target_are_recall_and_mrr():
    assert METRICS["hit"](RANKS, 3).tolist() == [1, 1, 0, 1, 0]
    assert METRICS["map"](RANKS, 3) == pytest.approx([1.0, 1 / 3, 0.0, 2 / 3, 0.0])


def test_means_have_recboles_names_in_the_order_asked_for():
    found = mean_metrics(RANKS, ["ndcg", "recall"], [10, 1])
    assert list(found) == ["ndcg@10", "ndcg@1", "recall@10", "recall@1"]
    assert found["recall@1"] == 0.2 and found["recall@10"] == 1.0 and found["ndcg@1"] == 0.2
    assert found["ndcg@10"] == pytest.approx((1 + 0.5 + 0.2890648 + 0.7564708 + 0.4608454) / 5, abs=1e-7)
    assert all(type(value) is float for value in found.values())


def test_a_constant_model_does_not_win():
    """All 100 scores are equal: the expected rank is 50.5, and no k below that is reached."""
    ranks = expected_ranks(torch.zeros(4, 100), torch.tensor([0, 1, 50, 99])).numpy()
    assert ranks.tolist() == [50.5] * 4
    assert set(mean_metrics(table_of(ranks), METRICS, [1, 10, 50]).values()) == {0.0}
    assert mean_metrics(table_of(ranks), ["recall"], [51]) == {"recall@51": 1.0}


@pytest.mark.parametrize("items", [60, 8])
def test_without_ties_the_metrics_are_recboles(items):
    """Also of a catalogue smaller than k: RecBole's collector then needs columns that are no items."""
    patch_recbole()
    topk = [1, 3, 10, 50]
    config = {"metrics": list(METRICS), "topk": topk, "metric_decimal_place": 17, "device": torch.device("cpu")}
    config["eval_args"] = {"mode": "full"}
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(300, items, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, items, (300,), generator=generator)
    collector = Collector(config)
    padded = torch.nn.functional.pad(scores, (0, max(0, 51 - items)), value=-torch.inf)
    collector.eval_batch_collect(padded, None, torch.arange(300), targets)
    expected = Evaluator(config).evaluate(collector.get_data_struct())
    found = mean_metrics(table_of(expected_ranks(scores, targets).numpy()), METRICS, topk)
    assert list(found) == list(expected) and found == pytest.approx(dict(expected), abs=1e-12)
    assert 0 < found["ndcg@3"] < found["ndcg@10"] < 1
