"""Pre-train UniSRec with several processes: CUDA_VISIBLE_DEVICES=0,1,2,3 python ddp_pretrain.py [-d FHCKM]"""

import logging
import os
import socket
import sys

from common.errors import UserError, run_command
from engine.settings import help_text, parse_command_line
from pretrain import USAGE as PRETRAIN_USAGE
from pretrain import configure, pretrain

USAGE = (
    """
CUDA_VISIBLE_DEVICES=0,1,2,3 python ddp_pretrain.py [-d FHCKM] [--port 12355] [--nproc N] [--key=value ...]
torchrun --nproc_per_node=N [--max_restarts=3] ddp_pretrain.py [-d FHCKM] [--key=value ...]

  --port PORT           port of this machine through which the processes connect (default: a free port)
  --nproc N             number of processes (default: one per visible GPU). Without a GPU, they share the CPU (gloo).

The processes compute the same loss and gradients as pretrain.py. train_batch_size counts the predictions of all
processes together. After a restart by torchrun, the run continues from its last checkpoint. After SIGTERM
or Ctrl-C, it saves a checkpoint and exits with code 75.
"""
    + PRETRAIN_USAGE
)
GRACE = 3  # seconds that the other processes have to end, after one has ended


def main(argv):
    options = parse_command_line(argv, lambda _: help_text(USAGE, "pretrain"))
    port, processes = options.pop("port", None), options.pop("nproc", None)
    config = configure(options)
    if "LOCAL_RANK" in os.environ:  # this process was started by torchrun
        pretrain(config)
        return
    import torch

    from data import UniSRecDataset

    gpus = torch.cuda.device_count() if config["device"].type == "cuda" else 0
    processes = _number("nproc", processes if processes is not None else gpus or 1)
    if 0 < gpus < processes:
        raise UserError(f"option --nproc: found {processes}, expected at most {gpus}: each process needs its own GPU")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port(port)), WORLD_SIZE=str(processes))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // processes)))
    UniSRecDataset(config).sequences("train")  # reports errors, and fills the cache from which the processes read
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)  # not a line for each process that it ends
    if not gpus:
        print(f"no GPU: {processes} process{'es' if processes > 1 else ''} on the CPU (gloo); --nproc N changes that")
    spawn(options, processes)


def spawn(options, processes):
    """Start the processes and wait for them. If one fails, end the others within seconds.

    Raises:
        UserError: the first error that a process reported.
        SystemExit: a process was killed, or all processes were stopped by SIGTERM.
    """
    import torch

    from common.processes import PREEMPTED, Preemption

    errors = torch.multiprocessing.get_context("spawn").SimpleQueue()
    context = torch.multiprocessing.spawn(_spawned, (options, errors), nprocs=processes, join=False)

    preemption = Preemption(lambda: [process.terminate() for process in context.processes])
    try:
        with preemption:
            while not context.join(grace_period=GRACE):
                pass
    except torch.multiprocessing.ProcessExitedException as end:
        if not errors.empty():
            raise UserError(errors.get()) from None
        if end.exit_code == PREEMPTED:
            raise SystemExit(PREEMPTED) from None
        if preemption.name:  # before the processes could react
            print("stopped before the training began", file=sys.stderr)
            raise SystemExit(130) from None
        how = f"was killed ({end.signal_name})" if end.signal_name else f"ended with code {end.exit_code}"
        raise SystemExit(
            f"error: process {end.error_index} of {processes} {how}, the others were stopped; "
            "continue from the last checkpoint with --resume"
        ) from None
    except KeyboardInterrupt:
        for process in context.processes:  # they may ignore the signal while they wait for each other
            process.join(GRACE)
            process.kill()
        raise


def _spawned(rank, options, errors):
    """Run one of the processes that `spawn` starts."""
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
    """The given port, if it is free. Without an argument, any free port."""
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", _number("port", port) if port is not None else 0))
        except (OSError, OverflowError):
            raise UserError(
                f"option --port: {port} is in use or not a port; leave the option out to get a free port"
            ) from None
        return probe.getsockname()[1]


if __name__ == "__main__":
    run_command(main)
