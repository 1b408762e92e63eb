"""Recommend with onnxruntime and numpy only: python examples/recommend_onnx.py FOLDER ROW,ROW,...

FOLDER is a bundle with graphs (`python -m serving.export FOLDER`). A row is a row of its items.parquet, counted from 0;
the history has the oldest item first. docs/serving.md explains each part of the score.
"""

import json
import sys

import numpy as np
import onnxruntime


class OnnxRecommender:
    """The scores of `serving.recommender.Recommender`, without torch."""

    def __init__(self, folder: str):
        with open(f"{folder}/onnx/scoring.json", encoding="utf-8") as file:
            self.scoring = json.load(file)
        self.items, self.user = (onnxruntime.InferenceSession(f"{folder}/onnx/{name}.onnx") for name in GRAPHS)
        self.vectors = read_tensor(f"{folder}/items.safetensors", "vectors")  # [N, H]; 0 for a removed item
        self.added = np.zeros(len(self.vectors), np.float32)
        self.added[self.scoring["unseen_rows"]] = self.scoring["unseen_bias"]
        if self.scoring["item_to_item_factor"]:
            names = ("item_to_item.columns", "item_to_item.values")
            self.columns, self.values = (read_tensor(f"{folder}/model.safetensors", name) for name in names)

    def add_items(self, texts: np.ndarray) -> None:
        """Add items as new rows. `texts` are vectors of the text encoder, float32 [n, D], n at least 1."""
        self.vectors = np.concatenate([self.vectors, self.items.run(None, {"texts": texts})[0]])
        self.added = np.append(self.added, np.zeros(len(texts), np.float32))

    def scores(self, history: list[int]) -> np.ndarray:
        """The scores of all rows, float32 [N], for a history of rows, oldest first."""
        history = history[-self.scoring["max_history"] :]
        inputs = {"vectors": self.vectors[None, history], "lengths": np.array([len(history)])}
        (user,) = self.user.run(None, inputs)[0]  # [H], of length 1
        cosines = self.vectors @ user / np.linalg.norm(self.vectors, axis=1).clip(1e-12)
        logits, bias = np.zeros_like(cosines), self.scoring["history_bias"]
        newest = {row: age for age, row in reversed(list(enumerate(history[::-1])))}  # a repeated item: its last place
        for row, age in newest.items():
            if self.scoring["item_to_item_factor"] and row < len(self.values):  # new items have no weights
                weight = self.scoring["item_to_item_factor"] * self.scoring["item_to_item_decay"] ** age
                np.add.at(logits, self.columns[row], weight * self.values[row])
        logits[history] = 0  # item-to-item logits are for other items only, the history bias for those of the history
        for row, age in newest.items() if bias else ():
            logits[row] = bias[min(age, len(bias) - 1)]
        return np.where(self.vectors.any(1), cosines + logits + self.added, -np.inf)


GRAPHS, TYPES = ("items", "user"), {"F32": np.float32, "I32": np.int32}


def read_tensor(path: str, name: str) -> np.ndarray:
    """Read a tensor of a safetensors file: the length of a JSON header, the header, the numbers."""
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))[name]
        (begin, end), start = header["data_offsets"], file.tell()
        file.seek(start + begin)
        return np.frombuffer(file.read(end - begin), TYPES[header["dtype"]]).reshape(header["shape"])


def main(folder: str, history: list[int]) -> None:
    """Print the ten best rows outside the history."""
    scores = OnnxRecommender(folder).scores(history)
    scores[history] = -np.inf
    for row in np.argsort(-scores)[:10]:
        print(f"{row:>6}  {scores[row]:.3f}")


if __name__ == "__main__":
    main(sys.argv[1], [int(row) for row in sys.argv[2].split(",")])
