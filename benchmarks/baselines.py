"""Training speed of the baselines, on batches of sequences and on RecBole's rows, in one run.

    python benchmarks/baselines.py -d Scientific [--data_path DIR] [--seconds 20]

On rows, SASRec is RecBole's class, and FDSA computes what RecBole's class does: one padded row per prefix. RecBole's
own FDSA and S3Rec need attributes, which the data sets do not have. GRU4Rec and BERT4Rec are RecBole's. Each
measurement runs in a process of its own. A step on rows takes up to two minutes on one core.
"""

import argparse
import json
import os
import sys

PROJECT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, PROJECT)

from benchmarks.measuring import memory, run_measurement, training_rate  # noqa: E402

SEQUENCES, ROWS = "sequences", "rows"
MEASURED = {  # model -> the kinds of batches that it learns from
    "SASRec": (SEQUENCES, ROWS),
    "SASRecHistory": (SEQUENCES,),
    "FDSA": (SEQUENCES, ROWS),
    "S3Rec": (SEQUENCES,),
    "GRU4Rec": (ROWS,),
    "BERT4Rec": (ROWS,),
}
SIZES = {"hidden_size": 300, "inner_size": 256, "embedding_size": 300}


def main() -> None:
    """Run the command. It is described at the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("-d", "--dataset", default="Scientific")
    parser.add_argument("--data_path", default=os.path.join(PROJECT, "dataset", "downstream"))
    parser.add_argument("--seconds", type=float, default=20.0, help="least time of each measurement (default: 20)")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps({"rate": _rate(options, *options.measure)} | memory()))
        return
    for model, kinds in MEASURED.items():
        rates = {kind: _run(options, model, kind) for kind in kinds}
        line = "".join(f"  {kind} {found['rate']:7,.0f}/s {found['peak_gb']:5.2f} GB" for kind, found in rates.items())
        ratio = f"  {rates[SEQUENCES]['rate'] / rates[ROWS]['rate']:5.1f} x" if len(rates) == 2 else ""
        print(f"{model:14}{line}{ratio}", flush=True)


def _run(options, model, kind):
    given = ["-d", options.dataset, "--data_path", options.data_path, "--seconds", options.seconds]
    return run_measurement(os.path.abspath(__file__), [*given, "--measure", model, kind])


def _rate(options, model, kind):
    """Predictions per second."""
    from recbole.data.utils import get_dataloader

    from baselines import yaml_files_of_name
    from data import UniSRecDataset
    from engine.config import build_config
    from engine.settings import settle

    known = settle("baseline", {}, *yaml_files_of_name(model)).settings
    sizes = {key: size for key, size in SIZES.items() if key in known}
    config = build_config(
        model, options.dataset, "baseline", {"data_path": options.data_path, "show_progress": False, **sizes}
    )
    dataset = UniSRecDataset(config)
    if kind == SEQUENCES:
        return training_rate(config, dataset, options.seconds)
    train = dataset.build()[0]
    batches = get_dataloader(config, "train")(config, train, None, shuffle=True)
    return training_rate(config, train, options.seconds, warm_up=1, batches=batches)


if __name__ == "__main__":
    main()
