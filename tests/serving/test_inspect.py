"""Diagnostics of a bundle: the figures are those of vectors worked out by hand, and the command writes its files."""

import os

import pytest
import torch

from common.files import read_json
from serving import inspect
from serving.inspect import effective_rank, mean_cosine


def test_isotropy():
    corners = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    assert mean_cosine(corners) == pytest.approx(-1 / 3), "of 12 ordered pairs, 4 have -1 and 8 have 0"
    assert mean_cosine(corners[:1]) == 0 and mean_cosine(corners[[0, 0]]) == pytest.approx(1)
    assert effective_rank(corners) == pytest.approx(2)
    assert effective_rank(corners[:2]) == pytest.approx(1) and effective_rank(corners[[0, 0]]) == pytest.approx(1)


def test_neighbors_are_the_nearest_before_and_after():
    texts = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]]), dim=1)
    vectors = {"texts": texts, "whitened": texts, "adapted": texts[[0, 2, 1, 3]]}
    found = inspect.neighbors(inspect.Domain(list("abcd"), vectors, torch.ones(4, 1)))
    assert [entry["item"] for entry in found] == list("abcd")
    assert [entry["before"][0]["item"] for entry in found] == ["b", "a", "d", "c"]
    assert [entry["after"][0]["item"] for entry in found] == ["c", "d", "a", "b"]
    assert found[0]["before"][0]["cosine"] == pytest.approx(0.9 / 0.82**0.5)
    assert all(len(entry["before"]) == len(entry["after"]) == 3 for entry in found), "all but the item itself"


@pytest.mark.parametrize("stage", ["inductive_ft", "transductive_ft"])
def test_the_command_inspects_a_finetuned_model(made, tmp_path, capsys, stage):
    inspect.main([made[stage][1], "--out", str(tmp_path)])
    assert {"inspection.json", "experts.png", "map.png"} == set(os.listdir(tmp_path))
    assert (tmp_path / "map.png").read_bytes()[:4] == b"\x89PNG"
    found = read_json(str(tmp_path / "inspection.json"))
    assert sum(found["experts"]["Tiny"]["mean_gate"]) == pytest.approx(1)
    stages = found["isotropy"]["Tiny"]
    assert list(stages) == ["texts", "whitened", "adapted"]
    assert all(1 <= values["effective_rank"] <= values["width"] for values in stages.values())
    assert len(found["neighbors"]["Tiny"]) == 10
    assert "Tiny" in capsys.readouterr().out


def test_the_command_inspects_a_pretrained_model_on_data_sets(made, tmp_path):
    inspect.main([made["pretrain"][1], "-d", "Tiny", "--data_path", made["data"], "--out", str(tmp_path)])
    assert list(read_json(str(tmp_path / "inspection.json"))["experts"]) == ["Tiny"]


def test_mistakes(made, tmp_path, refused):
    out = ["--out", tmp_path / "out"]
    assert "has no items; give data sets with -d" in refused(inspect.main, made["pretrain"][1], *out)
    assert "has items of its own; leave out -d" in refused(inspect.main, made["inductive_ft"][1], "-d", "Tiny", *out)
    words = ["-d", "Nothing", "--data_path", made["data"], *out]
    assert "no such feature file" in refused(inspect.main, made["pretrain"][1], *words)
    assert "no such file" in refused(inspect.main, tmp_path, *out)
    assert not (tmp_path / "out").exists()
