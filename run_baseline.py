"""Train and test a model under UniSRec's protocol: python run_baseline.py -m SASRec -d NAME"""

import os

from baselines import MODELS, check_name, yaml_files_of_name
from common.errors import UserError, run_command
from engine.settings import help_text, parse_command_line, settle, take_option

USAGE = f"""
python run_baseline.py -m MODEL -d NAME [--config_files=mine.yaml] [--key=value ...]

  -m, --model MODEL     a name, or a model of your own as FILE.py:CLASS or package.module:CLASS, with its settings in
                        CLASS.yaml or FILE.yaml beside it. Names:
                        {", ".join(sorted(name for name, model in MODELS.items() if model.runs))}
  -d, --dataset NAME    data set in dataset/downstream
  --config_files A,B    YAML files with settings of your own

S3Rec has two stages: --train_stage=pretrain writes saved/S3Rec-NAME-EPOCH.pth, from which
--train_stage=finetune --pre_model_path=FILE starts.

Writes the model to saved/MODEL-NAME-SEED-ID.pth, and the result to a .json file beside it. ID is the id of the run, see
saved/README.md.
"""


def main(argv):
    options = parse_command_line(argv, _help)
    name, dataset = take_option(options, "model", "SASRec"), take_option(options, "dataset", "Scientific")
    if "." not in name and ":" not in name:  # reports errors before the imports, which take seconds
        check_name(name)
        settle(MODELS[name].command, options, *yaml_files_of_name(name))
    from baselines import find_model
    from engine.config import build_config
    from engine.finetuning import finetune, run_baseline
    from unisrec import UniSRec

    model = find_model(name)
    is_unisrec = issubclass(model, UniSRec)  # it has the stages and settings of UniSRec
    config = build_config(model, dataset, "finetune" if is_unisrec else "baseline", options)
    if config["train_stage"] == "pretrain":
        _pretrain(config)
    elif int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("run_baseline.py: only pre-training runs in several processes; start it without torchrun")
    elif is_unisrec:
        finetune(config)
    else:
        _check_pretrained(config)
        run_baseline(config)


def _pretrain(config):
    """The stage `pretrain` of a baseline."""
    from engine.pretraining import pretrain

    if config["pre_model_path"]:
        raise UserError(
            "option --pre_model_path: the stage finetune starts from it; expected --resume or no checkpoint"
        )
    if "epochs" in config.given:
        raise UserError("option --epochs: this stage has --pretrain_epochs; leave --epochs out")
    config["epochs"] = config["pretrain_epochs"]
    pretrain(config)


def _check_pretrained(config):
    """Check that a baseline that is fine-tuned has something to start from."""
    if config["train_stage"] == "finetune" and not config["pre_model_path"]:
        raise UserError(
            f"option --pre_model_path: missing; {config['model']} is fine-tuned from a checkpoint of "
            "--train_stage=pretrain"
        )
    if config["resume"]:
        raise UserError("option --resume: only --train_stage=pretrain can be resumed; leave it out")


def _help(argv):
    """The help text, with the settings of the model that `argv` names."""
    words = dict(zip(argv, [*argv[1:], ""], strict=True)) | dict(word.split("=", 1) for word in argv if "=" in word)
    name = words.get("-m") or words.get("--model") or "SASRec"
    return help_text(USAGE, MODELS[name].command if name in MODELS else "baseline", *yaml_files_of_name(name))


if __name__ == "__main__":
    run_command(main)
