"""The log of a run, its time and memory, and its result file."""

import logging
import os
import platform
import resource
import sys
import time

import numpy as np
import recbole
import torch

from common.errors import UserError
from common.files import read_json, write_json, writing
from common.processes import is_main

logger = logging.getLogger(__name__)


def start_logging(config) -> None:
    """Log everything in the main process. The other processes log only errors, and show no progress bars."""
    config["show_progress"] = bool(config["show_progress"]) and is_main()
    logging.basicConfig(
        level=logging.INFO if is_main() else logging.ERROR,
        stream=sys.stderr,
        force=True,
        format="%(asctime)s  %(message)s",
        datefmt="%H:%M:%S",
    )
    logging.getLogger("torch").setLevel(logging.WARNING)


def report_settings(config) -> None:
    """Log the model, the data set, and the settings that differ from the defaults."""
    changed = ", ".join(f"{key} {value}" for key, value in sorted(config.changed.items()))
    logger.info(
        "%s on %s; settings that differ from the defaults: %s", config["model"], config["dataset"], changed or "none"
    )


class Stopwatch:
    """Measures the seconds of each activity: `with watch("train"): ...`.

    Attributes:
        seconds: activity -> seconds.
    """

    def __init__(self):
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str) -> "Stopwatch":
        self._name = name
        return self

    def __enter__(self):
        self._start = time.perf_counter()

    def __exit__(self, *_):
        self.seconds[self._name] = self.seconds.get(self._name, 0.0) + time.perf_counter() - self._start


def result_path(config, checkpoint: str) -> str:
    """The path of the result file: the setting `result_file`, by default beside the checkpoint."""
    return config["result_file"] or os.path.splitext(checkpoint)[0] + ".json"


def write_result(
    path: str,
    config,
    checkpoint: str | None,
    epochs: int,
    metrics: dict[str, dict[str, float]],
    seconds: dict[str, float],
    rows_per_second: float | None,
    *,
    run: str,
    text_encoder: dict | None,
    **more,
) -> dict:
    """Write the result file of a run.

    Args:
        path: the file.
        config: the run's settings, all of which are stored.
        checkpoint: path of the model that was evaluated, None if it is in no file.
        epochs: number of training epochs.
        metrics: {"valid": {...}, "test": {...}}, unrounded, in RecBole's names.
        seconds: seconds of `load`, `train` and `evaluate`.
        rows_per_second: training predictions per second, None without training.
        run: the id of the run.
        text_encoder: what the function `text_encoder` returns.
        more: further entries, plain data.

    Returns:
        The content of the file.
    """
    result = {
        "run": run,
        "model": config["model"],
        "dataset": config["dataset"],
        "train_stage": config["train_stage"] if config["model"] == "UniSRec" else None,
        "recipe": config["recipe"],
        "text_encoder": text_encoder,
        "seed": config["seed"],
        "checkpoint": checkpoint,
        "epochs": epochs,
        "metrics": metrics,
        "seconds": seconds,
        "rows_per_second": rows_per_second,
        "peak_memory_mb": peak_memory_mb(),
        "versions": versions(),
        **more,
        "settings": config.plain(),
    }
    if is_main():
        write_json(path, result)
        logger.info("result: %s", path)
    return result


def remove_old_result(path: str, run: str) -> None:
    """Remove an earlier result file before a run starts, so that none stands beside the checkpoint of a later run.

    Args:
        path: the result file. It need not exist.
        run: the id of the run that starts. If the result is that of another run, the log says so.
    """
    if os.path.exists(path):
        other = _other_run(path, run)
        with writing(path):
            os.unlink(os.path.realpath(path))
        if other:
            logger.info("result: %s (removed that of %s)", path, other)


def _other_run(path, run):
    """The other run that wrote an existing result file, in words. None if the file is missing or of this run."""
    if not os.path.exists(path):
        return None
    try:
        found = read_json(path)["run"]
    except (UserError, KeyError, TypeError):
        return "a run without id"
    return None if found == run else f"run {found}"


def text_encoder(dataset) -> dict | None:
    """The text encoder of a data set's features: `features` (the suffix of the files), `encoder`, `pooling`, `width`.

    `encoder` and `pooling` are None if they are not known. The result is None for a model that reads no texts.
    """
    if dataset.features is None:
        return None
    known = dict.fromkeys(("encoder", "pooling")) | dataset.features.description
    return {"features": dataset.features.paths[0].rpartition(".")[2], **known}


def peak_memory_mb() -> float:
    """The peak resident memory of this process so far, in MB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in KB, on macOS in bytes
    return peak / (1024 * 1024 if sys.platform == "darwin" else 1024)


def versions() -> dict[str, str]:
    """The versions of Python and of the libraries that the metrics depend on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "recbole": recbole.__version__,
    }
