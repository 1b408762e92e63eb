"""The identity of a run: its id, and which files belong to it.

The id of a run is a short hash of everything that determines the result: the settings, the training and evaluation
data, the code of the project, and the weights that the run starts from. With a hash, unlike with a time stamp, the same
command is the same run: when it is repeated, it replaces its own files and no others. So a script of experiments can be
started again.

Not part of the id:

- Settings that do not change the result: folders, result files, progress bars, the device. The device, the number of
  processes and the version of torch may change the rounding of sums. The result file tells the device and the versions.
- In pre-training: `epochs`, `save_step` and `resume`. They do not change the epochs that have been trained. A training
  that is continued with the same settings, data and code is the same run.
- The paths of files. Data and weights are identified by their content.
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
from engine.settings import NO_EFFECT, ROOT

_DIGITS = 10  # of an id. The probability that two of 10,000 runs have the same id is 1 in 20,000
_CODE = ("unisrec.py", "baselines", "common", "data", "engine", "layers")
_LENGTH = {"epochs", "pretrain_epochs", "save_step"}  # of a pre-training
logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Run:
    """The identity of a run. Its checkpoints store the attributes, as `run`, `run_start` and `run_data`.

    Attributes:
        id: hexadecimal digits.
        start: a hash of the weights that the run started from, None for new weights.
        data: a hash of the data.
    """

    id: str
    start: str | None = None
    data: str | None = None


def identify(config, dataset: UniSRecDataset, checkpoint: Mapping | None = None, resume: bool = False) -> Run:
    """The run of these settings, data, code and initial weights. All processes get the result of the main process.

    Args:
        config: the settings, as they are when training starts.
        dataset: the whole data set, or a part that its `build` returned.
        checkpoint: from `read_checkpoint`, if the run starts from a checkpoint.
        resume: whether the run continues the training of the checkpoint. If nothing has changed since, the result is
            the run of the checkpoint, else a new run.
    """
    run = None
    if is_main():
        data = _data_hash(dataset, SPLITS[:1] if config["train_stage"] == "pretrain" else SPLITS)
        basis = _basis(config, data)
        run = _make_run(basis, _weights_hash(checkpoint) if checkpoint else None, data)
        if resume and checkpoint:
            resumed = _make_run(basis, checkpoint.get("run_start"), data)
            run = resumed if resumed.id == checkpoint.get("run") else run
        logger.info("run %s", run.id)
    return from_main(run)


def check_files(paths: Iterable[str], run: Run, config) -> None:
    """Check before a training that it will replace no checkpoint of another run.

    Args:
        paths: the checkpoints that the run may write. They need not exist.
        run: the run.
        config: the settings of the run, for the message.

    Raises:
        UserError: a file belongs to another run.
    """
    for path in filter(pathlib.Path.exists, map(pathlib.Path, paths)):
        try:
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except Exception:  # unreadable, or a published checkpoint: not of this run in either case
            content = {}
        if content.get("run") != run.id:
            raise UserError(
                f"{path}: belongs to another run ({_difference(content, config)}) and would be replaced; "
                "give another --checkpoint_dir, or move or delete the file"
            )


def _difference(content, config):
    """How a checkpoint's run differs from that of `config`, in words."""
    if "run" not in content:
        return "it holds no run id"
    changed = [f"{key} {then}, now {now}" for key, (then, now) in changed_settings(content, config).items()]
    return f"run {content['run']}: {'; '.join(changed[:3]) or 'the data, the code or the initial weights differ'}"


def _make_run(basis, start, data):
    return Run(hashlib.sha256(f"{basis} {start}".encode()).hexdigest()[:_DIGITS], start, data)


def _basis(config, data):
    """Everything that determines the result, apart from the initial weights, as a str."""
    left_out = NO_EFFECT | (_LENGTH if config["train_stage"] == "pretrain" else set())
    settings = {key: value for key, value in config.plain().items() if key not in left_out}
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
    """The hash of the project's code that training and evaluation use, and of the files that define the model.

    These are the files of its class and of the classes that it derives from, but not torch's.
    """
    root = pathlib.Path(ROOT)
    places = [root / place for place in _CODE]
    files = {file for place in places for file in (place.rglob("*.py") if place.is_dir() else [place])}
    digest = hashlib.sha256()
    for base in model_class.__mro__:
        if base.__module__.partition(".")[0] in ("torch", "builtins"):
            continue
        try:
            digest.update(pathlib.Path(inspect.getfile(base)).read_bytes())
        except (OSError, TypeError):  # a class that was defined in an interactive session
            digest.update(base.__qualname__.encode())
    for file in sorted(files):
        digest.update(f"{file.relative_to(root)} {file_sha256(file)}".encode())
    return digest.hexdigest()


def _weights_hash(checkpoint):
    digest = hashlib.sha256()
    for name, tensor in sorted(checkpoint["state_dict"].items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
