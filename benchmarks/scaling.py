"""Speed and memory of pre-training with several processes on one machine.

    python benchmarks/scaling.py [--processes 1,2,4] [--folder DIR] [--threads T]

The data are the generated mixture of the published size (see large.py). Memory is the proportional set size, summed
over the processes: a page that several processes map counts once. Memory in use after the imports is subtracted.
"""

import argparse
import os
import sys
import tempfile
import time

PROJECT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, PROJECT)

import torch  # noqa: E402
import torch._dynamo  # noqa: E402  DistributedDataParallel imports it; here its memory counts as that of the imports

from benchmarks.measuring import open_data, run_measurement  # noqa: E402
from common.processes import gather_objects, process_group, rank  # noqa: E402
from ddp_pretrain import free_port  # noqa: E402


def proportional_set_size() -> float:
    """The proportional set size of this process in GB (Linux only)."""
    with open("/proc/self/smaps_rollup", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("Pss:")) / 1e6


def worker(number: int, count: int, options: argparse.Namespace, results) -> None:
    """Measure in process `number` of `count`. The main process puts the result into the queue `results`."""
    os.environ.update(RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE=str(count))
    torch.set_num_threads(options.threads)
    with process_group():
        result = measure(options)
    if number == 0:
        results.put(result)


def measure(options: argparse.Namespace) -> tuple[float, float]:
    """Train for some steps. Returns predictions/s and memory in GB beyond the imports, of all processes together."""
    from engine.building import build_model, sequence_batches, set_seeds
    from engine.trainer import Trainer
    from unisrec import UniSRec

    gather_objects(None)  # wait for all processes
    before = sum(gather_objects(proportional_set_size()))
    folder = os.path.join(options.folder, "pretrain")
    settings = {"train_batch_size": options.batch, "checkpoint_dir": folder, "pretrain_loss": "contrastive"}
    config, dataset = open_data("pretrain", folder, "FHCKM", **settings)  # the losses of the paper
    batches = sequence_batches(config, dataset)
    model = build_model(UniSRec, config, dataset).train()
    trainer = Trainer(config, model, "nowhere-{epoch}.pth")
    set_seeds(config["seed"], rank())
    predictions = 0
    for step, batch in enumerate(batches):
        if step == 2:
            predictions, start = 0, time.perf_counter()
        trainer.train_step(batch)
        predictions += len(batch)
        if step == options.steps + 1:
            break
    seconds = time.perf_counter() - start
    rate = sum(gather_objects(predictions)) / seconds
    all_ids = torch.arange(1, 2 * dataset.catalogue.n_items + 1)
    for ids in all_ids.split(1_000):
        dataset.features.lookup(ids)  # after some epochs, every process has read the features of every item
    return rate, sum(gather_objects(proportional_set_size())) - before


def main() -> None:
    """Run the command. It is described at the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--processes", default="1,2,4", help="numbers of processes to measure (default: 1,2,4)")
    parser.add_argument("--threads", type=int, default=1, help="threads of each process (default: 1)")
    parser.add_argument(
        "--batch", type=int, default=8192, help="predictions per batch, over all processes (default: 8192)"
    )
    parser.add_argument(
        "--steps", type=int, default=5, help="steps to measure, after two steps of warm-up (default: 5)"
    )
    parser.add_argument("--folder", help="folder for the generated data, 3 GB (default: temporary)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        options.folder = os.path.abspath(options.folder or temporary)
        large = os.path.join(PROJECT, "benchmarks", "large.py")
        run_measurement(large, ["mixture", "--folder", options.folder, "--measure", "prepare"])
        first = None
        for count in map(int, options.processes.split(",")):
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
            results = torch.multiprocessing.get_context("spawn").SimpleQueue()
            torch.multiprocessing.spawn(worker, (count, options, results), nprocs=count)
            rate, gigabytes = results.get()
            first = first or (rate, gigabytes)
            speed = f"{rate:7,.0f} predictions/s ({rate / first[0]:.2f} x)"
            memory = f"{gigabytes:.2f} GB ({gigabytes / first[1]:.2f} x)"
            print(f"processes: {count}, threads each: {options.threads}: {speed}, {memory}", flush=True)


if __name__ == "__main__":
    main()
