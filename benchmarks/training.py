"""Training speed of both modes in one run: python benchmarks/training.py -d Scientific [--seconds 20] [--key=value ...]

`rows` encodes every prefix by itself, as the published code does; `sequences` scores all positions in one pass. Both
adapt each distinct item once a batch. Prints predictions learnt from per second and their ratio.
"""

import os
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from common.errors import run_command  # noqa: E402
from engine.config import build_config, parse_command_line, take_option  # noqa: E402


def main(argv):
    options = parse_command_line(argv, {"-d": "dataset"}, __doc__)
    seconds = options.pop("seconds", 20)
    from unisrec import UniSRec

    config = build_config(
        UniSRec,
        take_option(options, "dataset", "Scientific"),
        ["overall.yaml", "UniSRec.yaml", "finetune.yaml"],
        {"show_progress": False, **options},
    )
    speed = {mode: predictions_per_second(config, mode, seconds) for mode in ("rows", "sequences")}
    print(f"{config['dataset']}, {config['train_stage']}, batches of {config['train_batch_size']} predictions")
    for mode, value in speed.items():
        print(f"{mode:10}{value:10,.0f} predictions/s{value / speed['rows']:8.1f} x")


def predictions_per_second(config, mode, seconds):
    """Train for some seconds after two steps of warm-up. Returns predictions per second, float."""
    from data import SequenceBatches, UniSRecDataset
    from engine.setup import build_model
    from engine.trainer import make_optimizer
    from unisrec import UniSRec

    dataset = UniSRecDataset(config)
    model = build_model(UniSRec, config, dataset).train()
    optimizer = make_optimizer(config, model)
    batches = SequenceBatches(
        dataset.sequences("train"), config["train_batch_size"], dataset.window, mode, config["window_stride"]
    )
    seen, steps, start = 0, 0, time.perf_counter()
    while True:
        for batch in batches:
            if steps == 2:
                seen, start = 0, time.perf_counter()
            optimizer.zero_grad(set_to_none=True)
            model.calculate_loss(batch.to(config["device"])).backward()
            optimizer.step()
            seen, steps = seen + len(batch), steps + 1
            if steps > 2 and time.perf_counter() - start > seconds:
                return seen / (time.perf_counter() - start)


if __name__ == "__main__":
    run_command(main)
