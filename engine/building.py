"""From settings to a data set, its batches and a model, the same for every command."""

import logging
import random

import numpy as np
import torch

from common.errors import UserError
from common.processes import gather, gather_objects, is_main, rank, world_size
from data import SequenceBatches, UniSRecDataset

logger = logging.getLogger(__name__)


def set_seeds(seed, rank=0):
    """Seed Python, numpy and torch; each rank draws its own noise and dropout."""
    random.seed(seed + rank)
    np.random.seed((seed + rank) % 2**32)
    torch.manual_seed(seed + rank)


def open_dataset(config):
    """Open a data set and say what is in it. Returns UniSRecDataset."""
    dataset = UniSRecDataset(config)
    if not is_main():
        gather_objects(None)  # the main process reads the training file, the others what it has cached
    summary = str(dataset)  # not inside logging, which would print a traceback of an error
    if is_main():
        gather_objects(None)
    logger.info("%s", summary)
    return dataset


def sequence_batches(config, dataset):
    """This process's share of the training sequences, as the settings cut and order them. Returns SequenceBatches."""
    more = {"rank": rank(), "world_size": world_size()}
    if config["train_stage"] == "pretrain":
        more["augment_ratios"] = {key: config[key] for key in ("item_drop_ratio", "item_drop_coefficient")}
        more["n_items"] = dataset.catalogue.n_items
    return SequenceBatches(
        dataset.sequences("train"),
        config["train_batch_size"],
        dataset.max_history,
        config["predictions_per_row"],
        config["seed"],
        **more,
    )


def build_model(model_class, config, dataset):
    """Make a model with the initial weights that the seed gives, the same on every rank, and let it gather what it
    compares from all of them. Returns the model."""
    set_seeds(config["seed"])
    try:
        model = model_class(config, dataset)
    except ValueError as error:
        raise UserError(f"{config['model']}: {error}; change that setting") from None
    if world_size() > 1:
        model.gather = gather
    return model.to(config["device"])
