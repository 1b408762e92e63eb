"""Large data: a generated mixture of the published size, and a generated catalogue of a million items.

    python benchmarks/large.py mixture [--folder DIR]       # 5 shops, 1.36 M users, 447,000 items, 14 M interactions
    python benchmarks/large.py catalogue [--folder DIR]     # 1 M items, 20,000 users

Text features have width 768 and are float16: 1.5 GB per million items. The data are generated once and stay in --folder
(default: a temporary folder). Items form clusters, also in their features, and users mostly stay in two clusters, so
that a model can learn something. Each measurement runs in a process of its own. Peak memory includes the pages of
mapped features that were read.
"""

import argparse
import json
import os
import sys
import tempfile
import time

PROJECT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, PROJECT)

import numpy as np  # noqa: E402

from benchmarks.measuring import memory, open_data, run_measurement, training_rate  # noqa: E402

WIDTH = 768
CLUSTER = 100  # items per cluster
# users, items, interactions of the shops that the paper pre-trains on (table 1)
SHOPS = {
    "Food": (115_349, 39_670, 1_027_413),
    "Home": (731_913, 185_552, 6_451_926),
    "CDs": (94_010, 64_439, 1_118_563),
    "Kindle": (138_436, 98_111, 2_204_596),
    "Movies": (281_700, 59_203, 3_226_731),
}
MILLION = (20_000, 1_000_000, 200_000)  # users, items, interactions


# -- generated shops -------------------------------------------------------------------------------------------------


def write_shop(folder: str, name: str, users: int, items: int, interactions: int, variants: int = 1) -> None:
    """Generate a data set and write it with the writers of this project.

    Args:
        folder: the folder in which the folder of the data set is created.
        name: the data set.
        users, items, interactions: their numbers.
        variants: number of feature files: feat1Mean, feat2Mean, ...
    """
    import polars as pl

    from dataset.preprocessing.interactions import Interactions
    from dataset.preprocessing.splits import Rules, write_data_set

    random = np.random.default_rng(items)
    user, item = _clicks(random, users, items, interactions)
    raw = [pl.Series([f"{kind}{number}" for number in range(count)]) for kind, count in (("U", users), ("I", items))]
    order = np.arange(len(user))
    rows = Interactions(user, item, order, order, *raw)
    texts = pl.DataFrame({"item": raw[1], "text": [f"item {number}" for number in range(items)]})
    write_data_set(name, folder, rows, lambda *_: texts, Rules(0, 0, all_items=True), dict)
    with open(os.path.join(folder, name, f"{name}.item2index"), encoding="utf-8") as file:
        number = np.array([int(line.split("\t")[0][1:]) for line in file])
    for variant in range(1, variants + 1):
        _write_features(random, os.path.join(folder, name, f"{name}.feat{variant}Mean"), number // CLUSTER)


def _clicks(random, users, items, interactions):
    """User and item of each interaction, uint32; interactions of one user follow one another."""
    lengths = 4 + random.multinomial(interactions - 4 * users, random.dirichlet(np.full(users, 0.5)))
    user = np.repeat(np.arange(users, dtype=np.uint32), lengths)
    clusters = -(-items // CLUSTER)
    favourite = random.integers(0, clusters, (users, 2))[user, random.integers(0, 2, len(user))]
    within = (CLUSTER * random.random(len(user)) ** 3).astype(np.int64)  # a long tail
    item = np.where(random.random(len(user)) < 0.1, random.integers(0, items, len(user)), favourite * CLUSTER + within)
    return user, np.minimum(item, items - 1).astype(np.uint32)


def _write_features(random, path, cluster):
    centres = random.standard_normal((cluster.max() + 1, WIDTH), np.float32)
    with open(path, "wb") as file:
        for part in np.array_split(cluster, max(1, len(cluster) // 10_000)):
            noise = random.standard_normal((len(part), WIDTH), np.float32)
            file.write((centres[part] + noise).astype(np.float16).tobytes())
    with open(f"{path}.json", "w", encoding="utf-8") as file:
        json.dump({"width": WIDTH, "items": len(cluster), "dtype": "float16"}, file)


def _prepare(options):
    """Generate the data that do not exist yet. Returns an empty dict."""
    from dataset.preprocessing.to_pretrain_atomic_files import write_mixture

    pretrain, downstream = (os.path.join(options.folder, kind) for kind in ("pretrain", "downstream"))
    shops = SHOPS if options.what == "mixture" else {}
    for name, sizes in shops.items():
        if not os.path.isfile(os.path.join(pretrain, name, f"{name}.feat2Mean.json")):
            write_shop(pretrain, name, *(max(1, int(size * options.scale)) for size in sizes), variants=2)
    if options.what == "mixture" and not os.path.isfile(os.path.join(pretrain, "FHCKM", "FHCKM.json")):
        write_mixture(list(SHOPS), pretrain, pretrain, "FHCKM")
    if options.what == "catalogue" and not os.path.isfile(
        os.path.join(downstream, "Million", "Million.feat1Mean.json")
    ):
        write_shop(downstream, "Million", *(max(1, int(size * options.scale)) for size in MILLION))
    return {}


# -- the mixture -----------------------------------------------------------------------------------------------------


def mixture(options: argparse.Namespace) -> None:
    """Measure loading and pre-training on the mixture."""
    for cache in ("first time", "warm cache"):
        result = _run(options, "load")
        _print_result(f"loading, {cache}", f"{result['load']:.2f} s to the first batch", result)
        print(f"  resident: {result['anonymous_gb']:.2f} GB, mapped files and libraries: {result['mapped_gb']:.2f} GB")
    result = _run(options, "pretraining")
    _print_result("pre-training, batches of 8,192", f"{result['rate']:,.0f} predictions/s", result)


def _load(options):
    import unisrec  # noqa: F401  imports are not part of loading
    from engine.building import sequence_batches

    start = time.perf_counter()
    config, dataset = _open_mixture(options)
    next(iter(sequence_batches(config, dataset)))
    return {"load": time.perf_counter() - start}


def _pretraining(options):
    return {"rate": training_rate(*_open_mixture(options), options.seconds)}


def _open_mixture(options):
    # the losses of the paper, with which the tables of the README were measured
    return open_data("pretrain", os.path.join(options.folder, "pretrain"), "FHCKM", pretrain_loss="contrastive")


# -- the catalogue ---------------------------------------------------------------------------------------------------


def catalogue(options: argparse.Namespace) -> None:
    """Measure fine-tuning with sampled negatives and, with `--exact`, one step of the exact softmax."""
    for stage in ("inductive_ft", "transductive_ft"):
        result = _run(options, "finetune", stage)
        _print_result(f"finetune.py, {stage}, 1 epoch", f"{result['rate']:,.0f} predictions/s", result)
        seconds = f"{result['train']:.0f} s training, {result['evaluate']:.0f} s valid and test"
        print(f"  {options.negatives:,} negatives; {seconds}; test recall@10 {result['recall@10']:.4f}", flush=True)
    if options.exact:
        result = _run(options, "exact_step", "inductive_ft")
        _print_result("one step, exact softmax, inductive_ft", f"{result['rate']:,.0f} predictions/s", result)


def _finetune(options):
    """Run `finetune.py` and read speed and time from its result file."""
    import finetune

    result_file = os.path.join(options.folder, f"{options.stage}.json")
    settings = {
        "data_path": os.path.join(options.folder, "downstream"),
        "checkpoint_dir": os.path.join(options.folder, "saved"),
        "result_file": result_file,
        "train_stage": options.stage,
        "sampled_negatives": options.negatives,
        "epochs": 1,
        "show_progress": False,
    }
    finetune.main(["-d", "Million", *(f"--{key}={value}" for key, value in settings.items())])
    with open(result_file, encoding="utf-8") as file:
        result = json.load(file)
    recall = result["metrics"]["test"]["recall@10"]
    return {**result["seconds"], "rate": result["rows_per_second"], "recall@10": recall}


def _exact_step(options):
    folder = os.path.join(options.folder, "downstream")
    return {"rate": training_rate(*open_data(options.stage, folder, "Million"), seconds=0, warm_up=0)}


# -- processes -------------------------------------------------------------------------------------------------------


def _print_result(label, speed, result):
    print(f"{label:40}{speed:>30}   peak {result['peak_gb']:.2f} GB", flush=True)


def _run(options, measure, stage="pretrain"):
    return run_measurement(
        os.path.abspath(__file__),
        [options.what, "--folder", options.folder, "--scale", options.scale, "--seconds", options.seconds]
        + ["--negatives", options.negatives, "--measure", measure, "--stage", stage],
    )


_MEASURES = {
    "prepare": _prepare,
    "load": _load,
    "pretraining": _pretraining,
    "finetune": _finetune,
    "exact_step": _exact_step,
}


def main() -> None:
    """Run the command. It is described at the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("mixture", "catalogue"))
    parser.add_argument("--folder", help="folder for the generated data, up to 5 GB (default: temporary)")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="factor on the numbers of users, items and interactions (default: 1)"
    )
    parser.add_argument("--seconds", type=float, default=30, help="seconds of pre-training to measure (default: 30)")
    parser.add_argument("--negatives", type=int, default=8192, help="sampled negatives per step (default: 8192)")
    parser.add_argument("--exact", action="store_true", help="also measure one step of the exact softmax (minutes)")
    parser.add_argument("--measure", choices=_MEASURES, help=argparse.SUPPRESS)
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(_MEASURES[options.measure](options) | memory()))
        return
    with tempfile.TemporaryDirectory() as temporary:
        options.folder = os.path.abspath(options.folder or temporary)
        _run(options, "prepare")
        {"mixture": mixture, "catalogue": catalogue}[options.what](options)


if __name__ == "__main__":
    main()
