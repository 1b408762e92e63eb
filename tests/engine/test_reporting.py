"""The log of a run, its stopwatch, and what its result file holds."""

import json
import logging
import os

import pytest
import torch

from baselines.untrained import Popularity
from common.files import read_json
from data import UniSRecDataset
from engine.config import build_config
from engine.reporting import (
    Stopwatch,
    remove_old_result,
    report_settings,
    result_path,
    start_logging,
    text_encoder,
    write_result,
)
from tests.conftest import small_config

METRICS = {"valid": {"ndcg@10": 1 / 3}, "test": {"ndcg@10": 2 / 7}}
SECONDS = {"load": 0.5, "train": 1.5, "evaluate": 0.25}
ENCODER = {"features": "feat1CLS", "encoder": "test", "pooling": "CLS", "width": 24}


def written(config, path, run="a1"):
    return write_result(
        path, config, "UniSRec.pth", 3, METRICS, SECONDS, 1000.5, run=run, text_encoder=ENCODER, best_epoch=2
    )


def test_a_result_holds_everything_unrounded(tmp_path):
    config = small_config("transductive_ft", "Tiny", "nowhere", checkpoint_dir=str(tmp_path), learning_rate=0.01)
    path = result_path(config, str(tmp_path / "UniSRec.pth"))
    content = written(config, path)
    result = json.loads((tmp_path / "UniSRec.json").read_text())
    assert result == content == read_json(path)
    assert result["metrics"] == METRICS and result["seconds"] == SECONDS and result["rows_per_second"] == 1000.5
    assert (result["model"], result["dataset"], result["train_stage"]) == ("UniSRec", "Tiny", "transductive_ft")
    assert (result["seed"], result["epochs"], result["checkpoint"]) == (2020, 3, "UniSRec.pth")
    assert (result["run"], result["recipe"], result["text_encoder"]) == ("a1", "history", ENCODER)
    assert (result["settings"]["learning_rate"], result["settings"]["hidden_size"]) == (0.01, 16)
    assert result["settings"] == config.plain() and result["best_epoch"] == 2
    assert result["peak_memory_mb"] > 50
    assert result["versions"]["torch"] == torch.__version__ and len(result["versions"]) >= 4
    config["result_file"] = str(tmp_path / "deep" / "other.json")
    assert result_path(config, "UniSRec.pth") == str(tmp_path / "deep" / "other.json")


def test_an_earlier_result_is_removed_before_a_run(tmp_path, caplog):
    config, path = small_config("inductive_ft", "Tiny", "nowhere"), str(tmp_path / "mine.json")
    remove_old_result(path, "a1")
    with caplog.at_level("INFO"):
        for run, told in (("a1", []), ("b2", [f"result: {path} (removed that of run a1)"])):
            written(config, path, "a1")
            caplog.clear()
            remove_old_result(path, run)
            assert caplog.messages == told and not os.path.exists(path)
        (tmp_path / "mine.json").write_text("[]")
        remove_old_result(path, "a1")
    assert caplog.messages[1:] == [f"result: {path} (removed that of a run without id)"] and not os.listdir(tmp_path)


def test_the_text_encoder_is_that_of_the_features(tiny):
    dataset = UniSRecDataset(small_config("inductive_ft", "Tiny", tiny))
    assert text_encoder(dataset) == text_encoder(dataset.build()[0]) == ENCODER


def test_features_without_description_have_an_unknown_encoder(tiny, tmp_path):
    (tmp_path / "downstream" / "Tiny" / "Tiny.feat1CLS.json").unlink()
    dataset = UniSRecDataset(small_config("inductive_ft", "Tiny", tiny))
    assert text_encoder(dataset) == {**ENCODER, "encoder": None}, "the suffix tells the pooling"


def test_a_model_that_reads_no_texts_has_no_encoder(tiny):
    config = build_config(Popularity, "Tiny", "baseline", {"data_path": tiny})
    assert text_encoder(UniSRecDataset(config)) is None


def test_the_log_tells_what_differs_from_the_defaults(caplog):
    options = {"seed": 7, "learning_rate": 0.001, "topk": [5, 10], "metrics": ["NDCG"]}
    config = build_config(Popularity, "Tiny", "baseline", options)
    config["epochs"] = 0  # not the user's choice
    with caplog.at_level("INFO"):
        report_settings(config)
        report_settings(build_config(Popularity, "Tiny", "baseline", {}))
    start = "Popularity on Tiny; settings that differ from the defaults: "
    assert caplog.messages == [start + "metrics ['NDCG'], seed 7, topk [5, 10]", start + "none"]


@pytest.mark.parametrize(("main", "level"), [(True, logging.INFO), (False, logging.ERROR)])
def test_other_processes_log_errors_only(monkeypatch, main, level):
    monkeypatch.setattr("engine.reporting.is_main", lambda: main)
    config = {"show_progress": True}
    start_logging(config)
    assert logging.getLogger().level == level and config["show_progress"] is main


def test_a_stopwatch_adds_up():
    watch = Stopwatch()
    for name in ("load", "train", "load"):
        with watch(name):
            pass
    first = dict(watch.seconds)
    assert set(first) == {"load", "train"} and all(value >= 0 for value in first.values())
    with watch("load"):
        sum(range(100000))
    assert watch.seconds["load"] > first["load"] and watch.seconds["train"] == first["train"]
