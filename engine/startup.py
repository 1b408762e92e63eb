"""Deferred imports. Each of them would take more than a second at every start.

Before the first training step, torch and RecBole import two libraries that training does not use:

| library | imported by | needed for | CPU time saved | memory saved |
|---|---|---|---|---|
| torch's compiler (`torch._dynamo`) | the first call of an optimizer's method | `torch.compile` | 2.1 s | 68 MB |
| scikit-learn | RecBole's metrics | three metrics that are not ranking metrics, spectral ids | 1.7 s | 68 MB |

The figures are CPU seconds and peak memory of the process up to the first step of `finetune.py`, the lowest of eight
runs. With both imports deferred, the process takes 3.2 s and 293 MB. Torch 2.13, scikit-learn 1.9, one core of an AMD
EPYC, 2026-11-24. Add a further deferred import only if it saves a second or more, and add its figures to the table.
"""

import contextlib
import importlib
import inspect
import sys
import types
from collections.abc import Callable, Iterator

import torch


def without_compiler(optimizer: type[torch.optim.Optimizer]) -> Callable[..., torch.optim.Optimizer]:
    """Derive an optimizer that does the same and does not import torch's compiler.

    Torch wraps methods of its optimizers, so that the compiler does not compile them. The wrapper imports the compiler
    at the first call. The derived class has the methods without the wrapper. Do not use it with `torch.compile`.
    """
    names = ("add_param_group", "load_state_dict", "state_dict", "step", "zero_grad")
    methods = {name: inspect.unwrap(getattr(optimizer, name)) for name in names}
    methods["step"] = torch.no_grad()(methods["step"])  # unwrapping has also removed this decorator
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

    If scikit-learn is already imported, the block changes nothing. After the block, `import sklearn` imports the real
    package.
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
