"""A bundle: a model as a folder that can be shared. It holds weights and plain data, nothing pickled.

    model.safetensors   the weights
    config.json         stage, settings, text encoder, sources, versions, and the checksum of model.safetensors
    README.md           the model card
    items.parquet       the items of a fine-tuned model: id, text, how often each occurs in the training data, and
                        columns to show, such as title, image and url
    items.safetensors   their representations, in the same order
    onnx/               two graphs of a fine-tuned model, written by `serving.export` on request

`engine.checkpoint.read_checkpoint` reads a bundle like a checkpoint file.
"""

import importlib.metadata
import os
import platform
import shutil
from typing import Any

import polars as pl
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from common.errors import UserError
from common.files import file_sha256, read_json, staged_folder, write_json
from engine.settings import NO_EFFECT, command_files, read_yaml

FORMAT = "unisrec-bundle-1"
WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
ITEMS, VECTORS = "items.parquet", "items.safetensors"
ONNX, SCORING = "onnx", "scoring.json"
_KEYS = ("model", "train_stage", "epoch", "features", "item_tokens", "run")


_CARD = """---
library_name: unisrec
tags: [sequential-recommendation, text-based-recommendation]
---

# {name}

A UniSRec model: it recommends the next item from the texts of the items before it.

| | |
|---|---|
| stage | {stage} |
| trained on | {dataset}, {epoch} epochs |
| recipe | {recipe} |
| text encoder | {encoder}, {pooling} pooling, width {width} |
| hidden size, layers, experts | {hidden_size}, {n_layers}, {n_exps} |

{use}
"""
_USE_PRETRAINED = """The item texts of another shop must be encoded by the same encoder. Then this command
fine-tunes the model. With `--epochs=0` it is used without training.

    python finetune.py -d NAME -p THIS_FOLDER"""
_USE_FINETUNED = """These commands recommend items of its shop, in the shell and over HTTP:

    python recommend.py -m THIS_FOLDER --history ID,ID
    python serve.py THIS_FOLDER

This command writes two ONNX graphs to the folder `onnx`, for programs without torch: text vectors to item vectors, and
histories of item vectors to user vectors.

    python -m serving.export THIS_FOLDER"""


def write_bundle(
    folder: str, checkpoint: dict[str, Any], items: tuple[pl.DataFrame, torch.Tensor] | None = None
) -> None:
    """Write a bundle. A model card that is already in the folder is kept.

    A model without items of its own was pre-trained for other shops. Its matrices are stored in half precision, and
    without the whitening, which belongs to the catalogue of a shop.

    Args:
        folder: created if it is missing.
        checkpoint: from `engine.checkpoint.read_checkpoint`, with settings and a description of the text features.
            Settings that say nothing about the model are left out.
        items: the columns `id`, `text` and `count`, and the representations of the items, float32 [N, H].

    Raises:
        UserError: the folder is not writable, or holds items, and none are given.
    """
    state = checkpoint["state_dict"]
    if items is None and os.path.exists(os.path.join(folder, ITEMS)):
        raise UserError(f"{folder}: holds the bundle of a fine-tuned model with its items; choose another folder")
    if items is None:
        state = {name: _compact(tensor) for name, tensor in state.items() if not name.startswith("whitening.")}
    config = {"format": FORMAT} | {key: checkpoint.get(key) for key in _KEYS}
    command = "pretrain" if checkpoint.get("train_stage") == "pretrain" else "finetune"
    known = {"dataset"}.union(*(read_yaml(file) for file in command_files(command))) - NO_EFFECT
    config["settings"] = {key: value for key, value in checkpoint["config"].items() if key in known}
    config["versions"] = {"python": platform.python_version(), "torch": importlib.metadata.version("torch")}
    with staged_folder(folder) as staging:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, os.path.join(staging, WEIGHTS))
        if items is not None:
            table, vectors = items
            table.write_parquet(os.path.join(staging, ITEMS))
            save_file({"vectors": vectors.contiguous()}, os.path.join(staging, VECTORS))
        config["sha256"] = file_sha256(os.path.join(staging, WEIGHTS))
        write_json(os.path.join(staging, CONFIG), config)
        if not os.path.exists(os.path.join(folder, CARD)):
            with open(os.path.join(staging, CARD), "w", encoding="utf-8") as file:
                file.write(_model_card(folder, checkpoint))
    _remove_old_graphs(folder, config["sha256"])


def _remove_old_graphs(folder, checksum):
    """Remove ONNX graphs that were exported from other weights."""
    scoring = os.path.join(folder, ONNX, SCORING)
    if os.path.isfile(scoring) and read_json(scoring)["model_sha256"] != checksum:
        shutil.rmtree(os.path.dirname(scoring))


def _compact(tensor):
    """Half precision for matrices. Vectors are few and include the largest numbers, so they stay as they are."""
    return tensor.half() if tensor.dim() > 1 and tensor.is_floating_point() else tensor


def _model_card(folder, checkpoint):
    """The text of a model card: what is known from the checkpoint. The name of the folder is that of the model."""
    settings = checkpoint["config"]
    features = {"encoder": "unknown encoder", "pooling": "unknown"} | checkpoint["features"]
    about = {"name": os.path.basename(os.path.abspath(folder)), "stage": checkpoint.get("train_stage")}
    about |= {key: settings.get(key) for key in ("dataset", "recipe", "hidden_size", "n_layers", "n_exps")}
    about |= {key: features[key] for key in ("encoder", "pooling", "width")}
    about["use"] = _USE_PRETRAINED if about["stage"] == "pretrain" else _USE_FINETUNED
    return _CARD.format(epoch=checkpoint.get("epoch"), **about)


def read_bundle(folder: str) -> dict[str, Any]:
    """Read a bundle as `engine.checkpoint.read_checkpoint` returns a checkpoint, with all weights in float32.

    Raises:
        UserError: a file is missing, damaged or of another format.
    """
    path = os.path.join(folder, CONFIG)
    config = read_json(path)
    found = config.get("format") if isinstance(config, dict) else None
    if found != FORMAT or not isinstance(config.get("settings"), dict):
        raise UserError(f"{path}: format {found!r}, expected {FORMAT!r}; write the bundle again")
    weights = os.path.join(folder, WEIGHTS)
    if not os.path.isfile(weights):
        raise UserError(f"{weights}: no such file; the bundle is incomplete, copy or write it again")
    if file_sha256(weights) != config.get("sha256"):
        raise UserError(
            f"{weights}: its checksum is not the one in {CONFIG}; the file is damaged, copy or write it again"
        )
    try:
        state = load_file(weights)
    except SafetensorError as error:
        raise UserError(f"{weights}: cannot be read ({error}); copy or write it again") from None
    state = {name: tensor.float() if tensor.dtype is torch.half else tensor for name, tensor in state.items()}
    return {**{key: config.get(key) for key in _KEYS}, "config": config["settings"], "state_dict": state}
