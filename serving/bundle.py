"""Write a checkpoint as a bundle, a folder that can be shared: python -m serving.bundle -p CHECKPOINT --out FOLDER

A fine-tuned model needs its data set, `-d NAME`. The bundle then holds the items, which `recommend.py` recommends. A
pre-trained model is shared without items. `engine.bundle` describes the files. `finetune.py -p FOLDER` starts from a
bundle.
"""

import argparse
import os
from typing import Any

import numpy as np
import polars as pl
import torch

from common.errors import UserError, run_command
from dataset.preprocessing.splits import read_show_columns
from dataset.preprocessing.texts import read_texts
from engine.building import build_model, open_dataset
from engine.bundle import write_bundle
from engine.checkpoint import adopt_settings, check_features, load_weights, read_checkpoint, stored_settings
from engine.config import build_config
from unisrec import UniSRec


def main(argv: list[str]) -> None:
    """Run the command. It is described at the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("-p", "--pretrained", metavar="CHECKPOINT", required=True, help="of pretrain.py or finetune.py")
    parser.add_argument("-d", "--dataset", metavar="NAME", help="data set whose items the bundle holds")
    parser.add_argument("--data_path", metavar="DIR", help="folder of the data sets (default: dataset/downstream)")
    parser.add_argument("--out", metavar="FOLDER", required=True, help="folder of the bundle; its model card is kept")
    options = parser.parse_args(argv)
    make_bundle(options.pretrained, options.out, options.dataset, options.data_path)
    sizes = {name: os.path.getsize(os.path.join(options.out, name)) for name in sorted(os.listdir(options.out))}
    print(f"written: {options.out} ({', '.join(f'{name} {size:,} bytes' for name, size in sizes.items())})")


def make_bundle(path: str, folder: str, name: str | None = None, data_path: str | None = None) -> None:
    """Write the bundle of a checkpoint.

    Args:
        path: the checkpoint.
        folder: of the bundle. Its model card is kept.
        name: the data set that a fine-tuned model was trained on. None for a pre-trained model.
        data_path: folder of the data sets. None: as in the settings.

    Raises:
        UserError: the checkpoint has no settings, or does not fit the data set.
    """
    checkpoint = read_checkpoint(path)
    if not stored_settings(checkpoint) or not checkpoint.get("features"):
        raise UserError(
            f"{path}: does not say its settings or its text encoder, as all checkpoints of the published code; "
            "a bundle needs them, so pre-train or fine-tune again"
        )
    items = None
    if name:
        items = items_of(path, checkpoint, name, data_path)
    elif checkpoint["train_stage"] != "pretrain":
        raise UserError(f"{path}: is fine-tuned; give its data set with -d, so that the bundle has its items")
    write_bundle(folder, checkpoint, items)


def items_of(
    path: str, checkpoint: dict[str, Any], name: str, data_path: str | None
) -> tuple[pl.DataFrame, torch.Tensor]:
    """The items of a data set, with their representations by the model of a checkpoint. See `write_bundle`.

    Raises:
        UserError: the checkpoint was pre-trained, or the data set is not the one that it was fine-tuned on.
    """
    if checkpoint["train_stage"] == "pretrain":
        raise UserError(f"{path}: is pre-trained and has no items of its own; leave out -d, or fine-tune it on {name}")
    if checkpoint["model"] != "UniSRec":
        raise UserError(f"{path}: holds a {checkpoint['model']}; only UniSRec itself can be a bundle")
    stored = stored_settings(checkpoint)
    options = {key: stored[key] for key in ("plm_suffix", "train_fraction", "holdout_items", "seed") if key in stored}
    options |= {"train_stage": checkpoint["train_stage"]} | ({"data_path": data_path} if data_path else {})
    config = build_config(UniSRec, name, "finetune", options)
    adopt_settings(config, checkpoint, path)
    dataset = open_dataset(config)
    check_features(checkpoint, dataset.features, path)
    model = build_model(UniSRec, config, dataset).eval()
    names = dataset.item_names()
    load_weights(model, checkpoint, path, names)
    with torch.inference_mode():
        vectors = model.item_table().clone()
    counts = np.bincount(dataset.sequences("train").items, minlength=len(names))[1:]
    texts = read_texts(os.path.join(config["data_path"], f"{name}.text"))
    table = pl.DataFrame({"id": names[1:], "text": [texts.get(item, "") for item in names[1:]], "count": counts})
    shown = read_show_columns(config["data_path"], name)
    return table if shown is None else table.join(shown, on="id", how="left", maintain_order="left"), vectors


if __name__ == "__main__":
    run_command(main)
