"""The ONNX graphs of a bundle: equal to the model at all sizes, and enough to recommend without torch."""

import os
import shutil

import numpy as np
import onnxruntime
import pytest
import torch

from common.files import read_json
from engine.bundle import ONNX, SCORING
from examples.recommend_onnx import OnnxRecommender
from serving import export
from serving.recommender import Recommender
from tests.conftest import WIDTH
from tests.serving.conftest import encode_with, ids

pytestmark = pytest.mark.slow  # an export takes 10 seconds
STAGES = ("inductive_ft", "transductive_ft")


@pytest.fixture(scope="module")
def exported(made, tmp_path_factory):
    """Copies of the bundles of both stages, with graphs."""
    folder = tmp_path_factory.mktemp("exported")
    for stage in STAGES:
        shutil.copytree(made[stage][1], folder / stage)
        export.main([str(folder / stage)])
    return {stage: str(folder / stage) for stage in STAGES}


def run(folder, graph, **inputs):
    session = onnxruntime.InferenceSession(os.path.join(folder, ONNX, graph))
    (output,) = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    return torch.from_numpy(output)


@pytest.mark.parametrize("stage", STAGES)
def test_the_graphs_equal_the_model_at_all_sizes(exported, stage):
    model = Recommender.from_pretrained(exported[stage]).model
    assert model.whitening is not None and model.history_mean is not None
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for count in (1, 2, 300):
            texts = torch.randn(count, WIDTH, generator=generator)
            found = run(exported[stage], export.ITEM_GRAPH, texts=texts)
            torch.testing.assert_close(found, export.ItemGraph(model)(texts), atol=1e-5, rtol=0)
        longest = model.max_seq_length
        for batch, length in ((1, 1), (1, longest), (2, 1), (5, 7), (64, longest)):
            vectors = torch.randn(batch, length, model.hidden_size, generator=generator)
            lengths = torch.randint(1, length + 1, (batch,), generator=generator)
            expected = export.UserGraph(model)(vectors, lengths)
            found = run(exported[stage], export.USER_GRAPH, vectors=vectors, lengths=lengths)
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
            vectors[torch.arange(length) >= lengths[:, None]] = 99.0  # padding has no effect
            padded = run(exported[stage], export.USER_GRAPH, vectors=vectors, lengths=lengths)
            torch.testing.assert_close(padded, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("stage", STAGES)
def test_scores_without_torch(exported, stage):
    """History bias and item-to-item logits included, for old and new items."""
    recommender, without_torch = Recommender.from_pretrained(exported[stage]), OnnxRecommender(exported[stage])
    texts = {"new1": "a new thing", "new2": "another new thing"}
    recommender.add_items(texts)
    without_torch.add_items(encode_with(None, list(texts.values())))
    names = [*ids(*range(30)), *texts]
    scoring = read_json(os.path.join(exported[stage], ONNX, SCORING))
    assert any(scoring["history_bias"]) and (scoring["item_to_item_factor"] > 0) == (stage == "transductive_ft")
    for history in ([4], [1, 2, 1, 5, 7, 8, 8], [3, 31, 30, 9], list(range(30)) * 3):
        expected = recommender.score([names[row] for row in history], names)
        np.testing.assert_allclose(without_torch.scores(history), expected, atol=1e-5, rtol=0)


def test_graphs_of_other_weights_are_removed(exported, made, tmp_path):
    folder = shutil.copytree(exported["inductive_ft"], tmp_path / "bundle")
    recommender = Recommender.from_pretrained(str(folder))
    recommender.remove_items(ids(3))
    recommender.save_pretrained(str(folder))
    assert (folder / ONNX / export.ITEM_GRAPH).exists(), "items have no effect on the graphs"
    Recommender.from_pretrained(made["transductive_ft"][1]).save_pretrained(str(folder))
    assert not (folder / ONNX).exists()


def test_mistakes(made, tmp_path, refused):
    assert "has no items of its own, and without a catalogue" in refused(export.main, made["pretrain"][1])
    assert not os.path.exists(os.path.join(made["pretrain"][1], ONNX))
    assert "no such file" in refused(export.main, tmp_path)
    assert "no such folder" in refused(export.main, "nobody/nothing-of-this-name")
