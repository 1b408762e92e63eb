"""Fine-tune UniSRec on one domain, or evaluate it there: python finetune.py -d Scientific [-p CHECKPOINT]"""

from common.errors import run_command
from engine.settings import help_text, parse_command_line, settle, take_option

USAGE = """
python finetune.py -d NAME [-p CHECKPOINT] [--key=value ...]

  -d, --dataset NAME        data set in dataset/downstream
  -p, --pretrained PATH     checkpoint or bundle to start from (default: start from scratch)
  -f, --fix_enc true|false  freeze the pre-trained transformer (default: false; with the recipe of the paper: true)
  --config_files A,B        YAML files with settings of your own

Writes the model to saved/UniSRec-NAME-STAGE-SEED-ID.pth, and the result to a .json file beside it. ID is the id of the
run, see saved/README.md.

With -p, the settings that shape the model (sizes, n_heads, hidden_act, ...) come from the checkpoint.
"""


def main(argv):
    options = parse_command_line(argv, lambda _: help_text(USAGE, "finetune"))
    dataset = take_option(options, "dataset", "Scientific")
    settle("finetune", options)  # reports errors before the imports, which take seconds
    from common.processes import process_group
    from engine.config import build_config
    from engine.finetuning import finetune
    from unisrec import UniSRec

    config = build_config(UniSRec, dataset, "finetune", options)
    with process_group(config["device"]):
        finetune(config)


if __name__ == "__main__":
    run_command(main)
