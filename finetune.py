"""Fine-tune UniSRec on one domain, or evaluate it there: python finetune.py -d Scientific [-p CHECKPOINT]"""

import logging
import os

from common.errors import run_command
from engine.settings import help_text, parse_command_line, settle, take_option

USAGE = """
python finetune.py -d NAME [-p CHECKPOINT] [--key=value ...]

  -d, --dataset NAME        data set in dataset/downstream
  -p, --pretrained PATH     checkpoint or bundle to start from (default: start from scratch)
  -f, --fix_enc true|false  freeze the pre-trained transformer (default: false; with the recipe of the paper: true)
  --config_files A,B        YAML files with settings of your own

Writes the model to saved/UniSRec-NAME-STAGE-SEED-ID.pth, the result to a .json file beside it, and a bundle for
recommend.py to a folder of the same name. ID is the id of the run, see saved/README.md.

With -p, the settings that shape the model (sizes, n_heads, hidden_act, ...) come from the checkpoint.
"""


def main(argv):
    options = parse_command_line(argv, lambda _: help_text(USAGE, "finetune"))
    dataset = take_option(options, "dataset", "Scientific")
    settle("finetune", options)  # reports errors before the imports, which take seconds
    from common.processes import is_main, process_group
    from engine.config import build_config
    from engine.finetuning import finetune
    from unisrec import UniSRec

    config = build_config(UniSRec, dataset, "finetune", options)
    data_path = os.path.dirname(os.path.abspath(config["data_path"]))
    with process_group(config["device"]):
        result, writes = finetune(config), is_main()
    if writes and config["bundle"] and config["epochs"] > 0:  # opening the data set would wait for the other processes
        write_bundle(result["checkpoint"], dataset, data_path)


def write_bundle(checkpoint, dataset, data_path):
    """Write a bundle of the fine-tuned model beside its checkpoint, if the data set has item texts."""
    from serving.bundle import make_bundle

    folder = os.path.splitext(checkpoint)[0]
    if os.path.isfile(os.path.join(data_path, dataset, f"{dataset}.text")):
        make_bundle(checkpoint, folder, dataset, data_path)
        logging.getLogger(__name__).info("bundle: %s", folder)
    else:
        logging.getLogger(__name__).info("no bundle: %s has no item texts", dataset)


if __name__ == "__main__":
    run_command(main)
