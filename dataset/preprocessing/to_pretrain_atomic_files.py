"""Combine several data sets into one mixture for pre-training, in the published layout.

    python dataset/preprocessing/to_pretrain_atomic_files.py --datasets Beauty,Toys,Sports --name BTS

Ids become `DOMAIN-INDEX`. For example, `1-17` is user or item 17 of the second data set. The mixture's folder gets
links to the feature files of the data sets, such as `Toys.feat1Mean`. After encoding texts again, run this command
again.
"""

import argparse
import glob
import os
import re
import shutil
import sys
from collections.abc import Sequence
from typing import Any

PROJECT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, PROJECT)  # so that the script finds `common` from any working folder

import polars as pl  # noqa: E402

from common.errors import UserError, did_you_mean, run_command  # noqa: E402
from common.files import read_json, staged_folder, write_json  # noqa: E402
from dataset.preprocessing.splits import INTER_HEADER, SPLITS, check_name, tab_separated  # noqa: E402
from dataset.preprocessing.tables import MalformedRows, read_table  # noqa: E402


def write_mixture(
    datasets: Sequence[str], input_path: str, output_path: str, name: str | None = None
) -> dict[str, Any]:
    """Write the mixture of several data sets into OUTPUT_PATH/NAME, with links to their features.

    Args:
        datasets: their names, in the order of the domain numbers.
        input_path: the folder that holds the data sets' folders.
        output_path: the folder in which the mixture's folder is created.
        name: of the mixture. Default: the first letters of the data sets, joined.

    Returns:
        The mixture's description, also written as NAME.json: `name`, `domains` (a dict for each data set), `rows` of
        each split, `features` (the names of the links).

    Raises:
        UserError: a data set or one of its files is missing or malformed, a data set is named twice, or
            OUTPUT_PATH/NAME holds something other than this mixture. It is then left as it is.
    """
    _check_names(datasets, input_path)
    name = name or "".join(dataset[0] for dataset in datasets)
    check_name(name)
    folder = os.path.join(output_path, name)
    _refuse_other_mixture(os.path.join(folder, name), datasets)
    domains = [_domain(dataset, input_path) for dataset in datasets]
    with staged_folder(folder) as staging:
        stem = os.path.join(staging, name)
        with open(f"{stem}.pt_datasets", "w", encoding="utf-8") as file:
            file.write(f"{','.join(datasets)}\n")
        rows = {split: _write_split(f"{stem}.{split}.inter", datasets, input_path, split) for split in SPLITS}
        linked = _link_features(datasets, input_path, folder, staging)
        description = {"name": name, "domains": domains, "rows": rows, "features": linked}
        write_json(f"{stem}.json", description)
    return description


def _domain(dataset: str, input_path: str) -> dict[str, Any]:
    """The entry of the mixture's description about a data set. `texts_sha256` tells whether features belong to it."""
    path = os.path.join(input_path, dataset, f"{dataset}.json")
    described = read_json(path) if os.path.isfile(path) else {}
    known = ("users", "items", "interactions", "texts_sha256")
    return {"name": dataset} | {key: described[key] for key in known if key in described}


def _check_names(datasets: Sequence[str], input_path: str) -> None:
    twice = sorted({dataset for dataset in datasets if datasets.count(dataset) > 1})
    if twice or not all(datasets):
        raise UserError(f"--datasets {','.join(datasets)}: expected different names, separated by commas")
    for dataset in datasets:
        folder = os.path.join(input_path, dataset)
        if not os.path.isdir(folder):
            near = did_you_mean(dataset, os.listdir(input_path)) if os.path.isdir(input_path) else ""
            raise UserError(f"{folder}: no such data set folder{near or '; process the data set first'}")
        for split in SPLITS:
            path = os.path.join(folder, f"{dataset}.{split}.inter")
            if not os.path.isfile(path):
                raise UserError(f"{path}: no such file; process the data set {dataset} again")


def _refuse_other_mixture(stem: str, datasets: Sequence[str]) -> None:
    """Raise an error if the folder holds a data set, or another mixture whose name happens to be the same."""
    listing = f"{stem}.pt_datasets"
    if os.path.exists(listing):
        with open(listing, encoding="utf-8") as file:
            found = file.read().strip()
        if found != ",".join(datasets):
            raise UserError(
                f"{listing}: found the mixture {found}, expected {','.join(datasets)} or none; "
                "choose another --name, or remove that folder"
            )
    elif glob.glob(f"{glob.escape(stem)}.*"):
        raise UserError(f"{os.path.dirname(stem)}: holds a data set that is not a mixture; choose another --name")


def _write_split(path: str, datasets: Sequence[str], input_path: str, split: str) -> int:
    """Write a `.inter` file of the mixture. Returns its number of rows."""
    columns = INTER_HEADER.split("\t")
    rows = 0
    with open(path, "wb") as output:
        output.write(f"{INTER_HEADER}\n".encode())
        for domain, dataset in enumerate(datasets):
            source = os.path.join(input_path, dataset, f"{dataset}.{split}.inter")
            malformed = MalformedRows(source, 0.0)
            ids = [
                (f"{domain}-" + pl.col(column).str.replace_all(" ", f" {domain}-", literal=True)).alias(column)
                for column in columns
            ]
            for part in read_table(source, columns, ids, malformed, separator="\t", quoted=False):
                output.write(tab_separated(part))
            malformed.check("a user, a history and an item, separated by tabs")
            rows += malformed.rows
    return rows


def _link_features(datasets: Sequence[str], input_path: str, folder: str, staging: str) -> list[str]:
    """Create links in `staging` to the data sets' feature files and their descriptions. Returns their names.

    The links are relative to `folder`, to which they are moved later, so the whole data folder can be moved.
    """
    linked = []
    for dataset in datasets:
        source_folder = os.path.join(input_path, dataset)
        for file in sorted(os.listdir(source_folder)):
            if re.match(re.escape(dataset) + r"\.feat\d", file):
                source = os.path.realpath(os.path.join(source_folder, file))
                try:
                    os.symlink(os.path.relpath(source, os.path.realpath(folder)), os.path.join(staging, file))
                except OSError:  # the file system has no links
                    shutil.copyfile(source, os.path.join(staging, file))
                linked.append(file)
    return linked


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Combine several data sets into one mixture for pre-training.")
    parser.add_argument("--datasets", required=True, metavar="A,B,C", help="the data sets, in the order of the domains")
    parser.add_argument("--name", metavar="NAME",
                        help="name of the mixture (default: the first letters of the data sets, joined)")  # fmt: skip
    parser.add_argument("--input_path", default=os.path.join(PROJECT, "dataset", "downstream"), metavar="DIR",
                        help="folder of the data sets (default: dataset/downstream)")  # fmt: skip
    parser.add_argument("--output_path", default=os.path.join(PROJECT, "dataset", "pretrain"), metavar="DIR",
                        help="where the mixture's folder is created (default: dataset/pretrain)")  # fmt: skip
    return parser


def main(argv: list[str]) -> None:
    """Run the command. It is described at the top of the file."""
    options = _parser().parse_args(argv)
    datasets = [name.strip() for name in options.datasets.split(",")]
    mixture = write_mixture(datasets, options.input_path, options.output_path, options.name)
    rows = ", ".join(f"{count:,} {split}" for split, count in mixture["rows"].items())
    print(f"{os.path.join(options.output_path, mixture['name'])}: {','.join(datasets)}: rows: {rows}")
    features = mixture["features"]
    without = [name for name in datasets if not any(file.startswith(f"{name}.feat1") for file in features)]
    print(f"  linked: {', '.join(features) or 'nothing'}")
    if without:
        print(f"note: no features of {', '.join(without)}; encode the texts, then run this command again",
              file=sys.stderr)  # fmt: skip


if __name__ == "__main__":
    run_command(main)
