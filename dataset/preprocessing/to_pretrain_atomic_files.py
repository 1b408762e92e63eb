"""Several data sets to one mixture for pre-training, in the published layout.

    python dataset/preprocessing/to_pretrain_atomic_files.py --datasets Beauty,Toys,Sports --name BTS

Ids become `DOMAIN-INDEX` (`1-17`: user or item 17 of the second data set). The feature files of the data sets are
linked beside the mixture as `Toys.feat1Mean` and so on; run the command again when features have been made anew.
"""

import argparse
import glob
import os
import shutil
import sys

PROJECT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, PROJECT)  # so that the script finds `common`, from whatever folder it is started

from common.errors import UserError, did_you_mean, run_command  # noqa: E402
from common.files import atomic_path  # noqa: E402
from dataset.preprocessing.splits import INTER_HEADER  # noqa: E402

SPLITS = ("train", "valid", "test")


def write_mixture(datasets, input_path, output_path, name=None):
    """Write the mixture of several data sets into OUTPUT_PATH/NAME, with links to their features.

    Args:
        datasets (list of str): their names; the order gives the domain numbers 0, 1, 2, ...
        input_path (str): the folder that holds the data sets' folders.
        output_path (str): the folder in which the mixture's folder is made.
        name (str, optional): of the mixture. Default: the first letters of the data sets, joined.

    Returns:
        dict: `name`; `rows`, the number of rows of each split; `features`, the names of the linked files.

    Raises:
        UserError: a data set or a file of it is missing, is named twice or cannot be read; or OUTPUT_PATH/NAME holds
            something other than this mixture, which is left as it is.
    """
    _check_names(datasets, input_path)
    name = name or "".join(dataset[0] for dataset in datasets)
    folder = os.path.join(output_path, name)
    stem = os.path.join(folder, name)
    _refuse_other_mixture(stem, datasets)
    # First, as it says whose folder this is: after a crash the same command may finish it, and no other.
    with atomic_path(f"{stem}.pt_datasets") as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(f"{','.join(datasets)}\n")
    rows = {split: _write_split(f"{stem}.{split}.inter", datasets, input_path, split) for split in SPLITS}
    return {"name": name, "rows": rows, "features": _link_features(datasets, input_path, folder)}


def _check_names(datasets, input_path):
    twice = sorted({dataset for dataset in datasets if datasets.count(dataset) > 1})
    if twice or not all(datasets):
        raise UserError(f"--datasets {','.join(datasets)}: expected names, each once, separated by commas only")
    for dataset in datasets:
        folder = os.path.join(input_path, dataset)
        if not os.path.isdir(folder):
            near = did_you_mean(dataset, os.listdir(input_path)) if os.path.isdir(input_path) else ""
            raise UserError(f"{folder}: no such data set folder{near or '; process the data set first'}")
        for split in SPLITS:
            path = os.path.join(folder, f"{dataset}.{split}.inter")
            if not os.path.isfile(path):
                raise UserError(f"{path}: no such file; process the data set {dataset} again")


def _refuse_other_mixture(stem, datasets):
    """Two mixtures can have the same first letters, and a data set's own folder is no mixture at all."""
    listing = f"{stem}.pt_datasets"
    if os.path.exists(listing):
        with open(listing, encoding="utf-8") as file:
            found = file.read().strip()
        if found != ",".join(datasets):
            raise UserError(
                f"{listing}: found the mixture {found}, asked to write {','.join(datasets)}; "
                "choose another --name, or remove that folder"
            )
    elif glob.glob(f"{glob.escape(stem)}.*"):
        raise UserError(f"{os.path.dirname(stem)}: holds something that is no mixture; choose another --name")


def _write_split(path, datasets, input_path, split):
    """Write one `.inter` file of the mixture; returns its number of rows."""
    rows = 0
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as output:
        output.write(f"{INTER_HEADER}\n")
        for domain, dataset in enumerate(datasets):
            source = os.path.join(input_path, dataset, f"{dataset}.{split}.inter")
            with open(source, encoding="utf-8") as lines:
                next(lines, None)  # the header
                for number, line in enumerate(lines, start=2):
                    output.write(_with_domain(line, domain, source, number))
                    rows += 1
    return rows


def _with_domain(line, domain, source, number):
    """One row with `domain-` before each of its ids."""
    fields = line.rstrip("\n").split("\t")
    if len(fields) != 3:
        raise UserError(f"{source}: line {number}: found {len(fields)} columns, expected 3 separated by tabs")
    user, sequence, target = fields
    sequence = " ".join([f"{domain}-{item}" for item in sequence.split()])
    return f"{domain}-{user}\t{sequence}\t{domain}-{target}\n"


def _link_features(datasets, input_path, folder):
    """Link each data set's feature files and their descriptions into `folder`; returns the names of the links."""
    linked = []
    for dataset in datasets:
        source_folder = os.path.join(input_path, dataset)
        for file in sorted(os.listdir(source_folder)):
            if file.startswith((f"{dataset}.feat1", f"{dataset}.feat2")):
                _link_or_copy(os.path.join(source_folder, file), os.path.join(folder, file))
                linked.append(file)
    return linked


def _link_or_copy(source, target):
    """A relative symbolic link, so that the whole data folder can be moved; a copy where links cannot be made."""
    with atomic_path(target) as temporary:
        os.unlink(temporary)
        try:
            os.symlink(os.path.relpath(os.path.realpath(source), os.path.realpath(os.path.dirname(target))), temporary)
        except OSError:
            shutil.copyfile(source, temporary)


def _parser():
    parser = argparse.ArgumentParser(description="Several data sets to one mixture for pre-training.")
    parser.add_argument("--datasets", required=True, metavar="A,B,C", help="names, in the order of the domains")
    parser.add_argument("--name", help="of the mixture (default: the first letters, joined)")
    parser.add_argument("--input_path", default=os.path.join(PROJECT, "dataset", "downstream"), metavar="DIR",
                        help="default: dataset/downstream of the project")  # fmt: skip
    parser.add_argument("--output_path", default=os.path.join(PROJECT, "dataset", "pretrain"), metavar="DIR",
                        help="default: dataset/pretrain of the project")  # fmt: skip
    return parser


def main(argv):
    """The command; see the top of the file."""
    options = _parser().parse_args(argv)
    datasets = [name.strip() for name in options.datasets.split(",")]
    mixture = write_mixture(datasets, options.input_path, options.output_path, options.name)
    rows = ", ".join(f"{count:,} {split}" for split, count in mixture["rows"].items())
    print(f"{os.path.join(options.output_path, mixture['name'])}: {','.join(datasets)}: rows: {rows}")
    without = [d for d in datasets if not any(file.startswith(f"{d}.feat1") for file in mixture["features"])]
    print(f"  linked: {', '.join(mixture['features']) or 'nothing'}")
    if without:
        print(f"note: no features of {', '.join(without)}; encode the texts, then run this command again",
              file=sys.stderr)  # fmt: skip


if __name__ == "__main__":
    run_command(main)
