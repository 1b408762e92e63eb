"""What the result of a run depends on, computed without training: settings, data, initial weights, code.

A finished run belongs to a run of the plan if model, data set, seed, stage, recipe, data and initial weights are the
same, and every setting that both of them know has the same value. Otherwise the run of the plan is missing.

A change of the code, or a new setting with a default, does not make a finished run worthless: it may have no effect on
the result. The run stays, and the table marks it until it is repeated (`run.py --rerun`). Comments, docstrings and
the format of the code do not count. Nor do models that the run does not use.
"""

import ast
import functools
import glob
import hashlib
import json
import os
import sys
from typing import Any

from baselines import MODELS
from common.errors import UserError
from common.files import file_sha256, read_json
from engine.settings import ROOT
from experiments.plan import Run

_DIGITS = 10  # of an id, as of `engine.runs`
_REGISTRY = os.path.join(ROOT, "baselines", "__init__.py")  # a new entry has no effect on other models


def describe(run: Run) -> dict[str, Any]:
    """What the result of a run depends on, except the code: plain data, for the record of the run.

    Raises:
        UserError: the data set or the checkpoint is missing.
    """
    options = run.options()
    return {
        "model": run.row.model,
        "dataset": run.dataset,
        "seed": run.seed,
        "recipe": run.row.recipe,
        "data": _data_hash(os.path.join(run.data_path, run.dataset)),
        "weights": _weights_hash(options["pretrained"]) if "pretrained" in options else None,
        "given": run.given,
        "settings": run.settings,
    }


def belongs(found: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """Whether a finished run is the one that is wanted. Both are described by `describe`.

    A setting that only one of them knows is a matter of the code, unless the wanted run gives it.
    """
    if any(found[key] != wanted[key] for key in ("model", "dataset", "seed", "recipe", "data", "weights")):
        return False
    then, now = found["settings"], wanted["settings"]
    return wanted["given"].keys() <= then.keys() and all(then[key] == now[key] for key in then.keys() & now.keys())


def run_name(description: dict[str, Any]) -> str:
    """The name of a run for its files: what it is, and a hash of its description."""
    digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:_DIGITS]
    model = description["model"].rpartition(":")[2]
    stage = description["settings"].get("train_stage") if model == "UniSRec" else None
    return "-".join(filter(None, [model, description["dataset"], stage, str(description["seed"]), digest]))


# -- data -----------------------------------------------------------------------------------------------------------


def _data_hash(folder: str) -> str:
    """The hash of the splits and the text features of a data set."""
    name = os.path.basename(folder)
    splits = [os.path.join(folder, f"{name}.{split}.inter") for split in ("train", "valid", "test")]
    for path in splits:
        if not os.path.isfile(path):
            raise UserError(
                f"{path}: no such file; create the data set as dataset/README.md describes, or give --data_path"
            )
    features = glob.glob(os.path.join(glob.escape(folder), f"{glob.escape(name)}.feat1*"))
    hashes = [_feature_hash(path) for path in sorted(features) if not path.endswith(".json")]
    return hashlib.sha256(" ".join([*map(_file_hash, splits), *hashes]).encode()).hexdigest()


def _feature_hash(path):
    """The hash of a feature file, from its description if there is one."""
    description = read_json(f"{path}.json") if os.path.isfile(f"{path}.json") else {}
    return str(description.get("sha256") or _file_hash(path))


def _weights_hash(path):
    """The hash of a checkpoint, or of the weights of a bundle."""
    if not os.path.isdir(path):
        return _file_hash(path)
    from engine.bundle import WEIGHTS  # imported here: torch takes seconds

    return _file_hash(os.path.join(path, WEIGHTS))


def _file_hash(path):
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file")
    status = os.stat(path)
    return _hash_of_version(path, status.st_size, status.st_mtime_ns)


@functools.cache
def _hash_of_version(path, size, changed):
    return file_sha256(path)


# -- code -----------------------------------------------------------------------------------------------------------


def code_hash(run: Run) -> str:
    """The hash of the project's code that a run uses: the files that its command and its model import.

    The files are found by their import statements, those inside functions included.
    """
    entry = MODELS.get(run.row.model)
    files = [os.path.join(ROOT, run.command)]
    if entry:
        files += _files_of_module(entry.path.partition(":")[0])
    elif ".py:" in run.row.model:
        files.append(run.options()["model"].rpartition(":")[0])
    elif ":" in run.row.model:
        files += _files_of_module(run.row.model.partition(":")[0])
    seen: dict[str, str] = {}
    while files:
        path = files.pop()
        if path not in seen and path != _REGISTRY:
            seen[path], imported = _read_code(path, os.stat(path).st_mtime_ns)
            files += imported
    return hashlib.sha256(f"{entry} {sorted(seen.values())}".encode()).hexdigest()[:_DIGITS]


@functools.cache
def _read_code(path: str, changed: int) -> tuple[str, tuple[str, ...]]:
    """The hash of a Python file without comments, docstrings and format, and the project's files that it imports."""
    with open(path, encoding="utf-8") as file:
        tree = ast.parse(file.read(), path)
    modules: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules += [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules += [node.module, *(f"{node.module}.{name.name}" for name in node.names)]
        elif isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if ast.get_docstring(node, clean=False) is not None:
                node.body[0] = ast.Pass()
    imported = {file for module in modules for file in _files_of_module(module)}
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest(), tuple(imported)


def _files_of_module(module: str) -> list[str]:
    """The file of a module of this project, and those of its packages. Empty for other modules."""
    if module.partition(".")[0] in sys.stdlib_module_names:
        return []
    parts = module.split(".")
    packages = [os.path.join(ROOT, *parts[:end], "__init__.py") for end in range(1, len(parts) + 1)]
    return [*filter(os.path.isfile, [os.path.join(ROOT, *parts) + ".py", *packages])]
