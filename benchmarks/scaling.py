"""Pre-training with several processes of this machine: speed, and memory that they share.

    python benchmarks/scaling.py [--processes 1,2,4] [--folder DIR] [--threads T]

Data: the generated mixture of the published size (see large.py). Memory is the proportional set size, summed over the
processes: a page that several have mapped counts once. What is there after the imports is subtracted.
"""

import argparse
import os
import sys
import tempfile
import time

PROJECT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, PROJECT)

import torch  # noqa: E402
import torch._dynamo  # noqa: E402  DistributedDataParallel loads it: it counts as an import

from benchmarks.measuring import open_data, run  # noqa: E402
from common.processes import gather_objects, process_group, rank  # noqa: E402
from ddp_pretrain import free_port  # noqa: E402


def proportional():
    """The proportional set size of this process, GB."""
    with open("/proc/self/smaps_rollup", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("Pss:")) / 1e6


def worker(number, count, options, results):
    """Train some steps in one of several processes; the main one reports."""
    os.environ.update(RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE=str(count))
    torch.set_num_threads(options.threads)
    with process_group():
        found = measure(options)
    if number == 0:
        results.put(found)


def measure(options):
    """(predictions/s of all processes, their memory beyond the imports in GB)."""
    from engine.building import build_model, sequence_batches, set_seeds
    from engine.trainer import Trainer
    from unisrec import UniSRec

    gather_objects(None)  # all are here
    before = sum(gather_objects(proportional()))
    folder = os.path.join(options.folder, "pretrain")
    config, dataset = open_data("pretrain", folder, "FHCKM", train_batch_size=options.batch, checkpoint_dir=folder)
    batches = sequence_batches(config, dataset)
    model = build_model(UniSRec, config, dataset).train()
    trainer = Trainer(config, model, "nowhere-{epoch}.pth")
    set_seeds(config["seed"], rank())
    seen = 0
    for step, batch in enumerate(batches):
        if step == 2:
            seen, start = 0, time.perf_counter()
        trainer.train_step(batch)
        seen += len(batch)
        if step == options.steps + 1:
            break
    seconds = time.perf_counter() - start
    rate = sum(gather_objects(seen)) / seconds
    every = torch.arange(1, 2 * dataset.catalogue.n_items + 1)
    for ids in every.split(1_000):
        dataset.features.lookup(ids)  # as after some epochs: every process has seen every item's features
    return rate, sum(gather_objects(proportional())) - before


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--processes", default="1,2,4", help="how many, one run each (default: 1,2,4)")
    parser.add_argument("--threads", type=int, default=1, help="of each process (default: 1)")
    parser.add_argument("--batch", type=int, default=8192, help="predictions of all processes (default: 8192)")
    parser.add_argument("--steps", type=int, default=5, help="to measure, after two of warm-up (default: 5)")
    parser.add_argument("--folder", help="of the generated data, 3 GB (default: a temporary one)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        options.folder = os.path.abspath(options.folder or temporary)
        large = os.path.join(PROJECT, "benchmarks", "large.py")
        run(large, ["mixture", "--folder", options.folder, "--measure", "prepare"])
        alone = None
        for count in map(int, options.processes.split(",")):
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
            results = torch.multiprocessing.get_context("spawn").SimpleQueue()
            torch.multiprocessing.spawn(worker, (count, options, results), nprocs=count)
            found = results.get()
            alone = alone or found
            speed = f"{found[0]:7,.0f} predictions/s ({found[0] / alone[0]:.2f} x)"
            memory = f"{found[1]:.2f} GB ({found[1] / alone[1]:.2f} x)"
            print(f"{count} processes of {options.threads} threads: {speed}, {memory}", flush=True)


if __name__ == "__main__":
    main()
