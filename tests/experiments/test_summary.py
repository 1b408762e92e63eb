"""The table of an experiment against figures worked out by hand, its Markdown, and README."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from scipy.stats import ttest_rel

import experiments.summary
from common.errors import UserError
from engine.settings import ROOT
from experiments.plan import plan_runs, read_experiment
from experiments.readme import fill
from experiments.report import _draw_curves, format_table, number, write_report
from experiments.store import Finished
from experiments.summary import build_table
from tests.experiments.test_compare import write_ranks

YAML = """
title: By hand
datasets: Tiny
seeds: [1, 2]
columns: [recall@10, ndcg@10, valid ndcg@10]
compare_with: Base
rows:
  Popularity: {model: Popularity, compare_with: ~}
  Base: {model: SASRec}
  Text: {model: UniSRec, stage: inductive_ft}
  None: {model: GRU4Rec}
"""
# ranks of 40 users by row and seed: the first `hits` of them have rank 1, the others 30
HITS = {("Popularity", 1): 4, ("Base", 1): 8, ("Base", 2): 12, ("Text", 1): 22, ("Text", 2): 26}


PROTOCOL = {"repeatable": True, "eval_args": {"mode": {"valid": "full", "test": "full"}}, "MAX_ITEM_LIST_LENGTH": 50}


def ranks(hits, users=40):
    return np.where(np.arange(users) < hits, 1, 30)


def finished_run(folder, run, hits):
    """A finished run of 40 users, of whom `hits` have their target on rank 1."""
    folder = folder / f"{run.row.label}-{run.seed}"
    folder.mkdir()
    write_ranks(folder / "ranks.parquet", ranks(hits))
    metrics = {"recall@10": hits / 40, "ndcg@10": hits / 40}
    record = {
        "started": f"2026-11-2{run.seed}T10:00:00",
        "seconds": 10,
        "machine": "a machine",
        "threads": 1,
        "code": "old" if run.row.label == "Base" and run.seed == 2 else "code",
        "description": {"given": run.given},
    }
    result = {
        "run": f"id{run.seed}",
        "seed": run.seed,
        "recipe": "published",
        "train_stage": run.settings.get("train_stage"),
        "text_encoder": {"features": "feat1Mean", "encoder": "minilm", "pooling": "Mean"} if run.row.stage else None,
        "metrics": {"test": metrics, "valid": {name: value / 2 for name, value in metrics.items()}},
        "epochs": 10 * run.seed,
        "best_epoch": 3 * run.seed,
        "seconds": {"load": 1.0, "train": 100.0 * run.seed, "evaluate": 2.0},
        "rows_per_second": 5.0,
        "peak_memory_mb": 6.0,
        "versions": {"torch": "2"},
        "groups": {"repetition": {"new to the user": {"users": 40, **metrics}}},
        "settings": PROTOCOL | {"epochs": 5},
    }
    return Finished(str(folder), record, result)


@pytest.fixture
def by_hand(tmp_path, tiny, monkeypatch):
    """The experiment, its runs, and those that have finished."""
    (tmp_path / "hand.yaml").write_text(YAML)
    experiment = read_experiment(str(tmp_path / "hand.yaml"))
    runs = plan_runs(experiment, tiny)
    monkeypatch.setattr(experiments.summary, "code_hash", lambda run: "code")
    done = {run: finished_run(tmp_path, run, HITS[run.row.label, run.seed])
            for run in runs if (run.row.label, run.seed) in HITS}  # fmt: skip
    return experiment, runs, done


def test_means_and_standard_errors(by_hand):
    table = build_table(*by_hand)
    assert (table["experiment"], table["runs"], table["finished"]) == ("hand", 7, 5)
    assert table["dates"] == ["2026-11-21", "2026-11-22"] and table["machines"] == ["a machine"]
    dataset = table["datasets"]["Tiny"]
    assert (dataset["users"], dataset["items"]) == (40, 100)
    text, popularity = dataset["rows"]["Text"], dataset["rows"]["Popularity"]
    recall = text["metrics"]["test"]["recall@10"]
    assert recall == {"mean": pytest.approx(0.6), "error": pytest.approx(0.05), "values": [0.55, 0.65]}
    assert text["metrics"]["valid"]["ndcg@10"]["mean"] == pytest.approx(0.3)
    assert popularity["metrics"]["test"]["recall@10"] == {"mean": 0.1, "error": None, "values": [0.1]}
    assert (text["stage"], text["seeds"], text["run_ids"]) == ("inductive_ft", [1, 2], ["id1", "id2"])
    assert (text["epochs"], text["best_epoch"], text["threads"]) == ([10, 20], [3, 6], [1, 1])
    assert text["protocol"] == PROTOCOL
    group = text["groups"]["repetition"]["new to the user"]
    assert group == {"users": 40, "recall@10": pytest.approx(0.6), "ndcg@10": pytest.approx(0.6)}
    assert [dataset["rows"][row]["runs_of_other_code"] for row in ("Base", "Text")] == [1, 0]
    assert dataset["rows"]["None"]["seeds"] == [] and dataset["rows"]["None"]["runs_wanted"] == 2


def test_paired_tests_average_a_users_metric_over_the_seeds(by_hand):
    rows = build_table(*by_hand)["datasets"]["Tiny"]["rows"]
    assert [rows[row]["compared"] for row in ("Popularity", "Base", "None")] == [None, None, None]
    base = ((ranks(8) <= 10) + 1.0 * (ranks(12) <= 10)) / 2
    text = ((ranks(22) <= 10) + 1.0 * (ranks(26) <= 10)) / 2
    compared = rows["Text"]["compared"]
    assert compared["row"] == "Base" and list(compared["metrics"]) == ["recall@10", "ndcg@10"], "valid has no ranks"
    found = compared["metrics"]["recall@10"]
    assert found["difference"] == pytest.approx(0.35) and found["p"] == pytest.approx(ttest_rel(text, base).pvalue)
    assert found["p"] < 0.01


def test_other_users_are_refused(by_hand, tmp_path):
    experiment, runs, done = by_hand
    (text,) = [found for run, found in done.items() if run.row.label == "Text" and run.seed == 2]
    write_ranks(text.ranks, ranks(26, users=39))
    with pytest.raises(UserError, match=r"Text-2/ranks.parquet: has no row of user u39 .*, but .*Base-1/ranks.parquet"):
        build_table(experiment, runs, done)


def test_the_markdown(by_hand):
    lines = format_table(build_table(*by_hand))
    assert lines[:7] == [
        "| Tiny (40 users, 100 items) | Recall@10 | NDCG@10 | valid NDCG@10 | seeds | best epoch | seconds | vs. |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        "| Popularity | .1000 | .1000 | .0500 | 1 | 3 | 103 |  |",
        "| Base (a)† | .2500 ± .0500 | .2500 ± .0500 | .1250 ± .0250 | 2 | 3 to 6 | 103 to 203 |  |",
        "| Text | **.6000** ± .0500 ▲ | **.6000** ± .0500 ▲ | **.3000** ± .0250 | 2 | 3 to 6 | 103 to 203 | a |",
        "| None |  |  |  | 0 of 2 |  |  |  |",
        "",
    ]
    assert lines[7:] == [
        "Mean ± standard error over the seeds 1 and 2. A model that draws no random numbers ran once. ▲ better, "
        "▼ worse than the row in the column “vs.”, p < .01 (paired t-test over users, whose metrics are averaged over "
        "the seeds). Full ranking of all items, those of the history included. Item texts: minilm, mean pooling. "
        "† with an earlier state of the code (`--rerun` repeats these runs). Measured 2026-11-21 to 2026-11-22 "
        "(a machine; 1 thread per run)."
    ]


def test_marks_of_worse_rows_and_of_chance(by_hand, tmp_path):
    experiment, runs, done = by_hand
    for hits, mark in ((0, "▼"), (10, "")):
        for run, found in done.items():
            if run.row.label == "Text":
                write_ranks(found.ranks, ranks(hits))
        text = build_table(experiment, runs, done)["datasets"]["Tiny"]["rows"]["Text"]
        assert (text["compared"]["metrics"]["recall@10"]["p"] < 0.01) == bool(mark)
        line = format_table(build_table(experiment, runs, done))[4]
        assert f"± .0500{' ' + mark if mark else ''} |" in line and "▲" not in line


def test_another_protocol_is_not_called_full_ranking(by_hand):
    full = "Full ranking of all items, those of the history included."
    for changes in ({"repeatable": False}, {"eval_args": {"mode": {"valid": "full", "test": "uni100"}}}):
        table = build_table(*by_hand)
        assert full in format_table(table)[-1]
        table["datasets"]["Tiny"]["rows"]["Base"]["protocol"].update(changes)
        assert full not in format_table(table)[-1]


def test_the_files_of_a_table(by_hand, tmp_path):
    table = build_table(*by_hand)
    write_report(table, str(tmp_path / "report"))
    with open(tmp_path / "report" / "table.json") as file:
        assert json.load(file) == table, "plain data"
    text = (tmp_path / "report" / "table.md").read_text()
    assert text.startswith("# By hand\n\n5 of 7 runs have finished.\n\n" + format_table(table)[0])
    assert "## NDCG@10 by group\n\n| Tiny, by repetition | new to the user (40 users) |" in text
    assert (tmp_path / "report" / "table.png").read_bytes()[:4] == b"\x89PNG"
    nothing = build_table(by_hand[0], by_hand[1], {})
    write_report(nothing, str(tmp_path / "nothing"))
    assert "| Text |  |  |  | 0 of 2 |  |  |" in (tmp_path / "nothing" / "table.md").read_text()


def test_numbers():
    assert [number(value) for value in (0.06804, 0.0, 1.0, 0.99999)] == [".0680", ".0000", "1.0000", "1.0000"]


def test_a_table_is_made_without_torch():
    code = "import sys, experiments.run, experiments.summary, experiments.report; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


# -- README ---------------------------------------------------------------------------------------------------------


def test_readme_is_filled_from_committed_tables(by_hand, tmp_path):
    table = build_table(*by_hand)
    os.makedirs(tmp_path / "results")
    (tmp_path / "results" / "hand.json").write_text(json.dumps(table))
    start, end = "<!-- table: results/hand.json -->", "<!-- end of table -->"
    filled = fill(f"# Title\n\n{start}\nold\n{end}\n\nText.\n{start}\n{end}\n", str(tmp_path))
    lines = "\n".join(format_table(table))
    assert filled == f"# Title\n\n{start}\n\n{lines}\n\n{end}\n\nText.\n{start}\n\n{lines}\n\n{end}\n"
    assert fill(filled, str(tmp_path)) == filled
    assert fill("No table.\n", str(tmp_path)) == "No table.\n"
    with pytest.raises(UserError, match="README.md: table results/hand.json has no end"):
        fill(f"{start}\n{start}\n{end}\n", str(tmp_path))
    with pytest.raises(UserError, match="results/none.json: no such file"):
        fill(f"{start.replace('hand', 'none')}\n{end}\n", str(tmp_path))


def test_readme_holds_what_the_committed_tables_say():
    with open(f"{ROOT}/README.md", encoding="utf-8") as file:
        text = file.read()
    assert len(re.findall("<!-- table", text)) == text.count("<!-- end of table -->")
    assert fill(text, ROOT) == text, "run `python experiments/readme.py`"


def test_points_of_a_curve_are_drawn_over_the_share_of_users():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    def row(mean, curve="scratch", model="UniSRec", **given):
        metrics = {"test": {"ndcg@10": {"mean": mean, "error": None}}}
        return {"curve": curve, "model": model, "seeds": [1], "metrics": metrics, "given_settings": given}

    rows = {"Text": row(0.05, None, "LastText"), "All": row(0.3), "None": row(0.1, epochs=0)}
    rows |= {"Few": row(0.2, train_fraction=0.05), "Pre-trained": row(0.25, "pre-trained", train_fraction=0.05)}
    figure, axes = pyplot.subplots()
    _draw_curves(axes, rows, "test", "ndcg@10")
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0%", "5%", "100%"]
    drawn = {bars.get_label(): bars.lines[0].get_xydata().tolist() for bars in axes.containers}
    assert drawn == {"scratch": [[0, 0.1], [1, 0.2], [2, 0.3]], "pre-trained": [[1, 0.25]]}
    assert [text.get_text() for text in axes.texts] == ["Text"], "a row without training is a line"
    pyplot.close(figure)
