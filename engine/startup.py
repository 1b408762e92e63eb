"""Imports that are put off because each takes more than a second of every start.

Two libraries are imported on the way to the first training step, and training uses neither:

| library | imported by | needed for | CPU time saved | memory saved |
|---|---|---|---|---|
| torch's compiler (`torch._dynamo`) | the first call of an optimiser's method | `torch.compile` | 2.1 s | 68 MB |
| scikit-learn | RecBole's metrics | three metrics that are no ranking metrics | 1.7 s | 68 MB |

Both were measured up to the first step of `finetune.py`, which takes 3.2 s and 293 MB: CPU seconds of the process, the
least of eight runs, and its peak memory. Torch 2.13, scikit-learn 1.9, one core of an AMD EPYC, 2026-11-24. A new
trick belongs here if it saves a second or more, with its figure.
"""

import contextlib
import importlib
import inspect
import sys
import types
from collections.abc import Iterator

import torch


def without_compiler(optimizer: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """Derive an optimiser that does the same and does not import torch's compiler.

    Torch wraps the optimisers' methods in functions that import the compiler at the first call, so that it leaves the
    methods alone. The derived class has the methods without that wrapper. Do not use it with `torch.compile`.
    """
    names = ("add_param_group", "load_state_dict", "state_dict", "step", "zero_grad")
    methods = {name: inspect.unwrap(getattr(optimizer, name)) for name in names}
    methods["step"] = torch.no_grad()(methods["step"])  # unwrapping has taken this away too
    return type(optimizer.__name__, (optimizer,), methods)


class _OnDemand(types.ModuleType):
    """A module whose functions import the real module when they are called."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **options: getattr(importlib.import_module(self.__name__), name)(*args, **options)


@contextlib.contextmanager
def sklearn_on_demand() -> Iterator[None]:
    """Functions imported from `sklearn.metrics` within the block import scikit-learn when they are called.

    Where scikit-learn is imported already, the block changes nothing. After the block `import sklearn` imports the
    real package.
    """
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
