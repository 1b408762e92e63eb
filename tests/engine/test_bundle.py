"""Bundles: the same model as the checkpoint, in half precision, as plain files, and damage is found."""

import json
import os
import pathlib
import shutil

import pytest
import torch

import finetune
import pretrain
from common.errors import UserError
from common.files import read_json
from engine.bundle import CARD, CONFIG, FORMAT, WEIGHTS
from engine.checkpoint import read_checkpoint
from engine.ranks_file import read_ranks
from serving import bundle
from tests.conftest import SMALL, write_mix, write_tiny


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A checkpoint of a pre-training, the bundle made of it, and the folder of a target."""
    folder = tmp_path_factory.mktemp("bundle")
    mix, tiny = write_mix(folder / "pretrain"), write_tiny(folder / "downstream")
    pretrain.main(["-d", "Mix", f"--data_path={mix}", f"--checkpoint_dir={folder}", "--epochs=1", *SMALL])
    checkpoint, out = str(folder / "UniSRec-Mix-1.pth"), str(folder / "mix")
    bundle.main(["-p", checkpoint, "--out", out])
    return checkpoint, out, tiny


@pytest.fixture
def copied(folders, tmp_path):
    """A copy of the bundle, to be damaged."""
    shutil.copytree(folders[1], tmp_path, dirs_exist_ok=True)
    return tmp_path


def test_a_bundle_holds_the_model_and_nothing_of_the_machine(folders):
    checkpoint, out, _ = folders
    assert sorted(os.listdir(out)) == sorted([WEIGHTS, CONFIG, CARD])
    then, now = read_checkpoint(checkpoint), read_checkpoint(out)
    names = {name for name in then["state_dict"] if not name.startswith("whitening.")}
    assert now["state_dict"].keys() == names and len(names) > 30
    for name, tensor in now["state_dict"].items():
        assert tensor.dtype is torch.float32
        precise = then["state_dict"][name].dim() < 2
        torch.testing.assert_close(
            tensor, then["state_dict"][name], rtol=0 if precise else 1e-3, atol=0 if precise else 1e-6
        )
    assert {key: now[key] for key in ("model", "train_stage", "epoch", "features", "run")} == {
        key: then[key] for key in ("model", "train_stage", "epoch", "features", "run")
    }
    settings = now["config"]
    assert (
        settings["dataset"] == "Mix"
        and settings["recipe"] == "history"
        and settings["n_exps"] == then["config"]["n_exps"]
    )
    text = "".join(pathlib.Path(out, name).read_text() for name in (CONFIG, CARD))
    assert os.path.dirname(checkpoint) not in text and "data_path" not in text
    assert "# mix" in text and "Mix, 1 epochs" in text


def test_finetuning_from_a_bundle(folders, tmp_path):
    checkpoint, out, tiny = folders
    tables = []
    for start in (checkpoint, out):
        where = tmp_path / os.path.basename(start)
        options = [
            f"--checkpoint_dir={where}",
            f"--ranks_file={where}/ranks.parquet",
            "-p",
            start,
            "--epochs=0",
            *SMALL,
        ]
        finetune.main(["-d", "Tiny", f"--data_path={tiny}", *options])
        tables.append(read_ranks(f"{where}/ranks.parquet").rank)
    (name,) = (name for name in os.listdir(tmp_path / "mix") if name.endswith(".json"))
    assert read_json(str(tmp_path / "mix" / name))["checkpoint"] == out
    assert abs(tables[0] - tables[1]).mean() < 0.2, "half precision swaps few ranks of 30"


def test_a_model_card_is_kept(folders, copied):
    (copied / CARD).write_text("# by hand")
    bundle.main(["-p", folders[0], "--out", str(copied)])
    assert (copied / CARD).read_text() == "# by hand"


def damage_weights(folder):
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[-3] ^= 1
    (folder / WEIGHTS).write_bytes(content)


def cut_weights(folder):
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:1000])


def change_format(folder):
    (folder / CONFIG).write_text(json.dumps({"format": "unisrec-bundle-99"}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_weights, f"{WEIGHTS}: its checksum is not the one in {CONFIG}"),
        (cut_weights, f"{WEIGHTS}: its checksum is not the one in {CONFIG}"),
        (lambda folder: (folder / WEIGHTS).unlink(), f"{WEIGHTS}: no such file"),
        (lambda folder: (folder / CONFIG).unlink(), f"{CONFIG}: no such file"),
        (lambda folder: (folder / CONFIG).write_text("{"), f"{CONFIG}: is not a JSON file"),
        (lambda folder: (folder / CONFIG).write_text("[]"), f"{CONFIG}: format None, expected {FORMAT!r}"),
        (change_format, f"{CONFIG}: format 'unisrec-bundle-99', expected {FORMAT!r}"),
    ],
)
def test_damage_is_found(copied, damage, message):
    damage(copied)
    with pytest.raises(UserError) as error:
        read_checkpoint(str(copied))
    assert message in str(error.value)


def test_a_bundle_needs_the_settings_of_its_checkpoint(folders, tmp_path):
    content = torch.load(folders[0], weights_only=True)
    torch.save({"state_dict": content["state_dict"]}, tmp_path / "bare.pth")
    with pytest.raises(UserError, match="does not say its settings or its text encoder"):
        bundle.main(["-p", str(tmp_path / "bare.pth"), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
