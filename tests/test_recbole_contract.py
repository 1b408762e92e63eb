"""RecBole's models, loaders, trainers and metrics work on the data set, and mean the same as without it."""

import functools
import math
import os
import random

import numpy as np
import pytest
import recbole.model.sequential_recommender
import torch
import torch.nn.functional as F
from recbole.data.interaction import Interaction
from recbole.data.transform import construct_transform
from recbole.data.utils import data_preparation
from recbole.model.abstract_recommender import SequentialRecommender
from recbole.trainer import Trainer
from recbole.utils import InputType

from baselines import MODELS
from data import UniSRecDataset
from engine.config import build_config
from engine.evaluate import Evaluation
from tests.small_data import write_downstream
from unisrec import UniSRec

SIZES = {"hidden_size": 16, "inner_size": 12, "n_exps": 3, "n_layers": 2, "n_heads": 2, "embedding_size": 16}
UNIFORM = {"distribution": "uniform", "sample_num": 1, "alpha": 1.0, "dynamic": False, "candidate_num": 0}
RECBOLE = {name for name in dir(recbole.model.sequential_recommender) if name[0].isupper()}  # its sequential models
TRAINED = sorted(name for name, model in MODELS.items() if model.runs and model.trains)
IGNORE_PADDING = sorted(name for name, model in MODELS.items() if model.ignores_padding)
OWN = {"UniSRec": UniSRec, "RecBole's SASRec": recbole.model.sequential_recommender.SASRec}
LONGEST = 12  # MAX_ITEM_LIST_LENGTH


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A data set with cut histories, repeated rows, and enough items for RecBole's CPR models."""
    folder = tmp_path_factory.mktemp("downstream")
    write_downstream(folder, users=25, items=120, cut_length=LONGEST, longest=18, repeat=(0, 7))
    return str(folder)


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """RecBole's trainer writes `log_tensorboard` where one stands."""
    monkeypatch.chdir(tmp_path)
    return str(tmp_path)


def config_for(model, small, **options):
    options = {"data_path": small, "plm_size": 24, "show_progress": False, "train_batch_size": 64, **options}
    is_unisrec = model is UniSRec or model in MODELS and MODELS[model].command == "finetune"
    command, stage = ("finetune", {"train_stage": "inductive_ft"}) if is_unisrec else ("baseline", {})
    config = build_config(model, "Small", command, {"MAX_ITEM_LIST_LENGTH": LONGEST, "epochs": 1, **stage, **options})
    for key, value in SIZES.items():  # not every model has each of them
        config[key] = 1 if (model, key) == ("ZESRec", "n_exps") else value
    if config["model"] == "S3Rec":
        config["train_stage"] = "finetune"  # the other stage does not predict the next item
    if config["MODEL_INPUT_TYPE"] == InputType.PAIRWISE:
        config["train_neg_sample_args"] = UNIFORM
    torch.manual_seed(3)
    return config


@functools.cache
def opened(name, small):
    """A model's configuration and RecBole's three loaders, made in the order in which RecBole makes them."""
    config = config_for(OWN.get(name, name), small)
    return config, *data_preparation(config, UniSRecDataset(config))


# -- RecBole's trainer ---------------------------------------------------------------------------------------------


def test_the_registry_knows_every_sequential_model_of_recboles():
    assert RECBOLE <= MODELS.keys() and len(RECBOLE) > 30
    refused = {"DIEN", "DIN", "GRU4RecF", "GRU4RecKG", "KSR", "SASRecF"}
    assert set(TRAINED) & RECBOLE == RECBOLE - refused


@pytest.mark.parametrize("model", ["SASRec", UniSRec])
def test_recboles_trainer_fits_and_evaluates(model, small, workplace):
    config = config_for(model, small, checkpoint_dir=workplace)
    train, valid, test = data_preparation(config, UniSRecDataset(config))
    model = config.model_class(config, train.dataset)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = Trainer(config, model)
    score, metrics = trainer.fit(train, valid, verbose=False, saved=True, show_progress=False)
    assert score == metrics["ndcg@10"] > 0
    assert any((model.state_dict()[name] != tensor).any() for name, tensor in before.items())
    assert os.path.dirname(trainer.saved_model_file) == workplace and os.path.isfile(trainer.saved_model_file)
    best = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = trainer.evaluate(valid, load_best_model=True)
    assert expected == metrics
    for parameter in model.parameters():  # the saved one is loaded again, whatever became of the model
        parameter.data.zero_()
    assert trainer.evaluate(valid, load_best_model=True) == metrics
    assert best.keys() == model.state_dict().keys()
    # our evaluation and RecBole's agree, though ours sorts the rows by length
    evaluation = Evaluation(config, UniSRecDataset(config))
    for phase, loader in (("valid", valid), ("test", test)):
        assert evaluation(model, phase) == pytest.approx(trainer.evaluate(loader, load_best_model=False), abs=1e-12)


@pytest.mark.parametrize("model", [*TRAINED, *OWN])
def test_every_model_that_needs_interactions_only_trains(model, small):
    """One step on RecBole's loaders, and scores of the right shape for valid."""
    config, train, valid, _ = opened(model, small)
    model = config.model_class(config, train.dataset)
    loss = model.calculate_loss(next(iter(train)))
    loss = sum(loss) if isinstance(loss, tuple) else loss
    loss.backward()
    assert torch.isfinite(loss) and any((p.grad != 0).any() for p in model.parameters() if p.grad is not None)
    batch, _, positive_u, positive_i = next(iter(valid))
    with torch.no_grad():
        scores = model.eval().full_sort_predict(batch)
    assert scores.view(-1, 121).shape == (25, 121) and torch.equal(positive_i, batch["item_id"])
    assert positive_u.tolist() == list(range(25))


# -- padding -------------------------------------------------------------------------------------------------------


def with_random_parameters(config, dataset):
    """A model all of whose parameters matter, the vectors of the padding included."""
    model = config.model_class(config, dataset).eval()
    torch.manual_seed(5)
    for parameter in model.parameters():
        parameter.data.normal_(0.0, 0.3)
    return model


def padded_and_trimmed(train, longest):
    """The same rows twice: padded to MAX_ITEM_LIST_LENGTH, and to the longest."""
    index = np.flatnonzero(train.inter_feat["item_length"].numpy() <= longest)[:40]
    rows = train[index]
    assert rows["item_length"].max() == longest
    columns = {**rows.interaction, "neg_item_id": rows["item_id"].flip(0)}
    histories = F.pad(rows["item_id_list"], (0, LONGEST - rows["item_id_list"].size(1)))
    return [Interaction({**columns, "item_id_list": histories[:, :width]}) for width in (LONGEST, longest)]


@pytest.mark.parametrize("name", [*IGNORE_PADDING, "UniSRec"])
def test_padding_changes_no_score_of_the_models_that_are_said_to_ignore_it(name, small):
    config, train, _, _ = opened(name, small)
    train_rows, transform = train.dataset, construct_transform(config)
    assert train_rows._pads_to_batch
    model = with_random_parameters(config, train_rows)
    for longest in (1, 3, 11):
        padded, trimmed = padded_and_trimmed(train_rows, longest)
        with torch.no_grad():
            for method in ("full_sort_predict", "predict"):
                full, short = getattr(model, method)(padded), getattr(model, method)(trimmed)
                finite = full.isfinite()
                assert torch.equal(finite, short.isfinite()) and finite.any()
                assert (full - short)[finite].abs().max() <= 1e-5 * full[finite].abs().max().clamp(min=1)
            if name in OWN or MODELS[name].trains:
                losses = []
                for rows in (padded, trimmed):
                    random.seed(1)  # BERT4Rec masks at random
                    losses.append(model.calculate_loss(transform(train_rows, rows)).item())
                assert losses[1] == pytest.approx(losses[0], rel=1e-4, nan_ok=longest == 1)


@pytest.mark.parametrize("name", TRAINED)
def test_only_those_get_short_rows(name, small):
    train = opened(name, small)[1].dataset
    shortest = train[int(train.inter_feat["item_length"].argmin())]["item_id_list"]
    assert shortest.size(1) == (1 if name in IGNORE_PADDING else LONGEST)


# -- evaluation ----------------------------------------------------------------------------------------------------


class Ranks(SequentialRecommender):
    """A stub that puts each row's target at a rank of the row's own, and padding above everything."""

    input_type = InputType.POINTWISE

    def __init__(self, config, dataset, rank):
        super().__init__(config, dataset)
        self.rank = rank

    def full_sort_predict(self, interaction):
        scores = torch.zeros(len(interaction), self.n_items)
        for row, (user, target) in enumerate(zip(interaction["user_id"], interaction["item_id"], strict=True)):
            others = [item for item in range(1, self.n_items) if item != target]
            order = others[: self.rank(int(user)) - 1] + [int(target)] + others[self.rank(int(user)) - 1 :]
            scores[row, order] = torch.linspace(1, -1, self.n_items - 1)
        scores[:, 0] = 7.0
        return scores


def test_metrics_of_a_ranking_worked_out_by_hand(small):
    config = config_for("SASRec", small, topk=[1, 5, 10], valid_metric="NDCG@10", eval_batch_size=8)
    dataset = UniSRecDataset(config)
    evaluation = Evaluation(config, dataset)
    model = Ranks(config, dataset, rank=lambda user: 1 + user % 12)
    ranks = [1 + user % 12 for user in range(1, 26)]
    for phase in ("valid", "test"):
        found = evaluation(model, phase)
        assert set(found) == {f"{name}@{k}" for name in ("recall", "ndcg") for k in (1, 5, 10)}
        for k in (1, 5, 10):
            hits = [rank for rank in ranks if rank <= k]
            assert found[f"recall@{k}"] == pytest.approx(len(hits) / 25, abs=1e-9)
            assert found[f"ndcg@{k}"] == pytest.approx(sum(1 / math.log2(1 + rank) for rank in hits) / 25, abs=1e-9)


class Extremes(Ranks):
    """A stub that scores each row's target `rank` and all other items 0."""

    def predict(self, interaction):
        assert len(interaction) == 6 * len(interaction["user_id"].unique()), "the target and five negatives"
        return torch.where(interaction["item_id"] == self.positives[interaction["user_id"]], self.rank, 0.0)


class Slow(UniSRec):
    """The same scores by a method of its own, which must be asked."""

    calls = 0

    def full_sort_predict(self, interaction):
        self.calls += 1
        return super().full_sort_predict(interaction)


def test_ranks_give_the_metrics_of_scores_and_never_overrule_them(small, workplace, monkeypatch):
    found = []
    for model_class in (UniSRec, Slow):
        for scores_at_once in (1 << 27, 200):  # all users, and five at a time
            monkeypatch.setattr("engine.evaluate._SCORES", scores_at_once)
            config = config_for(UniSRec, small, topk=[1, 5, 20], valid_metric="NDCG@20", checkpoint_dir=workplace)
            dataset = UniSRecDataset(config)
            evaluation = Evaluation(config, dataset)
            torch.manual_seed(0)
            model = model_class(config, dataset)
            found.append(evaluation(model, "test"))
            assert len(evaluation.loaders["test"]) == (
                1 if scores_at_once > 200 else math.ceil(25 / (200 // dataset.item_num))
            )
            assert model_class is UniSRec or model.calls == len(evaluation.loaders["test"])
    assert all(metrics == pytest.approx(found[0], abs=1e-12) for metrics in found) and found[0]["recall@20"] > 0


@pytest.mark.parametrize("mode", ["uni5", "pop5"])
def test_evaluation_with_sampled_negatives(mode, small, workplace):
    eval_args = {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": mode}
    options = dict(topk=[1, 5, 10], valid_metric="NDCG@10", eval_args=eval_args, checkpoint_dir=workplace)
    config = config_for(UniSRec, small, **options)
    dataset = UniSRecDataset(config)
    evaluation = Evaluation(config, dataset)
    for score, expected in ((1.0, {1: 1.0, 5: 1.0, 10: 1.0}), (-1.0, {1: 0.0, 10: 1.0})):
        model = Extremes(config, dataset, score)
        for phase in ("valid", "test"):
            part = evaluation.parts[phase].inter_feat
            model.positives = torch.zeros(dataset.user_num, dtype=torch.int64)
            model.positives[part["user_id"]] = part["item_id"]
            found = evaluation(model, phase)
            assert {k: found[f"recall@{k}"] for k in expected} == pytest.approx(expected)
    model = UniSRec(config, dataset).eval()
    train, valid, _ = data_preparation(config, UniSRecDataset(config))
    np.random.seed(1)
    own = evaluation(model, "valid")
    np.random.seed(1)
    assert own == pytest.approx(Trainer(config, model).evaluate(valid, load_best_model=False), abs=1e-12)
    assert 0 < own["recall@5"] < 1 == own["recall@10"]
