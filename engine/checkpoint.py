"""Checkpoints: weights and plain data. Loading runs no code from the file, and every tensor must match the model."""

import collections
import glob
import logging
import math
import os
import pickle
import re
import types
from typing import Any

import numpy as np
import torch
from numpy._core.multiarray import scalar

from common.errors import UserError
from common.files import atomic_path, check_zip
from data.features import made_by_suffix
from engine.bundle import read_bundle
from engine.settings import RECIPES, check_predictions_per_row, check_stored, props_file, read_yaml

FORMAT = "unisrec-1"
_EXPERT = "moe_adaptor.experts"
_WIDTH = "text width (encoder)"
_SIZES = {  # setting -> (tensor, dimension of the tensor that has this size)
    "hidden_size": ("LayerNorm.weight", 0),
    "inner_size": ("trm_encoder.layer.0.feed_forward.dense_1.weight", 0),
    "MAX_ITEM_LIST_LENGTH": ("position_embedding.weight", 0),
    "n_exps": ("moe_adaptor.experts.bias", 0),
    _WIDTH: ("moe_adaptor.experts.bias", 1),
}
_LAYER = re.compile(r"trm_encoder\.layer\.(\d+)\.")
# settings that determine what the weights compute; they are taken from the checkpoint
SHAPE = (
    "n_layers", "n_heads", "hidden_size", "inner_size", "hidden_act", "layer_norm_eps", "n_exps",
    "MAX_ITEM_LIST_LENGTH", "whiten_texts", "history_mean", "history_bias", "item_to_item",
)  # fmt: skip
# Parts that a user may add to a checkpoint without them. At first they do not change its scores.
_ADDED = {key: f"{key}." for key in ("history_mean", "history_bias", "item_to_item")}  # -> beginning of its tensors
_OF_THE_DATA = ("whitening.",)  # tensors that follow from the text features. Every data set has its own
_OF_THE_SHOP = ("history_mean.", "unseen_bias")  # they differ between shops
PUBLISHED = "published"  # the recipe of checkpoints that do not name theirs
# settings of checkpoints that were saved before the settings existed
_BEFORE = {"pretrain_loss": "contrastive", "train_fraction": 1.0, "holdout_items": 0.0}
_BEFORE |= {"unseen_negatives": True, "unseen_bias": None}
# settings that may differ between the parts of a run
_NOT_OF_A_RUN = dict.fromkeys(
    ("epochs", "resume", "show_progress", "device", "checkpoint_dir", "data_path", "allow_changed_data")
)
logger = logging.getLogger(__name__)


def save_checkpoint(path, model, config, epoch, item_tokens=None, **more):
    """Write a checkpoint.

    Args:
        path (str): the file.
        model (torch.nn.Module): its state dict is stored, and the description of its text features (`model.features`).
        config (Config): stored as plain data.
        epoch (int): number of completed epochs.
        item_tokens (sequence of str or None): the raw id of each row of the id embedding. None without an id embedding.
        more: further plain data or tensors (optimizer, generators, progress of the training).
    """
    content = {
        "format": FORMAT,
        "model": config["model"],
        "train_stage": config["train_stage"],
        "epoch": epoch,
        "config": config.plain(),
        "state_dict": model.state_dict(),
        "item_tokens": None if item_tokens is None else [str(token) for token in item_tokens],
        "features": getattr(getattr(model, "features", None), "description", None),
        **more,
    }
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as failure:
            # After a failed write (a full disk), torch still tries to finish the file. That error hides the first one
            raise failure.__context__ if isinstance(failure.__context__, OSError) else failure from None


def read_checkpoint(path):
    """Read a checkpoint of this project, one of the published code, or a bundle, onto the CPU.

    Args:
        path (str): a file, or the folder of a bundle.

    Returns:
        dict: `state_dict` in this project's layout, `epoch`, `item_tokens` (None if the file has none), `config`, and
        the other entries of the file.

    Raises:
        UserError: the file is missing, damaged, or not a checkpoint.
    """
    if os.path.isdir(path):
        return read_bundle(path)
    if not os.path.isfile(path):
        folder = os.path.dirname(os.path.abspath(path))
        there = sorted(name for name in os.listdir(folder) if name.endswith(".pth")) if os.path.isdir(folder) else []
        raise UserError(
            f"{path}: no such checkpoint (found in {folder}: {', '.join(there) or 'none'}); "
            "create one with python pretrain.py"
        )
    try:
        check_zip(path)
        content = torch.load(path, map_location="cpu", pickle_module=_data_only_pickle(), weights_only=False)
    except Exception as error:  # a damaged pickle can raise any exception
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{path}: cannot be read as a checkpoint ({os.path.getsize(path)} bytes; {reason}); "
            "it is damaged, truncated or not a checkpoint; download or create it again"
        ) from None
    state = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict) or not state or not all(map(_is_named_tensor, state.items())):
        raise UserError(
            f"{path}: holds no state_dict with tensors; expected a checkpoint of pretrain.py or finetune.py"
        )
    content = dict(content)
    try:
        content["state_dict"] = from_published_layout(state)
    except (KeyError, RuntimeError) as error:
        raise UserError(
            f"{path}: its experts do not fit each other ({' '.join(str(error).split())}); download or create it again"
        ) from None
    content.setdefault("item_tokens", None)
    return content


def adopt_settings(config, checkpoint: dict, path: str) -> None:
    """Take the recipe of a checkpoint, and the settings that shape the model (`SHAPE`).

    A checkpoint of the published recipe is used with all settings of props/published.yaml that the user does not set.
    Sizes are read from the shapes of the tensors, other settings from those that the checkpoint stores. A setting that
    is in neither stays as configured. The user may add the parts of `_ADDED` to a checkpoint without them.

    Args:
        config (Config): changed in place.
        checkpoint: from `read_checkpoint`.
        path: the file, for messages.

    Raises:
        UserError: the user has set one of the settings of `SHAPE` to another value, or a value of the checkpoint is not
            allowed.
    """
    found = _recipe_of(checkpoint) if "recipe" in config else {}  # a baseline has none
    recipe = {key: value for key, value in found.items() if key not in config.given}
    shape = _shape_of(checkpoint, found)
    adopted = {key: value for key, value in (recipe | shape).items() if config[key] != value}
    for key in adopted.keys() & config.given.keys():
        if key in _ADDED and not adopted[key]:
            del adopted[key]
            continue
        raise UserError(
            f"{config.given[key]}: found {config[key]!r}, expected {adopted[key]!r}, with which {path} was trained; "
            "leave it out, its value is taken from the checkpoint"
        )
    for key, value in adopted.items():
        check_stored(key, value, f"{path}: its setting {key}")
        config[key] = value
    if adopted:
        logger.info("settings from %s: %s", path, ", ".join(f"{key} {value}" for key, value in adopted.items()))
    missing = [key for key in SHAPE if key in config and key not in shape and key not in _ADDED]
    if missing:
        logger.info("%s does not say %s; this run uses its own values", path, ", ".join(missing))
    check_predictions_per_row(config.given, config)


def _recipe_of(checkpoint):
    """The settings that follow from the recipe that a checkpoint names. Returns a dict."""
    recipe = stored_settings(checkpoint).get("recipe", PUBLISHED)
    return read_yaml(props_file(RECIPES[recipe])) if str(recipe) in RECIPES else {"recipe": str(recipe)}


def _shape_of(checkpoint, recipe):
    """The settings of `SHAPE` that follow from a checkpoint and the settings of its recipe: dict."""
    stored, state = stored_settings(checkpoint), checkpoint["state_dict"]
    found = {key: recipe[key] for key in ("whiten_texts", *_ADDED) if key in recipe}
    found |= {key: stored[key] for key in SHAPE if isinstance(stored.get(key), int | float | str)}
    if not _has_part(checkpoint, _ADDED["item_to_item"]):
        found.pop("item_to_item", None)  # only the transductive stage has it, and the target may choose
    layers = {match[1] for match in map(_LAYER.match, state) if match}
    if layers:
        found["n_layers"] = len(layers)
    for key, (name, axis) in _SIZES.items():
        if key in SHAPE and name in state and state[name].dim() > axis:
            found[key] = state[name].shape[axis]
    return found


def stored_settings(checkpoint):
    """The settings that a checkpoint stores, as plain data or in RecBole's pickled Config. Returns a dict."""
    config = checkpoint.get("config")
    state = getattr(config, "state", None) if isinstance(config, Inert) else {"final_config_dict": config}
    stored = state.get("final_config_dict") if isinstance(state, dict) else None
    return stored if isinstance(stored, dict) else {}


def check_features(checkpoint: dict, features, path: str) -> None:
    """Check that a data set's text features agree with those that a checkpoint was trained on.

    Compared are encoder, pooling, width and normalization. A property that is unknown for one of them is not compared.
    In published checkpoints, the pooling follows from the setting `plm_suffix`.

    Args:
        checkpoint: from `read_checkpoint`.
        features (data.ItemFeatures): the features of the data set.
        path: the file of the checkpoint, for messages.

    Raises:
        UserError: a property differs.
    """
    then, now, file = checkpoint.get("features"), features.description, features.paths[0]
    if not isinstance(then, dict):
        then = {"width": checkpoint["state_dict"].get(_SIZES[_WIDTH][0], torch.empty(0, 0)).shape[-1] or None}
        then |= made_by_suffix(stored_settings(checkpoint).get("plm_suffix"))
    if "encoder" not in then or "encoder" not in now:
        without = path if "encoder" not in then else file
        logger.info("%s does not say which encoder made its text features; the encoders are not compared", without)
    differ = [key for key in then.keys() & now.keys() if None not in (then[key], now[key]) and then[key] != now[key]]
    if differ:
        raise UserError(
            f"{path}: was trained on text features of {_in_words(then)}; found {_in_words(now)} in {file}; "
            "encode the texts in the same way (dataset/preprocessing/encode_text.py), or choose other features "
            "with --plm_suffix"
        )


def _in_words(description):
    told = {key: description.get(key) for key in ("encoder", "pooling", "width", "normalised")}
    return ", ".join(f"{key} {value}" for key, value in told.items() if value is not None)


def changed_settings(checkpoint, config):
    """The settings in which a training differs from the one that saved a checkpoint: dict of key -> (then, now)."""
    then, now = ({**_BEFORE, **settings, **_NOT_OF_A_RUN} for settings in (checkpoint["config"], config.plain()))
    return {key: (then.get(key), now.get(key)) for key in sorted(then | now) if then.get(key) != now.get(key)}


def has_epochs(pattern: str) -> bool:
    """Whether the name of a checkpoint file has a place for the epoch, `{epoch}`. Then every checkpoint is kept."""
    return "{epoch}" in os.path.basename(pattern)


def epoch_path(pattern: str, epoch: int | str) -> str:
    """The path of the checkpoint of an epoch: `{epoch}` in the name of the file is replaced. Other braces stay."""
    before, _, after = pattern.rpartition("{epoch}")
    return f"{before}{epoch}{after}" if has_epochs(pattern) else pattern


def epoch_files(pattern: str) -> list[str]:
    """The existing checkpoints of all epochs."""
    return glob.glob(
        "*".join(map(glob.escape, pattern.rsplit("{epoch}", 1))) if has_epochs(pattern) else glob.escape(pattern)
    )


def latest_of_run(pattern, config, since):
    """The most advanced checkpoint from which a training with the same settings can be continued.

    Args:
        pattern (str): see `epoch_path`.
        config (Config): the settings of the training. The number of epochs may differ from that of the checkpoint.
        since (float): seconds since 1970. Files that are older belong to another run.

    Returns:
        str or None
    """
    found = []
    for path in epoch_files(pattern):
        if os.path.getmtime(path) < since:
            continue
        try:
            check_zip(path)
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except Exception:  # unreadable or damaged: skip it
            continue
        if content.get("format") == FORMAT and "optimizer" in content:
            if not changed_settings(content, config) and content["epoch"] < config["epochs"]:
                found.append((content["progress"]["epoch"], content["progress"]["batch"], path))
    return max(found)[-1] if found else None


def _is_named_tensor(item):
    return isinstance(item[0], str) and isinstance(item[1], torch.Tensor)


def from_published_layout(state):
    """Convert a published state dict (one module per expert, with text features) to this project's layout.

    A dict in this project's layout is returned unchanged. A `module.` prefix, left by DistributedDataParallel, is
    removed.

    Returns:
        dict
    """
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    of_experts = {name for name in state if name.startswith(f"{_EXPERT}.") and name.split(".")[2].isdecimal()}
    experts = range(1 + max((int(name.split(".")[2]) for name in of_experts), default=-1))
    result = {
        name: tensor for name, tensor in state.items() if name not in of_experts and name != "plm_embedding.weight"
    }  # text features are part of the data, not of a checkpoint
    if experts:
        result[f"{_EXPERT}.bias"] = torch.stack([state[f"{_EXPERT}.{e}.bias"] for e in experts])
        result[f"{_EXPERT}.weight"] = torch.stack([state[f"{_EXPERT}.{e}.lin.weight"] for e in experts])
    return result


def to_published_layout(state):
    """The inverse of `from_published_layout`: one entry per expert, without text features. Returns a dict."""
    result = {name: tensor for name, tensor in state.items() if not name.startswith(f"{_EXPERT}.")}
    for expert, (bias, weight) in enumerate(zip(state[f"{_EXPERT}.bias"], state[f"{_EXPERT}.weight"], strict=True)):
        result[f"{_EXPERT}.{expert}.bias"], result[f"{_EXPERT}.{expert}.lin.weight"] = bias, weight
    return result


def load_weights(model, checkpoint, path, item_tokens=None):
    """Load a checkpoint's weights into a model. The tensors of both must be the same, with five exceptions.

    - A checkpoint without an id embedding may be loaded into the transductive stage. The id embedding of the model then
      keeps its initial weights.
    - A bias of unseen items is loaded only if both have one.
    - A checkpoint without the parts of `_ADDED` may be loaded into a model with them. They then start without effect.
    - The whitening of the texts is not loaded. It belongs to the catalogue of the data set.
    - The history mean is not loaded if a pre-trained model is loaded for fine-tuning. It belongs to the source shops.

    Args:
        model (torch.nn.Module): gets the weights.
        checkpoint (dict): from `read_checkpoint`.
        path (str): the file, for messages.
        item_tokens (sequence of str): the raw ids of the data set's items in row order. If the checkpoint has an id
            embedding, its raw ids must be the same.

    Raises:
        UserError: a tensor is missing, left over or of another shape, or the items differ.
    """
    is_transfer = checkpoint.get("train_stage") == "pretrain" and model.train_stage != "pretrain"
    # a part that the checkpoint does not have is handled below
    kept = _OF_THE_DATA + tuple(part for part in _OF_THE_SHOP if is_transfer and _has_part(checkpoint, part))
    own = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(kept)}
    state = {name: tensor for name, tensor in checkpoint["state_dict"].items() if not name.startswith(kept)}
    optional = ("item_embedding.weight", "unseen_bias", *_ADDED.values())
    new = {name for name in own if name.startswith(optional) and name not in state}
    if "item_embedding.weight" in state and "item_embedding.weight" not in own:
        raise UserError(f"{path}: has id embeddings, which this stage does not; use --train_stage=transductive_ft")
    if "item_embedding.weight" in own and "item_embedding.weight" not in new:
        _check_items(checkpoint["item_tokens"], item_tokens, path)
    missing = [name for name in own if name not in state and name not in new]
    unexpected = [name for name in state if name not in own and name != "unseen_bias"]
    reshaped = [name for name in own if name in state and own[name].shape != state[name].shape]
    if missing or unexpected or reshaped:
        raise UserError(f"{path}: has another architecture: {_difference(state, own, missing, unexpected, reshaped)}")
    model.load_state_dict(state, strict=False)
    for part in {name.partition(".")[0] for name in new} & _ADDED.keys():
        getattr(model, part).switch_off()
    new_names = f"; new: {', '.join(sorted(new))}" if new else ""
    logger.info("loaded %s tensors from %s%s", len(state), path, new_names)


def _has_part(checkpoint, part):
    return any(name.startswith(part) for name in checkpoint["state_dict"])


def _difference(state, own, missing, unexpected, reshaped):
    """How a checkpoint and a model differ, in words: settings if they follow from shapes, else the first tensors."""
    layers = [
        len({name.split(".")[2] for name in names if name.startswith("trm_encoder.layer.")}) for names in (state, own)
    ]
    found = [f"n_layers {layers[0]}, expected {layers[1]}"] if layers[0] and layers[0] != layers[1] else []
    found += [
        f"{setting} {state[name].shape[axis]}, expected {own[name].shape[axis]}"
        for setting, (name, axis) in _SIZES.items()
        if name in state and name in own and state[name].dim() == own[name].dim()
        if state[name].shape[axis] != own[name].shape[axis]
    ]
    if found:
        return f"found {'; found '.join(found)}; use the settings it was trained with"
    parts = [
        f"{what} {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"
        for what, names in (("lacks", missing), ("unexpected:", unexpected), ("other shapes:", reshaped))
        if names
    ]
    return "; ".join(parts) + "; use the settings it was trained with"


def _check_items(stored, present, path):
    if not isinstance(stored, list):
        raise UserError(
            f"{path}: has id embeddings, but not the ids of their items (as all published transductive checkpoints); "
            "fine-tune again from the pre-trained checkpoint"
        )
    present = [str(token) for token in present]
    if len(stored) != len(present):
        raise UserError(
            f"{path}: has id embeddings of {len(stored) - 1} items, but the data set has {len(present) - 1} items; "
            "fine-tune again, or use the data set that it was trained on"
        )
    wrong = next((i for i, pair in enumerate(zip(stored, present, strict=True)) if pair[0] != pair[1]), None)
    if wrong is not None:
        raise UserError(
            f"{path}: row {wrong} of its id embeddings is item {stored[wrong]!r}, but in the data set it is "
            f"{present[wrong]!r}; fine-tune again, or use the data set that it was trained on"
        )


class Inert:
    """Replaces every class that a checkpoint names: it stores the state of the object and runs no code of the class."""

    def __init__(self, *args, **kwargs):
        self.arguments = args

    def __setstate__(self, state):
        self.state = state

    def __setitem__(self, key, value):
        self.__dict__.setdefault("items", {})[key] = value

    def append(self, value):
        self.__dict__.setdefault("values", []).append(value)

    def extend(self, values):
        self.__dict__.setdefault("values", []).extend(values)


def _rebuild_tensor(storage, offset, size, stride, *more):
    """torch's function for the tensors of a file, for tensors that lie within their storage.

    torch enlarges the storage of a tensor that is too large for it, as far as the memory goes.

    Raises:
        ValueError: the tensor reaches beyond its storage, or its elements share memory (a stride of 0).
    """
    places = [offset, *size, *stride]
    if not all(type(place) is int and place >= 0 for place in places) or len(size) != len(stride):
        raise ValueError(f"a tensor has the offset {offset}, the sizes {size} and the strides {stride}")
    count, held = math.prod(size), len(storage)
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    if count and (last >= held or count > held):
        raise ValueError(f"a tensor has {count} numbers up to place {last}, its storage has {held}")
    return torch._utils._rebuild_tensor_v2(storage, offset, size, stride, *more)


_ALLOWED = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
    ("torch", "Size"): torch.Size,
    ("torch", "device"): torch.device,
    ("numpy", "dtype"): np.dtype,
    ("numpy._core.multiarray", "scalar"): scalar,
    ("numpy.core.multiarray", "scalar"): scalar,
}


def _data_only_pickle():
    """A pickle module whose unpickler creates tensors and plain data. Any other object becomes an `Inert`."""

    class Unpickler(pickle.Unpickler):
        def find_class(self, module, name):
            if (module, name) in _ALLOWED:
                return _ALLOWED[module, name]
            if module == "torch" and name.endswith("Storage"):
                return getattr(torch, name)
            if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
                return getattr(torch, name)
            return type(name, (Inert,), {"__module__": module})

    module: Any = types.ModuleType("data_only_pickle")
    module.Unpickler, module.UnpicklingError = Unpickler, pickle.UnpicklingError
    module.load = lambda file, **options: Unpickler(file, **options).load()
    return module
