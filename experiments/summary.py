"""The table of an experiment as plain data: means, standard errors, paired tests and groups of its finished runs."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from engine.metrics import METRICS, RankTable
from engine.ranks_file import read_ranks
from experiments.compare import check_same_rows, paired_difference, parse_metric
from experiments.identity import code_hash
from experiments.plan import Experiment, Row, Run
from experiments.store import Finished

PROTOCOL = ("eval_args", "repeatable", "MAX_ITEM_LIST_LENGTH")  # settings of the evaluation


def build_table(experiment: Experiment, runs: list[Run], finished: Mapping[Run, Finished]) -> dict[str, Any]:
    """The table of an experiment.

    Args:
        runs: all runs of the experiment.
        finished: those that have finished.

    Returns:
        dict: plain data, the content of table.json. `experiments/README.md` describes it.

    Raises:
        UserError: two rows that are compared have different users, targets or numbers of candidates.
    """
    dates = sorted(found.record["started"][:10] for found in finished.values())
    machines = {found.record["machine"]: None for found in finished.values()}
    return {
        "experiment": experiment.name,
        "title": experiment.title,
        "columns": [list(column) for column in experiment.columns],
        "seeds": experiment.seeds,
        "runs": len(runs),
        "finished": len(finished),
        "dates": [dates[0], dates[-1]] if dates else None,
        "machines": list(machines),
        "datasets": {name: _of_dataset(experiment, runs, finished, name) for name in experiment.datasets},
    }


def _of_dataset(experiment, runs, finished, dataset):
    """The rows of a data set, label -> entry, and what they have in common."""
    wanted: dict[str, list[Run]] = {row.label: [] for row in experiment.rows}
    for run in runs:
        if run.dataset == dataset:
            wanted[run.row.label].append(run)
    found = {label: [finished[run] for run in each if run in finished] for label, each in wanted.items()}
    stale = {label: sum(finished[run].record["code"] != code_hash(run) for run in each if run in finished)
             for label, each in wanted.items()}  # fmt: skip
    tables = Ranks(found)
    rows = {}
    for row in experiment.rows:
        entry = _of_row(row, len(wanted[row.label]), found[row.label], stale[row.label])
        entry["compared"] = _compare(experiment, row, tables)
        rows[row.label] = entry
    return {**tables.size(), "rows": rows}


def _of_row(row: Row, wanted: int, found: list[Finished], stale: int) -> dict[str, Any]:
    """The entry of a row, without its comparison. The lists have one value per seed."""
    results = [each.result for each in found]
    about = results[0] if results else {}
    settings = about.get("settings", {})
    return {
        "model": row.model,
        "stage": about.get("train_stage"),
        "recipe": about.get("recipe"),
        "recipe_file": row.recipe or None,
        "pretrained": row.pretrained or None,
        "curve": row.curve or None,
        "given_settings": found[0].record["description"]["given"] if found else row.settings,
        "text_encoder": about.get("text_encoder"),
        "protocol": {key: settings[key] for key in PROTOCOL if key in settings},
        "runs_wanted": wanted,
        "runs_of_other_code": stale,
        "seeds": [result["seed"] for result in results],
        "run_ids": [result["run"] for result in results],
        "metrics": {split: _mean_metrics([result["metrics"][split] for result in results])
                    for split in ("valid", "test")},
        "epochs": [result["epochs"] for result in results],
        "best_epoch": [result.get("best_epoch") for result in results],
        "seconds": [result["seconds"] for result in results],
        "rows_per_second": [result.get("rows_per_second") for result in results],
        "peak_memory_mb": [result.get("peak_memory_mb") for result in results],
        "threads": [each.record["threads"] for each in found],
        "versions": about.get("versions"),
        "groups": _mean_groups([result["groups"] for result in results]),
    }  # fmt: skip


def _mean_metrics(results):
    """Metric -> mean and standard error over the seeds, and the value of each seed."""
    metrics = {}
    for name in results[0] if results else ():
        values = [result[name] for result in results]
        error = float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None
        metrics[name] = {"mean": float(np.mean(values)), "error": error, "values": values}
    return metrics


def _mean_groups(results):
    """Group -> label -> number of users, and the mean of each metric over the seeds. See `engine.groups`.

    A label that a seed does not have is left out. Subsets of the training data may have other labels of popularity.
    """
    return {
        group: {
            label: {name: float(np.mean([result[group][label][name] for result in results])) for name in first}
            | {"users": first["users"]}
            for label, first in labels.items()
            if all(label in result[group] for result in results)
        }
        for group, labels in (results[0] if results else {}).items()
    }


# -- paired tests ---------------------------------------------------------------------------------------------------


class Ranks:
    """The ranks of the finished runs of a data set, read when they are needed.

    Args:
        found: label of a row -> its finished runs.
    """

    def __init__(self, found: Mapping[str, list[Finished]]):
        self.found = found
        self._tables: dict[str, dict[str, RankTable]] = {}

    def tables(self, label: str) -> dict[str, RankTable]:
        """Path -> table of each run of a row."""
        if label not in self._tables:
            self._tables[label] = {each.ranks: read_ranks(each.ranks) for each in self.found[label]}
        return self._tables[label]

    def user_metrics(self, label: str, metric: str) -> np.ndarray:
        """The metric of each user, averaged over the seeds, float64 [U]."""
        name, k = parse_metric(metric)
        return np.mean([METRICS[name](table, k) for table in self.tables(label).values()], axis=0)

    def size(self) -> dict[str, int | None]:
        """The number of users and of items. None if no run has finished."""
        label = next((label for label, runs in self.found.items() if runs), None)
        table = next(iter(self.tables(label).values())) if label else None
        return {"users": len(table) if table else None, "items": int(table.candidates.max()) if table else None}


def _compare(experiment: Experiment, row: Row, ranks: Ranks) -> dict[str, Any] | None:
    """The differences of a row from the row to compare with, and the p-values. None if a row has no finished run."""
    base = row.compare_with
    if not base or not ranks.found[row.label] or not ranks.found[base]:
        return None
    check_same_rows({**ranks.tables(base), **ranks.tables(row.label)})
    metrics = {}
    for metric in dict.fromkeys(metric for split, metric in experiment.columns if split == "test"):
        metrics[metric] = paired_difference(ranks.user_metrics(row.label, metric), ranks.user_metrics(base, metric))
    return {"row": base, "metrics": metrics}
