"""Shared fixtures: small data sets in the published format, and what the published code computed."""

import json
import logging
import os
import re
import shutil

import numpy as np
import pytest

from common.errors import run_command
from engine.config import build_config
from tests.small_data import write_downstream, write_mixture
from unisrec import UniSRec

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SHARED = os.path.join(os.path.dirname(ROOT), "shared")


@pytest.fixture(scope="session")
def golden_folder(tmp_path_factory):
    """A copy of the recorded outputs, so that caches are written there."""
    if not os.path.isdir(SHARED):
        pytest.skip("the recorded outputs of the published code (../shared/golden) are not here")
    return shutil.copytree(os.path.join(SHARED, "golden"), tmp_path_factory.mktemp("shared") / "golden")


@pytest.fixture(scope="session")
def golden(golden_folder):
    """golden.npz as a dict of arrays."""
    with np.load(os.path.join(golden_folder, "golden.npz")) as stored:
        return dict(stored)


def small_config(stage, dataset, data_path, **options):
    """A configuration of a UniSRec of the golden files' sizes."""
    sizes = dict(hidden_size=16, inner_size=12, n_exps=3, n_layers=2, n_heads=2, plm_size=24, show_progress=False)
    return build_config(
        UniSRec,
        dataset,
        "pretrain" if stage == "pretrain" else "finetune",
        {"train_stage": stage, "data_path": data_path, **sizes, **options},
    )


MAX_HISTORY = 8  # of the data in the fixture `folder`


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """`Small`, with users longer than the window and repeated rows, and the mixture `Mix`."""
    folder = tmp_path_factory.mktemp("data")
    write_downstream(folder, users=14, window=MAX_HISTORY, longest=16, repeat=(0, 1, 20))
    write_mixture(folder, users=6, window=MAX_HISTORY, longest=14)
    return str(folder)


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """The same, but no history is longer than the window."""
    folder = tmp_path_factory.mktemp("whole")
    write_downstream(folder, users=14, window=16, longest=16, repeat=(0, 1, 20))
    write_mixture(folder, users=6, window=16, longest=14)
    return str(folder)


# -- small data sets, written here so that the tests need nothing from elsewhere -------------------------------------

WIDTH = 24  # of the features that the fixtures write
SMALL = [  # command-line options of a model that trains in a moment
    "--hidden_size=16",
    "--inner_size=12",
    "--n_exps=3",
    "--n_layers=2",
    "--n_heads=2",
    f"--plm_size={WIDTH}",
    "--show_progress=false",
]


def write_domain(folder, name, n_items=30, n_users=40, seed=0, described=True):
    """Write the items of a domain: features of both kinds, `.item2index`, `.text`. Returns its users' sequences.

    The items lie on a ring, an item's text says where, and a user mostly walks along it: there is something to learn.
    """
    os.makedirs(folder, exist_ok=True)
    generator = np.random.default_rng(seed)
    angle = 2 * np.pi * np.arange(n_items)[:, None] / n_items * np.arange(1, WIDTH // 2 + 1)
    features = np.concatenate([np.cos(angle), np.sin(angle)], 1) + 0.1 * generator.normal(size=(n_items, WIDTH))
    for suffix, noise in (("feat1CLS", 0.0), ("feat2CLS", 0.2)):
        path = os.path.join(folder, f"{name}.{suffix}")
        (features + noise * generator.normal(size=features.shape)).astype(np.float32).tofile(path)
        if described:
            description = {"encoder": "test", "pooling": "CLS", "width": WIDTH, "dtype": "float32", "items": n_items}
            with open(f"{path}.json", "w") as file:
                json.dump(description, file)
    with open(os.path.join(folder, f"{name}.item2index"), "w") as file:
        file.writelines(f"{name}{1000 + index}\t{index}\n" for index in range(n_items))
    with open(os.path.join(folder, f"{name}.text"), "w") as file:
        file.write("item_id:token\ttext:token_seq\n")
        file.writelines(f"{name}{1000 + index}\titem number {index}. \n" for index in range(n_items))
    steps = generator.integers(1, 4, (n_users, 12)).cumsum(1) + generator.integers(0, n_items, (n_users, 1))
    return [list(steps[user, : generator.integers(5, 13)] % n_items) for user in range(n_users)]


def write_splits(folder, name, users):
    """Write `.train`, `.valid` and `.test.inter`: leave-one-out, a row per prefix in train, longest first.

    Args:
        users (list of (str, list of str)): a user's token and item tokens, oldest first.
    """
    rows = {"train": [], "valid": [], "test": []}
    for user, items in users:
        rows["train"] += [(user, items[:end], items[end]) for end in range(len(items) - 3, 0, -1)]
        rows["valid"].append((user, items[:-2], items[-2]))
        rows["test"].append((user, items[:-1], items[-1]))
    for split, lines in rows.items():
        with open(os.path.join(folder, f"{name}.{split}.inter"), "w") as file:
            file.write("user_id:token\titem_id_list:token_seq\titem_id:token\n")
            file.writelines(f"{user}\t{' '.join(history)}\t{target}\n" for user, history, target in lines)


def write_tiny(data_path):
    """A data set of one domain, `Tiny`: 30 items, 40 users, features with descriptions. Returns `data_path`, str."""
    folder = os.path.join(data_path, "Tiny")
    sequences = write_domain(folder, "Tiny")
    write_splits(folder, "Tiny", [(str(user), list(map(str, items))) for user, items in enumerate(sequences)])
    return str(data_path)


def write_mix(data_path):
    """A mixture `Mix` of the domains A (20 items) and B (25 items), 30 users each. Returns `data_path`, str."""
    folder, users = os.path.join(data_path, "Mix"), []
    for number, (name, n_items) in enumerate((("A", 20), ("B", 25))):
        sequences = write_domain(folder, name, n_items, 30, seed=number + 1)
        users += [(f"{number}-{u}", [f"{number}-{item}" for item in items]) for u, items in enumerate(sequences)]
    write_splits(folder, "Mix", users)
    with open(os.path.join(folder, "Mix.pt_datasets"), "w") as file:
        file.write("A,B")
    return str(data_path)


@pytest.fixture
def tiny(tmp_path):
    """The `data_path` of the data set `Tiny`, this test's own."""
    return write_tiny(tmp_path / "downstream")


@pytest.fixture
def mixture(tmp_path):
    """The `data_path` of the mixture `Mix`, this test's own."""
    return write_mix(tmp_path / "pretrain")


@pytest.fixture
def refused(capsys):
    """Run a command that must end in a user's error: exit code 2 and one line beside the log. Returns its message."""

    def run(main, *argv):
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            run_command(main, [str(word) for word in argv])
        lines = capsys.readouterr().err.splitlines()
        assert end.value.code == 2, lines
        assert [line for line in lines if not re.match(r"\d\d:\d\d:\d\d  ", line)] == lines[-1:], lines
        assert lines[-1].startswith("error: ")
        return lines[-1].removeprefix("error: ")

    return run


@pytest.fixture(autouse=True)
def _logging_as_before():
    """The commands set logging up for their process; the next test gets it as it was."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
