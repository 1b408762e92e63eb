"""Lets RecBole 1.2.1 run on numpy >= 2 and torch >= 2.6. Called once, by `engine.config.Config`; importing does nothing.

- RecBole uses `np.float` and `np.bool`, names that numpy dropped. Two of its modules get a stand-in for numpy that
  still knows them; numpy itself stays as it is (RecBole's own remedy adds names to numpy, and fails on numpy 2).
- Importing RecBole's sequential models turns torch's anomaly detection on for the whole process (one of them, SINE, does
  so), which looks for NaN in every gradient: training then takes nearly twice the time. It is turned off again.
- torch >= 2.6 unpickles weights only; RecBole's checkpoints also hold numpy numbers, which are harmless.
RecBole's loading through pandas, broken by pandas 3, is replaced by `data/`.
"""

import types

import numpy as np
import torch


class _Numpy(types.ModuleType):
    """numpy with the names that RecBole 1.2.1 still uses."""

    float, int, bool, object, str = float, int, bool, object, str

    def __getattr__(self, name):
        return getattr(np, name)


def patch_recbole():
    """Make RecBole's modules work; calling it again changes nothing."""
    import recbole.data.interaction
    import recbole.evaluator.metrics
    import recbole.model.sequential_recommender  # noqa: F401

    torch.autograd.set_detect_anomaly(False)
    stand_in = _Numpy("numpy")
    for module in (recbole.data.interaction, recbole.evaluator.metrics):
        module.np = stand_in
    torch.serialization.add_safe_globals([np._core.multiarray.scalar, np.dtype, np.dtypes.Float64DType])
