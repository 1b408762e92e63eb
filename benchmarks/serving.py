"""Latency and throughput of recommendations: python benchmarks/serving.py [--items 10000 100000] [--index]

The model has the default size and random weights. Histories have 20 items. Item vectors are random, independent of one
another (`gaussian`, the hardest case for an index) or around 20,000 centers (`clustered`, as the texts of a shop are).
The text of a new item is encoded apart (benchmarks/encoding.py).
"""

import argparse
import os
import resource
import sys
import time

PROJECT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, PROJECT)  # so that the script finds the project's modules from any working folder

import numpy as np  # noqa: E402
import torch  # noqa: E402

from serving.model import shop_of, untrained_model  # noqa: E402
from serving.recommender import Recommender  # noqa: E402

WIDTH = 384  # of the text features
LENGTH = 20  # items of a history


def main() -> None:
    """Run the benchmark. It is described at the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--items", type=int, nargs="+", default=[10_000, 100_000], metavar="N", help="numbers of items")
    parser.add_argument("--index", action="store_true", help="approximate search instead of exact search")
    parser.add_argument("--vectors", choices=("gaussian", "clustered"), default="clustered")
    parser.add_argument("--requests", type=int, default=300, metavar="N", help="requests (default: 300)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), metavar="N")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {options.threads} threads, {options.vectors} vectors\n")
    print("| items | search | recall@10 | one request p50 | p99 | encoder p50 | p99 | histories per second | memory |")
    print("|---|---|---|---|---|---|---|---|---|")
    for count in options.items:
        print(measure(count, options.requests, options.vectors, options.index), flush=True)


def measure(count: int, requests: int, vectors_of: str, index: bool) -> str:
    """A row of the table. Histories per second: 512 at once. The memory is that of the process, so counts ascend."""
    model = untrained_model(shop_of(0, WIDTH))
    recommender = Recommender(model, {"features": {"encoder": "none", "width": WIDTH}, "config": {}})
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(20_000, model.hidden_size, generator=generator)
    ids = [f"item{number}" for number in range(count)]
    vectors = torch.randn(count, model.hidden_size, generator=generator)
    if vectors_of == "clustered":
        vectors += centers[torch.randint(len(centers), (count,), generator=generator)]
    recommender.append(ids, ids, vectors, [1] * count)
    del vectors
    recall = f"{recommender.build_index():.4f}" if index else "1"
    random = np.random.default_rng(0)
    histories = [[f"item{item}" for item in random.integers(0, count, LENGTH)] for _ in range(requests)]
    single = [seconds(lambda each=each: recommender.recommend(each)) for each in histories]
    rows, lengths = torch.randn(1, LENGTH, model.hidden_size), torch.tensor([LENGTH])
    with torch.no_grad():
        encoder = [seconds(lambda: model.encode_last(rows, lengths)) for _ in histories]
    many = (histories * (512 // requests + 1))[:512]
    batch = seconds(lambda: recommender.recommend(many, batch_size=512))
    (p50, p99), (encoder50, encoder99) = (1000 * np.percentile(each, (50, 99)) for each in (single, encoder))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return (
        f"| {count:,} | {'index' if index else 'exact'} | {recall} | {p50:.1f} ms | {p99:.1f} ms "
        f"| {encoder50:.2f} ms | {encoder99:.2f} ms | {len(many) / batch:,.0f} | {memory:,.0f} MB |"
    )


def seconds(act) -> float:
    """The seconds that a call takes."""
    start = time.perf_counter()
    act()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
