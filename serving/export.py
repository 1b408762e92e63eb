"""Export the model of a bundle as two ONNX graphs: python -m serving.export FOLDER

Other programs then recommend without torch (docs/serving.md, examples/recommend_onnx.py). FOLDER/onnx gets

    items.onnx     text vectors to item vectors. The whitening is part of it
    user.onnx      histories of item vectors to user vectors of length 1
    scoring.json   what is added to the cosines of user and items, and the checksum of the weights

The bundle needs items of its own: a whitening belongs to a catalogue.
"""

import argparse
import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import UserError, run_command
from common.files import read_json, staged_folder, write_json
from engine.bundle import CONFIG, ITEMS, ONNX, SCORING
from serving.recommender import Recommender
from unisrec import UniSRec

ITEM_GRAPH, USER_GRAPH = "items.onnx", "user.onnx"


class ItemGraph(nn.Module):
    """Text vectors to item vectors, float32 [n, D] -> [n, H]. The id embeddings of a transductive model are left out.

    Args:
        model: of a fine-tuned bundle.
    """

    def __init__(self, model: UniSRec):
        super().__init__()
        self.whitening = nn.Identity() if model.whitening is None else model.whitening[0]
        self.adaptor = model.moe_adaptor

    def forward(self, texts: Tensor) -> Tensor:
        return self.adaptor(self.whitening(texts))


class UserGraph(nn.Module):
    """Item vectors of histories to user vectors of length 1, float32 [B, L, H] and lengths int64 [B] -> [B, H]."""

    def __init__(self, model: UniSRec):
        super().__init__()
        self.model = model

    def forward(self, vectors: Tensor, lengths: Tensor) -> Tensor:
        return F.normalize(self.model.encode_histories(vectors, lengths), dim=-1)


def main(argv: list[str]) -> None:
    """Run the command. It is described at the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("bundle", metavar="FOLDER", help="the bundle of a fine-tuned model; it gets the folder onnx")
    folder = parser.parse_args(argv).bundle
    export(folder)
    print(f"written: {os.path.join(folder, ONNX)}")


def export(folder: str) -> None:
    """Write the folder `onnx` of a bundle. It takes about 20 seconds.

    Raises:
        UserError: the bundle is damaged, or has no items of its own.
    """
    if os.path.isdir(folder) and os.path.exists(os.path.join(folder, CONFIG)):
        if not os.path.isfile(os.path.join(folder, ITEMS)):
            raise UserError(
                f"{folder}: has no items of its own, and without a catalogue there is no whitening; fine-tune it, "
                "or load it with items and save it (Recommender.save_pretrained)"
            )
    recommender = Recommender.from_pretrained(folder)
    model = recommender.model
    histories = torch.zeros(3, 2, model.hidden_size), torch.tensor([2, 1, 1])
    with staged_folder(os.path.join(folder, ONNX)) as staging:
        _write_graph(
            os.path.join(staging, ITEM_GRAPH),
            ItemGraph(model),
            (torch.zeros(2, model.features.width),),
            {"texts": {0: "items"}},
            "vectors",
        )
        _write_graph(
            os.path.join(staging, USER_GRAPH),
            UserGraph(model),
            histories,
            {"vectors": {0: "batch", 1: "length"}, "lengths": {0: "batch"}},
            "user",
        )
        checksum = read_json(os.path.join(folder, CONFIG))["sha256"]
        write_json(os.path.join(staging, SCORING), _scoring(recommender, checksum))


def _scoring(recommender, checksum) -> dict[str, Any]:
    """What a score has beside the cosine. Logits are multiplied by the temperature, as a score is a cosine."""
    model, unseen_bias = recommender.model, recommender.unseen_biases()[0]
    bias, weights = model.history_bias, model.item_to_item
    used = weights is not None and weights.factor
    return {
        "model_sha256": checksum,
        "max_history": model.max_seq_length,
        "history_bias": [] if bias is None else (bias.values() * model.temperature).tolist(),
        "item_to_item_factor": float(weights.factor * model.temperature) if used else 0.0,
        "item_to_item_decay": float(weights.decay) if used else 1.0,
        "unseen_bias": unseen_bias,
        "unseen_rows": recommender.unseen_rows() if unseen_bias else [],
    }


def _write_graph(path, module, example, sizes, output):
    """Export a module whose inputs have the names and the dynamic sizes in `sizes`."""
    with _quiet():
        torch.onnx.export(
            module.eval(),
            example,
            path,
            input_names=list(sizes),
            output_names=[output],
            dynamic_shapes=tuple(sizes.values()),
            external_data=False,
            verbose=False,
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence torch's exporter, which warns of packages that are missing and of its own internals."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


if __name__ == "__main__":
    run_command(main)
