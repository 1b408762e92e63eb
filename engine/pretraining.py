"""Pre-training, for UniSRec and for baselines that have such a stage."""

import contextlib
import os

from common.errors import UserError
from common.files import locked
from common.processes import from_main, is_main, process_group, rank
from engine.building import build_model, open_dataset, sequence_batches, set_seeds, start_history
from engine.checkpoint import adopt_settings, check_features, epoch_path, latest_of_run, load_weights, read_checkpoint
from engine.reporting import report_settings, start_logging
from engine.runs import identify
from engine.trainer import Trainer

_SETTINGS_OF_A_LOSS = {
    "catalogue": {"sampled_negatives"},
    "contrastive": {"lambda", "item_drop_ratio", "item_drop_coefficient", "plm_suffix_aug"},
}


def check_loss(config) -> None:
    """Check that the user has set nothing that only the other loss of UniSRec has."""
    for loss, keys in _SETTINGS_OF_A_LOSS.items():
        for key in config.given.keys() & keys if loss != config["pretrain_loss"] else ():
            raise UserError(f"{config.given[key]}: only --pretrain_loss={loss} has this setting; leave one of them out")


def pretrain(config) -> str:
    """Pre-train, in one process or in a process group, and save. Returns the path of the last checkpoint."""
    with process_group(config["device"]) as first_start:
        return _pretrain(config, first_start)


def _pretrain(config, first_start):
    """Pre-train in this process.

    After a restart by torchrun, the run continues from the last checkpoint that it saved since `first_start` (in
    seconds since 1970). Without a restart, `first_start` is None.
    """

    def read(path):  # only the main process reads, because nodes may not share the folder
        return from_main(read_checkpoint(path) if is_main() else None) if path else None

    start_logging(config)
    resume = config["resume"]
    checkpoint = read(resume)
    if checkpoint:
        adopt_settings(config, checkpoint, resume)
        check_loss(config)
    report_settings(config)
    dataset = open_dataset(config)
    if checkpoint:
        check_features(checkpoint, dataset.features, resume)
    batches = sequence_batches(config, dataset)
    model = build_model(config.model_class, config, dataset)
    if hasattr(model, "note_unseen"):
        model.note_unseen(dataset.sequences("train"))
    path = os.path.join(config["checkpoint_dir"], f"{config['model']}-{config['dataset']}-{{epoch}}.pth")
    latest = from_main(latest_of_run(path, config, first_start) if first_start and is_main() else None)
    if latest:
        resume, checkpoint = latest, read(latest)
    run = identify(config, dataset, checkpoint, resume=bool(checkpoint))
    tokens = dataset.item_names() if hasattr(model, "item_embedding") else None
    trainer = Trainer(config, model, path, tokens, run)
    set_seeds(config["seed"], rank())
    if checkpoint:
        load_weights(model, checkpoint, resume, tokens)
        trainer.resume(checkpoint, resume)
    else:
        start_history(model, batches)
    with locked(path) if is_main() else contextlib.nullcontext():
        trainer.fit(batches, save_step=config["save_step"])
    return epoch_path(path, config["epochs"])
