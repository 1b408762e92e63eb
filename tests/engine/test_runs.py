"""A run's id: what it depends on, what it does not, and when a continued training keeps it."""

import os
import shutil

import numpy as np
import pytest
import torch

import engine.runs
from baselines import find_model
from baselines.untrained import Popularity
from data import UniSRecDataset
from engine.config import ROOT, build_config
from engine.runs import Run, identify
from tests.conftest import small_config, write_mix, write_tiny


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """data_path of Tiny and Mix; the tests do not change them."""
    folder = tmp_path_factory.mktemp("data")
    return {"Tiny": write_tiny(folder / "downstream"), "Mix": write_mix(folder / "pretrain")}


def run_of(config, checkpoint=None, resume=False):
    return identify(config, UniSRecDataset(config), checkpoint, resume)


def checkpoint(value=0.0, **more):
    return {"state_dict": {"weight": torch.full((2, 3), value), "bias": torch.tensor(1.0)}, **more}


def test_an_id_is_short_and_comes_again(data):
    config = small_config("inductive_ft", "Tiny", data["Tiny"])
    run = run_of(config)
    assert len(run.id) == 10 and set(run.id) <= set("0123456789abcdef") and run.start is None
    dataset = UniSRecDataset(config)
    assert identify(config, dataset.build()[0]) == run == run_of(small_config("inductive_ft", "Tiny", data["Tiny"]))


def test_an_id_does_not_depend_on_places(data, tmp_path):
    shutil.copytree(data["Tiny"], tmp_path / "moved")
    plain = run_of(small_config("inductive_ft", "Tiny", data["Tiny"]))
    for option in (
        {"show_progress": True},
        {"checkpoint_dir": str(tmp_path)},
        {"result_file": str(tmp_path / "result.json")},
        {"use_gpu": False},
        {"pretrained": "some.pth"},  # its weights count, see below
    ):
        assert run_of(small_config("inductive_ft", "Tiny", data["Tiny"], **option)) == plain, option
    assert run_of(small_config("inductive_ft", "Tiny", str(tmp_path / "moved"))) == plain


def test_an_id_depends_on_every_other_setting(data):
    options = [{}, {"seed": 1}, {"learning_rate": 0.01}, {"epochs": 5}, {"hidden_dropout_prob": 0.1}, {"topk": [10]}]
    runs = {run_of(small_config("inductive_ft", "Tiny", data["Tiny"], **option)).id for option in options}
    runs.add(run_of(small_config("transductive_ft", "Tiny", data["Tiny"])).id)
    assert len(runs) == len(options) + 1


def test_how_long_a_pretraining_goes_on_makes_no_other_run(data):
    first = run_of(small_config("pretrain", "Mix", data["Mix"]))
    for option in ({"epochs": 7}, {"save_step": 1}, {"resume": "some.pth"}):
        assert run_of(small_config("pretrain", "Mix", data["Mix"], **option)) == first, option
    assert run_of(small_config("pretrain", "Mix", data["Mix"], item_drop_ratio=0.5)) != first


@pytest.mark.parametrize("what", ["train.inter", "valid.inter", "feat1CLS", "feat1CLS described"])
def test_an_id_depends_on_the_data(tmp_path, what):
    data_path = write_tiny(tmp_path / "data")
    path = tmp_path / "data" / "Tiny" / f"Tiny.{what.split()[0]}"
    before = run_of(small_config("inductive_ft", "Tiny", data_path))
    if what.endswith("inter"):
        header, *rows = path.read_text().splitlines(keepends=True)
        path.write_text("".join([header, *reversed(rows)]))  # as many bytes, in another order
    elif what == "feat1CLS":
        features = np.fromfile(path, np.float32)
        features[-1] += 1
        features.tofile(path)
    else:
        description = path.with_name(f"{path.name}.json")
        description.write_text(description.read_text().replace("{", '{"sha256": "another", ', 1))
    assert run_of(small_config("inductive_ft", "Tiny", data_path)) != before


def test_models_that_read_no_texts_do_not_depend_on_features(tmp_path):
    data_path = write_tiny(tmp_path / "data")
    config = build_config(Popularity, "Tiny", "baseline", {"data_path": data_path})
    before = run_of(config)
    os.unlink(tmp_path / "data" / "Tiny" / "Tiny.feat1CLS")
    assert run_of(config) == before


def test_an_id_depends_on_the_code(data, tmp_path, monkeypatch):
    config = small_config("inductive_ft", "Tiny", data["Tiny"])
    before = run_of(config)
    for place in ("unisrec.py", "baselines", "common", "data", "engine", "layers"):
        copy = shutil.copytree if os.path.isdir(os.path.join(ROOT, place)) else shutil.copy
        copy(os.path.join(ROOT, place), tmp_path / place)
    monkeypatch.setattr(engine.runs, "ROOT", str(tmp_path))
    assert run_of(config) == before
    with open(tmp_path / "layers" / "losses.py", "a") as file:
        file.write("TEMPERATURE = 1\n")
    assert run_of(config) != before


def test_a_model_of_ones_own_counts_as_code(data, monkeypatch):
    config = small_config("inductive_ft", "Tiny", data["Tiny"])
    before = run_of(config)
    config.model_class = type("Mine", (config.model_class,), {"__module__": __name__})
    here = run_of(config)
    assert here != before
    config.model_class = type("Mine", (config.model_class,), {"__module__": "of a session"})
    assert run_of(config) not in (before, here), "a class without a file has a name"


def test_so_does_the_file_of_a_class_that_it_derives_from(data, tmp_path):
    """Models of one's own may share a file of common parts."""
    parts, model = tmp_path / "parts_of_my_models.py", tmp_path / "my_model.py"
    parts.write_text("from unisrec import UniSRec\nclass Base(UniSRec):\n    pass\n")
    model.write_text("from parts_of_my_models import Base\nclass Mine(Base):\n    pass\n")
    config = small_config("inductive_ft", "Tiny", data["Tiny"])
    config.model_class = find_model(f"{model}:Mine")
    before = run_of(config)
    parts.write_text(parts.read_text() + "    dropped = 0.5\n")
    assert run_of(config) != before


def test_an_id_depends_on_the_weights_that_a_run_starts_from(data):
    config = small_config("inductive_ft", "Tiny", data["Tiny"])
    runs = [run_of(config, start) for start in (None, checkpoint(), checkpoint(1.0), checkpoint())]
    assert runs[1] == runs[3] and len({run.id for run in runs}) == 3
    half = checkpoint()
    half["state_dict"]["weight"] = half["state_dict"]["weight"].bfloat16()
    assert run_of(config, half) != runs[1]


def test_a_continued_training_is_the_same_run_unless_something_has_changed(data):
    def config(**options):
        return small_config("pretrain", "Mix", data["Mix"], **options)

    first = run_of(config(epochs=2))
    saved = checkpoint(run=first.id, run_start=first.start)
    assert run_of(config(epochs=4), saved, resume=True) == first
    changed = run_of(config(learning_rate=0.1), saved, resume=True)
    assert changed.id != first.id and changed.start is not None
    assert changed != run_of(config(learning_rate=0.1)), "it did not train with this rate from the beginning"
    later = checkpoint(2.0, run=changed.id, run_start=changed.start)
    assert run_of(config(learning_rate=0.1), later, resume=True) == changed
    without = checkpoint()  # saved before runs had ids
    assert run_of(config(), without, resume=True).start is not None


def test_other_processes_get_the_main_ones_answer(monkeypatch):
    monkeypatch.setattr(engine.runs, "is_main", lambda: False)
    monkeypatch.setattr(engine.runs, "from_main", lambda value: Run("of the main process") if value is None else None)
    assert identify(None, None) == Run("of the main process")
