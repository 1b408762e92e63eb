"""Which finished runs belong to a plan: settings, data, weights and code."""

import itertools
import os

import pytest

from common.errors import UserError
from experiments import identity
from experiments.identity import belongs, code_hash, describe, run_name
from experiments.plan import plan_runs, read_experiment

SETTINGS = {"epochs": 3, "hidden_size": 64, "seed": 1}
FOUND = {"model": "SASRec", "dataset": "A", "seed": 1, "recipe": "", "data": "d", "weights": None}


def description(**changes):
    settings = SETTINGS | changes.pop("settings", {})
    return FOUND | {"given": {}, "settings": settings} | changes


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({}, True),
        ({"data": "other"}, False),
        ({"weights": "w"}, False),
        ({"recipe": "props/published.yaml"}, False),
        ({"settings": {"epochs": 4}}, False),
        ({"settings": {"epochs": 4}, "given": {"epochs": 4}}, False),
        ({"given": {"epochs": 3}}, True),  # the default, now written down
        ({"settings": {"new": 1}}, True),  # a new setting with a default comes with new code
        ({"settings": {"new": 1}, "given": {"new": 1}}, False),  # the row asks for what the finished run did not know
    ],
)
def test_which_runs_belong(changes, expected):
    assert belongs(description(), description(**changes)) == expected


def test_a_run_that_knew_more_settings_belongs():
    assert belongs(description(settings={"old": 1}), description())


def one_run(tmp_path, data_path, row="model: SASRec", more=""):
    path = tmp_path / "one.yaml"
    path.write_text(f"datasets: Tiny\nseeds: 1\nrows: {{Row: {{{row}}}}}\n{more}")
    return plan_runs(read_experiment(str(path)), data_path)[0]


def test_data_and_settings_are_described(tmp_path, tiny):
    first = describe(one_run(tmp_path, tiny))
    assert describe(one_run(tmp_path, tiny)) == first and run_name(first).startswith("SASRec-Tiny-1-")
    assert describe(one_run(tmp_path, tiny, more="settings: {epochs: 2}"))["settings"]["epochs"] == 2
    with open(f"{tiny}/Tiny/Tiny.test.inter", "a") as file:
        file.write("40\t1 2\t3\n")
    assert not belongs(first, describe(one_run(tmp_path, tiny)))
    moved = os.rename(tiny, tmp_path / "elsewhere") or str(tmp_path / "elsewhere")
    assert describe(one_run(tmp_path, moved))["data"] != first["data"]
    with pytest.raises(UserError, match=r"Tiny.train.inter: no such file; create the data set"):
        describe(one_run(tmp_path, tiny))


def test_the_content_of_a_checkpoint_counts(tmp_path, tiny):
    weights = tmp_path / "a.pth"
    row = f"model: UniSRec, stage: inductive_ft, pretrained: '{weights}'"
    with pytest.raises(UserError, match="a.pth: no such file"):
        describe(one_run(tmp_path, tiny, row))
    weights.write_bytes(b"1")
    first = describe(one_run(tmp_path, tiny, row))
    assert run_name(first).startswith("UniSRec-Tiny-inductive_ft-1-") and str(tmp_path) not in str(first["given"])
    weights.write_bytes(b"22")
    assert describe(one_run(tmp_path, tiny, row))["weights"] != first["weights"]


def test_what_counts_as_code(tmp_path, tiny, monkeypatch):
    run = one_run(tmp_path, tiny)
    root = tmp_path / "project"
    for name, text in {
        "run_baseline.py": "import os\nfrom engine import loop\n\n\ndef main():\n    from data.rows import read\n",
        "engine/__init__.py": "",
        "engine/loop.py": '"""The loop."""\n\n\ndef loop():\n    """Loop."""\n    return 1  # one\n',
        "engine/unused.py": "a = 1\n",
        "data/rows.py": "read = 1\n",
        "baselines/__init__.py": "MODELS = {}\n",
        "baselines/sasrec.py": "class SASRec: pass\n",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    monkeypatch.setattr(identity, "ROOT", str(root))
    monkeypatch.setattr(identity, "_REGISTRY", str(root / "baselines/__init__.py"))
    first, times = code_hash(run), itertools.count(1)

    def changed(name, text):
        path = root / name
        before = path.read_text()
        hashes = []
        for content in (text, before):
            path.write_text(content)
            os.utime(path, (0, next(times)))  # the clock of the file system may be too coarse for the test
            hashes.append(code_hash(run))
        assert hashes[1] == first
        return hashes[0] != first

    assert not changed("engine/loop.py", '"""Other words."""\n\ndef loop():\n    """Again."""\n\n    return  1\n')
    assert not changed("engine/unused.py", "a = 2\n") and not changed("baselines/__init__.py", "MODELS = {1: 2}\n")
    assert changed("engine/loop.py", '"""The loop."""\n\n\ndef loop():\n    return 2\n')
    assert changed("data/rows.py", "read = 2\n"), "imported inside a function"
    assert changed("baselines/sasrec.py", "class SASRec: a = 1\n"), "the file of the model"
    assert changed("engine/__init__.py", "a = 1\n"), "a package is imported with its modules"
