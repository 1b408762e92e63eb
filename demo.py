"""UniSRec from raw data to recommendations in four minutes: python demo.py

The demo splits MovieLens-100k, which RecBole includes, into four shops by main genre. No film is in two shops. It
encodes titles, years and genres with MiniLM, pre-trains on three shops, fine-tunes and compares on the fourth, and
recommends films.
"""

import glob
import logging
import os
from typing import Any

from common.errors import run_command
from common.files import atomic_path, write_json
from engine.settings import ROOT, help_text, parse_command_line, settle

USAGE = """
python demo.py [--key=value ...]     settings of fine-tuning and the baselines, for example --seed=1
"""
FOLDER = os.path.join(ROOT, "saved", "demo")
SOURCES, TARGET = ("Action", "Comedy", "Other"), "Drama"
MIXTURE = "Films"
PRETRAIN = {"epochs": 6, "train_batch_size": 2048, "save_step": 6, "hidden_size": 64}
FINETUNE = {"epochs": 12, "stopping_step": 3, "train_batch_size": 1024, "hidden_size": 64, "predictions_per_row": 25}
SHIPPED = os.path.join(ROOT, "saved", "amazon-minilm")  # the pre-trained model of this repository
# (row of the table, stage, what its model was pre-trained on, is fine-tuned, the row to compare it with)
UNISREC = (
    ("UniSRec, untrained", "inductive_ft", "", False, None),
    ("UniSRec, amazon-minilm, zero-shot", "inductive_ft", "shops", False, "UniSRec, untrained"),
    ("UniSRec, pre-trained, zero-shot", "inductive_ft", "films", False, "UniSRec, untrained"),
    ("UniSRec, inductive, from scratch", "inductive_ft", "", True, None),
    ("UniSRec, inductive, pre-trained", "inductive_ft", "films", True, "UniSRec, inductive, from scratch"),
    ("UniSRec, transductive, from scratch", "transductive_ft", "", True, None),
    ("UniSRec, transductive, pre-trained", "transductive_ft", "films", True, "UniSRec, transductive, from scratch"),
)
RECOMMENDS = "UniSRec, inductive, pre-trained"  # the row whose model recommends at the end
NEW_FILM = {"new": "American Beauty, 1999, Drama."}  # the data ends in 1998
BASELINES = {
    "Popularity": "Popularity",
    "LastText": "nearest text to the last film",
    "MeanText": "nearest text to the mean of the history",
    "SASRec": "SASRec (film ids only)",
}


def main(argv: list[str]) -> None:
    """Run the command. It is described at the top of the file."""
    options = parse_command_line(argv, lambda _: help_text(USAGE, "finetune"))
    settle("finetune", options)  # reports errors before anything is written
    data = prepare(os.path.join(FOLDER, "dataset"))
    checkpoint = pretrain_on_sources(data)
    rows = run_all(data, checkpoint, options)
    ndcg = print_table(rows)
    write_json(os.path.join(FOLDER, "results.json"), {"target": TARGET, "sources": SOURCES, "rows": rows})
    draw(rows, os.path.join(FOLDER, "results.png"))
    print(f"written: {FOLDER}/results.json, results.png")
    check(ndcg)
    recommend(next(row["checkpoint"] for row in rows if row["row"] == RECOMMENDS), os.path.join(data, "downstream"))


def announce(step: str) -> None:
    """Print the heading of a step."""
    print(f"\n== {step}", flush=True)


def prepare(folder: str) -> str:
    """Write four data sets with text features, and the mixture of the source shops. Returns the folder."""
    from dataset.preprocessing.encode_text import encode_dataset
    from dataset.preprocessing.process_movielens import process_movielens, table
    from dataset.preprocessing.to_pretrain_atomic_files import write_mixture

    announce("1. Split MovieLens-100k into four shops by main genre")
    print(
        "A film is in one shop; a user may be in several. Ratings with equal timestamps keep their order in the file."
    )
    print(table(process_movielens(folder)))
    announce("2. Encode titles, years and genres (all-MiniLM-L6-v2, mean pooling)")
    for domain in (*SOURCES, TARGET):
        encode_dataset(domain, os.path.join(folder, "downstream"))
    write_mixture(list(SOURCES), os.path.join(folder, "downstream"), os.path.join(folder, "pretrain"), MIXTURE)
    return folder


def pretrain_on_sources(data: str) -> str:
    """Pre-train on the mixture of the source shops. Returns the path of the checkpoint."""
    from pretrain import configure, pretrain

    announce(f"3. Pre-train on {', '.join(SOURCES)}")
    for earlier in glob.glob(os.path.join(FOLDER, f"UniSRec-{MIXTURE}-*.pth")):
        os.remove(earlier)  # if the code has changed, pre-training refuses to replace the checkpoint
    return pretrain(
        configure(
            {"dataset": MIXTURE, "data_path": os.path.join(data, "pretrain"), "checkpoint_dir": FOLDER, **PRETRAIN}
        )
    )


def run_all(data: str, checkpoint: str, options: dict[str, Any]) -> list[dict[str, Any]]:
    """Train or evaluate the model of each row of the table. Returns the results, each with `row` and `compare_with`."""
    from baselines import find_model, yaml_files
    from engine.config import build_config
    from engine.finetuning import finetune, run_baseline
    from unisrec import UniSRec

    announce(f"4. Train and test on {TARGET} (full ranking of its films; the best epoch on valid is tested)")
    common = {"data_path": os.path.join(data, "downstream"), "checkpoint_dir": FOLDER, **FINETUNE, **options}
    rows = []
    for registered, name in BASELINES.items():
        logging.getLogger().info("-- %s", name)
        model = find_model(registered)
        known = settle("baseline", {}, *yaml_files(model)).settings
        config = build_config(model, TARGET, "baseline", {key: common[key] for key in common.keys() & known.keys()})
        rows.append({"row": name, "compare_with": None, **run_baseline(config)})
    starts = {"": None, "films": checkpoint, "shops": SHIPPED}
    for name, stage, start, learns, compare_with in UNISREC:
        logging.getLogger().info("-- %s", name)
        config = build_config(
            UniSRec,
            TARGET,
            "finetune",
            {
                **{key: value for key, value in common.items() if key != "hidden_size" or start != "shops"},
                "train_stage": stage,
                "pretrained": starts[start],
                "epochs": common["epochs"] if learns else 0,
                "result_file": os.path.join(FOLDER, f"{name.replace(', ', '-').replace(' ', '-')}.json"),
            },
        )
        rows.append({"row": name, "compare_with": compare_with, **finetune(config)})
    return rows


def recommend(checkpoint: str, data_path: str) -> None:
    """Print recommendations for three histories, and one of a film that is not in the data.

    Args:
        checkpoint: a fine-tuned inductive model. Its bundle is written beside it.
        data_path: folder that holds the folder of the target.
    """
    from serving import bundle
    from serving.histories import read_histories
    from serving.recommender import Recommender

    announce(f"5. Recommend films ({RECOMMENDS})")
    folder = os.path.join(FOLDER, "bundle")
    bundle.main(["-p", checkpoint, "-d", TARGET, "--data_path", data_path, "--out", folder])
    recommender = Recommender.from_pretrained(folder)
    histories = [history for _, history in read_histories(os.path.join(data_path, TARGET, f"{TARGET}.test.inter"))]
    for history, best in zip(histories[:3], recommender.recommend(histories[:3], k=3), strict=True):
        print(f"{'':4}after  {' | '.join(recommender.texts[item] for item in history[-3:])}")
        print(f"{'':4}   ->  {' | '.join(item.text for item in best)}")
    recommender.add_items(NEW_FILM)
    for history, best in zip(histories, recommender.recommend(histories, k=3), strict=True):
        if any(item.id in NEW_FILM for item in best):
            print("A film that is not in the training data, from its text alone:")
            print(f"{'':4}after  {' | '.join(recommender.texts[item] for item in history[-3:])}")
            print(f"{'':4}   ->  {' | '.join(item.text for item in best)}")
            break
    print(f"try: python recommend.py -m {os.path.relpath(folder)} --history {','.join(histories[0][-3:])}")


def print_table(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Print the test metrics, and how much pre-training improves ndcg@10. Returns {row: ndcg@10}."""
    columns = ("recall@10", "ndcg@10", "recall@50", "ndcg@50")
    ndcg = {row["row"]: row["metrics"]["test"]["ndcg@10"] for row in rows}
    announce(f"Results on {TARGET}, test")
    print(f"{'':42}" + "".join(f"{column:>11}" for column in columns) + "   epochs    gain*")
    for row in rows:
        values = "".join(f"{row['metrics']['test'][column]:11.4f}" for column in columns)
        gain = f"{ndcg[row['row']] - ndcg[row['compare_with']]:+9.4f}" if row["compare_with"] else ""
        print(f"{row['row']:42}{values}{row['epochs']:9}{gain}")
    print("* ndcg@10 compared with the same model without pre-training (zero-shot: with the untrained model)")
    return ndcg


def draw(rows: list[dict[str, Any]], path: str) -> None:
    """Draw a bar chart of the test ndcg@10 of all rows and write it as PNG."""
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


def check(ndcg: dict[str, float]) -> None:
    """Check that each fine-tuned model is better than popularity and the untrained model.

    Raises:
        SystemExit: one is not. Exit code 1.
    """
    floor = max(ndcg["Popularity"], ndcg["UniSRec, untrained"])
    failed = [name for name, _, _, learns, _ in UNISREC if learns and not ndcg[name] > floor]
    if failed:
        raise SystemExit(
            f"error: {'; '.join(failed)}: expected ndcg@10 above {floor:.4f}, "
            "the better of popularity and the untrained model"
        )


if __name__ == "__main__":
    run_command(main)
