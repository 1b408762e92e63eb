"""The YAML file of an experiment, and the runs that it asks for. `experiments/README.md` describes the file."""

import dataclasses
import os
from typing import Any

import yaml

from baselines import MODELS, check_name, find_model, yaml_files, yaml_files_of_name
from common.errors import UserError, did_you_mean
from engine.settings import ROOT, Loader, Setting, as_list, read_yaml, settle
from experiments.compare import parse_metric

COLUMNS = ["recall@10", "ndcg@10", "recall@50", "ndcg@50"]
SPLITS = ("test", "valid")

_EXPERIMENT = {
    "title": Setting("title", "", "str"),
    "datasets": Setting("datasets", None, "list of str", text="[Scientific, Drama]"),
    "seeds": Setting("seeds", None, "list of int", range="0 or more", text="[2020, 2021, 2022]"),
    "columns": Setting("columns", COLUMNS, "list of str", text="[test recall@10, valid ndcg@10]"),
    "compare_with": Setting("compare_with", "", "str"),
    "settings": Setting("settings", {}, "dict"),
    "rows": Setting("rows", {}, "dict"),
}
_ROW = {
    "model": Setting("model", "", "str"),
    "stage": Setting("stage", "", "str"),
    "recipe": Setting("recipe", "", "str"),
    "pretrained": Setting("pretrained", "", "str"),
    "settings": Setting("settings", {}, "dict"),
    "compare_with": Setting("compare_with", "", "str"),
    "curve": Setting("curve", "", "str"),
}
# settings that have another place in the file, or that run.py sets
_ELSEWHERE = {
    "dataset": "datasets",
    "seed": "seeds",
    "model": "model of a row",
    "train_stage": "stage of a row",
    "config_files": "recipe of a row",
    "pretrained": "pretrained of a row",
}
_OWN = ("bundle", "checkpoint_dir", "groups", "ranks_file", "result_file", "show_progress")
_PATHS = {"checkpoint_dir", "data_path", "pretrained", "ranks_file", "result_file"}


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        model: `UniSRec`, or what `-m` of run_baseline.py takes.
        stage: `train_stage` of fine-tuning. Empty: the default.
        recipe: YAML file for `--config_files`. Empty: the defaults of the command.
        pretrained: checkpoint or bundle to start from. Empty: from scratch.
        settings: further settings.
        compare_with: label of the row to compare with. Empty: none.
        curve: name of the curve on which the row is a point of the figure. Empty: none.
    """

    label: str
    model: str
    stage: str = ""
    recipe: str = ""
    pretrained: str = ""
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    compare_with: str = ""
    curve: str = ""


@dataclasses.dataclass(frozen=True)
class Experiment:
    """The content of a YAML file, checked.

    Attributes:
        path, name: the file, and its name without folder and extension.
        columns: (split, metric) of each column, such as ("test", "recall@10").
        settings: settings of all rows whose model has them.
        rows: in the order of the table.
    """

    path: str
    name: str
    title: str
    datasets: list[str]
    seeds: list[int]
    columns: list[tuple[str, str]]
    settings: dict[str, Any]
    rows: list[Row]


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """One run of finetune.py or run_baseline.py.

    Attributes:
        command: the file of the command, `finetune.py` or `run_baseline.py`.
        data_path: folder of the data sets.
        given: the settings that the experiment and the row give, without paths.
        settings: every setting with its value, defaults included, without paths.
    """

    row: Row
    dataset: str
    seed: int
    command: str
    data_path: str
    given: dict[str, Any]
    settings: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.row.label}, {self.dataset}, seed {self.seed}"

    def options(self) -> dict[str, Any]:
        """The options of the command, without those for the files that it writes."""
        options = {"dataset": self.dataset, "seed": self.seed, "data_path": self.data_path, **self.given}
        if self.command == "run_baseline.py":
            options["model"] = _in_project(self.row.model) if ".py:" in self.row.model else self.row.model
        return options | _row_options(self.row)


# -- reading the file -----------------------------------------------------------------------------------------------


def read_experiment(path: str) -> Experiment:
    """Read the YAML file of an experiment and check its keys, types, columns and labels.

    Raises:
        UserError: the file is missing or wrong. The message names the file and the key.
    """
    content = _read(path)
    if isinstance(content.get("rows"), str):  # the rows are in a file of their own
        rows_path = os.path.join(os.path.dirname(path), content["rows"])
        content["rows"] = _read(rows_path)
    else:
        rows_path = path
    values = _checked(content, _EXPERIMENT, path, ("datasets", "seeds", "rows"))
    rows = [_row(label, row, rows_path, values["compare_with"]) for label, row in values["rows"].items()]
    labels = [row.label for row in rows]
    for row in rows:
        if row.compare_with and row.compare_with not in labels:
            raise UserError(
                f"{path}: compare_with: found {row.compare_with!r}, expected a row ({', '.join(labels)})"
                + did_you_mean(row.compare_with, labels)
            )
    _check_settings(values["settings"], path)
    return Experiment(
        path=path,
        name=os.path.splitext(os.path.basename(path))[0],
        title=values["title"],
        datasets=_distinct(values["datasets"], f"{path}: datasets"),
        seeds=_distinct(values["seeds"], f"{path}: seeds"),
        columns=[_column(text, f"{path}: columns") for text in as_list(values["columns"])],
        settings=values["settings"],
        rows=rows,
    )


def _read(path):
    """Read a YAML mapping. YAML lets the second of two equal keys replace the first: here that is an error."""
    content = read_yaml(path)
    with open(path, encoding="utf-8") as file:
        nodes = [yaml.compose(file, Loader)]
    while nodes:
        node = nodes.pop()
        if isinstance(node, yaml.MappingNode):
            keys = [key.value for key, _ in node.value]
            for key in keys:
                if keys.count(key) > 1:
                    raise UserError(f"{path}: {key} is given twice; keep one")
            nodes += [value for _, value in node.value]
    return content


def _checked(content, known, where, required):
    """The values of a mapping, with defaults, after a check of its keys and types."""
    for key in content:
        if key not in known:
            raise UserError(f"{where}: unknown key {key!r}, expected {', '.join(known)}{did_you_mean(key, known)}")
    for key in required:
        if content.get(key) in (None, "", [], {}):
            raise UserError(f"{where}: has no {key}, expected {known[key].text or 'a value'}")
    given = {key: known[key].check(value, f"{where}: {key}") for key, value in content.items() if value is not None}
    return {key: setting.default for key, setting in known.items()} | given


def _row(label, content, path, compare_with):
    where = f"{path}: row {label!r}"
    if not isinstance(label, str) or not isinstance(content, dict):
        raise UserError(f"{where}: found {content!r}, expected LABEL: {{model: NAME, ...}}")
    values = _checked(content, _ROW, where, ("model",))
    _check_settings(values["settings"], where)
    if "compare_with" not in content:
        values["compare_with"] = compare_with
    if values["compare_with"] == label:
        values["compare_with"] = ""
    return Row(label, **values)


def _check_settings(settings, where):
    for key in settings:
        if key in _ELSEWHERE:
            raise UserError(f"{where}: settings: {key} is no setting here; give it as {_ELSEWHERE[key]}")
        if key in _OWN:
            raise UserError(f"{where}: settings: {key} is set by run.py; remove it")


def _distinct(values, where):
    values = as_list(values)
    if len(set(values)) < len(values):
        raise UserError(f"{where}: found {values}, expected each value once")
    return values


def _column(text, where):
    """Parse a column: `recall@10` is on test, `valid recall@10` on valid. Returns (split, metric)."""
    *split, metric = text.split()
    if split not in ([], *([name] for name in SPLITS)):
        raise UserError(f"{where}: found {text!r}, expected METRIC@K, test METRIC@K or valid METRIC@K")
    name, k = parse_metric(metric, where)
    return (*(split or ["test"]), f"{name}@{k}")


# -- the runs -------------------------------------------------------------------------------------------------------


def plan_runs(experiment: Experiment, data_path: str | None = None) -> list[Run]:
    """All runs of an experiment, in order: the first seed of all rows comes before the second seed.

    A model that draws no random numbers (`trains` is False in the registry) runs with the first seed only.

    Args:
        data_path: folder of the data sets, instead of the one in the settings.

    Raises:
        UserError: an unknown model or setting, a wrong value, or a column that the runs do not measure.
    """
    settled = {row.label: _settle(experiment, row) for row in experiment.rows}
    known = {key for _, _, values in settled.values() for key in values}
    for key in experiment.settings:
        if key not in known:
            raise UserError(f"{experiment.path}: settings: no row has a setting {key!r}{did_you_mean(key, known)}")
    runs = []
    for number, seed in enumerate(experiment.seeds):
        for dataset in experiment.datasets:
            for row in experiment.rows:
                if number == 0 or row.model not in MODELS or MODELS[row.model].trains:
                    runs.append(_run(row, dataset, seed, data_path, *settled[row.label]))
    return runs


def _settle(experiment, row):
    """The file of the command of a row, the settings that are given, and every setting with its value."""
    try:
        command, kind, recbole, own = _command(row)
        known = settle(kind, {}, recbole, own).settings if experiment.settings else {}
        given = {key: value for key, value in experiment.settings.items() if key in known} | row.settings
        options = given | _row_options(row) | {"seed": max(experiment.seeds)}
        values = settle(kind, options, recbole, own).values()
    except UserError as error:
        raise UserError(f"{experiment.path}: row {row.label!r}: {error}") from None
    _check_columns(experiment, row, values)
    return command, given, values


def _run(row, dataset, seed, data_path, command, given, values):
    folder = data_path or _in_project(values["data_path"])
    given, values = ({key: part[key] for key in part.keys() - _PATHS} for part in (given, values))
    return Run(row, dataset, seed, command, folder, given, values | {"seed": seed})


def _command(row):
    """The file of the command, its settings (`finetune` or `baseline`) and the YAML files with the model's defaults."""
    if row.model == "UniSRec":
        return "finetune.py", "finetune", (), ()
    kind = "baseline"
    if "." not in row.model and ":" not in row.model:
        check_name(row.model)
        files = yaml_files_of_name(row.model)
    else:
        from unisrec import UniSRec  # imported here: it takes seconds

        model = find_model(_in_project(row.model) if ".py:" in row.model else row.model)
        files = yaml_files(model)
        kind = "finetune" if issubclass(model, UniSRec) else kind
    if kind == "baseline" and (row.stage or row.pretrained):
        raise UserError(f"{'stage' if row.stage else 'pretrained'}: model {row.model} has none; only UniSRec has")
    return "run_baseline.py", kind, *files


def _row_options(row):
    options = {}
    if row.stage:
        options["train_stage"] = row.stage
    if row.recipe:
        options["config_files"] = [_in_project(row.recipe)]
    if row.pretrained:
        options["pretrained"] = _in_project(row.pretrained)
    return options


def _check_columns(experiment, row, values):
    """Check that the runs of a row measure every column."""
    measured = [f"{name.lower()}@{k}" for name in as_list(values["metrics"]) for k in as_list(values["topk"])]
    for _, metric in experiment.columns:
        if metric not in measured:
            raise UserError(
                f"{experiment.path}: columns: found {metric}, but row {row.label!r} measures {', '.join(measured)}; "
                "change the settings metrics and topk"
            )


def _in_project(path):
    """A relative path in an experiment is relative to the project's folder."""
    return os.path.join(ROOT, path)
