"""The schema in props/: every setting has one home, its range is enforced, and --help prints it without torch."""

import os
import re
import subprocess
import sys

import pytest
import yaml
from recbole.model.layers import FeedForward

from baselines import MODELS, yaml_files
from common.errors import UserError
from engine.optimizer import _OPTIMIZERS
from engine.settings import (
    COMMAND_PROPS,
    RECIPES,
    ROOT,
    STAGE_PROPS,
    Setting,
    command_files,
    props_file,
    read_chain,
    read_settings,
    read_yaml,
    settle,
)

PROPS = sorted(os.listdir(props_file("")))
OF_MODELS = {f"{name}.yaml" for name in MODELS}  # files of one model each
SLOW = {"torch", "recbole", "transformers", "numpy", "pandas"}


# -- the files -------------------------------------------------------------------------------------------------------


def test_every_file_of_props_is_read_by_some_command():
    of_commands = {name for names in COMMAND_PROPS.values() for name in names}
    assert of_commands | set(STAGE_PROPS.values()) | set(RECIPES.values()) == set(PROPS) - OF_MODELS


def test_a_recipe_sets_keys_that_have_another_default():
    for name, file in RECIPES.items():
        recipe = read_yaml(props_file(file))
        settled = settle("finetune", {})
        assert recipe["recipe"] == name != settled.settings["recipe"].default
        changed = settle("finetune", {"config_files": [props_file(file)]}).values()
        assert {key: changed[key] for key in recipe} == recipe


@pytest.mark.parametrize(
    ("command", "stage"), [("pretrain", None), ("baseline", None), *(("finetune", s) for s in STAGE_PROPS)]
)
def test_every_key_has_one_home_with_kind_and_meaning(command, stage):
    """A file that is read later says another default or nothing; kind and range stand once."""
    declared, known = {}, {}
    for path, settings in read_chain(command_files(command, stage)):
        plain = read_settings(path)
        for key, setting in settings.items():
            assert setting.kind and setting.meaning, f"{path}: {key} lacks a kind or a meaning"
            assert setting.check(setting.default, key) == setting.default, f"{path}: {key}"
            assert yaml.safe_load(setting.text.replace("1e-", "1.0e-")) == setting.default, f"{path}: {key}"
            if plain[key].declared:
                assert key not in declared, f"{path}: {key} is declared in {declared[key]} already"
                declared[key] = path
            else:
                assert key in known and known[key].default != setting.default, f"{path}: {key}"
            known[key] = setting
    assert len(known) > 30


def test_a_default_stands_in_one_file_only():
    for key in ("epochs", "stopping_step", "MAX_ITEM_LIST_LENGTH", "n_heads", "resume"):
        files = [name for name in PROPS if name not in OF_MODELS and key in read_settings(props_file(name))]
        assert len(files) == 1, key


def test_numbers_and_sizes_have_ranges():
    for name in PROPS:
        for key, setting in read_settings(props_file(name)).items():
            if setting.declared and setting.kind in ("int", "float", "list of int"):
                assert setting.range, f"{name}: {key}"


def test_the_choices_are_those_that_the_code_knows():
    assert read_settings(props_file("overall.yaml"))["learner"].choices() == list(_OPTIMIZERS)
    for name in read_settings(props_file("UniSRec.yaml"))["hidden_act"].choices():
        FeedForward(4, 4, 0.0, name, 1e-12)
    stages = read_settings(props_file("finetune.yaml"))["train_stage"].choices()
    assert stages == ["inductive_ft", "transductive_ft"] and set(STAGE_PROPS) <= set(stages)


@pytest.mark.parametrize("name", sorted(name for name, model in MODELS.items() if model.runs))
def test_recboles_defaults_are_of_their_own_kind(name):
    command = MODELS[name].command
    settled = settle(command, {}, *yaml_files(MODELS[name].load()))
    for key, setting in settled.settings.items():
        value = setting.check(setting.default, key)
        assert value == setting.default or setting.kind == "str" and value == str(setting.default), key
    given = {key: setting.default for key, setting in settled.settings.items()}
    settle(command, given, *yaml_files(MODELS[name].load()))


# -- one setting -----------------------------------------------------------------------------------------------------


def declared(tmp_path, line):
    (tmp_path / "a.yaml").write_text(f"# A file\n{line}\n")
    (setting,) = read_settings(str(tmp_path / "a.yaml")).values()
    return setting


def test_a_line_declares_everything(tmp_path):
    setting = declared(tmp_path, "k: [10, 50]   # (list of int, items; 1 or more) cut-offs, of [published] (x)")
    assert setting == Setting(
        "k", [10, 50], "list of int", "items", "1 or more", "cut-offs, of [published] (x)", "[10, 50]", True
    )
    assert declared(tmp_path, "a: ~  # (str) a path").kind == "str"
    assert declared(tmp_path, "a: b") == Setting("a", "b", "str")
    assert declared(tmp_path, "a: ~") == Setting("a", None)
    assert declared(tmp_path, "a: 3  # a comment").meaning == "a comment"


def test_a_comment_that_contradicts_the_default_does_not_count(tmp_path):
    """RecBole's comments are not always right: `use_proj_bias: 1  # (bool)`."""
    assert declared(tmp_path, "a: 1  # (bool) x").kind == "int"
    assert declared(tmp_path, "a: 0  # (float) x").kind == "float", "dropout_prob: 0 takes 0.5"
    assert declared(tmp_path, "a: [1]  # (list or int) x").kind == "list"


@pytest.mark.parametrize(
    ("declaration", "right", "wrong", "expected"),
    [
        ("3  # (int; 1 or more)", [1, 10**9], [0, -1, 1.5, True, "3"], "1 or more|a whole number"),
        ("0.5  # (float; above 0)", [1e-9, 3], [0, -1, float("inf"), float("nan")], "a number above 0"),
        ("0.5  # (float; from 0 to 1)", [0, 1, 0.5], [-0.1, 1.1, float("nan")], "a number from 0 to 1"),
        ("0.5  # (float; from 0 to below 1)", [0, 0.99], [1, -1], "a number from 0 to below 1"),
        ("3  # (int; 0 to 4294967295)", [0, 2**32 - 1], [2**32, -1], "0 to 4294967295"),
        ("0.0  # (float; 0 or more)", [0, 7.5], [-1e-9, float("inf")], "0 or more"),
        ("a  # (str; one of a, b, c)", ["a", "c"], ["d", "a, b", ""], "one of a, b, c"),
        ("a  # (str; a or b)", ["a", "b"], ["c", "a or b"], "a or b"),
        ("[1]  # (list of int; 1 or more)", [[1, 2], 3], [[0], [], ["a"], [True]], r"whole numbers, each 1 or more"),
        ("[a]  # (list of str)", [["x"], "x"], [[], [1]], r"names, such as \[a\]"),
        ("true  # (bool)", [True, False], [1, "yes"], "true or false"),
        ("~  # (dict)", [{"a": 1}, None], [1, "a", [1]], "a mapping"),
    ],
)
def test_ranges(tmp_path, declaration, right, wrong, expected):
    setting = declared(tmp_path, f"key: {declaration} meaning")
    for value in right:
        assert setting.check(value, "key") == value
    for value in wrong:
        with pytest.raises(UserError, match=f"^option --key: found .*, expected ({expected})"):
            setting.check(value, "option --key")


def test_words_may_be_written_in_capitals(tmp_path):
    setting = declared(tmp_path, "learner: adam  # (str; one of adam, sgd) optimizer")
    assert setting.check("Adam", "learner") == "adam"
    with pytest.raises(UserError, match="did you mean adam"):
        setting.check("adm", "learner")


def test_a_range_that_nobody_understands_is_named(tmp_path):
    with pytest.raises(UserError, match="setting a: its range 'about 3' is unknown; expected `1 or more`"):
        declared(tmp_path, "a: 3  # (int; about 3) x").check(3, "a")


# -- a run's settings ------------------------------------------------------------------------------------------------


def test_a_stage_has_its_own_defaults(tmp_path):
    assert settle("finetune", {"train_stage": "inductive_ft"}).values()["attn_dropout_prob"] == 0.5
    assert settle("finetune", {}).values()["attn_dropout_prob"] == 0.2
    (tmp_path / "mine.yaml").write_text("train_stage: inductive_ft\n")
    assert settle("finetune", {"config_files": f"{tmp_path}/mine.yaml"}).values()["attn_dropout_prob"] == 0.5
    for stage in ("../UniSRec", ["inductive_ft"], 3):
        with pytest.raises(UserError, match="--train_stage: found .*, expected (inductive_ft or trans|a string)"):
            settle("finetune", {"train_stage": stage})


def test_what_the_user_gave_is_known_with_its_place(tmp_path):
    (tmp_path / "mine.yaml").write_text("seed: 1\nn_heads: 4\n")
    settled = settle("finetune", {"config_files": f"{tmp_path}/mine.yaml", "seed": 2})
    assert settled.given == {"seed": 2, "n_heads": 4}
    assert settled.where == {"seed": "option --seed", "n_heads": f"{tmp_path}/mine.yaml: n_heads"}


def test_ranges_hold_for_every_model_that_has_the_key():
    files = yaml_files(MODELS["GRU4Rec"].load())
    for options, message in (
        ({"hidden_size": 0}, "--hidden_size: found 0, expected 1 or more"),
        ({"learning_rate": 0}, "expected a number above 0"),
        ({"embedding_size": 0}, "--embedding_size: found 0, expected 1 or more"),
        ({"dropout_prob": "high"}, "--dropout_prob: found 'high', expected a number"),
    ):
        with pytest.raises(UserError, match=message):
            settle("baseline", options, *files)
    assert settle("baseline", {"loss_type": "BPR"}, *files).given["loss_type"] == "BPR", "CE is UniSRec's alone"
    for key in ("pretrained", "fix_enc", "train_stage", "temperature"):
        with pytest.raises(UserError, match=f"unknown option --{key}"):
            settle("baseline", {key: "x"}, *files)


def test_the_published_ways_of_naming_yaml_files(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for listed in (
        "props/finetune.yaml",
        "props/finetune.yaml props/overall.yaml",
        "props/finetune.yaml,props/overall.yaml",
    ):
        assert settle("baseline", {"config_files": listed}).values()["fix_enc"] is False


# -- help ------------------------------------------------------------------------------------------------------------


def modules_after(*command):
    """Run a command in a process of its own: (what it printed, its error, the top-level modules that it imported)."""
    code = f"""
import atexit, sys
atexit.register(lambda: print("MODULES", *{{name.split(".")[0] for name in sys.modules}}))
from common.errors import run_command
import {command[0]}
run_command({command[0]}.main, {list(command[1:])!r})
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    printed, _, modules = run.stdout.rpartition("MODULES")
    return printed, run.stderr, set(modules.split())


@pytest.mark.parametrize("command", ["finetune", "pretrain", "ddp_pretrain", "run_baseline"])
def test_help_lists_every_key_with_default_and_meaning_and_imports_nothing_slow(command):
    printed, error, modules = modules_after(command, "--help")
    assert error == "" and "yaml" in modules and not SLOW & modules
    words = " ".join(printed.split())
    kind = {"run_baseline": "baseline", "ddp_pretrain": "pretrain"}.get(command, command)
    files = [*command_files(kind), *(props_file(name) for name in STAGE_PROPS.values() if kind == "finetune")]
    for path, settings in read_chain(files):
        assert f"\n{os.path.relpath(path, ROOT)}: " in printed
        for setting in settings.values():
            meaning = re.escape(" ".join(f"{setting.meaning} ({setting.kind}".split()))
            assert re.search(rf"--{setting.key} {re.escape(setting.text)} {meaning}[,;)]", words), setting.key


def test_the_help_of_a_baseline_has_its_own_keys():
    printed, *_ = modules_after("run_baseline", "-m", "GRU4Rec", "--help")
    assert re.search(
        r"\nRecBole's GRU4Rec.yaml\n.*  --num_layers 1 +The number of layers in GRU. \(int\)\n", printed, re.S
    )


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("finetune", "--hlep=1"), "unknown option --hlep; did you mean --help?"),
        (("finetune", "--epochs=many"), "option --epochs: found 'many', expected a whole number (its default is 300)"),
        (("pretrain", "--lambada=1"), "unknown option --lambada; did you mean --lambda?"),
        (("ddp_pretrain", "-p", "12355"), "unknown option --pretrained (-p): "),
        (("run_baseline", "-m", "SASRek"), "unknown model 'SASRek'; did you mean SASRec?"),
        (("run_baseline", "-m", "GRU4Rec", "--num_layer=2"), "unknown option --num_layer; did you mean --num_layers?"),
    ],
)
def test_errors_show_before_anything_slow_is_imported(command, message):
    _, error, modules = modules_after(*command)
    assert error.startswith(f"error: {message}") and not SLOW & modules
