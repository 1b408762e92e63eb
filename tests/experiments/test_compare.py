"""Comparing ranks files: a known difference, none at all, and files that do not belong together."""

import json
import subprocess
import sys

import numpy as np
import polars as pl
import pytest
from scipy.stats import bootstrap, ttest_rel

from engine.config import ROOT
from experiments.compare import SAMPLES, bootstrap_interval, main, paired_p_value

USERS = 400


def write_ranks(path, ranks, **columns):
    """Write a ranks file of users u0, u1, ... in random order, with these ranks; columns may be replaced."""
    count = len(ranks)
    frame = pl.DataFrame(
        {
            "user": [f"u{number}" for number in range(count)],
            "target": [f"i{number % 7}" for number in range(count)],
            "history_length": [5] * count,
            "rank": np.array(ranks, np.float64),
            "candidates": [100] * count,
            "in_history": [False] * count,
            **columns,
        }
    )
    frame.sample(fraction=1, shuffle=True, seed=len(str(path))).write_parquet(path)
    return str(path)


@pytest.fixture
def files(tmp_path):
    """Three ranks files of the same users: `a`, `better` with 40 more hits at 10, `same` with the ranks of `a`."""
    ranks = np.random.default_rng(0).integers(1, 51, USERS)
    better = ranks.copy()
    better[np.flatnonzero(ranks > 10)[:40]] = 1
    return [write_ranks(tmp_path / f"{n}.parquet", r) for n, r in (("a", ranks), ("better", better), ("same", ranks))]


def compared(tmp_path, *arguments):
    main([*arguments, "--json", str(tmp_path / "out.json")])
    return json.loads((tmp_path / "out.json").read_text())


def test_a_known_difference_is_found(files, tmp_path, capsys):
    result = compared(tmp_path, *files, "--metrics", "recall@10,ndcg@50")
    assert (result["users"], result["samples"]) == (USERS, 10_000) and list(result["metrics"]) == [
        "recall@10",
        "ndcg@50",
    ]
    base, better, same = (result["metrics"]["recall@10"][path] for path in files)
    assert base == {"mean": pytest.approx((pl.read_parquet(files[0])["rank"] <= 10).mean())}
    assert better["mean"] - base["mean"] == pytest.approx(0.1) and better["difference"] == pytest.approx(0.1)
    # 40 of 400 differences are 1, the others 0: their mean has a standard error of 0.015
    assert better["low"] == pytest.approx(0.1 - 1.96 * 0.015, abs=0.003)
    assert better["high"] == pytest.approx(0.1 + 1.96 * 0.015, abs=0.003)
    assert 0 < better["p"] < 1e-9
    assert same == {"mean": base["mean"], "difference": 0.0, "low": 0.0, "high": 0.0, "p": 1.0}
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "400 users; differences from a, with 95% intervals"
    assert lines[4].split()[:2] == ["better", f"{better['mean']:.4f}"] and lines[4].split()[2] == "+0.1000"
    assert len({len(line) for line in (lines[4], lines[5], lines[7], lines[8])}) == 1, "aligned"
    assert lines[5].split()[-1] == "1.0000"


def test_the_interval_and_p_are_scipys():
    generator = np.random.default_rng(3)
    base, values = generator.random(300), generator.random(300) + 0.05
    low, high = bootstrap_interval(values - base, np.random.default_rng(1))
    expected = bootstrap((values - base,), np.mean, n_resamples=SAMPLES, method="percentile", rng=2).confidence_interval
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=0.003) and high - low > 0.07
    assert paired_p_value(values, base) == ttest_rel(values, base).pvalue
    assert paired_p_value(values, values) == 1.0


def test_the_same_seed_gives_the_same_interval_in_any_blocks(monkeypatch):
    differences = np.random.default_rng(0).normal(size=50)
    whole = bootstrap_interval(differences, np.random.default_rng(1))
    monkeypatch.setattr("experiments.compare._DRAWS", 1000)
    assert bootstrap_interval(differences, np.random.default_rng(1)) == pytest.approx(whole, abs=1e-12)


def test_a_user_with_several_rows(tmp_path):
    """In files with brackets in their names, which polars would take for patterns."""
    rows = {"user": ["a", "a", "b"], "target": ["i", "i", "i"], "history_length": [3, 4, 5]}
    one, two = (write_ranks(tmp_path / f"{r}", r, **rows) for r in ([1, 2, 30], [40, 50, 2]))
    found = compared(tmp_path, one, two, "--metrics=hit@10")["metrics"]["hit@10"][two]
    assert found["difference"] == pytest.approx(-1 / 3) and found["low"] <= -1 / 3 <= found["high"]


MISSING = "OTHER: has no row of user u0 with target i0, but A has"
WRONG = {
    "another user": ({"user": ["x", *(f"u{n}" for n in range(1, USERS))]}, MISSING),
    "another target": ({"target": ["x"] * USERS}, MISSING),
    "sampled candidates": ({"candidates": [50] * USERS}, "OTHER: found 50 candidates, expected 100 as in A"),
}


@pytest.mark.parametrize("case", WRONG)
def test_files_that_do_not_belong_together(files, tmp_path, refused, case):
    columns, message = WRONG[case]
    other = write_ranks(tmp_path / "other.parquet", [1] * USERS, **columns)
    expected = message.replace("OTHER", other).replace("A", files[0], 1)
    assert refused(main, files[0], other) == f"{expected}; compare models on the same data set, split and eval_args"


def test_a_user_too_many(files, tmp_path, refused):
    other = write_ranks(tmp_path / "other.parquet", [1] * (USERS + 1))
    expected = f"{files[0]}: has no row of user u400 with target i1, but {other} has; "
    assert refused(main, files[0], other).startswith(expected) and refused(main, other, files[0]).startswith(expected)


def test_wrong_inputs(files, tmp_path, refused):
    assert refused(main, files[0]) == f"found {files[0]}, expected two or more different ranks files"
    assert refused(main, files[0], files[0]).endswith("expected two or more different ranks files")
    assert refused(main, files[0], "nowhere").startswith("nowhere: no such file; write it with --ranks_file")
    text = tmp_path / "text.parquet"
    text.write_text("no Parquet")
    assert refused(main, files[0], text).startswith(f"{text}: is not a Parquet file (")
    pl.DataFrame({"user": ["a"], "rank": [1.0]}).write_parquet(text)
    missing = "target, history_length, candidates, in_history"
    assert refused(main, files[0], text).startswith(f"{text}: has no column {missing}, expected user, target, history")
    one = write_ranks(tmp_path / "one.parquet", [1])
    assert refused(main, one, files[0]) == f"{one}: holds 1 rows, expected two or more"
    for wrong in (["first"] * USERS, [None] * USERS, [0.5] * USERS):
        pl.read_parquet(files[0]).with_columns(rank=pl.Series(wrong)).write_parquet(text)
        assert refused(main, files[0], text).startswith(f"{text}: column rank, expected numbers from 1 on in every row")
    found = f"found {files[1]}, one of the ranks files, which it would replace"
    assert refused(main, *files, "--json", files[1]) == f"option --json: {found}"
    assert refused(main, *files, "--json", tmp_path).startswith(f"{tmp_path}: cannot be written: it is a folder")


@pytest.mark.parametrize("metrics", ["recal@10", "recall", "recall@0", "recall@1.5", "gauc@3", ""])
def test_unknown_metrics(files, refused, metrics):
    message = refused(main, *files, f"--metrics={metrics}")
    assert message.startswith(
        f"option --metrics: found {metrics!r}, expected METRIC@K, such as recall@10 (metrics: recall"
    )
    assert message.endswith("; did you mean recall?") or metrics[:4] != "reca"


def test_files_of_one_name_are_told_apart_by_their_folders(tmp_path, capsys):
    paths = []
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        paths.append(write_ranks(tmp_path / folder / "ranks.parquet", [1, 20, 3]))
    main(paths)
    assert f"differences from {paths[0]}, with" in capsys.readouterr().out


@pytest.mark.slow
def test_the_script_runs_from_any_folder(files, tmp_path):
    script = f"{ROOT}/experiments/compare.py"

    def run(*command):
        return subprocess.run(
            [sys.executable, *command], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout

    found = run(script, "a.parquet", "better.parquet")
    assert "recall@10" in found and "ndcg@10" in found
    code = f"import runpy, sys; sys.argv = ['compare.py', '-h']; runpy.run_path({script!r}, run_name='__main__')"
    words = run("-c", f"try:\n {code}\nexcept SystemExit:\n print(*sys.modules)").split()
    assert "--metrics" in words and "numpy" in words
    assert not {"torch", "polars", "scipy"} & set(words), "help is quick"
