"""The registry of models, and models of one's own: `-m FILE.py:CLASS` and `-m package.module:CLASS`."""

import json
import os
import subprocess
import sys

import pytest
import torch
from recbole.model.abstract_recommender import SequentialRecommender

import run_baseline
from baselines import MODELS, TEXT, entry, find_model, yaml_files
from baselines.sasrec import SASRec
from baselines.untrained import LastText, Popularity
from common.errors import UserError
from engine.settings import ROOT
from unisrec import UniSRec

OWN_MODEL = '''
import torch
from recbole.model.abstract_recommender import SequentialRecommender
from recbole.utils import InputType
from torch import nn

from scaling import scaled


class LastItem(SequentialRecommender):
    """Inner product of the last item's vector with every item's."""

    input_type = InputType.POINTWISE
    ignores_padding = True

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        torch.manual_seed(config["seed"])
        self.last, self.next = (nn.Embedding(self.n_items, config["width"]) for _ in range(2))
        self.widths = []

    def full_sort_predict(self, interaction):
        self.widths.append(interaction[self.ITEM_SEQ].size(1))
        last = interaction[self.ITEM_SEQ].gather(1, interaction[self.ITEM_SEQ_LEN][:, None] - 1)[:, 0]
        return scaled(self.last(last)) @ self.next.weight.T

    def calculate_loss(self, interaction):
        return nn.functional.cross_entropy(self.full_sort_predict(interaction), interaction[self.ITEM_ID])


class NoModel:
    pass


'''
OWN_YAML = "width: 8  # (int; 1 or more) size of the vectors\nlearning_rate: 0.05\n"


@pytest.fixture
def own(tmp_path):
    """A folder with a model of one's own, a module that it imports, and its settings."""
    (tmp_path / "my_model.py").write_text(OWN_MODEL)
    (tmp_path / "scaling.py").write_text("def scaled(x):\n    return 2 * x\n")
    (tmp_path / "my_model.yaml").write_text(OWN_YAML)
    return tmp_path


@pytest.fixture
def run(tiny, tmp_path):
    """Run run_baseline.py on Tiny; returns the result that it wrote."""

    def run(name, *options):
        result = tmp_path / "result.json"
        common = ["-d", "Tiny", f"--data_path={tiny}", f"--checkpoint_dir={tmp_path}/saved", "--show_progress=false"]
        run_baseline.main([*common, f"--result_file={result}", "-m", name, *options])
        return json.loads(result.read_text())

    return run


def test_a_model_of_ones_own_is_trained_and_tested(own, run):
    result = run(f"{own}/my_model.py:LastItem", "--epochs=30")
    assert (result["model"], result["dataset"]) == ("LastItem", "Tiny") and 1 <= result["best_epoch"] <= 30
    start = run(f"{own}/my_model.py:LastItem", "--epochs=0")
    # the items lie on a ring and users walk along it: there is something to learn
    assert result["metrics"]["test"]["ndcg@50"] > start["metrics"]["test"]["ndcg@50"] + 0.02
    content = torch.load(result["checkpoint"], weights_only=True)
    assert content["state_dict"]["last.weight"].shape == (31, 8) and content["config"]["learning_rate"] == 0.05


@pytest.mark.parametrize("name", ["LastItem.yaml", "my_model.yaml"])
def test_its_settings_stand_in_a_yaml_file_beside_it(own, run, refused, name):
    os.rename(own / "my_model.yaml", own / name)
    model = f"{own}/my_model.py:LastItem"
    for options, width in (([], 8), (["--width=4"], 4)):
        content = torch.load(run(model, "--epochs=1", *options)["checkpoint"], weights_only=True)
        assert content["state_dict"]["last.weight"].shape == (31, width)
    for option, message in (
        ("--width=0", "option --width: found 0, expected 1 or more"),
        ("--width=wide", "option --width: found 'wide', expected a whole number (its default is 8)"),
        ("--widht=3", "unknown option --widht; did you mean --width?"),
    ):
        assert refused(run_baseline.main, "-m", model, option) == message


def test_a_wrong_value_in_its_yaml_file_is_named(own, refused):
    (own / "my_model.yaml").write_text("width: 8\nepochs: many\n")
    message = refused(run_baseline.main, "-m", f"{own}/my_model.py:LastItem")
    assert message.startswith(f"{own}/my_model.yaml: epochs: found 'many', expected a whole number")


def test_rows_are_trimmed_for_a_model_that_says_it_ignores_padding(own, tiny):
    from engine.building import open_dataset
    from engine.config import build_config

    model = find_model(f"{own}/my_model.py:LastItem")
    config = build_config(model, "Tiny", "baseline", {"data_path": tiny})
    rows = open_dataset(config).build()[2]
    assert rows[list(range(len(rows)))]["item_id_list"].size(1) == 11, "users have at most 12 interactions"


def test_an_import_path(own, run, monkeypatch):
    monkeypatch.chdir(own)
    os.makedirs(own / "package_of_mine")  # no other test has a module of this name
    os.rename(own / "my_model.py", own / "package_of_mine" / "other.py")
    os.rename(own / "my_model.yaml", own / "package_of_mine" / "LastItem.yaml")
    assert run("package_of_mine.other:LastItem", "--epochs=1")["model"] == "LastItem"
    assert find_model("baselines.untrained:LastText") is LastText


def test_a_model_derived_from_unisrec_runs_with_its_stages_and_settings(own, run):
    (own / "mine.py").write_text("from unisrec import UniSRec\n\n\nclass Mine(UniSRec):\n    pass\n")
    sizes = ["--hidden_size=16", "--inner_size=12", "--n_exps=3"]
    result = run(f"{own}/mine.py:Mine", "--epochs=1", "--train_stage=inductive_ft", *sizes)
    assert result["model"] == "Mine" and os.path.basename(result["checkpoint"]).startswith("Mine-Tiny-inductive_ft")


def test_a_model_derived_from_recboles_has_the_settings_of_both(own, run):
    (own / "mine.py").write_text(
        "from recbole.model.sequential_recommender import GRU4Rec\n\n\nclass Mine(GRU4Rec):\n    pass\n"
    )
    (own / "Mine.yaml").write_text("hidden_size: 4\n")
    content = torch.load(run(f"{own}/mine.py:Mine", "--epochs=1")["checkpoint"], weights_only=True)
    assert (content["config"]["hidden_size"], content["config"]["num_layers"]) == (4, 1)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("{own}/nowhere.py:A", "{own}/nowhere.py: no such file; -m takes a model's name, FILE.py:CLASS or package.mo"),
        (
            "{own}/my_model.py",
            "option --model: found {own}/my_model.py, expected the class as well: {own}/my_model.py:C",
        ),
        ("{own}/my_model.py:Nobody", "{own}/my_model.py: has no model Nobody (models there: LastItem)"),
        ("{own}/my_model.py:NoModel", "{own}/my_model.py: has no model NoModel, which must derive from RecBole's Sequ"),
        (
            "nowhere.at.all:A",
            "nowhere.at.all: no such module; -m takes a model's name, FILE.py:CLASS or package.module",
        ),
    ],
)
def test_an_own_model_that_is_none_is_named(own, refused, name, expected):
    message = refused(run_baseline.main, "-m", name.format(own=own))
    assert message.startswith(expected.format(own=own))


def test_two_files_of_one_name_are_two_models(tmp_path):
    """A script may run several models in one process."""
    found = []
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        text = "from baselines.untrained import MeanText\nclass Mine(MeanText): ..."
        (tmp_path / folder / "mine.py").write_text(text)
        (tmp_path / folder / "mine.yaml").write_text(f"number: {len(found)}")
        found.append(find_model(f"{tmp_path / folder / 'mine.py'}:Mine"))
    for folder, model in zip(("one", "two"), found, strict=True):
        assert yaml_files(model)[1] == [str(tmp_path / folder / "mine.yaml")]


def test_a_bug_in_an_own_model_keeps_its_traceback(own):
    (own / "broken.py").write_text("import no_such_package\n")
    (own / "buggy.py").write_text("1 / 0\n")
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        find_model(f"{own}/broken.py:A")
    with pytest.raises(ZeroDivisionError):
        find_model(f"{own}/buggy.py:A")


# -- the registry ----------------------------------------------------------------------------------------------------


def test_every_model_that_runs_is_found_by_its_name():
    for name, model in MODELS.items():
        if model.runs:
            found = find_model(name)
            assert found.__name__ == name and issubclass(found, SequentialRecommender) and entry(found) is model
    assert find_model("SASRec") is SASRec


def test_what_a_class_says_of_itself():
    assert entry(UniSRec).needs == (TEXT,) and entry(UniSRec).ignores_padding and entry(UniSRec).trains
    assert entry(SASRec).ignores_padding and SASRec.ignores_padding, "said twice, so both must say the same"

    class Mine(LastText):
        pass

    assert entry(Mine).needs == (TEXT,) and not entry(Mine).ignores_padding


def test_importing_the_registry_imports_no_model():
    code = "import sys, baselines; print(*sys.modules)"
    modules = set(subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT).split())
    assert "baselines" in modules and not {"torch", "recbole", "baselines.sasrec", "numpy"} & modules


def test_a_model_of_the_registry_has_its_settings_in_props(tmp_path, monkeypatch, capsys):
    """The command knows them before it imports the model."""
    import baselines

    file = tmp_path / "props" / "Popularity.yaml"
    file.parent.mkdir()
    file.write_text("sharpness: 1  # (int; 1 or more) how sharp\n")
    monkeypatch.setattr(baselines, "__file__", str(tmp_path / "baselines" / "__init__.py"))
    assert baselines.yaml_files_of_name("Popularity") == ([], [str(file)])
    assert baselines.yaml_files_of_name("GRU4Rec")[1] == [] and len(baselines.yaml_files_of_name("GRU4Rec")[0]) == 1
    with pytest.raises(SystemExit):
        run_baseline.main(["-m", "Popularity", "--help"])
    assert "--sharpness" in capsys.readouterr().out
    with pytest.raises(UserError, match="option --sharpness: found 0, expected 1 or more"):
        run_baseline.main(["-m", "Popularity", "-d", "Tiny", "--sharpness=0"])


def test_a_model_of_ones_own_may_need_no_training():
    class Untrained(SequentialRecommender):
        trains = False

    assert not entry(Untrained).trains and entry(Popularity).trains is False and entry(SASRec).trains
