"""Pre-train UniSRec on a mixture of domains: python pretrain.py [-d FHCKM] [--key=value ...]"""

import contextlib
import os

from common.errors import UserError, run_command
from engine.settings import help_text, parse_command_line, settle, take_option

USAGE = """
python pretrain.py [-d FHCKM] [--key=value ...]

  -d, --dataset NAME    mixture in dataset/pretrain (dataset/README.md says how to make one)
  --resume FILE         continue an unfinished run from a checkpoint
  --config_files A,B    YAML files with settings of your own

Writes checkpoints to saved/UniSRec-NAME-EPOCH.pth.
"""

_SETTINGS_OF_A_LOSS = {
    "catalogue": {"sampled_negatives"},
    "contrastive": {"lambda", "item_drop_ratio", "item_drop_coefficient", "plm_suffix_aug"},
}


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
    from unisrec import UniSRec

    config = build_config(UniSRec, dataset, "pretrain", options)
    if config["epochs"] == 0:
        raise UserError("option --epochs: found 0, expected 1 or more: pre-training has nothing to evaluate")
    if not config["resume"]:
        _check_loss(config)
    return config


def _check_loss(config):
    """Check that the user has set nothing that only the other loss has."""
    for loss, keys in _SETTINGS_OF_A_LOSS.items():
        for key in config.given.keys() & keys if loss != config["pretrain_loss"] else ():
            raise UserError(f"{config.given[key]}: only --pretrain_loss={loss} has this setting; leave one of them out")


def pretrain(config):
    """Pre-train, in one process or in a process group, and save. Returns the path of the last checkpoint."""
    from common.processes import process_group

    with process_group(config["device"]) as first_start:
        return _pretrain(config, first_start)


def _pretrain(config, first_start):
    """Pre-train in this process.

    After a restart by torchrun, the run continues from the last checkpoint that it saved since `first_start` (in
    seconds since 1970). Without a restart, `first_start` is None.
    """
    from common.files import locked
    from common.processes import from_main, is_main, rank
    from engine.building import build_model, open_dataset, sequence_batches, set_seeds, start_history
    from engine.checkpoint import (
        adopt_settings,
        check_features,
        epoch_path,
        latest_of_run,
        load_weights,
        read_checkpoint,
    )
    from engine.reporting import report_settings, start_logging
    from engine.runs import identify
    from engine.trainer import Trainer
    from unisrec import UniSRec

    def read(path):  # only the main process reads, because nodes may not share the folder
        return from_main(read_checkpoint(path) if is_main() else None) if path else None

    start_logging(config)
    resume = config["resume"]
    checkpoint = read(resume)
    if checkpoint:
        adopt_settings(config, checkpoint, resume)
        _check_loss(config)
    report_settings(config)
    dataset = open_dataset(config)
    if checkpoint:
        check_features(checkpoint, dataset.features, resume)
    batches = sequence_batches(config, dataset)
    model = build_model(UniSRec, config, dataset)
    path = os.path.join(config["checkpoint_dir"], f"UniSRec-{config['dataset']}-{{epoch}}.pth")
    latest = from_main(latest_of_run(path, config, first_start) if first_start and is_main() else None)
    if latest:
        resume, checkpoint = latest, read(latest)
    trainer = Trainer(config, model, path, run=identify(config, dataset, checkpoint, resume=bool(checkpoint)))
    set_seeds(config["seed"], rank())
    if checkpoint:
        load_weights(model, checkpoint, resume)
        trainer.resume(checkpoint, resume)
    else:
        start_history(model, batches)
    with locked(path) if is_main() else contextlib.nullcontext():
        trainer.fit(batches, save_step=config["save_step"])
    return epoch_path(path, config["epochs"])


if __name__ == "__main__":
    run_command(main)
