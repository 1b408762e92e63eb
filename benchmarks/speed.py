"""Speed and memory of training and evaluation, compared with a plain reference in the same run.

    python benchmarks/speed.py                                         # MovieLens, which RecBole includes
    python benchmarks/speed.py -d Scientific -m BTS [--data DIR]       # DIR contains downstream/ and pretrain/
    python benchmarks/speed.py -d Scientific --parts finetune,startup

The reference (reference.py) computes as the published code does, so it is compared with the recipe of the paper. The
part `recipes` compares this recipe with the default one. The reference encodes one row per prefix, padded to 50 items.
It adapts every position, one expert after the other. It computes the item table again for every batch of an evaluation.
One of its steps takes up to a minute. Each measurement runs in a process of its own, whose peak memory is reported.
"""

import argparse
import json
import os
import subprocess
import sys
import time

PROJECT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, PROJECT)

from benchmarks.measuring import memory, open_data, run_measurement, training_rate  # noqa: E402

FINETUNING = ("transductive_ft", "inductive_ft")
PRETRAIN_ROWS = 1024  # batch size of the reference: the published 8,192 rows need 29 GB
FINETUNE_ROWS = 2048  # the published batch size
EVALUATION_ROWS = 2048  # the published batch size of an evaluation
PREDICTIONS_PER_ROW = (1, 2, 4, 50)


def main() -> None:
    """Run the command. It is described at the top of the file."""
    options = _parser().parse_args()
    if options.measure:
        print(json.dumps(_MEASURES[options.measure](options) | memory()))
        return
    if options.dataset == "Drama" and not options.data:
        options.data = _movielens()
    options.data = options.data or os.path.join(PROJECT, "dataset")
    print(f"{options.dataset}, {options.mixture}; {os.cpu_count()} cores", flush=True)
    for part in options.parts.split(","):
        _PARTS[part](options)


# -- the table -------------------------------------------------------------------------------------------------------


def finetuning(options: argparse.Namespace) -> None:
    """Predictions per second of both fine-tuning stages."""
    for stage in FINETUNING:
        _compare(f"fine-tuning, {stage}", "predictions", options, "finetune_ours", "finetune_reference", stage)


def pretraining(options: argparse.Namespace) -> None:
    """Predictions per second of pre-training."""
    _compare("pre-training", "predictions", options, "pretrain_ours", "pretrain_reference", "pretrain")


def evaluation(options: argparse.Namespace) -> None:
    """Users per second of an evaluation with full ranking."""
    _compare("evaluation, full ranking", "users", options, "evaluate_ours", "evaluate_reference", "transductive_ft")


def startup(options: argparse.Namespace) -> None:
    """Seconds from the start of the process to the end of the first training step."""
    _print_seconds("finetune.py: start to first step", _run(options, "first_step", "transductive_ft"))


def loading(options: argparse.Namespace) -> None:
    """Seconds to load the training sequences of the mixture from their cache."""
    _run(options, "load_mixture", "pretrain")  # writes the cache
    _print_seconds(f"loading {options.mixture}, warm cache", _run(options, "load_mixture", "pretrain"))


def predictions_per_row(options: argparse.Namespace) -> None:
    """Inductive fine-tuning with several values of `predictions_per_row`; 1 encodes each prefix by itself."""
    rates = {n: _run(options, "finetune_ours", "inductive_ft", n)["rate"] for n in PREDICTIONS_PER_ROW}
    for n, rate in rates.items():
        label = f"inductive, {n} predictions per row"
        print(f"{label:40}{rate:9,.0f} predictions/s   {rate / rates[1]:.1f} x rows", flush=True)


def recipes(options: argparse.Namespace) -> None:
    """The default recipe compared with the recipe of the paper: training in both stages, and evaluation."""
    for label, unit, measure, stage in (
        *((f"fine-tuning, {stage}", "predictions", "finetune_ours", stage) for stage in FINETUNING),
        ("evaluation, full ranking", "users", "evaluate_ours", "transductive_ft"),
    ):
        own, published = (_run(options, measure, stage, recipe=recipe) for recipe in ("default", "published"))
        print(f"{label:40}{own['rate']:9,.0f} {unit}/s {own['peak_gb']:5.2f} GB   published recipe "
              f"{published['rate']:9,.0f}/s {published['peak_gb']:5.2f} GB   {own['rate'] / published['rate']:5.2f} x",
              flush=True)  # fmt: skip


def _compare(label, unit, options, ours, reference, stage):
    fast, slow = _run(options, ours, stage), _run(options, reference, stage)
    print(f"{label:40}{fast['rate']:9,.0f} {unit}/s {fast['peak_gb']:5.2f} GB   reference {slow['rate']:7,.1f}/s "
          f"{slow['peak_gb']:5.2f} GB   {fast['rate'] / slow['rate']:6.0f} x", flush=True)  # fmt: skip


def _print_seconds(label, result):
    print(f"{label:40}{result['seconds']:9.2f} s   {result['peak_gb']:5.2f} GB", flush=True)


def _run(options, measure, stage, predictions_per_row=None, recipe="published"):
    """One measurement in a process of its own. Returns dict."""
    return run_measurement(
        os.path.abspath(__file__),
        ["-d", options.dataset, "-m", options.mixture, "--data", options.data, "--seconds", options.seconds]
        + ["--measure", measure, "--stage", stage, "--recipe", recipe]
        + (["--predictions_per_row", predictions_per_row] if predictions_per_row else []),
    )


def _movielens():
    folder = os.path.join(PROJECT, "saved", "demo", "dataset")
    if not os.path.isfile(os.path.join(folder, "pretrain", "Films", "Films.json")):
        # in a process of its own: a process inherits the peak memory of its parent
        prepare = f"import demo; demo.prepare({folder!r})"
        subprocess.run([sys.executable, "-c", prepare], check=True, cwd=PROJECT)
    return folder


# -- measurements ----------------------------------------------------------------------------------------------------


def _open(options):
    """(config, data set) of the stage."""
    pretrain = options.stage == "pretrain"
    folder = os.path.join(options.data, "pretrain" if pretrain else "downstream")
    name = options.mixture if pretrain else options.dataset
    settings = {"predictions_per_row": options.predictions_per_row} if options.predictions_per_row else {}
    if options.recipe == "published":
        settings["config_files"] = [os.path.join(PROJECT, "props", "published.yaml")]
    return open_data(options.stage, folder, name, **settings)


def _train(options):
    return {"rate": training_rate(*_open(options), options.seconds)}


def _reference(config, dataset):
    """The reference model with all text features in memory, as in the published code; row 0 is padding."""
    import torch

    from benchmarks.reference import ReferenceUniSRec

    count = dataset.catalogue.n_items * (2 if config["train_stage"] == "pretrain" else 1)
    features = dataset.features.lookup(torch.arange(1, count + 1))
    features = torch.cat([torch.zeros_like(features[:1]), features])
    return ReferenceUniSRec(config, features, dataset.catalogue.n_items + 1)


def _padded_rows(config, part, count):
    """Random rows of a split, padded as by the published loader: items [B, 50], lengths [B], targets [B]."""
    import numpy as np
    import torch.nn.functional as F

    chosen = np.random.default_rng(0).permutation(len(part))[:count]
    rows = part[np.sort(chosen)]
    items = rows["item_id_list"]
    items = F.pad(items, (0, config["MAX_ITEM_LIST_LENGTH"] - items.size(1)))
    return items, rows["item_length"], rows["item_id"]


def _reference_step(options, count, loss_of):
    """One Adam step of the reference model on `count` rows. Returns dict."""
    import torch

    config, dataset = _open(options)
    model = _reference(config, dataset).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=config["learning_rate"])
    rows = _padded_rows(config, dataset.build()[0], count)
    start = time.perf_counter()
    loss_of(model, *rows).backward()
    optimizer.step()
    return {"rate": len(rows[0]) / (time.perf_counter() - start)}


def _finetune_reference(options):
    return _reference_step(options, FINETUNE_ROWS, lambda model, *rows: model.finetune_loss(*rows))


def _pretrain_reference(options):
    def loss_of(model, items, lengths, targets):
        return model.pretrain_loss(items, lengths, targets, items, lengths)  # a view costs as much as its rows

    return _reference_step(options, PRETRAIN_ROWS, loss_of)


def _evaluate_ours(options):
    from engine.building import build_model
    from engine.evaluate import Evaluation
    from unisrec import UniSRec

    config, dataset = _open(options)
    model, evaluate = build_model(UniSRec, config, dataset), Evaluation(config, dataset)
    if model.item_to_item is not None:  # as after a training
        model.item_to_item.fit(dataset.sequences("train"))
        model.item_to_item.factor.fill_(1.0)
    evaluate(model, "test")
    start = time.perf_counter()
    evaluate(model, "test")
    return {"rate": len(evaluate.parts["test"]) / (time.perf_counter() - start)}


def _evaluate_reference(options):
    import torch

    config, dataset = _open(options)
    model = _reference(config, dataset).eval()
    items, lengths, targets = _padded_rows(config, dataset.build()[2], EVALUATION_ROWS)
    start = time.perf_counter()
    with torch.no_grad():
        top = model.scores(items, lengths).topk(50, dim=-1).indices
        (top == targets[:, None] - 1).any(-1).float().mean().item()
    return {"rate": len(items) / (time.perf_counter() - start)}


def _first_step(options):
    """Run `finetune.py` until its first step is done. `run_measurement` times the process, its start included."""
    import finetune
    from engine.trainer import Trainer

    class FirstStep(Exception):
        pass

    def step_and_stop(self, batch, train_step=Trainer.train_step):
        train_step(self, batch)
        raise FirstStep

    Trainer.train_step = step_and_stop
    try:
        finetune.main(["-d", options.dataset, "--data_path", os.path.join(options.data, "downstream")])
    except FirstStep:
        return {}
    raise AssertionError("finetune.py ended without a training step")


def _load_mixture(options):
    config, _ = _open(options)
    from data import UniSRecDataset

    start = time.perf_counter()
    UniSRecDataset(config).sequences("train")
    return {"seconds": time.perf_counter() - start}


_PARTS = {
    "finetune": finetuning,
    "pretrain": pretraining,
    "evaluate": evaluation,
    "startup": startup,
    "load": loading,
    "predictions_per_row": predictions_per_row,
    "recipes": recipes,
}
_MEASURES = {
    "finetune_ours": _train,
    "finetune_reference": _finetune_reference,
    "pretrain_ours": _train,
    "pretrain_reference": _pretrain_reference,
    "evaluate_ours": _evaluate_ours,
    "evaluate_reference": _evaluate_reference,
    "first_step": _first_step,
    "load_mixture": _load_mixture,
}


def _parser():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "-d", "--dataset", default="Drama", help="data set to fine-tune on (default: Drama, from MovieLens)"
    )
    parser.add_argument(
        "-m", "--mixture", default="Films", help="mixture to pre-train on (default: Films, from MovieLens)"
    )
    parser.add_argument("--data", metavar="DIR", help="folder with downstream/ and pretrain/ (default: dataset)")
    parser.add_argument("--parts", default=",".join(_PARTS), metavar="A,B,C", help=f"default: {','.join(_PARTS)}")
    parser.add_argument("--seconds", type=float, default=20, help="seconds of training to measure (default: 20)")
    parser.add_argument("--measure", choices=_MEASURES, help=argparse.SUPPRESS)
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    parser.add_argument("--predictions_per_row", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--recipe", choices=("default", "published"), help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    main()
