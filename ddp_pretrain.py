"""Pre-train UniSRec with several processes: CUDA_VISIBLE_DEVICES=0,1,2,3 python ddp_pretrain.py [-d FHCKM]"""

import logging
import os
import signal
import socket

from common.errors import UserError, run_command
from engine.settings import help_text, parse_command_line
from pretrain import USAGE as PRETRAIN_USAGE
from pretrain import configure, pretrain

USAGE = (
    """
CUDA_VISIBLE_DEVICES=0,1,2,3 python ddp_pretrain.py [-d FHCKM] [--port 12355] [--nproc N] [--key=value ...]
torchrun --nproc_per_node=N [--max_restarts=3] ddp_pretrain.py [-d FHCKM] [--key=value ...]

  --port PORT           of this machine, for the processes to find each other (default: a free one)
  --nproc N             processes; default: one per visible GPU. Without a GPU, N processes share the CPU (gloo).
All processes together compute what pretrain.py would; train_batch_size is that of all. A restart by torchrun goes on
from the last checkpoint. SIGTERM saves and ends the run with code 75.
"""
    + PRETRAIN_USAGE
)
GRACE = 3  # seconds that the other processes get to end when one has


def main(argv):
    options = parse_command_line(argv, lambda _: help_text(USAGE, "pretrain"))
    port, processes = options.pop("port", None), options.pop("nproc", None)
    config = configure(options)
    if "LOCAL_RANK" in os.environ:  # torchrun has started us
        pretrain(config)
        return
    import torch

    from data import UniSRecDataset

    gpus = torch.cuda.device_count() if config["device"].type == "cuda" else 0
    processes = _number("nproc", processes if processes is not None else gpus or 1)
    if 0 < gpus < processes:
        raise UserError(f"option --nproc: found {processes}, expected at most {gpus}: each takes a GPU")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port(port)), WORLD_SIZE=str(processes))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // processes)))
    UniSRecDataset(config).sequences("train")  # errors show here, and the processes find what is parsed in a cache
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)  # it tells of each process it ends
    if not gpus:
        print(f"no GPU: {processes} process{'es' if processes > 1 else ''} on the CPU (gloo); --nproc N changes that")
    spawn(options, processes)


def spawn(options, processes):
    """Start the processes and wait for them; if one ends before its time, end the others within seconds.

    Raises:
        UserError: the processes made an error that the user can mend; it is told once.
        SystemExit: a process was killed, or all were told to stop.
    """
    import torch

    from common.processes import PREEMPTED

    errors = torch.multiprocessing.get_context("spawn").SimpleQueue()
    context = torch.multiprocessing.spawn(_spawned, (options, errors), nprocs=processes, join=False)

    def pass_on(number, frame):
        for process in context.processes:
            process.terminate()

    before = signal.signal(signal.SIGTERM, pass_on)
    try:
        while not context.join(grace_period=GRACE):
            pass
    except torch.multiprocessing.ProcessExitedException as end:
        if not errors.empty():
            raise UserError(errors.get()) from None
        if end.exit_code == PREEMPTED:
            raise SystemExit(PREEMPTED) from None
        how = f"was killed ({end.signal_name})" if end.signal_name else f"ended with code {end.exit_code}"
        raise SystemExit(
            f"error: process {end.error_index} of {processes} {how}, the others were stopped; "
            "go on from the last checkpoint with --resume"
        ) from None
    except KeyboardInterrupt:
        for process in context.processes:  # they may wait for each other where no signal reaches them
            process.join(GRACE)
            process.kill()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _spawned(rank, options, errors):
    """One process of a run that this command started."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    try:
        pretrain(configure(options))
    except UserError as error:
        errors.put(str(error))
        raise SystemExit(2) from None


def _number(key, value):
    if type(value) is not int or value < 1:
        raise UserError(f"option --{key}: found {value!r}, expected a whole number from 1 on")
    return value


def free_port(port=None):
    """The port asked for, if it is free, or any free one."""
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", _number("port", port) if port is not None else 0))
        except (OSError, OverflowError):
            raise UserError(f"option --port: {port} is taken or no port; leave it out to get a free one") from None
        return probe.getsockname()[1]


if __name__ == "__main__":
    run_command(main)
