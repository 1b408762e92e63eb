"""Write a checkpoint as a bundle, a folder that can be shared: python -m serving.bundle -p CHECKPOINT --out FOLDER

`engine.bundle` describes the files. `finetune.py -p FOLDER` starts from a bundle.
"""

import argparse
import os
from typing import Any

from common.errors import UserError, run_command
from engine.bundle import CARD, CONFIG, WEIGHTS, write_bundle
from engine.checkpoint import read_checkpoint, stored_settings

_CARD = """---
library_name: unisrec
license: mit
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

The item texts of another shop must be encoded by the same encoder. Then `python finetune.py -d NAME -p THIS_FOLDER`
fine-tunes the model. With `--epochs=0` it is used without training.
"""


def main(argv: list[str]) -> None:
    """Run the command. It is described at the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("-p", "--pretrained", metavar="CHECKPOINT", required=True, help="of pretrain.py or finetune.py")
    parser.add_argument("--out", metavar="FOLDER", required=True, help="folder of the bundle; its model card is kept")
    options = parser.parse_args(argv)
    checkpoint = read_checkpoint(options.pretrained)
    settings = stored_settings(checkpoint)
    if not settings or not checkpoint.get("features"):
        raise UserError(
            f"{options.pretrained}: does not say its settings or its text encoder, as all checkpoints of the published "
            "code; a bundle needs them, so pre-train or fine-tune again"
        )
    write_bundle(options.out, checkpoint, settings, model_card(options.out, checkpoint, settings))
    sizes = {name: os.path.getsize(os.path.join(options.out, name)) for name in (WEIGHTS, CONFIG, CARD)}
    print(f"written: {options.out} ({', '.join(f'{name} {size:,} bytes' for name, size in sizes.items())})")


def model_card(folder: str, checkpoint: dict[str, Any], settings: dict[str, Any]) -> str:
    """The text of a model card: what is known from the checkpoint.

    Args:
        folder: its name is the name of the model.
        checkpoint: from `read_checkpoint`.
        settings: of the checkpoint.
    """
    features = {"encoder": "unknown encoder", "pooling": "unknown"} | checkpoint["features"]
    about = {"name": os.path.basename(os.path.abspath(folder)), "stage": checkpoint.get("train_stage")}
    about |= {key: settings.get(key) for key in ("dataset", "recipe", "hidden_size", "n_layers", "n_exps")}
    about |= {key: features[key] for key in ("encoder", "pooling", "width")}
    return _CARD.format(epoch=checkpoint.get("epoch"), **about)


if __name__ == "__main__":
    run_command(main)
