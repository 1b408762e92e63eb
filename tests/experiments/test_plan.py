"""The YAML files of experiments: what they ask for, and one-line errors."""

import glob
import os

import pytest

from baselines import MODELS
from common.errors import UserError
from engine.settings import ROOT
from experiments.plan import plan_runs, read_experiment

GOOD = """
title: Two shops
datasets: [Tiny, Small]
seeds: [1, 2]
columns: [recall@10, valid ndcg@50]
compare_with: SASRec
settings: {epochs: 3, hidden_size: 16}
rows:
  Popularity: {model: Popularity}
  SASRec: {model: SASRec, settings: {hidden_size: 32}}
  Text: {model: UniSRec, stage: inductive_ft, recipe: mine.yaml, pretrained: saved/a.pth, compare_with: ~}
"""


def write(folder, text=GOOD, name="two.yaml"):
    (folder / name).write_text(text)
    return str(folder / name)


@pytest.fixture
def good(tmp_path):
    (tmp_path / "mine.yaml").write_text("temperature: 0.1\n")
    return write(tmp_path, GOOD.replace("mine.yaml", str(tmp_path / "mine.yaml")))


def test_a_file_becomes_an_experiment(good):
    experiment = read_experiment(good)
    assert (experiment.name, experiment.title) == ("two", "Two shops")
    assert experiment.columns == [("test", "recall@10"), ("valid", "ndcg@50")]
    assert [row.label for row in experiment.rows] == ["Popularity", "SASRec", "Text"]
    assert [row.compare_with for row in experiment.rows] == ["SASRec", "", ""], "no row is compared with itself"


def test_the_runs_of_an_experiment(good, tmp_path):
    runs = plan_runs(read_experiment(good), "somewhere")
    first = [f"{row}, {dataset}, seed 1" for dataset in ("Tiny", "Small") for row in ("Popularity", "SASRec", "Text")]
    second = [f"{row}, {dataset}, seed 2" for dataset in ("Tiny", "Small") for row in ("SASRec", "Text")]
    assert [str(run) for run in runs] == first + second, "a model without random numbers runs once"
    popularity, sasrec, text = (run.options() for run in runs[:3])
    common = {"dataset": "Tiny", "seed": 1, "data_path": "somewhere", "epochs": 3}
    assert popularity == {**common, "model": "Popularity"}, "Popularity has no hidden_size"
    assert sasrec == {**common, "model": "SASRec", "hidden_size": 32}, "the setting of the row counts"
    assert text == {
        **common,
        "hidden_size": 16,
        "train_stage": "inductive_ft",
        "config_files": [str(tmp_path / "mine.yaml")],
        "pretrained": os.path.join(ROOT, "saved", "a.pth"),
    }
    assert [run.command for run in runs[:3]] == ["run_baseline.py", "run_baseline.py", "finetune.py"]
    assert runs[2].settings["temperature"] == 0.1 and runs[2].settings["predictions_per_row"] == 25


def test_a_model_of_ones_own(tmp_path):
    model = tmp_path / "mine.py"
    model.write_text("from unisrec import UniSRec\n\n\nclass Mine(UniSRec):\n    pass\n")
    text = f"datasets: A\nseeds: 1\nrows: {{Mine: {{model: '{model}:Mine', stage: inductive_ft}}}}\n"
    (run,) = plan_runs(read_experiment(write(tmp_path, text)))
    assert run.command == "run_baseline.py" and run.settings["train_stage"] == "inductive_ft"
    assert run.options()["model"] == f"{model}:Mine" and run.data_path == os.path.join(ROOT, "dataset/downstream")


def test_rows_may_be_in_a_file_of_their_own(tmp_path):
    write(tmp_path, "Popularity: {model: Popularity}\nSASRec: {model: SASRec}\n", "rows.yaml")
    path = write(tmp_path, "datasets: A\nseeds: [1, 2]\ncompare_with: Popularity\nrows: rows.yaml\n")
    assert [row.compare_with for row in read_experiment(path).rows] == ["", "Popularity"]
    write(tmp_path, "Popularity: {modl: Popularity}\n", "rows.yaml")
    with pytest.raises(UserError, match=r"rows.yaml: row 'Popularity': unknown key 'modl', .*; did you mean model\?$"):
        read_experiment(path)


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("seeds: [1, 2]", "seed: [1, 2]", r"two.yaml: unknown key 'seed', expected .*; did you mean seeds\?"),
        ("seeds: [1, 2]", "", r"two.yaml: has no seeds, expected \[2020, 2021, 2022\]"),
        ("seeds: [1, 2]", "seeds: [1, x]", r"two.yaml: seeds: found \[1, 'x'\], expected whole numbers"),
        ("seeds: [1, 2]", "seeds: [1, 1]", r"two.yaml: seeds: found \[1, 1\], expected each value once"),
        ("seeds: [1, 2]", "seeds: [1, 2]\nseeds: 3", r"two.yaml: seeds is given twice"),
        ("title: Two shops", "title: [a]", r"two.yaml: title: found \['a'\], expected a string"),
        ("recall@10,", "recal@10,", r"two.yaml: columns: found 'recal@10', .*; did you mean recall\?"),
        ("recall@10,", "train recall@10,", r"columns: found 'train recall@10', expected METRIC@K, test METRIC@K"),
        ("recall@10,", "mrr@10,", r"columns: found mrr@10, but row 'Popularity' measures recall@10, recall@50"),
        ("with: SASRec", "with: SASRek", r"compare_with: found 'SASRek', expected a row .*; did you mean SASRec\?"),
        ("epochs: 3", "epoch: 3", r"two.yaml: settings: no row has a setting 'epoch'; did you mean epochs\?"),
        ("epochs: 3", "seed: 3", r"two.yaml: settings: seed is no setting here; give it as seeds"),
        ("epochs: 3", "ranks_file: a", r"two.yaml: settings: ranks_file is set by run.py; remove it"),
        ("epochs: 3", "epochs: many", r"two.yaml: row 'Popularity': option --epochs: found 'many', expected a whole"),
        ("hidden_size: 32", "hiden_size: 32", r"row 'SASRec': unknown option --hiden_size; did you mean --hidden_size"),
        ("model: Popularity", "model: Popular", r"row 'Popularity': unknown model 'Popular'; did you mean Popularity"),
        ("model: Popularity", "mode: Popularity", r"row 'Popularity': unknown key 'mode', .* mean model\?"),
        ("model: Popularity", "settings: {}", r"two.yaml: row 'Popularity': has no model"),
        ("{model: Popularity}", "Popularity", r"two.yaml: row 'Popularity': found 'Popularity', expected LABEL: "),
        ("{model: Popularity}", "{model: Popularity, stage: inductive_ft}", r"stage: model Popularity has none"),
        ("stage: inductive_ft", "stage: inductive", r"row 'Text': option --train_stage: found 'inductive'"),
        ("recipe: ", "recipe: no/", r"row 'Text': .*no/.*mine.yaml: no such file"),
    ],
)
def test_what_is_wrong_is_named(good, tmp_path, old, new, message):
    with open(good) as file:
        text = file.read()
    assert text.count(old) == 1
    with pytest.raises(UserError, match=message) as error:
        plan_runs(read_experiment(write(tmp_path, text.replace(old, new))))
    assert "\n" not in str(error.value) and "two.yaml: " in str(error.value)


def test_a_missing_file_and_no_mapping(tmp_path):
    with pytest.raises(UserError, match="none.yaml: no such file"):
        read_experiment(str(tmp_path / "none.yaml"))
    with pytest.raises(UserError, match="holds list, expected `key: value` lines"):
        read_experiment(write(tmp_path, "- a\n"))


COMMITTED = [path for path in glob.glob(f"{ROOT}/experiments/*.yaml") if not path.endswith("rows.yaml")]


@pytest.mark.parametrize("path", COMMITTED, ids=os.path.basename)
def test_the_committed_experiments(path):
    experiment = read_experiment(path)
    assert experiment.seeds == [2020, 2021, 2022]
    compared = {row.compare_with for row in experiment.rows} - {""}
    if any(row.recipe for row in experiment.rows):
        assert compared >= {"UniSRec inductive, published", "UniSRec transductive, published"}
    assert compared, "every experiment tests differences"
    missing = [row.model for row in experiment.rows if row.model not in MODELS and row.model != "UniSRec"]
    missing += [row.recipe for row in experiment.rows if row.recipe and not os.path.isfile(f"{ROOT}/{row.recipe}")]
    if missing:
        pytest.skip(f"not in this project yet: {', '.join(missing)}")
    assert len(plan_runs(experiment)) == len(experiment.datasets) * sum(
        1 if row.model in MODELS and not MODELS[row.model].trains else 3 for row in experiment.rows
    )
