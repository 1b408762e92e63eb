"""Shared fixtures: small data sets in the published format, and what the published code computed."""

import os

import numpy as np
import pytest

from engine.config import build_config
from unisrec import UniSRec

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SHARED = os.path.join(os.path.dirname(ROOT), "shared")
STAGE_PROPS = {"pretrain": "pretrain.yaml", "inductive_ft": "finetune.yaml", "transductive_ft": "finetune.yaml"}


@pytest.fixture(scope="session")
def golden_folder():
    if not os.path.isdir(SHARED):
        pytest.skip("the recorded outputs of the published code (../shared/golden) are not here")
    return os.path.join(SHARED, "golden")


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
