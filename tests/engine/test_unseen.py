"""The bias of unseen items is the one with the best metric on valid."""

import logging

import pytest
import torch

from common.errors import UserError
from engine.building import build_model, open_dataset
from engine.checkpoint import load_weights
from engine.evaluate import Evaluation
from engine.unseen import BIASES, choose_unseen_bias
from tests.conftest import small_config, write_tiny
from unisrec import UniSRec


@pytest.fixture
def opened(tmp_path):
    def open_for(**options):
        options = {
            "holdout_items": 0.4,
            "metrics": ["NDCG", "Recall"],
            "topk": [5],
            "valid_metric": "NDCG@5",
            **options,
        }
        config = small_config("inductive_ft", "Tiny", write_tiny(tmp_path / "downstream"), **options)
        dataset = open_dataset(config)
        model = build_model(UniSRec, config, dataset)
        model.note_unseen(dataset.sequences("train"))
        return model, Evaluation(config, dataset), dataset

    return open_for


def test_the_choice_is_the_best_of_all_evaluations(opened, caplog):
    model, evaluation, _ = opened()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with caplog.at_level(logging.INFO):
        assert choose_unseen_bias(model, evaluation)
    chosen = float(model.unseen_bias)
    found = {}
    for bias in (0.0, *BIASES):
        model.unseen_bias.fill_(bias)
        found[bias] = evaluation(model, "valid")["ndcg@5"]
    assert len(set(found.values())) > 3 and found[chosen] == max(found.values())
    assert f"unseen items: 12, bias {chosen:g}" in caplog.text
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before if name != "unseen_bias")


def test_nothing_is_chosen_without_unseen_items_or_against_the_user(opened):
    model, evaluation, _ = opened(holdout_items=0.0)
    assert not model.unseen.any() and not choose_unseen_bias(model, evaluation) and model.unseen_bias == 0
    model, evaluation, _ = opened(unseen_bias=1.5)
    assert not choose_unseen_bias(model, evaluation) and model.unseen_bias == 1.5
    model, evaluation, _ = opened(unseen_negatives=True)
    assert not choose_unseen_bias(model, evaluation) and model.unseen_bias is None
    with pytest.raises(UserError, match="unseen_bias needs unseen_negatives False"):
        opened(unseen_negatives=True, unseen_bias=1.0)


def test_the_bias_belongs_to_a_shop(opened):
    """It moves to another model of the same catalogue, but not from pre-training."""
    source, _, _ = opened()
    source.unseen_bias.fill_(-2.0)
    for stage, expected in (("inductive_ft", -2.0), ("pretrain", 0.0)):
        target, _, _ = opened()
        checkpoint = {"state_dict": source.state_dict(), "item_tokens": None, "train_stage": stage}
        load_weights(target, checkpoint, "a checkpoint")
        assert target.unseen_bias == expected
    older = {name: tensor for name, tensor in source.state_dict().items() if name != "unseen_bias"}
    target, _, _ = opened()
    load_weights(target, {"state_dict": older, "item_tokens": None, "train_stage": "inductive_ft"}, "a checkpoint")
    assert target.unseen_bias == 0
