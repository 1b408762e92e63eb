"""Build a data set, its batches and a model from the settings, in the same way for every command."""

import contextlib
import copy
import logging
import random
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from common.errors import UserError
from common.processes import broadcast, gather, gather_objects, is_main, rank, world_size
from data import SequenceBatches, UniSRecDataset
from engine.config import Config
from engine.fast_parts import use_fast_parts
from layers.history import HistoryBias, HistoryMean

logger = logging.getLogger(__name__)
Model = TypeVar("Model", bound=nn.Module)


def set_seeds(seed: int, rank: int = 0) -> None:
    """Seed Python, numpy and torch. Processes with different ranks draw different random numbers."""
    random.seed(seed + rank)
    np.random.seed((seed + rank) % 2**32)
    torch.manual_seed(seed + rank)


def open_dataset(config: Config) -> UniSRecDataset:
    """Open a data set and log a summary of it."""
    dataset = UniSRecDataset(config)
    if not is_main():
        gather_objects(None)  # wait until the main process has parsed the training file, then read its cache
    summary = str(dataset)  # parses the file. In the logging call, a UserError would print a traceback
    if is_main():
        gather_objects(None)
    logger.info("%s", summary)
    return dataset


def sequence_batches(config: Config, dataset: UniSRecDataset) -> SequenceBatches:
    """The training batches. Each process gets its share of every batch."""
    more: dict[str, Any] = {"rank": rank(), "world_size": world_size()}
    loss = config["pretrain_loss"] if config["train_stage"] == "pretrain" else None
    if loss == "catalogue":
        more["by_domain"] = True
    elif loss == "contrastive":
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


def build_model(model_class: type[Model], config: Config, dataset: UniSRecDataset) -> Model:
    """Build a model on the device that the settings name.

    The seed determines the initial weights, so they are the same in every process. With several processes, the model
    gets a function that gathers tensors from all of them. With `--fast=false`, the model stays plain.

    Raises:
        UserError: the model refuses a setting or a combination of settings.
    """
    set_seeds(config["seed"])
    try:
        model: Any = model_class(config, dataset)
    except ValueError as error:
        raise UserError(f"{config['model']}: {error}; change that setting") from None
    if config["fast"]:
        use_fast_parts(model)
    if world_size() > 1:
        model.gather = gather
    return model.to(config["device"])


def start_history(model: Any, batches: SequenceBatches, *parts: str) -> None:
    """Choose the first values of the parts for the history from about 2,000 predictions of the training data.

    They have few values, which need few data, but more steps than there are in a training on few users. All processes
    get the values of the main process.

    Args:
        model: parts that it does not have are skipped.
        batches: the training batches.
        parts: names of attributes of the model. Default: `history_bias` and `history_mean`.
    """
    attributes = [getattr(model, name, None) for name in parts or ("history_bias", "history_mean")]
    found = [part for part in attributes if isinstance(part, HistoryBias | HistoryMean)]
    if not found:
        return
    few = copy.copy(batches)
    few.batch_size = min(batches.batch_size, 2048)
    batch = next(iter(few)).to(next(model.parameters()).device)
    with _evaluating(model):
        for part in found:
            part.start(batch, model.calculate_loss)
    broadcast(parameter.detach() for part in found for parameter in part.parameters())


@contextlib.contextmanager
def _evaluating(model):
    """Within the block, the model has neither dropout nor label smoothing."""
    training, smoothing = model.training, getattr(model, "label_smoothing", None)
    model.eval()
    if smoothing is not None:
        model.label_smoothing = 0.0
    yield
    model.train(training)
    if smoothing is not None:
        model.label_smoothing = smoothing
