"""What a run tells: its log, the time and memory that it took, its result file."""

import logging
import os
import platform
import resource
import sys
import time

import numpy as np
import torch

from common.files import write_json
from common.processes import is_main

logger = logging.getLogger(__name__)


def start_logging(config):
    """Tell the terminal everything from the main process, from the others only what goes wrong, and no progress."""
    config["show_progress"] = bool(config["show_progress"]) and is_main()
    logging.basicConfig(
        level=logging.INFO if is_main() else logging.ERROR,
        stream=sys.stderr,
        force=True,
        format="%(asctime)s  %(message)s",
        datefmt="%H:%M:%S",
    )
    logging.getLogger("torch").setLevel(logging.WARNING)


class Stopwatch:
    """Seconds by activity: `with watch("train"): ...`."""

    def __init__(self):
        self.seconds = {}

    def __call__(self, name):
        self._name = name
        return self

    def __enter__(self):
        self._start = time.perf_counter()

    def __exit__(self, *_):
        self.seconds[self._name] = self.seconds.get(self._name, 0.0) + time.perf_counter() - self._start


def result_path(config, checkpoint):
    """Where the result file goes: `result_file`, by default beside the checkpoint."""
    return config["result_file"] or os.path.splitext(checkpoint)[0] + ".json"


def write_result(path, config, checkpoint, epochs, metrics, seconds, rows_per_second, **more):
    """Write a run's result file.

    Args:
        path (str): the file.
        config (Config), checkpoint (str or None), epochs (int): what ran.
        metrics (dict): {"valid": {...}, "test": {...}}, unrounded, RecBole's names.
        seconds (dict): load, train, evaluate.
        rows_per_second (float or None): predictions learnt from per second of training.

    Returns:
        dict: what was written.
    """
    result = {
        "model": config["model"],
        "dataset": config["dataset"],
        "train_stage": config["train_stage"] if config["model"] == "UniSRec" else None,
        "seed": config["seed"],
        "checkpoint": checkpoint,
        "epochs": epochs,
        "metrics": metrics,
        "seconds": seconds,
        "rows_per_second": rows_per_second,
        "peak_memory_mb": peak_memory_mb(),
        "versions": versions(),
        **more,
    }
    if is_main():
        write_json(path, result)
        logger.info("result: %s", path)
    return result


def peak_memory_mb():
    """The most memory this process had at once (resident; on macOS the unit is bytes), in MB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1024 * 1024 if sys.platform == "darwin" else 1024)


def versions():
    """Versions of what the numbers depend on."""
    import recbole

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "recbole": recbole.__version__,
    }
