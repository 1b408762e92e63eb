"""Pre-train UniSRec on a mixture of domains: python pretrain.py [-d FHCKM] [--key=value ...]"""

import os

from common.errors import UserError, run_command
from engine.config import build_config, check_choice, parse_command_line, take_option

USAGE = """
python pretrain.py [-d FHCKM] [--key=value ...]     every key of props/overall.yaml, UniSRec.yaml, pretrain.yaml

  -d, --dataset NAME    mixture in dataset/pretrain (dataset/README.md says how to make one)
  --resume FILE         go on from a checkpoint of an unfinished run
writes saved/UniSRec-NAME-EPOCH.pth
"""
SHORT = {"-d": "dataset"}


def main(argv):
    pretrain(configure(parse_command_line(argv, SHORT, USAGE)))


def configure(options):
    """The configuration of a pre-training, from the command line's options. Returns Config."""
    from unisrec import UniSRec

    options = dict(options)
    dataset = take_option(options, "dataset", "FHCKM")
    config = build_config(UniSRec, dataset, ["overall.yaml", "UniSRec.yaml", "pretrain.yaml"], options)
    check_choice(config, "train_stage", ["pretrain"])
    check_choice(config, "loss_type", ["CE"])
    if config["epochs"] == 0:
        raise UserError("option --epochs: found 0, expected 1 or more: pre-training has nothing to evaluate")
    return config


def pretrain(config):
    """Pre-train and save, with the other processes where there are some. Returns the path of the last checkpoint."""
    from common.processes import process_group

    with process_group(config["device"]) as first_start:
        return _pretrain(config, first_start)


def _pretrain(config, first_start):
    """Pre-train as one of the processes of the group.

    After a restart by torchrun the run continues from the last checkpoint that it has saved since `first_start`, in
    seconds since 1970. Without a restart `first_start` is None.
    """
    from common.processes import from_main, is_main, rank
    from engine.building import build_model, open_dataset, sequence_batches, set_seeds
    from engine.checkpoint import latest_of_run, load_weights, read_checkpoint
    from engine.reporting import report_settings, start_logging
    from engine.runs import identify
    from engine.trainer import Trainer
    from unisrec import UniSRec

    start_logging(config)
    report_settings(config)
    dataset = open_dataset(config)
    batches = sequence_batches(config, dataset)
    model = build_model(UniSRec, config, dataset)
    path = os.path.join(config["checkpoint_dir"], f"UniSRec-{config['dataset']}-{{epoch}}.pth")
    resume = latest_of_run(path, config, first_start) if first_start and is_main() else None
    resume = from_main(resume or config["resume"])
    # the main process reads it for all: the nodes may not share the folder
    checkpoint = from_main(read_checkpoint(resume) if is_main() else None) if resume else None
    trainer = Trainer(config, model, path, run=identify(config, dataset, checkpoint, resume=bool(resume)))
    set_seeds(config["seed"], rank())
    if resume:
        load_weights(model, checkpoint, resume)
        trainer.resume(checkpoint, resume)
    trainer.fit(batches, save_step=config["save_step"])
    return path.format(epoch=config["epochs"])


if __name__ == "__main__":
    run_command(main)
