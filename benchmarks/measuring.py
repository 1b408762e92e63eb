"""What the benchmarks share: one measurement a process, data, training for some seconds, memory."""

import json
import os
import subprocess
import sys
import time


def run(script, arguments):
    """Run one measurement, a script that prints JSON last, in a process of its own; its peak memory is its own then.

    Returns:
        dict: what it printed, and `seconds`, its start-up included.
    """
    start = time.perf_counter()
    command = [sys.executable, script, *map(str, arguments)]
    found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return {"seconds": time.perf_counter() - start} | json.loads(found.stdout.splitlines()[-1])


def memory():
    """In GB: the peak of this process and, on Linux, what is resident now, its own and pages of mapped files."""
    from engine.reporting import peak_memory_mb

    if not os.path.exists("/proc/self/status"):
        return {"gigabytes": peak_memory_mb() / 1e3}
    with open("/proc/self/status", encoding="ascii") as file:
        status = dict(line.split(":", 1) for line in file)
    keys = {"gigabytes": "VmHWM", "own": "RssAnon", "mapped": "RssFile"}
    return {name: int(status[key].split()[0]) / 1e6 for name, key in keys.items()}


def open_data(stage, folder, name, **settings):
    """Open a data set for a stage of UniSRec as the commands do. Returns (config, data set)."""
    from data import UniSRecDataset
    from engine.config import build_config
    from unisrec import UniSRec

    settings = {"data_path": folder, "train_stage": stage, "show_progress": False, **settings}
    config = build_config(UniSRec, name, "pretrain" if stage == "pretrain" else "finetune", settings)
    return config, UniSRecDataset(config)


def training_rate(config, dataset, seconds, warm_up=2):
    """Train for some seconds after some steps of warm-up; making batches counts.

    Returns:
        float: predictions learnt from per second.
    """
    from engine.building import build_model, sequence_batches
    from engine.optimizer import make_optimizer
    from unisrec import UniSRec

    model = build_model(UniSRec, config, dataset).train()
    optimizer = make_optimizer(config, model)
    batches = sequence_batches(config, dataset)
    seen, steps, start = 0, 0, time.perf_counter()
    while True:
        for batch in batches:
            if steps == warm_up:
                seen, start = 0, time.perf_counter()
            optimizer.zero_grad(set_to_none=True)
            model.calculate_loss(batch.to(config["device"])).backward()
            optimizer.step()
            seen, steps = seen + len(batch), steps + 1
            if steps > warm_up and time.perf_counter() - start > seconds:
                return seen / (time.perf_counter() - start)
