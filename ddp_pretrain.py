"""Pre-train UniSRec with several processes: CUDA_VISIBLE_DEVICES=0,1,2,3 python ddp_pretrain.py [-d FHCKM]"""

import logging
import os
import socket

import torch

from common.errors import UserError, run_command
from data import UniSRecDataset
from engine.config import parse_command_line
from pretrain import USAGE as PRETRAIN_USAGE
from pretrain import configure, pretrain

USAGE = (
    """
CUDA_VISIBLE_DEVICES=0,1,2,3 python ddp_pretrain.py [-d FHCKM] [-p 12355] [--nproc N] [--key=value ...]
torchrun --nproc_per_node=N ddp_pretrain.py [-d FHCKM] [--key=value ...]

  -p, --port PORT       of this machine, for the processes to find each other (default: a free one)
  --nproc N             processes; default: one per visible GPU. Without a GPU, N processes share the CPU (gloo).
One process of the run computes what pretrain.py would on its share of each batch; train_batch_size is that of all.
"""
    + PRETRAIN_USAGE
)
SHORT = {"-d": "dataset", "-p": "port"}


def main(argv):
    options = parse_command_line(argv, SHORT, USAGE)
    port, processes = options.pop("port", None), options.pop("nproc", None)
    config = configure(options)
    if "LOCAL_RANK" in os.environ:  # torchrun has started us
        work(int(os.environ["RANK"]), config)
        return
    processes = _number("nproc", processes if processes is not None else torch.cuda.device_count() or 1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port(port)), WORLD_SIZE=str(processes))
    UniSRecDataset(config).sequences("train")  # mistakes show here, and the processes find what is parsed in a cache
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)  # it tells of each process it ends
    if not torch.cuda.is_available():
        print(f"no GPU: {processes} process{'es' if processes > 1 else ''} on the CPU (gloo); --nproc N changes that")
    mistakes = torch.multiprocessing.get_context("spawn").SimpleQueue()
    try:
        torch.multiprocessing.spawn(_spawned, (options, mistakes), nprocs=processes)
    except (torch.multiprocessing.ProcessExitedException, torch.multiprocessing.ProcessRaisedException):
        if mistakes.empty():
            raise
        raise UserError(mistakes.get()) from None  # all processes make the same mistake; it is told once


def _spawned(rank, options, mistakes):
    """One process of a run that this command started."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    try:
        work(rank, configure(options))
    except UserError as mistake:
        mistakes.put(str(mistake))
        raise SystemExit(2) from None


def work(rank, config):
    """Join the others and pre-train."""
    from common.processes import start_process_group

    start_process_group()
    try:
        pretrain(config)
    finally:
        torch.distributed.destroy_process_group()


def _number(key, value):
    if type(value) is not int or value < 1:
        raise UserError(f"option --{key}: found {value!r}, expected a whole number from 1 on")
    return value


def _free_port(port):
    """The port asked for, if it is free, or any free one."""
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", _number("port", port) if port is not None else 0))
        except (OSError, OverflowError):
            raise UserError(f"option --port: {port} is taken or no port; leave it out to get a free one") from None
        return probe.getsockname()[1]


if __name__ == "__main__":
    run_command(main)
