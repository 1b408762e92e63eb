"""Training and evaluating on one data set: UniSRec in its fine-tuning stages, and RecBole's models beside it."""

import logging
import os

from recbole.data.utils import get_dataloader

from common.errors import UserError
from data import SequenceBatches
from engine.checkpoint import load_weights, read_checkpoint
from engine.evaluate import Evaluation
from engine.setup import (Stopwatch, build_model, open_dataset, result_path, set_seeds, start_logging, write_result)
from engine.trainer import Trainer
from unisrec import STAGES, UniSRec

logger = logging.getLogger(__name__)


def finetune(config):
    """Fine-tune UniSRec (or evaluate it, with `epochs` 0) and write the result. Returns the result, dict."""
    start_logging()
    checkpoint = read_checkpoint(config["pretrained"]) if config["pretrained"] else None
    _settle_stage(config, checkpoint)
    watch = Stopwatch()
    with watch("load"):
        dataset = open_dataset(config)
        model = build_model(UniSRec, config, dataset)
        tokens = dataset.field2id_token[dataset.iid_field] if config["train_stage"] == "transductive_ft" else None
        if checkpoint:
            load_weights(model, checkpoint, config["pretrained"], tokens)
            if config["fix_enc"]:
                model.freeze_encoder()
        batches = SequenceBatches(dataset.sequences("train"), config["train_batch_size"], dataset.window,
                                  config["train_mode"], config["window_stride"], config["seed"])
        evaluation = Evaluation(config, dataset)
    name = f"UniSRec-{config['dataset']}-{config['train_stage']}-{config['seed']}{'-pretrained' if checkpoint else ''}"
    return train_and_test(config, model, batches, evaluation, name, watch, tokens)


def run_baseline(config):
    """Train and test one of RecBole's sequential models under the same protocol. Returns the result, dict."""
    start_logging()
    watch = Stopwatch()
    with watch("load"):
        dataset = open_dataset(config)
        model = build_model(config.model_class, config, dataset)
        evaluation = Evaluation(config, dataset)
        batches = get_dataloader(config, "train")(config, evaluation.parts["train"], evaluation.sampler, shuffle=True)
    tokens = dataset.field2id_token[dataset.iid_field]
    name = f"{config['model']}-{config['dataset']}-{config['seed']}"
    return train_and_test(config, model, batches, evaluation, name, watch, tokens)


def train_and_test(config, model, batches, evaluation, name, watch, item_tokens):
    """Train with validation, test the best epoch, write the result file. Returns the result, dict."""
    path = os.path.join(config["checkpoint_dir"], f"{name}.pth")
    show = bool(config["show_progress"])
    set_seeds(config["seed"])
    trainer, progress = None, None
    if config["epochs"] > 0:
        trainer = Trainer(config, model, path, item_tokens)

        def validate(model):
            with watch("evaluate"):
                return evaluation(model, "valid", show)

        with watch("all"):
            progress = trainer.fit(batches, validate)
    with watch("evaluate"):
        valid = progress.best_metrics if progress and progress.best_metrics else evaluation(model, "valid", show)
        test = evaluation(model, "test", show)
    seconds = dict(watch.seconds)
    if trainer:
        before_test = watch.seconds["evaluate"]
        del before_test
    logger.info("test  %s", "  ".join(f"{key} {value:.4f}" for key, value in test.items()))
    return write_result(result_path(config, path), config, path if trainer else config["pretrained"],
                        progress.epoch if progress else 0, {"valid": valid, "test": test}, seconds, None,
                        best_epoch=progress.best_epoch if progress else None)


def _settle_stage(config, checkpoint):
    """Check the stage; an evaluation of a checkpoint without id embeddings is inductive.

    Raises:
        UserError: an unknown stage or training mode.
    """
    stages = STAGES[1:]
    if config["train_stage"] not in stages:
        raise UserError(f"option --train_stage: found {config['train_stage']!r}, expected {' or '.join(stages)}")
    if config["train_mode"] not in ("sequences", "rows"):
        raise UserError(f"option --train_mode: found {config['train_mode']!r}, expected sequences or rows")
    if checkpoint and config["epochs"] == 0 and "item_embedding.weight" not in checkpoint["state_dict"]:
        config["train_stage"] = "inductive_ft"
