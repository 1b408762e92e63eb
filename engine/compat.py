"""Make RecBole 1.2.1 run with numpy 2 and torch 2.6 or newer. `engine.config.Config` calls `patch_recbole`.

| what RecBole does | what `patch_recbole` does |
|---|---|
| uses names that numpy 2 does not have, such as `np.float` | Gives two modules of RecBole a stand-in for numpy that has these names. Numpy itself stays unchanged. RecBole's own remedy adds the names to numpy, and fails on numpy 2. |
| turns on torch's anomaly detection when its sequential models are imported (SINE does) | Turns it off. Anomaly detection checks every gradient for NaN. With it, training took 1.6 times as long. |
| writes checkpoints in a pickle protocol that `torch.load(weights_only=True)` refuses | Gives RecBole's trainer a stand-in for torch whose `save` uses torch's default protocol. |
| accepts the names of its own metrics only | Adds the names in `engine.metrics.METRICS` to its ranking metrics. |
| stores numpy numbers in its checkpoints | Allows them in `torch.load(weights_only=True)`. They are plain data. |

RecBole loads data with pandas, and that code fails on pandas 3. The package `data/` replaces it.
"""  # noqa: E501

import types

import numpy as np
import torch
from numpy._core.multiarray import scalar

from engine.metrics import METRICS
from engine.startup import sklearn_on_demand

with sklearn_on_demand():
    import recbole.data.interaction
    import recbole.evaluator
    import recbole.evaluator.metrics
    import recbole.model.sequential_recommender
    import recbole.trainer.trainer
    from recbole.utils import EvaluatorType


class _Numpy(types.ModuleType):
    """Numpy with the names that RecBole 1.2.1 still uses."""

    float, int, bool, object, str = float, int, bool, object, str

    def __getattr__(self, name):
        return getattr(np, name)


class _Torch(types.ModuleType):
    """Torch whose `save` uses torch's default pickle protocol, whatever protocol the caller asks for."""

    @staticmethod
    def save(state, file, pickle_protocol=None):
        torch.save(state, file)

    def __getattr__(self, name):
        return getattr(torch, name)


def patch_recbole() -> None:
    """Patch RecBole's modules as described at the top of this file. A second call changes nothing."""
    torch.autograd.set_detect_anomaly(False)
    stand_in = _Numpy("numpy")
    for module in (recbole.data.interaction, recbole.evaluator.metrics):
        module.np = stand_in
    recbole.trainer.trainer.torch = _Torch("torch")
    for name in METRICS:
        recbole.evaluator.metric_types.setdefault(name, EvaluatorType.RANKING)
    torch.serialization.add_safe_globals([scalar, np.dtype, np.dtypes.Float64DType])
