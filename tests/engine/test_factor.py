"""The factor and decay of the item-to-item logits: chosen on valid, stored, and used by what comes after."""

import itertools
import logging

import numpy as np
import pytest
import torch

from common.files import read_json
from data import UniSRecDataset
from engine.building import build_model
from engine.checkpoint import read_checkpoint
from engine.evaluate import Evaluation
from engine.item_to_item import DECAYS, FACTORS, add_item_to_item
from finetune import main
from layers.item_to_item import ItemToItem
from tests.conftest import SMALL, small_config, write_tiny
from unisrec import UniSRec


@pytest.fixture
def opened(tmp_path):
    """A function that opens an untrained transductive model and its evaluation."""
    folder = write_tiny(tmp_path)

    def open_one(**options):
        options = {"topk": [3, 5], "valid_metric": "NDCG@5", **options}
        config = small_config("transductive_ft", "Tiny", str(folder), **options)
        dataset = UniSRecDataset(config)
        return build_model(UniSRec, config, dataset), Evaluation(config, dataset)

    return open_one


@pytest.mark.parametrize("metric", ["NDCG@5", "Recall@3"])
def test_the_choice_is_the_best_of_all_evaluations(opened, metric):
    model, evaluation = opened(valid_metric=metric)
    add_item_to_item(model, evaluation)
    part = model.item_to_item
    chosen = float(part.decay), float(part.factor)
    metrics = evaluation(model, "valid")
    assert part.values.any()
    found = {}
    for decay, factor in [(1.0, 0.0), *itertools.product(DECAYS, FACTORS)]:
        part.decay.fill_(decay)
        part.factor.fill_(factor)
        found[float(part.decay), factor] = evaluation(model, "valid")[metric.lower()]
    assert found[chosen] == max(found.values()) == metrics[metric.lower()] > found[1.0, 0.0]


def test_logits_that_help_nobody_are_left_out(opened, monkeypatch, caplog):
    model, evaluation = opened()
    monkeypatch.setattr(ItemToItem, "fit", lambda self, sequences: None)  # so all weights are 0
    before = evaluation(model, "valid")
    with caplog.at_level(logging.INFO):
        add_item_to_item(model, evaluation)
    assert evaluation(model, "valid") == before and not model.item_to_item.factor
    line = f"ndcg@5 on valid {before['ndcg@5']:.4f} without, {before['ndcg@5']:.4f} with the best factor"
    assert line in caplog.text and "decay" not in caplog.text


def test_another_metric_is_replaced_by_ndcg(opened, caplog):
    model, evaluation = opened(metrics=["NDCG", "GAUC"], valid_metric="GAUC")
    with caplog.at_level(logging.INFO):
        add_item_to_item(model, evaluation)
    assert "ndcg@10 on valid" in caplog.text


def test_rows_are_spaced_evenly(opened):
    model, evaluation = opened()
    model.train()
    everything, some = (
        evaluation.compare(model, lambda rows: [model.full_sort_predict(rows)], 1, "valid", most)[0]
        for most in (99, 10)
    )
    table, _ = evaluation.evaluate(model, "valid")
    np.testing.assert_array_equal(everything.rank, table.rank)
    assert (len(everything), len(some)) == (40, 10)
    np.testing.assert_array_equal(some.rank, table.rank[np.searchsorted(table.user, some.user)])
    np.testing.assert_array_equal(np.sort(some.history_length), np.sort(table.history_length)[::4])
    assert model.training, "the mode is restored"


def test_the_checkpoint_holds_them_and_the_next_training_chooses_again(tmp_path, monkeypatch):
    folder = write_tiny(tmp_path)
    command = ["-d", "Tiny", f"--data_path={folder}", f"--checkpoint_dir={tmp_path}", *SMALL]
    main([*command, "--epochs=1", f"--result_file={tmp_path}/trained.json"])
    trained = read_json(str(tmp_path / "trained.json"))
    stored = read_checkpoint(trained["checkpoint"])
    assert stored["state_dict"]["item_to_item.factor"] > 0 and stored["state_dict"]["item_to_item.values"].any()
    assert stored["progress"]["best_metrics"] == trained["metrics"]["valid"]
    again = ["-p", trained["checkpoint"], f"--result_file={tmp_path}/again.json"]
    main([*command, *again, "--epochs=0"])
    assert read_json(str(tmp_path / "again.json"))["metrics"]["test"] == pytest.approx(trained["metrics"]["test"])
    seen = []
    loss = UniSRec.calculate_loss

    def watched(self, batch):
        seen.append(float(self.item_to_item.factor))
        return loss(self, batch)

    monkeypatch.setattr(UniSRec, "calculate_loss", watched)
    main([*command, *again, "--epochs=1"])
    assert set(seen) == {0.0}, "the model learns without them"
    assert torch.load(read_json(str(tmp_path / "again.json"))["checkpoint"])["state_dict"]["item_to_item.factor"] > 0
