"""Shared fixtures: small data sets (tests/small_data.py), and the recorded outputs of the published code."""

import logging
import os
import re
import shutil
import signal

import numpy as np
import pytest

from common.errors import run_command
from engine.config import build_config
from engine.settings import props_file, read_yaml
from tests.small_data import (  # noqa: F401  tests import some of these from here
    SMALL,
    WIDTH,
    write_downstream,
    write_mix,
    write_mixture,
    write_tiny,
)
from unisrec import UniSRec

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SHARED = os.path.join(os.path.dirname(ROOT), "shared")


# the settings of the paper's recipe that all stages have, apart from the size of the model
PUBLISHED = {
    key: value for key, value in read_yaml(props_file("published.yaml")).items() if key not in ("n_exps", "fix_enc")
}


@pytest.fixture(scope="session", autouse=True)
def _react_to_interrupts():
    """Also if a shell has started the tests in the background, where it lets them ignore SIGINT."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


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
    """A configuration of a UniSRec of the golden files' sizes. Pre-training is contrastive by default."""
    if stage == "pretrain":
        options = {"pretrain_loss": "contrastive", **options}
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
    """`Small`, with users longer than MAX_HISTORY and repeated rows, and the mixture `Mix`."""
    folder = tmp_path_factory.mktemp("data")
    write_downstream(folder, users=14, cut_length=MAX_HISTORY, longest=16, repeat=(0, 1, 20))
    write_mixture(folder, users=6, cut_length=MAX_HISTORY, longest=14)
    return str(folder)


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """The same, but no history is cut."""
    folder = tmp_path_factory.mktemp("whole")
    write_downstream(folder, users=14, cut_length=16, longest=16, repeat=(0, 1, 20))
    write_mixture(folder, users=6, cut_length=16, longest=14)
    return str(folder)


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
