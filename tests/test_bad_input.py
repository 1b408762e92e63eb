"""What a user can get wrong: each command ends with exit code 2, one line that helps, and nothing half-written."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

import ddp_pretrain
import finetune
import pretrain
import run_baseline
from common.errors import UserError
from engine.settings import ROOT
from engine.trainer import Trainer
from tests.conftest import SMALL, WIDTH, write_mix, write_tiny

pytestmark = pytest.mark.slow

HEADER = "user_id:token\titem_id_list:token_seq\titem_id:token\n"
GARBAGE = np.random.default_rng(0).bytes(20000)


@pytest.fixture
def saved(tmp_path):
    """Where the commands save; after each test of this file it must be empty."""
    folder = tmp_path / "saved"
    yield folder
    left = [os.path.join(place, name) for place, _, names in os.walk(folder) for name in names]
    assert left == [], "written although the command failed"


@pytest.fixture
def tune(tiny, saved, refused):
    """Run finetune.py on Tiny, where it must fail; returns the message."""
    common = ["-d", "Tiny", f"--data_path={tiny}", f"--checkpoint_dir={saved}", *SMALL]
    return lambda *options: refused(finetune.main, *common, *options)


@pytest.fixture
def pre(mixture, saved, refused):
    """Run pretrain.py on Mix, where it must fail; returns the message."""
    common = ["-d", "Mix", f"--data_path={mixture}", f"--checkpoint_dir={saved}", *SMALL]
    return lambda *options: refused(pretrain.main, *common, *options)


@pytest.fixture
def baseline(tiny, saved, refused):
    """Run run_baseline.py on Tiny, where it must fail; returns the message."""
    common = ["-d", "Tiny", f"--data_path={tiny}", f"--checkpoint_dir={saved}", "--show_progress=false"]
    return lambda *options: refused(run_baseline.main, *common, *options)


def place(data_path, name):
    return os.path.join(data_path, name.split(".")[0] if name.startswith(("Tiny", "Mix")) else "Mix", name)


def write(path, content):
    with open(path, "wb") as file:
        file.write(content if isinstance(content, bytes) else content.encode())


# -- the data set ----------------------------------------------------------------------------------------------------


def test_a_missing_data_set_names_those_that_are_there(tiny, saved, refused):
    os.makedirs(os.path.join(tiny, "Another"))
    common = [f"--data_path={tiny}", f"--checkpoint_dir={saved}"]
    for main in (finetune.main, run_baseline.main):
        message = refused(main, "-d", "Scientific", *common)
        assert message.startswith(f"{tiny}/Scientific: no such data set (found Another, Tiny)")
        assert "dataset/README.md" in message and "--data_path" in message
    for main in (pretrain.main, ddp_pretrain.main):
        assert f"{tiny}/FHCKM: no such data set (found Another, Tiny)" in refused(main, *common)
    message = refused(finetune.main, "-d", "Tiny", f"--data_path={tiny}/nowhere", f"--checkpoint_dir={saved}")
    assert "found no data set there" in message


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_a_missing_inter_file(tiny, tune, baseline, split):
    os.unlink(place(tiny, f"Tiny.{split}.inter"))
    for message in (tune(), baseline("-m", "GRU4Rec")):
        assert message.startswith(place(tiny, f"Tiny.{split}.inter: no such file"))


@pytest.mark.parametrize("split", ["train", "valid", "test"])
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "lacks user_id:token, item_id_list:token_seq, item_id:token; expected user_id:token item_id_list"),
        (HEADER, "holds no rows after its header; expected one row"),
        (HEADER.strip(), "holds no rows after its header; expected one row"),
        ("user_id:token\titem_id:token\n1\t2\n", "lacks item_id_list:token_seq; expected user_id:token item_id_list"),
        ("user\titems\titem\n1\t2 3\t4\n", "header 'user\\titems\\titem' lacks user_id:token, item_id_list:token_seq"),
        (GARBAGE, "lacks user_id:token"),
        (GARBAGE.replace(b"\n", b""), "lacks user_id:token"),
        (HEADER.encode() + GARBAGE, "tab-separated columns, expected 3 as in the header; correct the line"),
        (HEADER + "1\t2 3\n", "line 2: found 2 tab-separated columns, expected 3 as in the header"),
        (HEADER + "1\t2\t3\n1\t2\t3\t4\n", "line 3: found 4 tab-separated columns, expected 3 as in the header"),
    ],
)
def test_an_inter_file_that_is_none(tiny, tune, split, content, expected):
    write(place(tiny, f"Tiny.{split}.inter"), content)
    message = tune()
    assert message.startswith(place(tiny, f"Tiny.{split}.inter")) and expected in message
    assert len(message) < 600, "a file of garbage may hold a line of any length"


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("1\t2 B00XYZ\t4", "item_id_list holds 'B00XYZ'; expected a whole number from 0 on"),
        ("1\t2 3.0\t4", "item_id_list holds '3.0'; expected a whole number from 0 on"),
        ("1\t2 -1\t4", "item_id_list holds '-1'; expected a whole number"),
        ("1\t2 0-17\t4", "item_id_list holds '0-17'; expected a whole number"),
        ("1\t2 3\tx", "item_id holds 'x'; expected a whole number"),
        ("AXY\t2 3\t4", "user_id holds 'AXY'; expected a whole number"),
        ("1\t\t4", "item_id_list holds ''; expected a whole number"),
        ("1\t2  3\t4", "item_id_list holds ''; expected a whole number"),
        (f"1\t2 {'z' * 5000}\t4", f"item_id_list holds '{'z' * 40}'...; expected a whole number"),
        ("1\t2 99999999999\t4", "item_id_list holds a number above 4294967295 (99999999999)"),
        ("1\t2 30\t4", "item 30 has no feature (Tiny.feat1CLS holds 30 items); encode"),
        ("1\t2 3\t31", "item 31 has no feature (Tiny.feat1CLS holds 30 items); encode"),
    ],
)
def test_a_wrong_id_is_named_by_file_and_line(tiny, tune, row, expected):
    path = place(tiny, "Tiny.valid.inter")
    write(path, f"{HEADER}1\t2 3\t4\n{row}\n5\t6\t7\n")
    message = tune("--epochs=1")
    assert message.startswith(f"{path}, line 3: {expected}") and len(message) < 400


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("0-1\t0-2 0_17\t0-3", "item_id_list holds '0_17'; expected domain-index, such as 0-17"),
        ("0-1\t5\t0-3", "item_id_list holds '5'; expected domain-index, such as 0-17"),
        ("0-1\t0-\t0-3", "item_id_list holds '0-'; expected domain-index"),
        ("0-1\t0-2\t-1", "item_id holds '-1'; expected domain-index"),
        ("0-1\t0--1\t0-3", "item_id_list holds '0--1'; expected domain-index"),
        ("0-1\t0-1-2 0\t0-3", "item_id_list holds '0-1-2'; expected domain-index"),
        ("0-1\t0-1-1 0\t0-3", "item_id_list holds '0-1-1'; expected domain-index"),  # no 0-1 1-0
        ("1\t0-2\t0-3", "user_id holds '1'; expected domain-index"),
        ("0-1\t0-2\t1-25", "item 1-25 has no feature (B.feat1CLS holds 25 items)"),
        ("0-1\t0-20\t1-2", "item 0-20 has no feature (A.feat1CLS holds 20 items)"),
        ("0-1\t2-0\t1-2", "item 2-0 has no feature (Mix.pt_datasets names 2 domains)"),
    ],
)
def test_a_wrong_id_of_a_mixture_is_named_by_file_and_line(mixture, pre, row, expected):
    path = place(mixture, "Mix.train.inter")
    write(path, f"{HEADER}0-0\t0-1 0-2\t0-3\n{row}\n0-5\t0-6\t0-7\n")
    assert pre("--epochs=1").startswith(f"{path}, line 3: {expected}")


# -- features --------------------------------------------------------------------------------------------------------


def test_missing_features(tiny, mixture, tune, pre):
    os.unlink(place(tiny, "Tiny.feat1CLS"))
    message = tune()
    assert (
        message.startswith(place(tiny, "Tiny.feat1CLS: no such feature file")) and "encode_text.py -d Tiny" in message
    )
    os.unlink(place(mixture, "B.feat2CLS"))
    assert pre("--pretrain_loss=contrastive").startswith(place(mixture, "B.feat2CLS: no such feature file"))
    assert pre("--plm_suffix=feat1Mean").startswith(place(mixture, "A.feat1Mean: no such feature file"))


@pytest.mark.parametrize("described", [True, False])
@pytest.mark.parametrize("size", [0, 4, 30 * WIDTH * 4 - 4, 30 * WIDTH * 4 + 1])
def test_a_feature_file_of_a_wrong_size(tiny, tune, described, size):
    path = place(tiny, "Tiny.feat1CLS")
    os.truncate(path, size)
    if not described:
        os.unlink(f"{path}.json")
    message = tune()
    assert message.startswith(f"{path}: {size} bytes do not fit ") and "96 bytes per item)" in message
    assert f"{path}.json" in message if described else ("plm_size 24" in message and "--plm_size" in message)


@pytest.mark.parametrize("described", [True, False])
def test_features_of_fewer_items_than_the_index_names(tiny, tune, described):
    path = place(tiny, "Tiny.feat1CLS")
    os.truncate(path, 29 * WIDTH * 4)
    write(f"{path}.json", json.dumps({"width": WIDTH, "items": 29}))
    if not described:
        os.unlink(f"{path}.json")
    assert tune().startswith(f"{path}: holds 29 items of width 24, but {place(tiny, 'Tiny.item2index')} names 30")


@pytest.mark.parametrize("plm_size", [12, 48, 8])
def test_a_plm_size_that_divides_the_file_but_contradicts_the_index(tiny, saved, refused, plm_size):
    """Without the check, such a size would quietly load wrong rows."""
    os.unlink(place(tiny, "Tiny.feat1CLS.json"))
    options = [option for option in SMALL if "plm_size" not in option]
    common = ["-d", "Tiny", f"--data_path={tiny}", f"--checkpoint_dir={saved}", *options]
    message = refused(finetune.main, *common, f"--plm_size={plm_size}")
    assert f"holds {30 * 24 // plm_size} items of width {plm_size}" in message and "names 30" in message
    assert "--plm_size" in message


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'{"width": ', "is not a JSON file"),
        (GARBAGE[:100], "is not a JSON file"),
        (b"[24, 30]", "holds list, expected width and items"),
        (b'{"width": 24}', "items None, expected a whole number"),
        (b'{"width": 0, "items": 30}', "width 0, expected a whole number"),
        (b'{"width": "24", "items": 30}', "width '24', expected a whole number"),
        (b'{"width": 24, "items": 30, "dtype": "object"}', "dtype 'object', expected float32 or float16"),
    ],
)
def test_a_broken_description_of_features(tiny, tune, content, expected):
    path = place(tiny, "Tiny.feat1CLS.json")
    write(path, content)
    assert tune().startswith(f"{path}: {expected}")


def test_domains_encoded_by_different_encoders(mixture, pre):
    write(place(mixture, "B.feat1CLS.json"), json.dumps({"width": 12, "items": 50}))
    message = pre()
    assert message.startswith(place(mixture, "B.feat1CLS: vectors of 12 float32 numbers, expected 24 float32 as in "))


@pytest.mark.parametrize("content", [b"", b"A\nB", b"A,,B", b"A,A", GARBAGE[:50]], ids=range(5))
def test_a_broken_list_of_domains(mixture, pre, content):
    write(place(mixture, "Mix.pt_datasets"), content)
    message = pre()
    assert message.startswith(place(mixture, "Mix.pt_datasets: found "))
    assert message.endswith("expected the names of the domains, separated by commas; write the mixture again")


# -- options ---------------------------------------------------------------------------------------------------------


# How options are parsed and which values they may have: tests/engine/test_config.py. Here: what the command adds.
@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--train_stage=transductve_ft", "option --train_stage: found 'transductve_ft', expected inductive_ft or "),
        ("--train_stage=pretrain", "option --train_stage: found 'pretrain', expected inductive_ft or transductive_ft"),
        ("--loss_type=BPR", "option --loss_type: found 'BPR', expected CE"),
        ("--learner=adm", "option --learner: found 'adm', expected one of adam, adamw, sgd, adagrad, rmsprop"),
        ("--clip_grad_norm={norm: 1}", "option --clip_grad_norm: found {'norm': 1}, expected arguments of torch's"),
        ("--metrics=[NDCG, ItemCoverage]", "option --topk: found 50, expected at most 30 for itemcoverage"),
        ("--dataset=~", "option --dataset is given twice"),
    ],
)
def test_a_wrong_option(tune, option, message):
    assert tune(option).startswith(message)


def test_a_wrong_option_of_pretraining(pre):
    assert pre("--train_stage=inductive_ft").startswith("option --train_stage: found 'inductive_ft', expected pretrain")
    assert pre("--epochs=0").startswith("option --epochs: found 0, expected 1 or more")
    assert pre("--lambda=-1").startswith("option --lambda: found -1, expected 0 or more")
    assert pre("--item_drop_ratio=1.5").startswith("option --item_drop_ratio: found 1.5, expected a number from 0 to 1")
    assert pre("--lambada=1") == "unknown option --lambada; did you mean --lambda?"
    for name in ("--pretrained", "-p"):
        message = pre(name, "12355")
        assert message.startswith("unknown option --pretrained (-p): pre-training starts from scratch; --resume FILE")
        assert "the port of ddp_pretrain.py is --port" in message


def test_sizes_that_do_not_fit_each_other(tiny, saved, refused):
    options = [option for option in SMALL if "n_heads" not in option]
    common = ["-d", "Tiny", f"--data_path={tiny}", f"--checkpoint_dir={saved}", *options]
    message = refused(finetune.main, *common, "--n_heads=3")
    assert message.startswith("UniSRec: ") and "hidden size (16)" in message and "heads (3)" in message


def test_the_message_about_an_unknown_model_lists_only_what_runs(baseline):
    listed = re.search(r"\(models that run: (.*); FILE.py:CLASS", baseline("-m", "Nobody"))[1].split(", ")
    assert {"SASRec", "GRU4Rec", "Popularity", "LastText"} <= set(listed)
    assert not {"GRU4RecF", "KSR", "BPR", "UniSRec"} & set(listed)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("SASRek", "unknown model 'SASRek'; did you mean SASRec? (models that run: BERT4Rec,"),
        ("GRU4RecF", "model GRU4RecF: needs item attributes, which these data sets do not have"),
        ("KSR", "model KSR: needs a knowledge graph"),
        ("BPR", "model BPR: is not a sequential model; choose one that is, such as SASRec"),
        ("[a]", "option --model: found ['a'], expected a name"),
    ],
)
def test_models_that_do_not_run(baseline, name, expected):
    assert baseline("-m", name).startswith(expected)


def test_results_that_cannot_be_written_show_before_the_training(tune, tmp_path):
    (tmp_path / "file").touch()
    assert tune(f"--result_file={tmp_path}").startswith(f"{tmp_path}: cannot be written: it is a folder")
    assert "cannot be written: a file stands where" in tune(f"--result_file={tmp_path}/file/result.json")


@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_a_run_whose_files_another_run_is_writing(tune, pre, saved, monkeypatch, command):
    """The same command twice at the same time. The second one leaves the files of the first one alone."""
    messages, fit = [], Trainer.fit

    def fit_twice(self, *arguments, **options):
        monkeypatch.setattr(Trainer, "fit", fit)
        messages.append((pre if command == "pretrain" else tune)("--epochs=1"))
        raise UserError("the first run ends")

    monkeypatch.setattr(Trainer, "fit", fit_twice)
    assert (pre if command == "pretrain" else tune)("--epochs=1") == "the first run ends"
    name = r"UniSRec-Mix-{epoch}" if command == "pretrain" else r"UniSRec-Tiny-transductive_ft-2020-\w{10}"
    assert re.match(rf"{saved}/{name}.pth: another run is writing this file \(process \d+\); wait", messages[0])


# -- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A pre-trained checkpoint's file and its content."""
    folder = tmp_path_factory.mktemp("published")
    common = ["-d", "Mix", f"--data_path={write_mix(folder / 'data')}", f"--checkpoint_dir={folder}", *SMALL]
    pretrain.main([*common, "--epochs=1"])
    path = str(folder / "UniSRec-Mix-1.pth")
    return path, torch.load(path, weights_only=True)


@pytest.fixture(params=["finetune -p", "pretrain --resume"])
def start_from(request, tune, pre):
    """Both commands that read a checkpoint."""
    if request.param == "finetune -p":
        return lambda path, *options: tune("-p", path, *options)
    return lambda path, *options: pre("--epochs=4", f"--resume={path}", *options)


def test_a_missing_checkpoint_names_those_that_are_there(start_from, published, tmp_path):
    path, _ = published
    folder = os.path.dirname(path)
    message = start_from(f"{folder}/UniSRec-Mix-300.pth")
    assert message.startswith(
        f"{folder}/UniSRec-Mix-300.pth: no such checkpoint (found in {folder}: UniSRec-Mix-1.pth)"
    )


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 0.95])
def test_a_truncated_checkpoint(start_from, published, tmp_path, share):
    path = tmp_path / "half.pth"
    with open(published[0], "rb") as file:
        content = file.read()
    path.write_bytes(content[: int(share * len(content))])
    message = start_from(path)
    assert message.startswith(f"{path}: cannot be read as a checkpoint ({int(share * len(content))} bytes; ")
    assert "truncated" in message


@pytest.mark.parametrize("content", ["text", "garbage", "list", "no tensors", "a data set"])
def test_a_file_that_is_no_checkpoint(start_from, tiny, tmp_path, content):
    path = tmp_path / "other.pth"
    if content in ("list", "no tensors"):
        torch.save([1, 2] if content == "list" else {"state_dict": {"a": "b"}}, path)
    else:
        write(path, {"text": b"epoch 1 loss 9.0\n" * 9, "garbage": GARBAGE}.get(content) or HEADER)
    expected = "holds no state_dict with tensors" if content in ("list", "no tensors") else "cannot be read as a"
    assert start_from(path).startswith(f"{path}: {expected}")


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("--hidden_size=8", "found 8, expected 16"),
        ("--n_layers=1", "found 1, expected 2"),
        ("--n_heads=4", "found 4, expected 2"),
        ("--n_exps=4", "found 4, expected 3"),
        ("--inner_size=20", "found 20, expected 12"),
        ("--hidden_act=relu", "found 'relu', expected 'gelu'"),
        ("--layer_norm_eps=1e-6", "found 1e-06, expected 1e-12"),
        ("--MAX_ITEM_LIST_LENGTH=30", "found 30, expected 50"),
    ],
)
@pytest.mark.parametrize("command", ["finetune -p", "pretrain --resume"])
def test_an_option_that_contradicts_the_checkpoint(tiny, mixture, saved, refused, published, command, option, expected):
    name, path = option.split("=")[0], published[0]
    main, *words = {
        "finetune -p": (finetune.main, "-d", "Tiny", f"--data_path={tiny}", "-p", path),
        "pretrain --resume": (pretrain.main, "-d", "Mix", f"--data_path={mixture}", "--resume", path, "--epochs=4"),
    }[command]
    options = [other for other in SMALL if other.split("=")[0] != name]
    assert refused(main, *words, f"--checkpoint_dir={saved}", *options, option) == (
        f"option {name}: {expected}, with which {path} was trained; "
        "leave it out, its value is taken from the checkpoint"
    )


def test_a_yaml_file_that_contradicts_the_checkpoint(tune, published, tmp_path):
    options = tmp_path / "my.yaml"
    options.write_text("hidden_act: tanh\n")
    message = tune("-p", published[0], f"--config_files={options}")
    assert message.startswith(f"{options}: hidden_act: found 'tanh', expected 'gelu', with which {published[0]} was")


def test_a_checkpoint_of_another_encoder(tiny, tune, published):
    path = place(tiny, "Tiny.feat1CLS")
    np.zeros((30, 10), np.float32).tofile(path)
    write(f"{path}.json", json.dumps({"width": 10, "items": 30}))
    assert tune("-p", published[0]).startswith(
        f"{published[0]}: was trained on text features of encoder test, pooling CLS, width {WIDTH}; "
        f"found pooling CLS, width 10 in {path}; encode the texts in the same way"
    )


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"encoder": "minilm"}, "encoder minilm, pooling CLS, width 24"),
        ({"pooling": "Mean"}, "encoder test, pooling Mean, width 24"),
    ],
)
def test_features_of_another_kind_than_the_checkpoint_was_trained_on(
    tiny, tune, pre, mixture, published, change, found
):
    """They have the same width, so without the check only the metrics would differ."""
    for folder, names in ((tiny, ["Tiny"]), (mixture, ["A", "B"])):
        for name in names:
            path = place(folder, f"{name}.feat1CLS.json")
            with open(path) as file:
                description = json.load(file)
            write(path, json.dumps(description | change))
    expected = f"{published[0]}: was trained on text features of encoder test, pooling CLS, width 24; found {found} in "
    assert tune("-p", published[0], "--epochs=0").startswith(f"{expected}{place(tiny, 'Tiny.feat1CLS')}; encode the")
    message = pre(f"--resume={published[0]}", "--epochs=4")
    assert message.startswith(f"{expected}{place(mixture, 'A.feat1CLS')}; encode the texts in the same way")


def test_mean_features_without_a_description_are_not_taken_for_cls_features(tiny, tune, published):
    for suffix in ("", ".json"):
        os.rename(place(tiny, f"Tiny.feat1CLS{suffix}"), place(tiny, f"Tiny.feat1Mean{suffix}"))
    os.unlink(place(tiny, "Tiny.feat1Mean.json"))
    message = tune("-p", published[0])
    assert "of encoder test, pooling CLS, width 24; found pooling Mean, width 24 in " in message


def test_a_checkpoint_with_missing_or_additional_tensors(tune, published, tmp_path):
    path, content = published
    state = dict(content["state_dict"])
    state["surplus.weight"] = state.pop("LayerNorm.bias")
    torch.save({**content, "state_dict": state}, tmp_path / "a.pth")
    message = tune("-p", tmp_path / "a.pth")
    assert message.startswith(f"{tmp_path}/a.pth: has another architecture: lacks LayerNorm.bias; unexpected: surplus")


def test_the_prefix_that_ddp_leaves_is_no_mistake(published, tiny, tmp_path):
    path, content = published
    state = {f"module.{name}": tensor for name, tensor in content["state_dict"].items()}
    torch.save({**content, "state_dict": state}, tmp_path / "a.pth")
    results = []
    for name, checkpoint in (("one", path), ("other", tmp_path / "a.pth")):
        result = tmp_path / f"{name}.json"
        common = ["-d", "Tiny", f"--data_path={tiny}", f"--checkpoint_dir={tmp_path}", f"--result_file={result}"]
        finetune.main([*common, *SMALL, "-p", str(checkpoint), "--epochs=0"])
        results.append(json.loads(result.read_text())["metrics"])
    assert results[0] == results[1]


def test_a_checkpoint_that_cannot_be_resumed(pre, published, tmp_path):
    path, content = published
    torch.save({name: value for name, value in content.items() if name != "optimizer"}, tmp_path / "a.pth")
    message = pre("--epochs=4", f"--resume={tmp_path}/a.pth")
    assert message.startswith(
        f"{tmp_path}/a.pth: cannot be resumed, it holds weights only; expected one that pretrain.py"
    )
    message = pre("--epochs=1", f"--resume={path}")
    assert message == f"{path}: has completed 1 epochs, but --epochs is 1; set a larger --epochs"
    assert pre("--epochs=4", f"--resume={path}", "--learner=sgd").startswith(f"{path}: was trained with adam, not sgd")


# -- a process of its own --------------------------------------------------------------------------------------------


def test_a_process_ends_with_code_2_and_one_line(tmp_path):
    """As the user sees it: from another folder, with nothing else on stderr, not even a library's warning."""
    data_path = write_tiny(tmp_path / "data")
    (tmp_path / "notes.pth").write_text("no checkpoint\n")
    command = [sys.executable, os.path.join(ROOT, "finetune.py"), "-d", "Tiny", f"--data_path={data_path}"]
    command += [*SMALL, "-p", "notes.pth", f"--checkpoint_dir={tmp_path}/saved"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (run.returncode, run.stdout) == (2, "")
    assert re.fullmatch(r"error: notes.pth: cannot be read as a checkpoint \(14 bytes; .*\n", run.stderr)
    assert sorted(os.listdir(tmp_path)) == ["data", "notes.pth"]
