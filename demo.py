"""The whole of UniSRec on real data in a few minutes: python demo.py

MovieLens-100k (comes with RecBole) is cut by main genre into four shops with no film in common. The films' titles,
years and genres are encoded by MiniLM, the model is pre-trained on three of the shops and moves to the fourth.
"""

import glob
import logging
import os

from common.errors import run_command
from common.files import atomic_path, write_json
from engine.config import ROOT, build_config, parse_command_line

USAGE = """
python demo.py [--key=value ...]     keys of props/ change the fine-tuning and the baseline, for example --seed=1
"""
FOLDER = os.path.join(ROOT, "saved", "demo")
SOURCES, TARGET = ("Action", "Comedy", "Other"), "Drama"
MIXTURE = "Films"
PRETRAIN = {"epochs": 6, "train_batch_size": 2048, "save_step": 6, "hidden_size": 64}
FINETUNE = {"epochs": 12, "stopping_step": 3, "train_batch_size": 1024, "hidden_size": 64, "predictions_per_row": 25}
# (row of the table, stage, starts from the pre-trained model, learns, the row that it should be compared with)
UNISREC = (
    ("UniSRec, untrained", "inductive_ft", False, False, None),
    ("UniSRec, pre-trained, zero-shot", "inductive_ft", True, False, "UniSRec, untrained"),
    ("UniSRec, inductive, from scratch", "inductive_ft", False, True, None),
    ("UniSRec, inductive, pre-trained", "inductive_ft", True, True, "UniSRec, inductive, from scratch"),
    ("UniSRec, transductive, from scratch", "transductive_ft", False, True, None),
    ("UniSRec, transductive, pre-trained", "transductive_ft", True, True, "UniSRec, transductive, from scratch"),
)
BASELINES = {
    "Popularity": "Popularity",
    "LastText": "nearest text to the last film",
    "MeanText": "nearest text to the mean of the history",
    "SASRec": "SASRec (film ids only)",
}


def main(argv):
    options = parse_command_line(argv, {}, USAGE)
    data = prepare(os.path.join(FOLDER, "dataset"))
    checkpoint = pretrain_on_sources(data)
    rows = run_all(data, checkpoint, options)
    table = print_table(rows)
    write_json(os.path.join(FOLDER, "results.json"), {"target": TARGET, "sources": SOURCES, "rows": rows})
    draw(rows, os.path.join(FOLDER, "results.png"))
    print(f"written: {FOLDER}/results.json, results.png")
    check(table)


def say(text):
    print(f"\n== {text}", flush=True)


def prepare(folder):
    """MovieLens to four data sets, their texts to features, the sources to a mixture. Returns the folder."""
    from dataset.preprocessing.encode_text import encode_dataset
    from dataset.preprocessing.process_movielens import process_movielens, table
    from dataset.preprocessing.to_pretrain_atomic_files import write_mixture

    say(
        "1. MovieLens-100k by main genre. Ratings with the same time keep their order in the file; "
        "a user may occur in several shops, a film in one"
    )
    print(table(process_movielens(folder)))
    say("2. titles, years and genres to vectors (all-MiniLM-L6-v2, mean pooling)")
    for domain in (*SOURCES, TARGET):
        encode_dataset(domain, os.path.join(folder, "downstream"))
    write_mixture(list(SOURCES), os.path.join(folder, "downstream"), os.path.join(folder, "pretrain"), MIXTURE)
    return folder


def pretrain_on_sources(data):
    """Pre-train on the mixture of the source shops. Returns the checkpoint."""
    from pretrain import configure, pretrain

    say(f"3. pre-training on {', '.join(SOURCES)}")
    for earlier in glob.glob(os.path.join(FOLDER, f"UniSRec-{MIXTURE}-*.pth")):
        os.remove(earlier)  # of an earlier demo; if the code has changed since, pre-training would not replace it
    return pretrain(
        configure(
            {"dataset": MIXTURE, "data_path": os.path.join(data, "pretrain"), "checkpoint_dir": FOLDER, **PRETRAIN}
        )
    )


def run_all(data, checkpoint, options):
    """Every row of the table. Returns a list of results, dict, each with its `row` name and `compare_with`."""
    from engine.finetuning import finetune, interaction_model, run_baseline
    from unisrec import UniSRec

    say(f"4. the target shop, {TARGET}: full ranking of its films, best epoch chosen on valid, reported on test")
    shared = {"data_path": os.path.join(data, "downstream"), "checkpoint_dir": FOLDER, **FINETUNE, **options}
    rows = []
    for model, name in BASELINES.items():
        logging.getLogger().info("-- %s", name)
        config = build_config(
            interaction_model(model),
            TARGET,
            ["overall.yaml", "finetune.yaml"],
            {key: value for key, value in shared.items() if key != "hidden_size" or model == "SASRec"},
        )
        rows.append({"row": name, "compare_with": None, **run_baseline(config)})
    for name, stage, pretrained, learns, twin in UNISREC:
        logging.getLogger().info("-- %s", name)
        config = build_config(
            UniSRec,
            TARGET,
            ["overall.yaml", "UniSRec.yaml", "finetune.yaml"],
            {
                **shared,
                "train_stage": stage,
                "pretrained": checkpoint if pretrained else None,
                "epochs": shared["epochs"] if learns else 0,
                "result_file": os.path.join(FOLDER, f"{name.replace(', ', '-').replace(' ', '-')}.json"),
            },
        )
        rows.append({"row": name, "compare_with": twin, **finetune(config)})
    return rows


def print_table(rows):
    """Print the test metrics, and what pre-training adds to the twin's ndcg@10. Returns {row: ndcg@10}."""
    columns = ("recall@10", "ndcg@10", "recall@50", "ndcg@50")
    ndcg = {row["row"]: row["metrics"]["test"]["ndcg@10"] for row in rows}
    say(f"result: {TARGET}, test")
    print(f"{'':42}" + "".join(f"{column:>11}" for column in columns) + "   epochs   ndcg@10 to its twin's")
    for row in rows:
        values = "".join(f"{row['metrics']['test'][column]:11.4f}" for column in columns)
        gain = f"{ndcg[row['row']] - ndcg[row['compare_with']]:+11.4f}" if row["compare_with"] else ""
        print(f"{row['row']:42}{values}{row['epochs']:9}{gain}")
    print("The twin of zero-shot is the untrained model, that of pre-trained the same model from scratch.")
    return ndcg


def draw(rows, path):
    """A bar for each row's test ndcg@10."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [row["row"] for row in rows]
    colours = [
        "tab:orange" if "pre-trained" in name else "tab:blue" if name.startswith("UniSRec") else "tab:gray"
        for name in names
    ]
    figure, axes = pyplot.subplots(figsize=(9, 4.5))
    bars = axes.barh(names, [row["metrics"]["test"]["ndcg@10"] for row in rows], color=colours)
    axes.bar_label(bars, fmt="%.4f", padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel(f"ndcg@10 on {TARGET} (test, full ranking)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    pyplot.close(figure)


def check(ndcg):
    """Fine-tuned models must beat popularity and the untrained model; where one does not, exit with 1."""
    floor = max(ndcg["Popularity"], ndcg["UniSRec, untrained"])
    failed = [name for name, _, _, learns, _ in UNISREC if learns and not ndcg[name] > floor]
    if failed:
        raise SystemExit(f"not better than popularity and the untrained model ({floor:.4f}): {'; '.join(failed)}")


if __name__ == "__main__":
    run_command(main)
