"""Lets RecBole 1.2.1 run on numpy >= 2 and torch >= 2.6. Called by `engine.config.Config`; importing does nothing.

- RecBole uses `np.float` and `np.bool`, names that numpy dropped. Two of its modules get a stand-in for numpy that
  still knows them; numpy itself stays as it is (RecBole's own remedy adds names to numpy, and fails on numpy 2).
- Importing RecBole's sequential models turns torch's anomaly detection on for the whole process (one of them, SINE,
  does so), which looks for NaN in every gradient and made training take 1.6 times as long. It is turned off again.
- torch >= 2.6 unpickles weights only; RecBole's checkpoints also hold numpy numbers, which are harmless, and are
  written in a pickle protocol that torch then refuses. RecBole's trainer gets a stand-in for torch that writes torch's
  own protocol.
- Importing RecBole's metrics imports scikit-learn, for three of them that no ranking needs, and that takes as long as
  all the rest of RecBole. `sklearn_on_demand` puts it off until one of them is used.
RecBole's loading through pandas, broken by pandas 3, is replaced by `data/`.
"""

import contextlib
import importlib
import sys
import types

import numpy as np
import torch
from numpy._core.multiarray import scalar


class _Numpy(types.ModuleType):
    """numpy with the names that RecBole 1.2.1 still uses."""

    float, int, bool, object, str = float, int, bool, object, str

    def __getattr__(self, name):
        return getattr(np, name)


class _Torch(types.ModuleType):
    """torch that writes checkpoints in its default pickle protocol, whatever RecBole asks for."""

    @staticmethod
    def save(state, file, pickle_protocol=None):
        torch.save(state, file)

    def __getattr__(self, name):
        return getattr(torch, name)


class _OnDemand(types.ModuleType):
    """A module whose functions import the real one when they are called."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **options: getattr(importlib.import_module(self.__name__), name)(*args, **options)


@contextlib.contextmanager
def sklearn_on_demand():
    """Within this, functions imported from `sklearn.metrics` import it when they are called, not before."""
    if "sklearn" in sys.modules:
        yield
        return
    stand_ins = {name: _OnDemand(name) for name in ("sklearn", "sklearn.metrics")}
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        for name, stand_in in stand_ins.items():
            if sys.modules.get(name) is stand_in:
                del sys.modules[name]


def patch_recbole():
    """Make RecBole's modules work; calling it again changes nothing."""
    import recbole.data.interaction
    import recbole.evaluator.metrics
    import recbole.model.sequential_recommender
    import recbole.trainer.trainer

    torch.autograd.set_detect_anomaly(False)
    stand_in = _Numpy("numpy")
    for module in (recbole.data.interaction, recbole.evaluator.metrics):
        module.np = stand_in
    recbole.trainer.trainer.torch = _Torch("torch")
    torch.serialization.add_safe_globals([scalar, np.dtype, np.dtypes.Float64DType])
