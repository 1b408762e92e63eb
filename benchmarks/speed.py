"""Training and evaluation against the published way of doing it, in one run, each in a process of its own.

    python benchmarks/speed.py                                         # MovieLens, which comes with RecBole
    python benchmarks/speed.py -d Scientific -m BTS [--data DIR]       # DIR holds downstream/ and pretrain/
    python benchmarks/speed.py -d Scientific --parts finetune,startup

The reference (reference.py) encodes one row a prefix, padded to 50, adapts every position with one expert after the
other, and makes the table of items anew for every batch of an evaluation. One step of it takes up to a minute. Peak
memory is of the whole process.
"""

import argparse
import json
import os
import subprocess
import sys
import time

PROJECT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, PROJECT)

from benchmarks.measuring import memory, open_data, run, training_rate  # noqa: E402

FINETUNING = ("transductive_ft", "inductive_ft")
PRETRAIN_ROWS = 1024  # of the reference: the published 8,192 need 29 GB
SHARED = (1, 2, 4, 50)  # predictions per row
EVALUATION_ROWS = 2048  # the published batch of an evaluation


def main():
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


def finetuning(options):
    for stage in FINETUNING:
        _compare(f"fine-tuning, {stage}", "predictions", options, "finetune_ours", "finetune_reference", stage)


def pretraining(options):
    _compare("pre-training", "predictions", options, "pretrain_ours", "pretrain_reference", "pretrain")


def evaluation(options):
    _compare("evaluation, full ranking", "users", options, "evaluate_ours", "evaluate_reference", "transductive_ft")


def startup(options):
    _line("finetune.py: from Enter to the first step", _run(options, "first_step", "transductive_ft"))


def loading(options):
    _run(options, "load_mixture", "pretrain")  # warms the cache
    _line(f"loading {options.mixture}, warm", _run(options, "load_mixture", "pretrain"))


def sharing(options):
    """How many predictions share an encoded history: from each prefix by itself to all positions in one pass."""
    rates = {shared: _run(options, "finetune_ours", "inductive_ft", shared)["rate"] for shared in SHARED}
    for shared, rate in rates.items():
        what = f"inductive, {shared} predictions per row"
        print(f"{what:40}{rate:9,.0f} predictions/s   {rate / rates[1]:.1f} x rows", flush=True)


def _compare(what, unit, options, ours, reference, stage):
    fast, slow = _run(options, ours, stage), _run(options, reference, stage)
    print(f"{what:40}{fast['rate']:9,.0f} {unit}/s {fast['gigabytes']:5.2f} GB   reference {slow['rate']:7,.1f}/s "
          f"{slow['gigabytes']:5.2f} GB   {fast['rate'] / slow['rate']:6.0f} x", flush=True)  # fmt: skip


def _line(what, found):
    print(f"{what:40}{found['seconds']:9.2f} s   {found['gigabytes']:5.2f} GB", flush=True)


def _run(options, measure, stage, shared=None):
    """One measurement in a process of its own. Returns dict."""
    return run(
        os.path.abspath(__file__),
        ["-d", options.dataset, "-m", options.mixture, "--data", options.data, "--seconds", options.seconds]
        + ["--measure", measure, "--stage", stage, *(["--shared", shared] if shared else [])],
    )


def _movielens():
    folder = os.path.join(PROJECT, "saved", "demo", "dataset")
    if not os.path.isfile(os.path.join(folder, "pretrain", "Films", "Films.json")):
        # in a process of its own: one starts with the peak memory of the one that started it
        prepare = f"import demo; demo.prepare({folder!r})"
        subprocess.run([sys.executable, "-c", prepare], check=True, cwd=PROJECT)
    return folder


# -- measurements ----------------------------------------------------------------------------------------------------


def _open(options):
    """(config, data set) of the stage."""
    pretrain = options.stage == "pretrain"
    folder = os.path.join(options.data, "pretrain" if pretrain else "downstream")
    name = options.mixture if pretrain else options.dataset
    settings = {"predictions_per_row": options.shared} if options.shared else {}
    return open_data(options.stage, folder, name, **settings)


def _train(options):
    return {"rate": training_rate(*_open(options), options.seconds)}


def _reference(config, dataset):
    """The plain model with the features that the published code would hold, padding row first."""
    import torch

    from benchmarks.reference import ReferenceUniSRec

    count = dataset.catalogue.n_items * (2 if config["train_stage"] == "pretrain" else 1)
    features = dataset.features.lookup(torch.arange(1, count + 1))
    features = torch.cat([torch.zeros_like(features[:1]), features])
    return ReferenceUniSRec(config, features, dataset.catalogue.n_items + 1)


def _padded_rows(config, part, count):
    """Rows of a split as the published loader gives them, drawn at random: items [B, 50], lengths [B], targets [B]."""
    import numpy as np
    import torch.nn.functional as F

    chosen = np.random.default_rng(0).permutation(len(part))[:count]
    rows = part[np.sort(chosen)]
    items = rows["item_id_list"]
    items = F.pad(items, (0, config["MAX_ITEM_LIST_LENGTH"] - items.size(1)))
    return items, rows["item_length"], rows["item_id"]


def _reference_step(options, count, loss_of):
    """The published work for one step of Adam. Returns dict."""
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
    return _reference_step(options, 2048, lambda model, *rows: model.finetune_loss(*rows))


def _pretrain_reference(options):
    def loss_of(model, items, lengths, targets):
        return model.pretrain_loss(items, lengths, targets, items, lengths)  # the view costs what the rows cost

    return _reference_step(options, PRETRAIN_ROWS, loss_of)


def _evaluate_ours(options):
    from engine.building import build_model
    from engine.evaluate import Evaluation
    from unisrec import UniSRec

    config, dataset = _open(options)
    model, evaluate = build_model(UniSRec, config, dataset), Evaluation(config, dataset)
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
    """All that `finetune.py` does until its first step is done; the process's own start is part of the time."""
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
    raise AssertionError("there was no step")


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
    "sharing": sharing,
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
    parser.add_argument("-d", "--dataset", default="Drama", help="to fine-tune on (default: Drama, of MovieLens)")
    parser.add_argument("-m", "--mixture", default="Films", help="to pre-train on (default: Films, of MovieLens)")
    parser.add_argument("--data", metavar="DIR", help="holds downstream/ and pretrain/ (default: dataset)")
    parser.add_argument("--parts", default=",".join(_PARTS), help=f"default: {','.join(_PARTS)}")
    parser.add_argument("--seconds", type=float, default=20, help="of training to measure (default: 20)")
    parser.add_argument("--measure", choices=_MEASURES, help=argparse.SUPPRESS)
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    parser.add_argument("--shared", type=int, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    main()
