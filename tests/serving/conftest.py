"""Bundles of small models, and an encoder that needs no language model."""

import zlib

import numpy as np
import pytest

import finetune
import pretrain
import serving.recommender
from serving import bundle
from tests.conftest import SMALL, WIDTH, write_mix, write_tiny


class FakeEncoder:
    """The vector of a text is drawn with the text as the seed."""

    width = WIDTH

    def __init__(self, encoder, pooling):
        assert (encoder, pooling) == ("test", "CLS")


def encode_with(encoder, texts):
    drawn = [np.random.default_rng(zlib.crc32(text.encode())).normal(size=WIDTH) for text in texts]
    return np.array(drawn, np.float32).reshape(-1, WIDTH)


@pytest.fixture(autouse=True)
def _fake_encoder(monkeypatch):
    monkeypatch.setattr(serving.recommender, "Encoder", FakeEncoder)
    monkeypatch.setattr(serving.recommender, "encode_with", encode_with)


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """(checkpoint, bundle) of each stage, and the folder of the data."""
    folder = tmp_path_factory.mktemp("made")
    tiny, mix = write_tiny(folder / "downstream"), write_mix(folder / "pretrain")
    pretrain.main(["-d", "Mix", f"--data_path={mix}", f"--checkpoint_dir={folder}/pre", "--epochs=1", *SMALL])
    found = {"data": tiny, "pretrain": (f"{folder}/pre/UniSRec-Mix-1.pth", f"{folder}/pretrained")}
    bundle.main(["-p", found["pretrain"][0], "--out", found["pretrain"][1]])
    for stage in ("inductive_ft", "transductive_ft"):
        options = [f"--train_stage={stage}", "--epochs=3", f"--checkpoint_dir={folder}/{stage}", *SMALL]
        finetune.main(["-d", "Tiny", f"--data_path={tiny}", "--bundle=false", *options])
        (path,) = map(str, (folder / stage).glob("*.pth"))
        bundle.main(["-p", path, "-d", "Tiny", "--data_path", tiny, "--out", f"{folder}/{stage}-bundle"])
        found[stage] = path, f"{folder}/{stage}-bundle"
    return found


def ids(*numbers):
    """Raw ids of items of the data set `Tiny`."""
    return [f"Tiny{1000 + number}" for number in numbers]
