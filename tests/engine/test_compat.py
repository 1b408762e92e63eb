"""RecBole on today's numpy and torch: what the patches give it, and that they stay within its modules."""

import numpy as np
import recbole.data.interaction
import recbole.evaluator.metrics
import recbole.trainer.trainer
import torch

from engine.compat import patch_recbole

NUMPY_USERS = (recbole.data.interaction, recbole.evaluator.metrics)


def test_recbole_has_numpys_former_names_and_numpy_has_not():
    patch_recbole()
    for module in NUMPY_USERS:
        assert (module.np.float, module.np.int, module.np.bool) == (float, int, bool)
        assert module.np.mean is np.mean and module.np is not np
    assert np.bool is not bool and not hasattr(np, "float")
    assert recbole.data.interaction.Interaction({"a": np.array([1, 2])})["a"].tolist() == [1, 2]


def test_recboles_trainer_writes_checkpoints_that_torch_reads_as_plain_data(tmp_path):
    patch_recbole()
    path, content = tmp_path / "a.pth", {"best": np.float64(0.25), "weights": torch.ones(2)}
    recbole.trainer.trainer.torch.save(content, path, pickle_protocol=4)
    read = torch.load(path, weights_only=True)
    assert read["best"] == 0.25 and torch.equal(read["weights"], content["weights"])
    assert recbole.trainer.trainer.torch.optim is torch.optim and recbole.trainer.trainer.torch is not torch


def test_anomaly_detection_is_off_again():
    with torch.autograd.set_detect_anomaly(True):  # as RecBole's SINE leaves it
        patch_recbole()
        assert not torch.is_anomaly_enabled()


def test_patching_twice_changes_nothing():
    patch_recbole()
    array = np.arange(3)
    patch_recbole()
    assert recbole.evaluator.metrics.np.asarray(array) is array
    assert recbole.trainer.trainer.torch.zeros is torch.zeros
