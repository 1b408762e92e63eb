"""The commands from end to end, on small data: pre-train, fine-tune, evaluate, baselines, and what they write."""

import glob
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

import finetune
import pretrain
import run_baseline
from common.errors import UserError
from engine.checkpoint import read_checkpoint
from engine.settings import ROOT
from tests.conftest import SMALL, write_mix, write_tiny

pytestmark = pytest.mark.slow

METRICS = {"recall@10", "recall@50", "ndcg@10", "ndcg@50"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return {"Mix": write_mix(folder / "pretrain"), "Tiny": write_tiny(folder / "downstream")}


@pytest.fixture(scope="module")
def pretrained(data, tmp_path_factory):
    """A pre-trained checkpoint."""
    folder = tmp_path_factory.mktemp("saved")
    pretrain.main(["-d", "Mix", f"--data_path={data['Mix']}", f"--checkpoint_dir={folder}", "--epochs=2", *SMALL])
    assert glob.glob(str(folder / "*.pth")) == [str(folder / "UniSRec-Mix-2.pth")]
    return str(folder / "UniSRec-Mix-2.pth")


def tuned(data, saved, *options):
    """Run finetune.py and read what it wrote; returns the result and the checkpoint's path."""
    os.makedirs(saved, exist_ok=True)
    before = set(os.listdir(saved))
    finetune.main(["-d", "Tiny", f"--data_path={data['Tiny']}", f"--checkpoint_dir={saved}", *SMALL, *options])
    (written,) = [name for name in set(os.listdir(saved)) - before if name.endswith(".json")]
    with open(os.path.join(saved, written)) as file:
        return json.load(file), os.path.join(saved, written.replace(".json", ".pth"))


def baseline(data, saved, *options):
    common = [f"--data_path={data['Tiny']}", f"--checkpoint_dir={saved}", "--show_progress=false", "-d", "Tiny"]
    run_baseline.main([*common, *options])
    (name,) = [name for name in os.listdir(saved) if name.endswith(".json")]
    with open(os.path.join(saved, name)) as file:
        return json.load(file)


def count_rows(data, split="train"):
    with open(os.path.join(data["Tiny"], "Tiny", f"Tiny.{split}.inter")) as file:
        return len(file.readlines()) - 1


def check_result(result, **expected):
    """Every key that a result file holds."""
    assert {"model", "dataset", "train_stage", "seed", "checkpoint", "epochs", "metrics"} <= result.keys()
    assert {"seconds", "rows_per_second", "peak_memory_mb", "versions"} <= result.keys()
    assert {"run", "recipe", "text_encoder", "settings"} <= result.keys()
    assert result.keys() >= expected.keys() and {key: result[key] for key in expected} == expected
    assert set(result["metrics"]) == {"valid", "test"} and set(result["seconds"]) == {"load", "train", "evaluate"}
    for metrics in result["metrics"].values():
        assert set(metrics) == METRICS and all(0 <= value <= 1 for value in metrics.values())
        assert metrics["recall@50"] == 1.0, "there are 30 items only"
        # of 40 users, so recall has few digits; ndcg has logarithms in it
        assert round(metrics["ndcg@50"], 6) != metrics["ndcg@50"], "unrounded"
    assert result["seconds"]["load"] > 0 and result["seconds"]["evaluate"] > 0 and result["peak_memory_mb"] > 1
    assert (result["seconds"]["train"] > 0) == (result["epochs"] > 0) == (result["rows_per_second"] is not None)


def learned(path):
    """The tensors of a checkpoint, without the whitening of its data set and what is chosen on valid."""
    state = read_checkpoint(path)["state_dict"]
    return {name: tensor for name, tensor in state.items() if not name.startswith(("whitening.", "unseen_bias"))}


def test_pretraining_saves_a_checkpoint_of_plain_data(pretrained):
    content = torch.load(pretrained, weights_only=True)
    assert (content["epoch"], content["train_stage"], content["model"]) == (2, "pretrain", "UniSRec")
    assert content["config"]["dataset"] == "Mix" and content["item_tokens"] is None
    names = [name for name in content["state_dict"] if not name.startswith(("history_", "whitening.", "unseen_"))]
    assert "item_embedding.weight" not in names and len(names) == 39
    assert content["config"]["recipe"] == "history" and "whitening.1.mean" in content["state_dict"]


def test_training_loads_neither_torchs_compiler_nor_a_language_model(data, tmp_path):
    """Each would take seconds of every start. Only the spectral ids of the transductive stage need scikit-learn."""
    command = ["-d", "Tiny", f"--data_path={data['Tiny']}", f"--checkpoint_dir={tmp_path}", "--epochs=1", *SMALL]
    command += ["--train_stage=inductive_ft"]
    code = f"import sys, finetune; finetune.main({command!r}); print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert "torch.optim.adam" in modules.split()
    assert not {"torch._dynamo", "sympy", "sklearn", "transformers"} & set(modules.split())


@pytest.mark.parametrize("stage", ["inductive_ft", "transductive_ft"])
def test_finetuning_on_top_of_pretraining(data, pretrained, tmp_path, stage):
    result, path = tuned(data, tmp_path, "-p", pretrained, f"--train_stage={stage}", "--epochs=2", "-f", "true")
    check_result(result, model="UniSRec", dataset="Tiny", train_stage=stage, seed=2020, checkpoint=path, epochs=2)
    assert result["rows_per_second"] == pytest.approx(2 * count_rows(data) / result["seconds"]["train"])
    old, new = learned(pretrained), learned(path)
    parts = {name.partition(".")[0] for name in set(new) - set(old)}
    assert parts == ({"item_embedding", "item_to_item"} if stage == "transductive_ft" else set())
    changed = {name for name, tensor in old.items() if not torch.equal(tensor, new[name])}
    frozen = {name for name in old if name.startswith(("trm_encoder.", "position_embedding."))}
    assert changed == set(old) - frozen, "the encoder stays as it was pre-trained, all else learns"


def test_without_a_fixed_encoder_everything_learns(data, pretrained, tmp_path):
    _, path = tuned(data, tmp_path, "-p", pretrained, "--epochs=1", "--train_stage=inductive_ft")
    old, new = learned(pretrained), learned(path)
    # the key's bias shifts all attention logits of a query alike, so its gradient is rounding noise
    same = {name for name, tensor in old.items() if torch.equal(tensor, new[name]) and "key.bias" not in name}
    assert same == set()


@pytest.mark.parametrize("stage", ["inductive_ft", "transductive_ft"])
def test_training_from_scratch(data, tmp_path, stage):
    result, path = tuned(data, tmp_path, f"--train_stage={stage}", "--epochs=12", "--learning_rate=0.01")
    check_result(result, train_stage=stage, checkpoint=path)
    assert 1 <= result["best_epoch"] <= result["epochs"] <= 12
    start, _ = tuned(data, tmp_path / "untrained", f"--train_stage={stage}", "--epochs=0")
    check_result(start, checkpoint=None, epochs=0)
    # the items lie on a ring and users walk along it: there is something to learn
    assert result["metrics"]["test"]["ndcg@50"] > start["metrics"]["test"]["ndcg@50"] + 0.02


def test_no_epochs_evaluate_a_pretrained_checkpoint_by_its_texts_alone(data, pretrained, tmp_path):
    result, path = tuned(data, tmp_path, "-p", pretrained, "--epochs", "0")
    check_result(result, train_stage="inductive_ft", checkpoint=pretrained, epochs=0, best_epoch=None)
    assert not os.path.exists(path) and not glob.glob(str(tmp_path / "*.pth"))


@pytest.mark.parametrize("stage", ["inductive_ft", "transductive_ft"])
def test_evaluating_a_finetuned_checkpoint_gives_the_numbers_of_its_training(data, pretrained, tmp_path, stage):
    options = f"--train_stage={stage}", "--seed=7"
    trained, path = tuned(data, tmp_path, "-p", pretrained, "--epochs=3", *options)
    with open(path.replace(".pth", ".json")) as file:
        before = file.read()
    evaluated, _ = tuned(data, tmp_path, "-p", path, "--epochs=0", *options)
    check_result(evaluated, train_stage=stage, checkpoint=path, epochs=0)
    assert evaluated["metrics"] == trained["metrics"], "of the best epoch"
    with open(path.replace(".pth", ".json")) as file:
        assert file.read() == before, "the evaluation did not replace the result of the training"


def test_a_finetuned_checkpoint_belongs_to_its_items(data, tmp_path, refused):
    """Where the data set was made again, its indices may stand for other items."""
    _, path = tuned(data, tmp_path / "saved", "--epochs=1")
    shutil.copytree(data["Tiny"], tmp_path / "again")
    index = tmp_path / "again" / "Tiny" / "Tiny.item2index"
    swapped = index.read_text().replace("Tiny1003\t3", "Tiny1003\tX").replace("Tiny1004\t4", "Tiny1004\t3")
    index.write_text(swapped.replace("Tiny1003\tX", "Tiny1003\t4"))
    command = ["-d", "Tiny", f"--data_path={tmp_path}/again", f"--checkpoint_dir={tmp_path}/saved", "-p", path, *SMALL]
    message = refused(finetune.main, *command, "--epochs=0")
    expected = f"{path}: row 4 of its id embeddings is item 'Tiny1003', but in the data set it is 'Tiny1004'"
    assert message.startswith(expected)


@pytest.mark.parametrize("options", [[], ["--predictions_per_row=1"], ["--MAX_ITEM_LIST_LENGTH=3"]])
def test_every_row_of_the_file_is_learnt_once_an_epoch(data, tmp_path, options):
    _, path = tuned(data, tmp_path, "--epochs=2", "--eval_step=2", "--train_batch_size=50", *options)
    assert read_checkpoint(path)["progress"]["predictions"] == 2 * count_rows(data)


def test_rows_and_whole_sequences_learn_the_same(data, tmp_path):
    """Without dropout and in one batch it is the same step, however many share a history; see data/batches.py."""
    still = ["--hidden_dropout_prob=0", "--attn_dropout_prob=0", "--adaptor_dropout_prob=0", "--learner=sgd"]
    options = [*still, "--train_stage=inductive_ft", "--epochs=1", "--train_batch_size=100000"]
    states = []
    for predictions_per_row in (50, 1):
        # the gate's noise is drawn for each item of the catalogue, in the same order
        _, path = tuned(
            data, tmp_path / str(predictions_per_row), *options, f"--predictions_per_row={predictions_per_row}"
        )
        states.append(read_checkpoint(path)["state_dict"])
    for name, tensor in states[0].items():
        torch.testing.assert_close(tensor, states[1][name], rtol=1e-4, atol=1e-6, msg=name)


def test_one_seed_gives_one_result(data, pretrained, tmp_path):
    results = [
        tuned(data, tmp_path / str(number), "-p", pretrained, "--epochs=2", f"--seed={seed}")[0]["metrics"]
        for number, seed in enumerate((5, 5, 6))
    ]
    assert results[0] == results[1] != results[2]


def test_one_seed_gives_one_pretraining(data, pretrained, tmp_path):
    common = ["-d", "Mix", f"--data_path={data['Mix']}", "--epochs=2", *SMALL]
    pretrain.main([*common, f"--checkpoint_dir={tmp_path}"])
    old, new = (read_checkpoint(path)["state_dict"] for path in (pretrained, str(tmp_path / "UniSRec-Mix-2.pth")))
    assert all(torch.equal(tensor, new[name]) for name, tensor in old.items())
    pretrain.main([*common, f"--checkpoint_dir={tmp_path}/other", "--seed=1"])
    new = read_checkpoint(str(tmp_path / "other" / "UniSRec-Mix-2.pth"))["state_dict"]
    assert not any(torch.equal(old[name], new[name]) for name in ("position_embedding.weight", "moe_adaptor.w_gate"))


def test_settings_of_pretraining_reach_it(data, tmp_path):
    common = ["-d", "Mix", f"--data_path={data['Mix']}", "--epochs=1", *SMALL]
    contrastive, found = ["--pretrain_loss=contrastive"], []
    for options in ([], ["--predictions_per_row=1"], contrastive,
                    [*contrastive, "--lambda=0.5"], [*contrastive, "--item_drop_ratio=0.9"]):  # fmt: skip
        folder = tmp_path / str(len(found))
        pretrain.main([*common, f"--checkpoint_dir={folder}", *options])
        found.append(read_checkpoint(str(folder / "UniSRec-Mix-1.pth"))["state_dict"]["position_embedding.weight"])
    for number, weights in enumerate(found):
        assert not any(torch.equal(weights, other) for other in found[:number]), number


def test_a_pretraining_goes_on_with_its_loss_only(data, tmp_path):
    common = ["-d", "Mix", f"--data_path={data['Mix']}", f"--checkpoint_dir={tmp_path}", *SMALL]
    pretrain.main([*common, "--pretrain_loss=contrastive", "--epochs=1"])
    path = str(tmp_path / "UniSRec-Mix-1.pth")
    message = f"^{path}: was trained with contrastive, not catalogue; set --pretrain_loss=contrastive$"
    with pytest.raises(UserError, match=message):
        pretrain.main([*common, "--epochs=2", f"--resume={path}"])
    pretrain.main([*common, "--epochs=2", f"--resume={path}", "--pretrain_loss=contrastive", "--lambda=0.5"])
    assert read_checkpoint(str(tmp_path / "UniSRec-Mix-2.pth"))["epoch"] == 2


def test_pretraining_over_a_catalogue_needs_no_shortened_texts(data, tmp_path):
    folder = shutil.copytree(data["Mix"], tmp_path / "data")
    for path in glob.glob(f"{folder}/Mix/*.feat2*"):
        os.remove(path)
    common = ["-d", "Mix", f"--data_path={folder}", f"--checkpoint_dir={tmp_path}", "--epochs=1", *SMALL]
    pretrain.main(common)
    with pytest.raises(UserError, match="feat2"):
        pretrain.main([*common, "--pretrain_loss=contrastive"])


@pytest.mark.parametrize("option", ["lambda", "item_drop_ratio", "item_drop_coefficient", "sampled_negatives"])
def test_settings_of_the_other_loss_are_refused(data, option):
    own, other = ("contrastive", "catalogue") if option != "sampled_negatives" else ("catalogue", "contrastive")
    message = f"^option --{option}: only --pretrain_loss={own} has this setting; leave one of them out$"
    command = ["-d", "Mix", f"--data_path={data['Mix']}", f"--pretrain_loss={other}", *SMALL]
    with pytest.raises(UserError, match=message):
        pretrain.main([*command, f"--{option}=1"])


@pytest.mark.parametrize("model", ["SASRec", "GRU4Rec", "BERT4Rec"])
def test_baselines_that_learn(data, tmp_path, model):
    result = baseline(data, tmp_path, "-m", model, "--epochs=1")
    path = str(tmp_path / f"{model}-Tiny-2020-{result['run']}.pth")
    check_result(result, model=model, train_stage=None, checkpoint=path, epochs=1, best_epoch=1)
    stored = read_checkpoint(path)
    assert stored["progress"]["predictions"] == count_rows(data)
    assert len(stored["item_tokens"]) == 31 and stored["config"]["model"] == model


UNTRAINED = ["Popularity", "LastText", "MeanText", "WhitenedText", "ItemTransitions", "EASE", "TextAndTransitions"]


@pytest.mark.parametrize("model", UNTRAINED)
def test_baselines_that_need_no_training(data, tmp_path, model):
    result = baseline(data, tmp_path, "-m", model, "--epochs=1")
    check_result(result, model=model, train_stage=None, checkpoint=None, epochs=0)
    assert os.listdir(tmp_path) == [f"{model}-Tiny-2020-{result['run']}.json"]


@pytest.mark.parametrize("options", [["-m", "FPMC"], ["-m", "SASRec", "--loss_type=BPR"]])
def test_baselines_that_compare_pairs(data, tmp_path, options):
    check_result(baseline(data, tmp_path, *options, "--epochs=1"), model=options[1], epochs=1)


def test_other_metrics_of_recbole(data, tmp_path):
    names = "[NDCG,GAUC,MRR,Hit,Precision,MAP,ItemCoverage,GiniIndex,AveragePopularity,TailPercentage,ShannonEntropy]"
    result = baseline(data, tmp_path, "-m", "Popularity", f"--metrics={names}", "--topk=[5,10]")
    measured = result["metrics"]["test"]
    assert len(measured) == 1 + 10 * 2 and measured["itemcoverage@10"] == pytest.approx(10 / 30, abs=0.02)
    assert 0 < measured["gauc"] < 1 and measured["averagepopularity@5"] > count_rows(data) / 30


def test_the_result_goes_where_the_user_wants_it(data, tmp_path):
    result_file = tmp_path / "results" / "mine.json"
    command = ["-d", "Tiny", f"--data_path={data['Tiny']}", f"--checkpoint_dir={tmp_path}/saved", *SMALL]
    finetune.main([*command, "--epochs=1", f"--result_file={result_file}"])
    check_result(json.loads(result_file.read_text()), epochs=1)
    assert not glob.glob(str(tmp_path / "saved" / "*.json"))


def test_paths_are_seen_from_where_the_user_stands(data, pretrained, tmp_path, monkeypatch):
    shutil.copytree(data["Tiny"], tmp_path / "my data")
    shutil.copy(pretrained, tmp_path / "start.pth")
    (tmp_path / "my.yaml").write_text("epochs: 1\ndata_path: my data\ndataset: Tiny\n")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    finetune.main(["--config_files=my.yaml", "-p", "start.pth", "--checkpoint_dir=elsewhere", *SMALL])
    (result,) = glob.glob("elsewhere/*.json")
    with open(result) as file:
        check_result(json.load(file), dataset="Tiny", checkpoint=result.replace(".json", ".pth"), epochs=1)


def test_data_may_lie_in_a_folder_that_nobody_may_write_to(data, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shutil.copytree(data["Tiny"], tmp_path / "data", ignore=shutil.ignore_patterns(".unisrec-cache"))
    access = os.access
    locked = str(tmp_path / "data")
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).startswith(locked) and access(path, mode))
    result, _ = tuned({"Tiny": locked}, tmp_path / "saved", "--epochs=1")
    check_result(result, epochs=1)
    assert not glob.glob(f"{locked}/**/.unisrec-cache", recursive=True) and os.listdir(tmp_path / "cache" / "unisrec")
