"""The command line and the YAML files: every key known, every value of its kind, nothing evaluated."""

import io
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml

import ddp_pretrain
import finetune
import pretrain
import run_baseline
from baselines import find_model
from common.errors import UserError
from engine.config import build_config
from engine.settings import ROOT, command_files, parse_command_line, props_file, read_yaml, take_option
from unisrec import UniSRec


def parse(*argv):
    return parse_command_line(list(argv), lambda argv: "usage")


def config_of(*argv, model=UniSRec, command="finetune"):
    return build_config(model, "Tiny", command, parse(*argv))


# -- words -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "options"),
    [
        (["--epochs=3"], {"epochs": 3}),
        (["--epochs", "3"], {"epochs": 3}),
        (["-d", "Tiny"], {"dataset": "Tiny"}),
        (["-d=Tiny"], {"dataset": "Tiny"}),
        (["-p", "saved/UniSRec-FHCKM-300.pth"], {"pretrained": "saved/UniSRec-FHCKM-300.pth"}),
        (["-f", "False"], {"fix_enc": False}),
        (["-f", "true", "--epochs", "1"], {"fix_enc": True, "epochs": 1}),
        (["--learning_rate=1e-3"], {"learning_rate": 1e-3}),
        (["--learning_rate", "5E-4"], {"learning_rate": 5e-4}),
        (["--lambda=.5e+1"], {"lambda": 5.0}),
        (["--lambda", "-1e-3"], {"lambda": -1e-3}),
        (["--gain", "-5"], {"gain": -5}),
        (["--topk=[5, 10]"], {"topk": [5, 10]}),
        (["--eval_args={mode: full, order: TO}"], {"eval_args": {"mode": "full", "order": "TO"}}),
        (["--pretrained="], {"pretrained": None}),
        (["--pretrained=~"], {"pretrained": None}),
        (["--dataset='5'"], {"dataset": "5"}),
        (["--checkpoint_dir=runs/a=b"], {"checkpoint_dir": "runs/a=b"}),
        (["--checkpoint_dir=2024-11-21"], {"checkpoint_dir": "2024-11-21"}),
        (["--checkpoint_dir=2024-99-99"], {"checkpoint_dir": "2024-99-99"}),
        (["--epochs=3", "--epochs", "3"], {"epochs": 3}),
        ([], {}),
    ],
)
def test_both_ways_of_writing_an_option(argv, options):
    parsed = parse(*argv)
    assert parsed == options
    assert [type(value) for value in parsed.values()] == [type(value) for value in options.values()]


def test_a_bool_without_a_value_is_true():
    assert parse("--groups", "--seed=3") == {"groups": True, "seed": 3}
    assert parse("--seed=3", "--fast") == {"seed": 3, "fast": True}
    assert parse("--groups", "false") == {"groups": False}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["Tiny"], "unexpected word 'Tiny'"),
        (["-x", "3"], "unexpected word '-x'"),
        (["--=3"], "unexpected word '--=3'"),
        (["--epochs"], "option --epochs has no value; write --epochs VALUE"),
        (["--epochs", "--seed=3"], "option --epochs has no value"),
        (["-f", "-d", "Tiny"], "option -f has no value"),
        (["--epochs=3", "--epochs=4"], "option --epochs is given twice, as 3 and 4"),
        (["-d", "A", "--dataset=B"], "option --dataset is given twice, as 'A' and 'B'"),
        (["--learning_rate=1e-3", "--learning_rate=.nan"], "option --learning_rate is given twice"),
        (["--topk=[1, 2"], r"option --topk: '\[1, 2' is not a YAML value"),
        (["--seed=0x_"], "option --seed: '0x_' is not a YAML value"),
        (["--seed=!!python/object/apply:os.getcwd []"], "is not a YAML value"),
    ],
)
def test_a_word_that_is_no_option_stops_the_run(argv, message):
    with pytest.raises(UserError, match=message):
        parse(*argv)


def test_values_are_never_evaluated(tmp_path):
    for text in ("__import__('os')", f"open({str(tmp_path / 'made')!r}, 'w')", "1 + 1", "lambda: 0"):
        value = parse(f"--anything={text}")["anything"]
        assert not callable(value) and value != 2, value
    with pytest.raises(UserError, match="--seed: found .*expected a whole number"):
        config_of("--seed=__import__('os')")
    config = config_of("--checkpoint_dir=1 + 1")
    assert config["checkpoint_dir"] == "1 + 1", "RecBole's Config does not evaluate it either"
    assert os.listdir(tmp_path) == []


def test_recbole_does_not_read_the_command_line_by_itself(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pytest", "--seed=7", "--epochs=9"])
    assert (config_of()["seed"], config_of()["epochs"]) == (2020, 300)


@pytest.mark.parametrize("command", [pretrain, finetune, run_baseline, ddp_pretrain])
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_is_printed_and_is_no_failure(command, flag, capsys):
    with pytest.raises(SystemExit) as end:
        command.main([flag, "--no_such_option"])
    assert end.value.code == 0
    printed = capsys.readouterr().out
    assert f"python {command.__name__}.py" in printed and "--key=value" in printed and "-d" in printed


# -- keys ------------------------------------------------------------------------------------------------------------


def test_an_unknown_key_stops_the_run_and_the_nearest_is_offered():
    with pytest.raises(UserError) as error:
        config_of("--temprature=0.1")
    assert str(error.value) == "unknown option --temprature; did you mean --temperature?"
    with pytest.raises(UserError, match="^unknown option --qqqq$"):
        config_of("--qqqq=1")


@pytest.mark.parametrize("key", ["model", "dataset"])
def test_what_the_command_itself_decides_is_no_key(key):
    """`finetune.py --model=SASRec` would otherwise quietly train UniSRec."""
    with pytest.raises(UserError, match=f"unknown option --{key}"):
        config_of(f"--{key}=SASRec")


def test_keys_of_recboles_own_yaml_are_known():
    config = config_of("--gpu_id=1", "--loss_decimal_place=3", "--reg_weight=0.1", "--worker=2")
    assert (config["gpu_id"], config["loss_decimal_place"], config["reg_weight"]) == ("1", 3, 0.1)
    model = find_model("GRU4Rec")
    assert config_of("--embedding_size=8", model=model, command="baseline")["embedding_size"] == 8
    with pytest.raises(UserError, match="unknown option --embedding_size"):
        config_of("--embedding_size=8")


def test_every_key_of_the_props_can_be_set_to_its_default():
    settings = {key: value for path in command_files("finetune") for key, value in read_yaml(path).items()}
    words = {key: yaml.safe_dump(value, default_flow_style=True, width=1000) for key, value in settings.items()}
    config = config_of(*(f"--{key}={word.removesuffix('...' + chr(10)).strip()}" for key, word in words.items()))
    assert len(settings) > 30
    assert {key: config[key] for key in settings if key not in ("data_path", "eval_args", "train_neg_sample_args")} == {
        key: value for key, value in settings.items() if key not in ("data_path", "eval_args", "train_neg_sample_args")
    }


@pytest.mark.parametrize("separator", [",", " "])
def test_the_users_yaml_files_win_over_the_props_and_lose_to_the_command_line(tmp_path, separator):
    (tmp_path / "a.yaml").write_text("epochs: 5\nlearning_rate: 1e-2\nseed: 1\nmy_own_key: [1, 2]\n")
    (tmp_path / "b.yaml").write_text("seed: 2\ngpu_id: 0\n")
    config = config_of(f"--config_files={tmp_path}/a.yaml{separator}{tmp_path}/b.yaml", "--epochs=7", "--my_own_key=3")
    assert [config[key] for key in ("epochs", "learning_rate", "seed", "my_own_key", "gpu_id")] == [7, 0.01, 2, 3, "0"]
    config = config_of(f"--config_files=[{tmp_path}/a.yaml]")
    assert config["my_own_key"] == [1, 2]


def test_model_and_dataset_may_stand_in_the_users_yaml(tmp_path):
    (tmp_path / "mine.yaml").write_text("dataset: Mine\nmodel: GRU4Rec\n")
    options = {"config_files": str(tmp_path / "mine.yaml"), "dataset": "Other"}
    assert take_option(options, "dataset", "Scientific") == "Other" and "dataset" not in options
    assert take_option(options, "dataset", "Scientific") == "Mine"
    assert take_option(options, "model", "SASRec") == "GRU4Rec"
    assert take_option({}, "dataset", "Scientific") == "Scientific"
    assert take_option({"dataset": 2014}, "dataset", "Scientific") == "2014"
    for value in (None, False, ["A"]):
        with pytest.raises(UserError, match="option --dataset: found .* expected a name"):
            take_option({"dataset": value}, "dataset", "Scientific")


def test_an_empty_yaml_file_says_nothing(tmp_path):
    (tmp_path / "empty.yaml").write_text("# nothing yet\n")
    assert config_of(f"--config_files={tmp_path}/empty.yaml")["epochs"] == 300


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "my.yaml: no such file"),
        (b"epochs: [1, 2", "my.yaml: is not valid YAML"),
        (b"\xff\xfe\x00", "my.yaml: is not valid YAML"),
        (b"- a\n- b\n", "my.yaml: holds list, expected `key: value` lines"),
        (b"just words", "my.yaml: holds str"),
        (b"1: 2\n", "my.yaml: key 1 is not a string"),
        (b"x: !!python/object/apply:os.getcwd []", "my.yaml: is not valid YAML"),
        (b"epochs: many\n", "my.yaml: epochs: found 'many', expected a whole number"),
        (b"train_batch_size: 0\n", "my.yaml: train_batch_size: found 0, expected 1 or more"),
    ],
)
def test_a_broken_yaml_file_is_named(tmp_path, content, message):
    if content is not None:
        (tmp_path / "my.yaml").write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        config_of(f"--config_files={tmp_path}/my.yaml")
    assert "\n" not in str(error.value)


def test_a_folder_is_no_yaml_file(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        config_of(f"--config_files={tmp_path}")
    with pytest.raises(UserError, match="--config_files: found 5, expected YAML files"):
        config_of("--config_files=5")


# -- values ----------------------------------------------------------------------------------------------------------


def test_false_is_false():
    assert config_of("-f", "False")["fix_enc"] is False
    assert config_of("-f", "no")["fix_enc"] is False
    assert config_of()["fix_enc"] is False
    assert config_of("--config_files", props_file("published.yaml"))["fix_enc"] is True
    with pytest.raises(UserError, match="--fix_enc: found 'maybe', expected true or false"):
        config_of("-f", "maybe")


def test_values_have_the_types_that_the_code_expects():
    config = config_of(
        "--learning_rate=1", "--topk=5", "--metrics=[NDCG]", "--valid_metric=ndcg@5", "--weight_decay=1e-4"
    )
    assert config["learning_rate"] == 1 and config["topk"] == [5] and config["metrics"] == ["NDCG"]
    assert isinstance(config["weight_decay"], float)
    assert config["valid_metric_bigger"] is True


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--epochs=abc", r"option --epochs: found 'abc', expected a whole number \(its default is 300\)"),
        ("--epochs=1.5", "expected a whole number"),
        ("--epochs=true", "expected a whole number"),
        ("--epochs=", "option --epochs: found None, expected a whole number"),
        ("--epochs=-1", "option --epochs: found -1, expected 0 or more"),
        ("--seed=-1", "option --seed: found -1, expected 0 to 4294967295"),
        ("--learning_rate=fast", "option --learning_rate: found 'fast', expected a number"),
        ("--learning_rate=0", "option --learning_rate: found 0, expected a number above 0"),
        ("--learning_rate=.nan", "expected a number above 0"),
        ("--learning_rate=.inf", "expected a number above 0"),
        ("--temperature=0", "expected a number above 0"),
        ("--hidden_dropout_prob=1", "expected a number from 0 to below 1"),
        ("--adaptor_dropout_prob=-0.1", "expected a number from 0 to below 1"),
        ("--train_batch_size=0", "option --train_batch_size: found 0, expected 1 or more"),
        ("--eval_batch_size=0", "expected 1 or more"),
        ("--eval_step=0", "expected 1 or more"),
        ("--stopping_step=0", "expected 1 or more"),
        ("--n_exps=0", "expected 1 or more"),
        ("--n_layers=0", "expected 1 or more"),
        ("--MAX_ITEM_LIST_LENGTH=0", "expected 1 or more"),
        ("--predictions_per_row=0", "option --predictions_per_row: found 0, expected 1 or more"),
        ("--predictions_per_row=51", "option --predictions_per_row: found 51, expected 1 to MAX_ITEM_LIST_LENGTH, 50"),
        ("--MAX_ITEM_LIST_LENGTH=10 --predictions_per_row=11", "found 11, expected 1 to MAX_ITEM_LIST_LENGTH, 10"),
        ("--hidden_act=gello", "option --hidden_act: found 'gello', expected one of gelu, relu"),
        ("--topk=0", "option --topk: found 0, expected whole numbers, each 1 or more"),
        ("--topk=[10,0]", "expected whole numbers, each 1 or more"),
        ("--topk=[ten]", "expected whole numbers, each 1 or more"),
        ("--topk=true", "expected a list"),
        ("--metrics=[Recal]", "option --metrics: found 'recal', expected ranking metrics .*did you mean recall"),
        ("--metrics=[AUC]", "option --metrics: found 'auc', expected ranking metrics"),
        ("--metrics=[]", "option --metrics: found"),
        ("--metrics=[1]", "option --metrics: found"),
        ("--valid_metric=NDCG@20", "--valid_metric: found 'NDCG@20', .*recall@10, recall@50, ndcg@10, ndcg@50"),
        ("--valid_metric=NDCG", "option --valid_metric: found 'NDCG'"),
        ("--topk=5", "option --valid_metric: found 'NDCG@10'"),
        ("--clip_grad_norm=1.0", "option --clip_grad_norm: found 1.0, expected a mapping"),
        ("--pretrained=[a.pth]", r"option --pretrained: found \['a.pth'\], expected a string"),
        ("--result_file=true", "option --result_file: found True, expected a string"),
        ("--eval_args=full", "option --eval_args: found 'full', expected a mapping"),
        ("--checkpoint_dir=", "option --checkpoint_dir: found None, expected a string"),
        ("--eval_args={mode: foo}", "settings of UniSRec on Tiny: .*foo"),
    ],
)
def test_a_value_that_makes_no_sense_is_refused_before_anything_is_read(argv, message):
    words = argv.split(" ") if "{" not in argv else [argv]
    with pytest.raises(UserError, match=message):
        config_of(*words)


def test_shorter_histories_need_no_other_option():
    """The default of predictions_per_row is above this length. Only one that the user gave is refused."""
    config = config_of("--MAX_ITEM_LIST_LENGTH=10")
    assert config["MAX_ITEM_LIST_LENGTH"] == 10 < config["predictions_per_row"]


def test_a_model_that_learns_from_pairs_gets_pairs():
    for name, pairs in (("FPMC", True), ("TransRec", True), ("GRU4Rec", False), ("SINE", False)):
        config = config_of(model=find_model(name), command="baseline")
        assert (config["train_neg_sample_args"]["distribution"] == "uniform") is pairs, name
    config = config_of("--loss_type=BPR", model=find_model("GRU4Rec"), command="baseline")
    assert config["train_neg_sample_args"]["distribution"] == "uniform"


def test_unknown_models_are_listed():
    with pytest.raises(UserError, match=r"unknown model 'SASRek'; did you mean SASRec\? .*BERT4Rec, .*GRU4Rec"):
        find_model("SASRek")


# -- paths -----------------------------------------------------------------------------------------------------------


def test_default_paths_lie_beside_the_code_and_given_ones_where_the_user_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = config_of()
    assert config["data_path"] == os.path.join(ROOT, "dataset", "downstream", "Tiny")
    assert config["checkpoint_dir"] == os.path.join(ROOT, "saved")
    config = config_of("--data_path=my data", "--checkpoint_dir=../runs")
    assert (config["data_path"], config["checkpoint_dir"]) == (os.path.join("my data", "Tiny"), "../runs")
    (tmp_path / "my.yaml").write_text("data_path: from_yaml\n")
    assert config_of("--config_files=my.yaml")["data_path"] == os.path.join("from_yaml", "Tiny")


def test_the_configuration_pickles_to_plain_data():
    config = config_of("--topk=[1, 10]")
    buffer = io.BytesIO()
    torch.save({"config": config}, buffer)
    buffer.seek(0)
    read = torch.load(buffer, weights_only=True)["config"]
    assert dict(read) == config.plain()
    assert (read["topk"], read["device"], read["learning_rate"]) == ([1, 10], str(config["device"]), 0.001)


# -- nothing else changes --------------------------------------------------------------------------------------------

SIDE_EFFECTS = """
import os, sys
import numpy as np, pandas, polars, scipy, sklearn, torch, yaml
import recbole.utils

def state():
    loaders = (yaml.SafeLoader, yaml.FullLoader, yaml.Loader)
    return {
        "environment": dict(os.environ),
        "numpy": [name for name in ("float", "int", "object", "float_", "unicode_") if hasattr(np, name)] + [np.bool],
        "yaml": [str(loader.yaml_implicit_resolvers) + str(loader.yaml_constructors) for loader in loaders],
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "numpy's errors": np.geterr(),
        "working directory": os.getcwd(),
        "arguments": list(sys.argv),
    }

before = state()
import common.errors, common.files, common.processes, baselines, data, layers.losses, unisrec
import engine.building, engine.checkpoint, engine.compat, engine.evaluate
import engine.finetuning, engine.reporting, engine.trainer
import pretrain, ddp_pretrain, finetune, run_baseline
from engine.config import build_config
assert state() == before, [key for key in before if state()[key] != before[key]]
build_config(unisrec.UniSRec, "Tiny", "finetune", {})
assert state() == before, [key for key in before if state()[key] != before[key]]
assert not torch.is_anomaly_enabled(), "RecBole's SINE turns it on; it costs half the speed"
assert not [name for name in sys.modules if name.startswith(("wandb", "ray"))]
"""


@pytest.mark.slow
def test_importing_the_project_changes_nothing_for_others():
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", SIDE_EFFECTS], cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")


def test_recbole_gets_its_numpy_and_numpy_stays_as_it_is():
    import recbole.evaluator.metrics

    config_of()
    assert not hasattr(np, "float") or np.float is not float
    assert recbole.evaluator.metrics.np is not np and recbole.evaluator.metrics.np.mean is np.mean
