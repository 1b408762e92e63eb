"""Training and evaluating on one data set: UniSRec in its fine-tuning stages, and RecBole's models beside it."""

import logging
import os

from recbole.data.utils import get_dataloader
from recbole.model.abstract_recommender import SequentialRecommender

from baselines import TRAINED, UNTRAINED
from common.errors import UserError
from common.files import check_can_write
from common.processes import rank
from engine.building import build_model, open_dataset, sequence_batches, set_seeds
from engine.checkpoint import load_weights, read_checkpoint
from engine.config import check_choice, resolve_model
from engine.evaluate import Evaluation
from engine.reporting import Stopwatch, report_settings, result_path, start_logging, text_encoder, write_result
from engine.runs import identify
from engine.trainer import Progress, Trainer
from unisrec import STAGES, AllPositions, UniSRec

logger = logging.getLogger(__name__)


def finetune(config):
    """Fine-tune UniSRec (or evaluate it, with `epochs` 0) and write the result. Returns the result, dict."""
    start_logging(config)
    checkpoint = read_checkpoint(config["pretrained"]) if config["pretrained"] else None
    _settle_stage(config, checkpoint)
    report_settings(config)
    watch = Stopwatch()
    with watch("load"):
        dataset = open_dataset(config)
        model = build_model(UniSRec, config, dataset)
        tokens = dataset.item_names() if config["train_stage"] == "transductive_ft" else None
        if checkpoint:
            load_weights(model, checkpoint, config["pretrained"], tokens)
            if config["fix_enc"]:
                model.freeze_encoder()
        evaluation = Evaluation(config, dataset)
        batches = _training_batches(config, dataset, evaluation)
        run = identify(config, dataset, checkpoint)
    name = f"UniSRec-{config['dataset']}-{config['train_stage']}-{config['seed']}"
    name += "-pretrained" * bool(checkpoint) + "-evaluated" * (config["epochs"] == 0)
    return train_and_test(config, model, batches, evaluation, name, run, watch, tokens)


def run_baseline(config):
    """Train and test a model that reads rows, under the same protocol. Returns the result, dict."""
    start_logging(config)
    if config["model"] in UNTRAINED:
        config["epochs"] = 0
    report_settings(config)
    watch = Stopwatch()
    with watch("load"):
        dataset = open_dataset(config)
        evaluation = Evaluation(config, dataset)
        batches = _training_batches(config, dataset, evaluation)  # first: BERT4Rec's loader names fields for its model
        model = build_model(config.model_class, config, evaluation.parts["train"])  # some read the training rows
        run = identify(config, dataset)
    name = f"{config['model']}-{config['dataset']}-{config['seed']}"
    return train_and_test(config, model, batches, evaluation, name, run, watch, dataset.item_names())


def _training_batches(config, dataset, evaluation):
    """Batches of sequences for the models that learn from all positions, RecBole's loader of rows for the others."""
    if issubclass(config.model_class, AllPositions) and config["loss_type"] == "CE":
        return sequence_batches(config, dataset)
    return get_dataloader(config, "train")(config, evaluation.parts["train"], evaluation.sampler, shuffle=True)


def train_and_test(config, model, batches, evaluation, name, run, watch, item_tokens):
    """Train with validation, test the best epoch, write the result file. Returns the result, dict.

    The files are called `name`-ID, ID being the id of `run` (engine.runs.Run): no other run has files of these names.
    """
    path = os.path.join(config["checkpoint_dir"], f"{name}-{run.id}.pth")
    show = bool(config["show_progress"])
    check_can_write(result_path(config, path))
    set_seeds(config["seed"], rank())
    progress = Progress()
    if config["epochs"] > 0:
        trainer = Trainer(config, model, path, item_tokens, run)
        progress = trainer.fit(batches, lambda model: evaluation(model, "valid", show))
    with watch("evaluate"):
        valid = progress.best_metrics or evaluation(model, "valid", show)
        test = evaluation(model, "test", show)
    logger.info("test  %s", "  ".join(f"{key} {value:.4f}" for key, value in test.items()))
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
    )


def _settle_stage(config, checkpoint):
    """Check the stage; an evaluation of a checkpoint without id embeddings is inductive."""
    check_choice(config, "train_stage", STAGES[1:])
    check_choice(config, "loss_type", ["CE"])
    if checkpoint and config["epochs"] == 0 and "item_embedding.weight" not in checkpoint["state_dict"]:
        config["train_stage"] = "inductive_ft"


def interaction_model(name):
    """The class of a baseline: a sequential model of RecBole's that needs interactions only, or an untrained one.

    Raises:
        UserError: no such model, or one that needs more.
    """
    if name in ("FDSA", "S3Rec"):
        raise UserError(
            f"model {name}: reads item texts and comes later; models that run now: SASRec, GRU4Rec, BERT4Rec, ..."
        )
    if name in _NEED_MORE:
        raise UserError(
            f"model {name}: needs {_NEED_MORE[name]}, which these data sets do not have; "
            "choose one that reads interactions only, such as SASRec, GRU4Rec, BERT4Rec"
        )
    model = {**UNTRAINED, **TRAINED}.get(name) or resolve_model(name)
    if not issubclass(model, SequentialRecommender):
        raise UserError(f"model {name}: is no sequential model; choose one that is, such as SASRec, GRU4Rec, BERT4Rec")
    return model


_NEED_MORE = {
    **dict.fromkeys(("GRU4RecF", "SASRecF", "DIN", "DIEN"), "item attributes"),
    **dict.fromkeys(("GRU4RecKG", "KSR"), "a knowledge graph"),
}
