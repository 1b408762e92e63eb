"""Encoding speed against a plain loop, in one run: python benchmarks/encoding.py [--data_path DIR] [-d Scientific]

The loop is the published one: texts in the order of the file, 4 at a time, padded to the longest of the 4, in float32,
with the graph that gradients would need; once more under `no_grad`, and on a CPU once more on one thread, which is
faster than several where these wait for one another. A loop gets a part of the texts, which is said, since it is slow.
Loops and encoding take turns, because machines are noisy: read the ratio first, it is to the fastest loop. Prints texts
per second, how far the vectors are apart, and the time of the whole job (feat1 and feat2, from loading the encoder to
the written files), which is not done in turns and so the noisier figure. The encoder is minilm unless --plm_name names
another.
"""

import argparse
import os
import sys
import tempfile
import time

import numpy as np

PROJECT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, PROJECT)

from common.errors import run_command  # noqa: E402
from dataset.preprocessing.encoding_options import add_encoding_options, encoding_settings  # noqa: E402

LOOP_BATCH = 4  # texts
LOOPS = {  # name: (keeps the graph, threads; None: as many as torch takes)
    "loop, with graph": (True, None),
    "loop, no_grad": (False, None),
    "loop, no_grad, 1 thread": (False, 1),
}


def main(argv):
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
    loops, encoder, (ours, theirs) = take_turns(model, views, options.turns, options.loop_texts)
    fastest = [max(speed.rate() for speed in speeds) for speeds in zip(*loops.values(), strict=True)]  # of each view
    for name, (speed, _) in loops.items():
        print(speed.line(name, fastest[0]))
    print(encoder.line("encoder", fastest[0]))
    print_difference(ours, theirs)

    seconds = whole_job(options)
    reckoned = sum(len(texts) / rate for rate in fastest)
    print(
        f"whole job, feat1 and feat2, {2 * len(texts):,} texts: {seconds:.0f} s, "
        f"the fastest loop would take {reckoned:.0f} s: {reckoned / seconds:.1f} x"
    )


def take_turns(model, views, turns, loop_texts):
    """Loops and encoding, one after the other, several times.

    Args:
        model (Encoder)
        views (list of list of str): the texts of feat1 and of feat2.
        turns (int): in each the encoder gets another part of feat1's texts, together all.
        loop_texts (int): that each loop gets in each turn, of each view.

    Returns:
        (loops, encoder, vectors): name -> list of Speed, for both views; Speed, for feat1; the vectors of the encoder
        and of the loop for the same texts, float32 [n, width].
    """
    loop = Loop(model)
    loop.run(views[0][:40], False, None)  # the first products of a process are slow
    kinds = [name for name in LOOPS if model.device.type == "cpu" or not name.endswith("thread")]
    loops, encoder = {name: [Speed(), Speed()] for name in kinds}, Speed()
    ours, theirs = (np.full((len(views[0]), model.width), np.nan, np.float32) for _ in range(2))
    for turn in range(turns):
        first = turn * len(views[0]) // turns
        some = slice(first, first + loop_texts)
        for name in kinds:
            for view, speed in zip(views, loops[name], strict=True):
                vectors = speed.measure(loop.run, view[some], *LOOPS[name])
                if view is views[0]:
                    theirs[some] = vectors
        mine = slice(turn, None, turns)
        ours[mine] = encoder.measure(encode_distinct, model, views[0][mine])
    both = ~np.isnan(theirs[:, 0])
    return loops, encoder, (ours[both], theirs[both])


class Speed:
    """Texts per second of something that is done now and again."""

    def __init__(self):
        self._texts, self._seconds = [], []

    def measure(self, function, *arguments):
        """Call a function that returns (number of texts, result). Returns the result."""
        start = time.perf_counter()
        texts, result = function(*arguments)
        self._seconds.append(time.perf_counter() - start)
        self._texts.append(texts)
        return result

    def rate(self):
        return sum(self._texts) / sum(self._seconds)

    def line(self, name, reference):
        """One row of the table; `reference` (float): texts/s of what the ratio is to."""
        rates = [texts / seconds for texts, seconds in zip(self._texts, self._seconds, strict=True)]
        return (
            f"{name:24}{self.rate():8,.0f} texts/s{self.rate() / reference:7.2f} x"
            f"   ({sum(self._texts):,} texts of feat1, {len(rates)} turns, {min(rates):,.0f} to {max(rates):,.0f})"
        )


class Loop:
    """The reference: 4 texts at a time in the order given. Pools as the encoder does."""

    def __init__(self, model):
        from dataset.preprocessing.encoder import load_encoder

        self.encoder = model
        self.tokenizer, self.model = load_encoder(model.name)
        self.model.to(model.device)

    def run(self, texts, graph, threads):
        """Returns (number of texts, vectors [n, width])."""
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


def encode_distinct(model, texts):
    """Returns (number of distinct texts, vectors [n, width]): what is encoded once is counted once."""
    from dataset.preprocessing.encoder import encode_with

    return len(set(texts)), encode_with(model, texts)


def whole_job(options):
    """Encode the data set in a folder of its own. Returns seconds."""
    from dataset.preprocessing.encode_text import copy_split, encode_dataset

    options.variants = 1
    with tempfile.TemporaryDirectory() as folder:
        copy_split(options.dataset, os.path.join(options.data_path, options.dataset), folder)
        start = time.perf_counter()
        encode_dataset(options.dataset, folder, **encoding_settings(options))
        return time.perf_counter() - start


def print_difference(ours, theirs):
    cosine = (ours * theirs).sum(1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1)
    print(f"{len(ours):,} vectors of both compared: largest difference {np.abs(ours - theirs).max():.1e}, "
          f"smallest cosine {cosine.min():.7f}")  # fmt: skip


def parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-d", "--dataset", default="Scientific", metavar="NAME")
    parser.add_argument("--data_path", default=os.path.join(PROJECT, "dataset", "downstream"), metavar="DIR",
                        help="the folder of the data sets (default: dataset/downstream of the project)")  # fmt: skip
    parser.add_argument("--turns", type=int, default=5, metavar="N", help="how often loops and encoding alternate")
    parser.add_argument("--loop_texts", type=int, default=60, metavar="N", help="that a loop gets in a turn")
    add_encoding_options(parser)
    parser.set_defaults(plm_name="minilm")
    return parser


if __name__ == "__main__":
    run_command(main)
