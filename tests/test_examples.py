"""The examples run from any folder, and say what they should."""

import os
import re
import subprocess
import sys

import pytest

from dataset.preprocessing import process_custom
from dataset.preprocessing.splits import read_show_columns
from engine.settings import ROOT

pytestmark = pytest.mark.slow


def run(example, *words, folder):
    command = [sys.executable, os.path.join(ROOT, "examples", example), *map(str, words)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True, text=True).stdout


def test_from_csv_files_to_an_answered_request(tmp_path):
    lines = run("own_shop.py", tmp_path / "shop", folder=tmp_path).splitlines()
    after = lines.index("recommended:") + 1
    recommended = [line.split("  ")[-1] for line in lines[after : after + 5]]
    assert len(set(recommended)) == 5 and "Porzellantasse, rot" not in recommended, "it is in the history"
    assert not any(", " in title and title.endswith(".") for title in recommended), "titles, not texts"
    assert lines[lines.index("near the new product:") + 1].strip().startswith("Porzellantasse, ")
    (bundle,) = {path.parent for path in tmp_path.glob("shop/saved/*/model.safetensors")}
    for total in (73, 73):  # the added product survives the restart
        served = run("serve_shop.py", bundle, "TA-101", folder=tmp_path).splitlines()
        assert f"{{'total': {total}}}" in served and len(served) == 6
    assert "72 items" not in served[0] and "73 items" in served[0]


def test_pretraining_helps_in_a_third_shop(tmp_path):
    lines = run("transfer.py", tmp_path / "transfer", folder=tmp_path).splitlines()
    pattern = re.compile(r"(.*) weights, (\d) epochs: (0\.\d{4})")
    ndcg = {found.group(1, 2): float(found[3]) for found in map(pattern.fullmatch, lines) if found}
    assert len(ndcg) == 4
    for epochs in "05":
        assert ndcg["pre-trained", epochs] > ndcg["new", epochs]
    assert ndcg["new", "5"] > ndcg["pre-trained", "0"] > 0


def test_the_shop_of_a_thousand_products(tmp_path):
    """The files of `make_shop.py` are what `process_custom.py` expects, with the options of README."""
    run("make_shop.py", tmp_path / "shop", folder=tmp_path)
    tables = ["--interactions", f"{tmp_path}/shop/clicks.csv", "--items", f"{tmp_path}/shop/items.csv"]
    texts = ["--text_columns", "title,department", "--show_columns", "title,price,url", "--missing_text", "empty"]
    process_custom.main(
        ["--dataset", "MyShop", *tables, *texts, "--plm_name", "none", "--output_path", str(tmp_path / "data")]
    )
    shown = read_show_columns(str(tmp_path / "data" / "MyShop"), "MyShop")
    assert len(shown) == 1000 and shown["title"].null_count() == 40 and shown["url"].null_count() == 0
    assert any(item.startswith("KÜ-") for item in shown["id"])
