"""Speed of encoding texts, compared with a plain loop in the same run.

    python benchmarks/encoding.py [--data_path DIR] [-d Scientific]

The loop is the published one: batches of 4 texts in the order of the file, padded to the longest text of the batch,
float32. It runs in three variants: keeping the autograd graph (as published), under `no_grad`, and, on a CPU, under
`no_grad` with one thread. Loops are slow, so each gets only a part of the texts. The output says how many.

The speed of a machine varies, so the loops and the encoder take turns. Read the ratio to the fastest loop first. The
output also contains the largest difference between the vectors, and the time of the whole job, from loading the encoder
to the written files feat1 and feat2. The whole job runs only once, so its time is less certain.

The encoder is minilm unless --plm_name chooses another one.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

PROJECT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, PROJECT)

from common.errors import run_command  # noqa: E402
from dataset.preprocessing.encoding_options import add_encoding_options, encoding_settings  # noqa: E402

if TYPE_CHECKING:
    from dataset.preprocessing.encoder import Encoder

LOOP_BATCH = 4  # texts
LOOPS = {  # name: (keeps the autograd graph, threads; None: torch's default)
    "loop, with graph": (True, None),
    "loop, no_grad": (False, None),
    "loop, no_grad, 1 thread": (False, 1),
}


def main(argv: list[str]) -> None:
    """Run the command. It is described at the top of the file."""
    import torch

    from dataset.preprocessing.encode_text import load_dataset_texts
    from dataset.preprocessing.encoder import Encoder
    from dataset.preprocessing.texts import drop_words

    options = parser().parse_args(argv)
    texts = load_dataset_texts(options.dataset, options.data_path)
    views = [texts, drop_words(texts, options.word_drop_ratio, options.seed)]
    model = Encoder(options.plm_name, options.emb_type, options.batch_tokens, options.gpu_id, options.precision)
    print(
        f"{options.dataset}: {len(texts):,} texts; {options.plm_name}, {model.pooling}, {model.precision}, "
        f"{model.device}, {torch.get_num_threads()} threads"
    )
    loops, encoder, (ours, reference) = take_turns(model, views, options.turns, options.loop_texts)
    fastest = [max(speed.rate() for speed in speeds) for speeds in zip(*loops.values(), strict=True)]  # one per view
    for name, (speed, _) in loops.items():
        print(speed.line(name, fastest[0]))
    print(encoder.line("encoder", fastest[0]))
    print_difference(ours, reference)

    seconds = whole_job(options)
    estimate = sum(len(texts) / rate for rate in fastest)
    print(
        f"whole job, feat1 and feat2, {2 * len(texts):,} texts: {seconds:.0f} s; "
        f"fastest loop (estimated): {estimate:.0f} s, {estimate / seconds:.1f} x"
    )


def take_turns(
    model: "Encoder", views: list[list[str]], turns: int, loop_texts: int
) -> "tuple[dict[str, list[Speed]], Speed, tuple[np.ndarray, np.ndarray]]":
    """Run the loops and the encoder in turns.

    Args:
        model: the encoder.
        views: the texts of feat1 and of feat2.
        turns: number of turns; in each the encoder gets another part of the feat1 texts.
        loop_texts: texts per view that each loop gets in each turn.

    Returns:
        (loops, encoder, vectors): for each loop its speed on both views; the speed of the encoder on feat1; the vectors
        of the encoder and of the loop for the same texts, float32 [n, width] each.
    """
    loop = Loop(model)
    loop.run(views[0][:40], False, None)  # warm-up
    kinds = [name for name in LOOPS if model.device.type == "cpu" or not name.endswith("thread")]
    loops, encoder = {name: [Speed(), Speed()] for name in kinds}, Speed()
    ours, reference = (np.full((len(views[0]), model.width), np.nan, np.float32) for _ in range(2))
    for turn in range(turns):
        first = turn * len(views[0]) // turns
        part = slice(first, first + loop_texts)
        for name in kinds:
            for view, speed in zip(views, loops[name], strict=True):
                vectors = speed.measure(loop.run, view[part], *LOOPS[name])
                if view is views[0]:
                    reference[part] = vectors
        part = slice(turn, None, turns)
        ours[part] = encoder.measure(encode_distinct, model, views[0][part])
    both = ~np.isnan(reference[:, 0])
    return loops, encoder, (ours[both], reference[both])


class Speed:
    """Texts per second over several timed calls."""

    def __init__(self):
        self._texts, self._seconds = [], []

    def measure(self, function: Callable[..., tuple[int, Any]], *arguments: Any) -> Any:
        """Call and time a function that returns (number of texts, result). Returns the result."""
        start = time.perf_counter()
        texts, result = function(*arguments)
        self._seconds.append(time.perf_counter() - start)
        self._texts.append(texts)
        return result

    def rate(self) -> float:
        """Texts per second."""
        return sum(self._texts) / sum(self._seconds)

    def line(self, name: str, reference: float) -> str:
        """A line of the table, with the ratio to `reference` (texts per second)."""
        rates = [texts / seconds for texts, seconds in zip(self._texts, self._seconds, strict=True)]
        return (
            f"{name:24}{self.rate():8,.0f} texts/s{self.rate() / reference:7.2f} x"
            f"   ({sum(self._texts):,} texts of feat1, {len(rates)} turns, {min(rates):,.0f} to {max(rates):,.0f})"
        )


class Loop:
    """The reference: batches of 4 texts, in the given order, with the pooling of the encoder."""

    def __init__(self, model: "Encoder") -> None:
        from dataset.preprocessing.encoder import load_encoder

        self.encoder = model
        self.tokenizer, self.model = load_encoder(model.name)
        self.model.to(model.device)

    def run(self, texts: list[str], graph: bool, threads: int | None) -> tuple[int, np.ndarray]:
        """Encode texts, with or without the autograd graph. Returns (number of texts, vectors float32 [n, width])."""
        import torch

        before = torch.get_num_threads()
        torch.set_num_threads(threads or before)
        with torch.set_grad_enabled(graph):
            rows = [self._vectors(texts[start : start + LOOP_BATCH]) for start in range(0, len(texts), LOOP_BATCH)]
        torch.set_num_threads(before)
        return len(texts), torch.cat(rows).numpy()

    def _vectors(self, texts):
        batch = self.tokenizer(
            texts, padding=True, truncation=True, max_length=self.encoder.max_tokens, return_tensors="pt"
        ).to(self.encoder.device)
        hidden = self.model(**batch).last_hidden_state
        if self.encoder.pooling == "CLS":
            return hidden[:, 0].detach().cpu()
        mask = batch["attention_mask"].unsqueeze(-1)
        return ((hidden * mask).sum(dim=1) / mask.sum(dim=1)).detach().cpu()


def encode_distinct(model: "Encoder", texts: list[str]) -> tuple[int, np.ndarray]:
    """Encode texts. Returns (number of distinct texts, vectors [n, width]); equal texts are encoded once."""
    from dataset.preprocessing.encoder import encode_with

    return len(set(texts)), encode_with(model, texts)


def whole_job(options: argparse.Namespace) -> float:
    """Encode the data set in a temporary folder. Returns seconds."""
    from dataset.preprocessing.encode_text import copy_split, encode_dataset

    options.variants = 1
    with tempfile.TemporaryDirectory() as folder:
        copy_split(options.dataset, os.path.join(options.data_path, options.dataset), folder)
        start = time.perf_counter()
        encode_dataset(options.dataset, folder, **encoding_settings(options))
        return time.perf_counter() - start


def print_difference(ours: np.ndarray, reference: np.ndarray) -> None:
    """Print how far the vectors of encoder and loop, float [n, width], differ."""
    cosine = (ours * reference).sum(1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(reference, axis=1)
    print(
        f"{len(ours):,} vectors compared: largest difference {np.abs(ours - reference).max():.1e}, "
        f"smallest cosine {cosine.min():.7f}"
    )


def parser() -> argparse.ArgumentParser:
    """The options of this benchmark and those of encoding."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-d", "--dataset", default="Scientific", metavar="NAME")
    parser.add_argument("--data_path", default=os.path.join(PROJECT, "dataset", "downstream"), metavar="DIR",
                        help="folder of the data sets (default: dataset/downstream of the project)")  # fmt: skip
    parser.add_argument("--turns", type=int, default=5, metavar="N", help="number of turns (default: 5)")
    parser.add_argument("--loop_texts", type=int, default=60, metavar="N",
                        help="texts per view that a loop gets in each turn (default: 60)")  # fmt: skip
    add_encoding_options(parser)
    parser.set_defaults(plm_name="minilm")
    return parser


if __name__ == "__main__":
    run_command(main)
