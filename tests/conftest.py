"""Shared fixtures: small data sets (tests/small_data.py), and the recorded outputs of the published code."""

import logging
import os
import re
import shutil

import numpy as np
import pytest

from common.errors import run_command
from engine.config import build_config
from tests.small_data import SMALL, WIDTH, write_mix, write_tiny  # noqa: F401 (tests import them from here)
from unisrec import UniSRec

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SHARED = os.path.join(os.path.dirname(ROOT), "shared")
STAGE_PROPS = {"pretrain": "pretrain.yaml", "inductive_ft": "finetune.yaml", "transductive_ft": "finetune.yaml"}


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
        ["overall.yaml", "UniSRec.yaml", STAGE_PROPS[stage]],
        {"train_stage": stage, "data_path": data_path, **sizes, **options},
    )


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
