"""What makes a run: its id, and which files belong to it.

A run's id is a short hash of everything that decides its result: the settings, the training and evaluation data, the
project's code, and the weights that it starts from. A time stamp would do as a file name, but with a hash the same
command is the same run: repeated, it replaces its own files and no others. A script of experiments can be started
again, and two results with one id can be compared without looking for what else has changed.

Not part of the id:

- settings that do not change the result: folders, result files, progress bars, the device. Sums may be rounded
  otherwise on another device, or with another number of processes or another version of torch; a result file tells
  these apart (`settings`, `versions`).
- in pre-training, where every epoch is the same whatever comes after it, `epochs`, `save_step` and `resume`. A
  training that is continued with the same settings, data and code is the same run.
- where a file lies and what it is called. Data and weights are known by their content.
"""

import dataclasses
import hashlib
import inspect
import json
import logging
import pathlib
from collections.abc import Iterable, Mapping

import torch

from common.errors import UserError
from common.files import file_sha256
from common.processes import from_main, is_main
from data import UniSRecDataset
from data.dataset import SPLITS
from data.features import feature_description
from engine.checkpoint import changed_settings
from engine.settings import ROOT

_DIGITS = 10  # of an id: among 10,000 runs two have the same one with a probability of 1 in 20,000
_CODE = ("unisrec.py", "baselines", "common", "data", "engine", "layers")
# settings that do not change the result, and paths whose content counts instead
_NO_EFFECT = {"checkpoint_dir", "data_path", "pretrained", "ranks_file", "result_file", "resume"}
_NO_EFFECT |= {"device", "gpu_id", "groups", "local_rank", "show_progress", "use_gpu"}
_LENGTH = {"epochs", "save_step"}  # of a pre-training
logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Run:
    """A run's identity, as its checkpoints store it (`run`, `run_start`).

    Attributes:
        id: hexadecimal digits.
        start: a hash of the weights that the run started from, None for new weights.
    """

    id: str
    start: str | None = None


def identify(config, dataset: UniSRecDataset, checkpoint: Mapping | None = None, resume: bool = False) -> Run:
    """Find out which run these settings, data, code and initial weights make. All processes get the main one's answer.

    Args:
        config: the settings, as they are when training starts.
        dataset: the whole data set, or a part that `build` has made of it.
        checkpoint: from `read_checkpoint`, if the run starts from one.
        resume: whether the run continues the checkpoint's training. It is the checkpoint's run if nothing has changed
            since, else a new one.
    """
    run = None
    if is_main():
        basis = _basis(config, dataset)
        run = _make_run(basis, _weights_hash(checkpoint) if checkpoint else None)
        if resume and checkpoint:
            resumed = _make_run(basis, checkpoint.get("run_start"))
            run = resumed if resumed.id == checkpoint.get("run") else run
        logger.info("run %s", run.id)
    return from_main(run)


def check_files(paths: Iterable[str], run: Run, config) -> None:
    """Check before a training that it will replace no checkpoint of another run.

    This does not protect two runs from each other that have both passed the check. A lock would have its place here.

    Args:
        paths: the checkpoints that the run may write. Those that do not exist yet are fine.
        config: the run's settings, for the message.

    Raises:
        UserError: a file is of another run.
    """
    for path in filter(pathlib.Path.exists, map(pathlib.Path, paths)):
        try:
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except Exception:  # unreadable, or a published checkpoint: in any case not of this run
            content = {}
        if content.get("run") != run.id:
            raise UserError(
                f"{path}: is of another run ({_difference(content, config)}) and would be replaced; "
                "give another --checkpoint_dir, or move or delete the file"
            )


def _difference(content, config):
    """How a checkpoint's run differs from that of `config`, in words."""
    if "run" not in content:
        return "it holds no run id"
    changed = [f"{key} {then}, now {now}" for key, (then, now) in changed_settings(content, config).items()]
    return f"run {content['run']}: {'; '.join(changed[:3]) or 'the data, the code or the initial weights differ'}"


def _make_run(basis, start):
    return Run(hashlib.sha256(f"{basis} {start}".encode()).hexdigest()[:_DIGITS], start)


def _basis(config, dataset):
    """What decides the result apart from the initial weights: str."""
    pretraining = config["train_stage"] == "pretrain"
    left_out = _NO_EFFECT | (_LENGTH if pretraining else set())
    settings = {key: value for key, value in config.plain().items() if key not in left_out}
    data = _data_hash(dataset, SPLITS[:1] if pretraining else SPLITS)
    return f"{json.dumps(settings, sort_keys=True)} {data} {_code_hash(config.model_class)}"


def _data_hash(dataset, splits):
    digest = hashlib.sha256(json.dumps(dataset.catalogue.counts).encode())
    for split in splits:
        sequences = dataset.sequences(split)
        digest.update(f"{split} {sequences.cut_length}".encode())
        for array in (sequences.offsets, sequences.items, sequences.weights, sequences.users):
            digest.update(f"{array.dtype} {array.shape}".encode())
            digest.update(array)
    for path in dataset.features.paths if dataset.features else ():
        digest.update((feature_description(path).get("sha256") or file_sha256(path)).encode())
    return digest.hexdigest()


def _code_hash(model_class):
    """Of the project's code that training and evaluation use, and of the file that defines the model."""
    root = pathlib.Path(ROOT)
    places = [root / place for place in _CODE]
    files = {file for place in places for file in (place.rglob("*.py") if place.is_dir() else [place])}
    try:
        digest = hashlib.sha256(pathlib.Path(inspect.getfile(model_class)).read_bytes())
    except (OSError, TypeError):  # a class of an interactive session
        digest = hashlib.sha256(model_class.__qualname__.encode())
    for file in sorted(files):
        digest.update(f"{file.relative_to(root)} {file_sha256(file)}".encode())
    return digest.hexdigest()


def _weights_hash(checkpoint):
    digest = hashlib.sha256()
    for name, tensor in sorted(checkpoint["state_dict"].items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
