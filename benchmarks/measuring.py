"""Functions that the benchmarks share: a process per measurement, opening data, timed training, memory."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data import UniSRecDataset
    from engine.config import Config


def run_measurement(script: str, arguments: Sequence[object]) -> dict[str, Any]:
    """Run one measurement in a process of its own, so that its peak memory is its own.

    Args:
        script: path of a Python script whose last line of output is a JSON object.
        arguments: its command line.

    Returns:
        The JSON object, and `seconds`: the run time of the process, its start included.
    """
    start = time.perf_counter()
    command = [sys.executable, script, *map(str, arguments)]
    process = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return {"seconds": time.perf_counter() - start} | json.loads(process.stdout.splitlines()[-1])


def memory() -> dict[str, float]:
    """Memory of this process in GB.

    Returns:
        `peak_gb`: the peak resident memory. On Linux also the current resident memory: `anonymous_gb` (private to the
        process) and `mapped_gb` (pages of mapped files).
    """
    from engine.reporting import peak_memory_mb

    if not os.path.exists("/proc/self/status"):
        return {"peak_gb": peak_memory_mb() / 1e3}
    with open("/proc/self/status", encoding="ascii") as file:
        status = dict(line.split(":", 1) for line in file)
    keys = {"peak_gb": "VmHWM", "anonymous_gb": "RssAnon", "mapped_gb": "RssFile"}
    return {name: int(status[key].split()[0]) / 1e6 for name, key in keys.items()}


def open_data(stage: str, folder: str, name: str, **settings: object) -> "tuple[Config, UniSRecDataset]":
    """Open a data set as the commands do.

    Args:
        stage: `pretrain`, `inductive_ft` or `transductive_ft`.
        folder: contains the folder of the data set.
        name: the data set.
        settings: override the defaults of `props/`.

    Returns:
        (config, data set)
    """
    from data import UniSRecDataset
    from engine.config import build_config
    from unisrec import UniSRec

    settings = {"data_path": folder, "train_stage": stage, "show_progress": False, **settings}
    config = build_config(UniSRec, name, "pretrain" if stage == "pretrain" else "finetune", settings)
    return config, UniSRecDataset(config)


def training_rate(
    config: "Config", dataset: "UniSRecDataset", seconds: float, warm_up: int = 2, batches: Any = None
) -> float:
    """Measure the speed of training, making the batches included.

    Args:
        config, dataset: from `open_data`.
        seconds: the shortest time to measure. At least one step is measured.
        warm_up: number of steps before the measurement.
        batches: an iterable over the batches of an epoch. None: batches of sequences.

    Returns:
        Predictions per second.
    """
    from engine.building import build_model, sequence_batches
    from engine.optimizer import make_optimizer

    model = build_model(config.model_class, config, dataset).train()
    optimizer = make_optimizer(config, model)
    batches = sequence_batches(config, dataset) if batches is None else batches
    predictions, steps, start = 0, 0, time.perf_counter()
    while True:
        for batch in batches:
            if steps == warm_up:
                predictions, start = 0, time.perf_counter()
            optimizer.zero_grad(set_to_none=True)
            model.calculate_loss(batch.to(config["device"])).backward()
            optimizer.step()
            predictions, steps = predictions + len(batch), steps + 1
            if steps > warm_up and time.perf_counter() - start > seconds:
                return predictions / (time.perf_counter() - start)
