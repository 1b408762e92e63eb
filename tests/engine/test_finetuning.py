"""Which files fine-tunings, evaluations and baselines leave, and what their results say of them."""

import os

import pytest
import torch

import finetune
import pretrain
import run_baseline
from common.files import read_json
from engine.checkpoint import read_checkpoint
from engine.evaluate import Evaluation
from layers.history import MEAN_STEP
from tests.conftest import SMALL, write_mix, write_tiny


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return {"Mix": write_mix(folder / "pretrain"), "Tiny": write_tiny(folder / "downstream")}


@pytest.fixture(scope="module")
def two_checkpoints(data, tmp_path_factory):
    """Pre-trained with two seeds; both are called UniSRec-Mix-1.pth."""
    paths = []
    for seed in (1, 2):
        folder = tmp_path_factory.mktemp(f"seed{seed}")
        command = ["-d", "Mix", f"--data_path={data['Mix']}", f"--checkpoint_dir={folder}", "--epochs=1", *SMALL]
        pretrain.main([*command, f"--seed={seed}"])
        paths.append(str(folder / "UniSRec-Mix-1.pth"))
    return paths


@pytest.fixture
def tuned(data, tmp_path):
    """Run finetune.py; returns the names of all results and checkpoints that are there afterwards."""

    def run(*options):
        finetune.main(["-d", "Tiny", f"--data_path={data['Tiny']}", f"--checkpoint_dir={tmp_path}", *SMALL, *options])
        return sorted(name for name in os.listdir(tmp_path) if os.path.isfile(tmp_path / name))

    return run


def test_two_learning_rates_leave_two_results_and_two_checkpoints(tuned, tmp_path):
    rates = (0.001, 0.01)
    for rate in rates:
        names = tuned("--epochs=1", f"--learning_rate={rate}")
    results = [read_json(str(tmp_path / name)) for name in names if name.endswith(".json")]
    assert sorted(result["settings"]["learning_rate"] for result in results) == list(rates)
    for result in results:
        assert result["checkpoint"] == str(tmp_path / f"UniSRec-Tiny-transductive_ft-2020-{result['run']}.pth")
        stored = read_checkpoint(result["checkpoint"])
        assert (stored["run"], stored["run_start"]) == (result["run"], None)
        assert stored["config"]["learning_rate"] == result["settings"]["learning_rate"]
    assert len(names) == 4 and len({result["run"] for result in results}) == 2


def test_the_same_command_replaces_its_own_files_and_no_others(tuned, tmp_path):
    once = tuned("--epochs=1")
    times = [os.stat(tmp_path / name).st_mtime_ns for name in once]
    metrics = read_json(str(tmp_path / once[0]))["metrics"]
    twice = tuned("--epochs=1")
    assert once == twice and len(once) == 2
    assert all(os.stat(tmp_path / name).st_mtime_ns > time for name, time in zip(once, times, strict=True))
    assert read_json(str(tmp_path / once[0]))["metrics"] == metrics


def test_evaluations_of_two_checkpoints_leave_two_results(tuned, two_checkpoints, tmp_path):
    for path in two_checkpoints:
        names = tuned("-p", path, "--epochs=0")
    results = [read_json(str(tmp_path / name)) for name in names]
    assert sorted(result["checkpoint"] for result in results) == sorted(two_checkpoints)
    assert results[0]["metrics"] != results[1]["metrics"]
    starts = "UniSRec-Tiny-inductive_ft-2020-pretrained-evaluated-"
    assert names == sorted(f"{starts}{result['run']}.json" for result in results)


def test_a_training_from_a_checkpoint_stores_what_it_started_from(tuned, two_checkpoints, tmp_path):
    for path in two_checkpoints:
        tuned("-p", path, "--epochs=1", "--train_stage=inductive_ft")
    names = [name for name in os.listdir(tmp_path) if name.endswith(".pth")]
    starts = {read_checkpoint(str(tmp_path / name))["run_start"] for name in names}
    assert len(names) == len(starts) == 2 and None not in starts


@pytest.mark.parametrize(("model", "reads_texts"), [("SASRec", False), ("LastText", True)])
def test_baselines_have_an_id_too(data, tmp_path, model, reads_texts):
    command = ["-m", model, "-d", "Tiny", f"--data_path={data['Tiny']}", f"--checkpoint_dir={tmp_path}", "--epochs=1"]
    for seed in (1, 2):
        run_baseline.main([*command, f"--seed={seed}", "--show_progress=false"])
    names = sorted(name for name in os.listdir(tmp_path) if name.endswith(".json"))
    results = [read_json(str(tmp_path / name)) for name in names]
    assert names == [f"{model}-Tiny-{seed}-{result['run']}.json" for seed, result in zip((1, 2), results, strict=True)]
    assert (results[0]["text_encoder"] is not None) == reads_texts and results[0]["recipe"] is None


def test_a_pretraining_that_would_replace_another_is_refused_before_it_trains(data, two_checkpoints, refused, capsys):
    """The files of the same run may be replaced."""
    path = two_checkpoints[0]
    with open(path, "rb") as file:
        before = file.read()
    folder = os.path.dirname(path)
    command = ["-d", "Mix", f"--data_path={data['Mix']}", f"--checkpoint_dir={folder}", "--epochs=1", *SMALL]
    message = refused(pretrain.main, *command, "--seed=5")
    run = read_checkpoint(path)["run"]
    assert message == (
        f"{path}: belongs to another run (run {run}: seed 1, now 5) and would be replaced; "
        "give another --checkpoint_dir, or move or delete the file"
    )
    with open(path, "rb") as file:
        assert file.read() == before
    pretrain.main([*command, "--seed=1"])
    assert read_checkpoint(path)["run"] == run


def test_a_checkpoint_without_id_is_not_replaced(data, refused, tmp_path):
    (tmp_path / "UniSRec-Mix-1.pth").write_bytes(b"as published")
    command = ["-d", "Mix", f"--data_path={data['Mix']}", f"--checkpoint_dir={tmp_path}", "--epochs=1", *SMALL]
    message = refused(pretrain.main, *command)
    assert message.startswith(f"{tmp_path}/UniSRec-Mix-1.pth: belongs to another run (it holds no run id) and would be")
    assert os.listdir(tmp_path) == ["UniSRec-Mix-1.pth"]


def test_the_start_is_the_result_if_training_only_harms(tuned, tmp_path):
    """Also of a training from scratch, which starts with what a look at the data says."""
    for options in ([], ["--train_stage=inductive_ft"]):
        names = tuned("--epochs=2", "--learning_rate=0.5", "--item_to_item=0", *options)
        (name,) = (name for name in names if name.endswith(".json") and ("inductive" in name) == bool(options))
        result = read_json(str(tmp_path / name))
        assert (result["best_epoch"], result["epochs"]) == (0, 2)
        state = read_checkpoint(result["checkpoint"])["state_dict"]
        assert state["history_bias.weight"].any(), "chosen from the data"


def test_the_history_mean_of_a_pretraining_belongs_to_its_shops(tuned, two_checkpoints, tmp_path):
    content = torch.load(two_checkpoints[0], weights_only=True)
    content["state_dict"]["history_mean.weight"].fill_(123.0)
    content["state_dict"]["history_bias.weight"].fill_(-0.5)
    torch.save(content, tmp_path / "changed.pth")
    tuned("-p", str(tmp_path / "changed.pth"), "--epochs=1", "--learning_rate=1e-9", "--train_stage=inductive_ft")
    (path,) = tmp_path.glob("*-pretrained-*.pth")
    state = read_checkpoint(str(path))["state_dict"]
    assert state["history_mean.weight"].item() == pytest.approx(1 / MEAN_STEP, rel=1e-3)
    torch.testing.assert_close(state["history_bias.weight"], torch.full((8,), -0.5), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("new", "loaded"), [(0.3, 0.2), (0.2, 0.2), (0.2, 0.3)])
def test_a_warning_where_pretraining_harms(tuned, two_checkpoints, capsys, monkeypatch, new, loaded):
    values = [new, loaded]
    monkeypatch.setattr(Evaluation, "__call__", lambda *_: {"ndcg@10": values.pop(0)})
    tuned("-p", two_checkpoints[0], "--epochs=0")
    told = [line for line in capsys.readouterr().err.splitlines() if "does not help here" in line]
    assert len(told) == (new > loaded) and values == []
    assert all(f"{two_checkpoints[0]} has ndcg@10 0.2000 on valid, new weights have 0.3000" in line for line in told)
