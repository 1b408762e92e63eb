"""Imports that are put off: training does without them, and what needs them still gets them."""

import subprocess
import sys
import types

import pytest

from engine.config import ROOT
from engine.startup import sklearn_on_demand

pytestmark = pytest.mark.slow  # each test starts processes


def output_of(code):
    """What a process of its own prints: list of words."""
    command = [sys.executable, "-W", "ignore", "-c", code]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()


STEP = """
weight = torch.nn.Parameter(torch.ones(2))
optimizer = {optimizer}([weight], lr=0.1)
optimizer.zero_grad()
weight.sum().backward()
optimizer.step()
optimizer.load_state_dict(optimizer.state_dict())
assert weight.tolist() != [1, 1]
"""


def test_neither_library_is_imported_and_sklearn_is_where_it_is_needed():
    words = output_of(f"""
import sys, torch, engine.config
from engine.startup import without_compiler
{STEP.format(optimizer="without_compiler(torch.optim.SGD)")}
print("sklearn" in sys.modules, "torch._dynamo" in sys.modules)
from recbole.evaluator.metrics import sk_auc
assert sk_auc([0, 1, 2], [0, 1, 1]) == 1.5
import sklearn
print("sklearn.metrics" in sys.modules, sklearn.__version__ > "")
""")
    assert words == ["False", "False", "True", "True"]


def test_both_libraries_would_be_imported():
    """If this fails, RecBole or torch has changed, and the trick that puts the library off can be deleted."""
    code = "import sys, torch, recbole.evaluator.metrics\n" + STEP.format(optimizer="torch.optim.SGD")
    assert output_of(code + "print('sklearn' in sys.modules, 'torch._dynamo' in sys.modules)") == ["True", "True"]


def test_sklearn_that_is_imported_already_is_used(monkeypatch):
    package, metrics = types.ModuleType("sklearn"), types.ModuleType("sklearn.metrics")
    package.metrics, metrics.auc = metrics, max
    monkeypatch.setitem(sys.modules, "sklearn", package)
    monkeypatch.setitem(sys.modules, "sklearn.metrics", metrics)
    with sklearn_on_demand():
        from sklearn.metrics import auc
    assert auc is max and sys.modules["sklearn"] is package
