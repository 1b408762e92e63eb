"""Fine-tune UniSRec on one domain, or evaluate it there: python finetune.py -d Scientific [-p CHECKPOINT]"""

from common.errors import run_command
from engine.config import build_config, parse_command_line, take_option

USAGE = """
python finetune.py -d NAME [-p CHECKPOINT] [--key=value ...]

  every key of props/overall.yaml, UniSRec.yaml, finetune.yaml, and

  -d, --dataset NAME        data set in dataset/downstream
  -p, --pretrained FILE     checkpoint to start from; without one, from scratch
  -f, --fix_enc true|false  keep the pre-trained transformer as it is (default true)
  --train_stage STAGE       inductive_ft (text only) or transductive_ft (text and item ids, default)
  --epochs 0                evaluate without training
writes saved/UniSRec-NAME-STAGE-SEED-ID.pth and, beside it, the result as .json; ID: see saved/README.md
"""
SHORT = {"-d": "dataset", "-p": "pretrained", "-f": "fix_enc"}


def main(argv):
    options = parse_command_line(argv, SHORT, USAGE)
    from common.processes import process_group
    from engine.finetuning import finetune
    from unisrec import UniSRec

    dataset = take_option(options, "dataset", "Scientific")
    config = build_config(UniSRec, dataset, ["overall.yaml", "UniSRec.yaml", "finetune.yaml"], options)
    with process_group(config["device"]):
        finetune(config)


if __name__ == "__main__":
    run_command(main)
