"""Train and test a sequential model of RecBole's under UniSRec's protocol: python run_baseline.py -m SASRec -d NAME"""

import os

from common.errors import UserError, run_command
from engine.config import build_config, parse_command_line, take_option

USAGE = """
python run_baseline.py -m MODEL -d NAME [--config_files=props/finetune.yaml] [--key=value ...]

  -m, --model MODEL     one of RecBole's sequential models that need interactions only: SASRec, GRU4Rec, BERT4Rec, ...
  -d, --dataset NAME    data set in dataset/downstream
  every key of props/overall.yaml, props/finetune.yaml and of the model's own YAML in RecBole
writes saved/MODEL-NAME-SEED-ID.pth and, beside it, the result as .json; ID: see saved/README.md
"""
SHORT = {"-m": "model", "-d": "dataset"}


def main(argv):
    options = parse_command_line(argv, SHORT, USAGE)
    from engine.finetuning import interaction_model, run_baseline

    config = build_config(
        interaction_model(take_option(options, "model", "SASRec")),
        take_option(options, "dataset", "Scientific"),
        ["overall.yaml", "finetune.yaml"],
        options,
    )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("run_baseline.py: runs as one process; start it without torchrun")
    run_baseline(config)


if __name__ == "__main__":
    run_command(main)
