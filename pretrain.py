"""Pre-train UniSRec on a mixture of domains: python pretrain.py [-d FHCKM] [--key=value ...]"""

from common.errors import UserError, run_command
from engine.settings import help_text, parse_command_line, settle, take_option

USAGE = """
python pretrain.py [-d FHCKM] [--key=value ...]

  -d, --dataset NAME    mixture in dataset/pretrain (dataset/README.md says how to make one)
  --resume FILE         continue an unfinished run from a checkpoint
  --config_files A,B    YAML files with settings of your own

Writes checkpoints to saved/UniSRec-NAME-EPOCH.pth.
"""


def main(argv):
    pretrain(configure(parse_command_line(argv, lambda _: help_text(USAGE, "pretrain"))))


def configure(options):
    """Build the Config of a pre-training from the options of the command line."""
    options = dict(options)
    if "pretrained" in options:
        raise UserError(
            "unknown option --pretrained (-p): pre-training starts from scratch; --resume FILE continues a run, "
            "and the port of ddp_pretrain.py is --port"
        )
    dataset = take_option(options, "dataset", "FHCKM")
    settle("pretrain", options)  # reports errors before the imports, which take seconds
    from engine.config import build_config
    from engine.pretraining import check_loss
    from unisrec import UniSRec

    config = build_config(UniSRec, dataset, "pretrain", options)
    if config["epochs"] == 0:
        raise UserError("option --epochs: found 0, expected 1 or more: pre-training has nothing to evaluate")
    if not config["resume"]:
        check_loss(config)
    return config


def pretrain(config):
    """`engine.pretraining.pretrain`, which takes seconds to import. Returns the path of the last checkpoint."""
    from engine.pretraining import pretrain

    return pretrain(config)


if __name__ == "__main__":
    run_command(main)
