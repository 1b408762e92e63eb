"""Training and evaluation on one data set, for UniSRec in its fine-tuning stages and for baselines."""

import contextlib
import logging
import os

import numpy as np
from recbole.data.utils import get_dataloader

from baselines import entry
from common.files import check_can_write, locked
from common.processes import is_main, rank
from engine.building import build_model, open_dataset, sequence_batches, set_seeds, start_history
from engine.checkpoint import adopt_settings, check_features, load_weights, read_checkpoint
from engine.evaluate import Evaluation
from engine.groups import format_groups, group_metrics
from engine.item_to_item import add_item_to_item
from engine.ranks_file import write_ranks
from engine.reporting import (
    Stopwatch,
    remove_old_result,
    report_settings,
    result_path,
    start_logging,
    text_encoder,
    write_result,
)
from engine.runs import identify
from engine.trainer import Trainer
from engine.training_state import Progress
from engine.unseen import choose_unseen_bias
from layers.encoder import AllPositions

logger = logging.getLogger(__name__)


def finetune(config):
    """Fine-tune UniSRec or a model derived from it, or only evaluate it if `epochs` is 0. Returns the result, dict."""
    start_logging(config)
    checkpoint = read_checkpoint(config["pretrained"]) if config["pretrained"] else None
    if checkpoint:
        _settle_stage(config, checkpoint)
        adopt_settings(config, checkpoint, config["pretrained"])
    report_settings(config)
    watch = Stopwatch()
    with watch("load"):
        dataset = open_dataset(config)
        if checkpoint:
            check_features(checkpoint, dataset.features, config["pretrained"])
        model = build_model(config.model_class, config, dataset)
        tokens = dataset.item_names() if config["train_stage"] == "transductive_ft" else None
        evaluation = Evaluation(config, dataset)
        batches = _training_batches(config, dataset, evaluation)
        run = identify(config, dataset, checkpoint)
    with watch("evaluate"):
        start = _start(config, model, dataset, batches, evaluation, checkpoint, tokens)
    name = f"{config['model']}-{config['dataset']}-{config['train_stage']}-{config['seed']}"
    name += ("-pretrained" if checkpoint else "") + ("-evaluated" if config["epochs"] == 0 else "")
    return train_and_test(config, model, batches, evaluation, name, run, watch, tokens, start)


def _has_ids(checkpoint):
    """Whether a checkpoint has id embeddings, so that it belongs to one catalogue."""
    return "item_embedding.weight" in checkpoint["state_dict"]


def _start(config, model, dataset, batches, evaluation, checkpoint, tokens):
    """Choose the initial weights: those of the checkpoint, else new ones with what a look at the data says.

    A warning is logged if the weights of the checkpoint are worse than new ones.

    Returns:
        dict: the metrics of the initial weights on valid.
    """
    show, metric, learns = bool(config["show_progress"]), config["valid_metric"].lower(), config["epochs"] > 0
    own = checkpoint and _has_ids(checkpoint)  # the checkpoint was trained on this catalogue
    model.note_unseen(dataset.sequences("train"))
    if not own:
        model.start_ids(dataset.sequences("train"))
        if learns:
            start_history(model, batches)
            choose_unseen_bias(model, evaluation)
        untrained = evaluation(model, "valid", show)
        if not checkpoint:
            return untrained
    load_weights(model, checkpoint, config["pretrained"], tokens)
    if config["fix_enc"]:
        model.freeze_encoder()
    if learns and model.item_to_item is not None:
        model.item_to_item.switch_off()  # the model learns without these logits
    if learns and checkpoint.get("train_stage") == "pretrain":
        start_history(model, batches, "history_mean")
        choose_unseen_bias(model, evaluation)
    if config["unseen_bias"] is not None and model.unseen_bias is not None:
        model.unseen_bias.fill_(config["unseen_bias"])
    metrics = evaluation(model, "valid", show)
    gain = (metrics[metric] - untrained[metric]) * (1 if config["valid_metric_bigger"] else -1) if not own else 0
    if gain < 0:
        logger.warning(
            "warning: %s has %s %.4f on valid, new weights have %.4f: this pre-training does not help here; compare "
            "with a training from scratch, without -p",
            config["pretrained"], metric, metrics[metric], untrained[metric],
        )  # fmt: skip
    return metrics


def run_baseline(config):
    """Train and test a model that does not derive from UniSRec, under the same protocol. Returns the result, dict."""
    start_logging(config)
    if not entry(config.model_class).trains:
        config["epochs"] = 0
    path = config["pre_model_path"] if hasattr(config.model_class, "only_pretrained") else ""
    checkpoint = read_checkpoint(path) if path else None
    if checkpoint:
        adopt_settings(config, checkpoint, path)
    report_settings(config)
    watch = Stopwatch()
    with watch("load"):
        dataset = open_dataset(config)
        evaluation = Evaluation(config, dataset)
        # before the model: BERT4Rec's loader defines fields that its model reads
        batches = _training_batches(config, dataset, evaluation)
        model = build_model(config.model_class, config, evaluation.parts["train"])  # some models read the training rows
        if checkpoint:
            load_pretrained(model, checkpoint, path, dataset.item_names())
        if config["epochs"] > 0:
            start_history(model, batches)
        run = identify(config, dataset, checkpoint)
    name = f"{config['model']}-{config['dataset']}-{config['seed']}"
    return train_and_test(config, model, batches, evaluation, name, run, watch, dataset.item_names())


def load_pretrained(model, checkpoint, path, item_tokens):
    """Load the weights of a baseline's own pre-training, without the parts that only that stage has."""
    kept = {name: part for name, part in checkpoint["state_dict"].items() if not name.startswith(model.only_pretrained)}
    load_weights(model, {**checkpoint, "state_dict": kept}, path, item_tokens)


def _training_batches(config, dataset, evaluation):
    """Batches of sequences for models that learn from all positions, RecBole's loader of rows for other models."""
    if issubclass(config.model_class, AllPositions) and config["loss_type"] == "CE":
        return sequence_batches(config, dataset)
    return get_dataloader(config, "train")(config, evaluation.parts["train"], evaluation.sampler, shuffle=True)


def train_and_test(config, model, batches, evaluation, name, run, watch, item_tokens, start=None):
    """Train with validation, test the best epoch, write the result file. Returns the result, dict.

    `start` holds the metrics of the initial weights on valid. They are the result if no epoch is better.

    The file names are `name`-ID, where ID is the id of `run` (an `engine.runs.Run`). No other run has these file names.
    They are locked, so that the same run cannot be started twice at the same time.
    """
    path = os.path.join(config["checkpoint_dir"], f"{name}-{run.id}.pth")
    files = [path, result_path(config, path), *filter(None, [config["ranks_file"]])]
    for file in files:
        check_can_write(file)
    with contextlib.ExitStack() as locks:
        if is_main():
            for file in dict.fromkeys(map(os.path.realpath, files)):
                locks.enter_context(locked(file))
            remove_old_result(result_path(config, path), run.id)
        return _train_and_test(config, model, batches, evaluation, path, run, watch, item_tokens, start)


def _train_and_test(config, model, batches, evaluation, path, run, watch, item_tokens, start):
    show = bool(config["show_progress"])
    set_seeds(config["seed"], rank())
    progress = Progress(best_metrics=start)
    if config["epochs"] > 0:
        trainer = Trainer(config, model, path, item_tokens, run)
        progress = trainer.fit(batches, lambda model: evaluation(model, "valid", show), start=start)
        with watch("evaluate"):
            changed = hasattr(model, "unseen") and choose_unseen_bias(model, evaluation)
            if getattr(model, "item_to_item", None) is not None:
                add_item_to_item(model, evaluation)
                changed = True
            if changed:
                progress.best_metrics = evaluation(model, "valid", show)
        if changed:
            trainer.save(path, optimizer=False, epoch=progress.best_epoch)
    with watch("evaluate"):
        valid = progress.best_metrics or evaluation(model, "valid", show)
        table, test = evaluation.evaluate(model, "test", show)
    logger.info("test  %s", "  ".join(f"{key} {value:.4f}" for key, value in test.items()))
    groups = _groups(config, evaluation, table) if config["groups"] else None
    if config["ranks_file"] and is_main():
        write_ranks(config["ranks_file"], table, evaluation.dataset)
        logger.info("ranks: %s", config["ranks_file"])
    seconds = {
        **watch.seconds,
        "train": progress.train_seconds,
        "evaluate": watch.seconds["evaluate"] + progress.valid_seconds,
    }
    speed = progress.predictions / progress.train_seconds if progress.train_seconds else None
    return write_result(
        result_path(config, path),
        config,
        path if progress.epoch else config["pretrained"],
        progress.epoch,
        {"valid": valid, "test": test},
        seconds,
        speed,
        run=run.id,
        text_encoder=text_encoder(evaluation.parts["train"]),
        best_epoch=progress.best_epoch,
        groups=groups,
    )


def _groups(config, evaluation, table):
    """Compute the test metrics by group and log them as a table. Returns a dict, see `group_metrics`."""
    counts = np.bincount(evaluation.dataset.sequences("train").items, minlength=evaluation.dataset.item_num)
    groups = group_metrics(table, counts, evaluation.by_rank, config["topk"])
    for line in format_groups(groups):
        logger.info("%s", line)
    return groups


def _settle_stage(config, checkpoint):
    """Without training, a checkpoint without id embeddings is evaluated in the inductive stage."""
    if config["epochs"] == 0 and not _has_ids(checkpoint):
        if config["train_stage"] != "inductive_ft":
            logger.info("%s has no id embeddings: evaluating on text alone", config["pretrained"])
        config["train_stage"] = "inductive_ft"
