"""Checkpoints: weights and plain data. Loading runs nothing that a file names, and accounts for every tensor."""

import collections
import glob
import logging
import os
import pickle
import re
import types

import numpy as np
import torch

from common.errors import UserError
from common.files import atomic_path
from data.features import made_by_suffix
from engine.settings import check_window

FORMAT = "unisrec-1"
_EXPERT = "moe_adaptor.experts"
_WIDTH = "text width (encoder)"
_SIZES = {  # which setting a tensor's shape tells, and where
    "hidden_size": ("LayerNorm.weight", 0),
    "inner_size": ("trm_encoder.layer.0.feed_forward.dense_1.weight", 0),
    "MAX_ITEM_LIST_LENGTH": ("position_embedding.weight", 0),
    "n_exps": ("moe_adaptor.experts.bias", 0),
    _WIDTH: ("moe_adaptor.experts.bias", 1),
}
_LAYER = re.compile(r"trm_encoder\.layer\.(\d+)\.")
# settings that decide what the weights compute; a checkpoint brings its own
SHAPE = (
    "n_layers", "n_heads", "hidden_size", "inner_size", "hidden_act", "layer_norm_eps", "n_exps",
    "MAX_ITEM_LIST_LENGTH",
)  # fmt: skip
# settings that may differ between the parts of a run
_NOT_OF_A_RUN = dict.fromkeys(("epochs", "resume", "show_progress", "device", "checkpoint_dir", "data_path"))
logger = logging.getLogger(__name__)


def save_checkpoint(path, model, config, epoch, item_tokens=None, **more):
    """Write a checkpoint.

    Args:
        path (str): the file.
        model (torch.nn.Module): its state dict is stored, and what is known of its text features (`model.features`).
        config (Config): stored as plain data.
        epoch (int): epochs done.
        item_tokens (sequence of str or None): what row i of the id embedding stands for; needed where there is one.
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
            # after a failed write (a full disk) torch ends its file all the same, and that failure hides the first
            raise failure.__context__ if isinstance(failure.__context__, OSError) else failure from None


def read_checkpoint(path):
    """Read a checkpoint of this project, or one of the published code, onto the CPU.

    Returns:
        dict: `state_dict` in this project's layout, `epoch`, `item_tokens` (None where the file has none), `config`,
        and whatever else the file holds.

    Raises:
        UserError: the file is missing, broken, or no checkpoint.
    """
    if not os.path.isfile(path):
        folder = os.path.dirname(os.path.abspath(path))
        there = sorted(name for name in os.listdir(folder) if name.endswith(".pth")) if os.path.isdir(folder) else []
        raise UserError(
            f"{path}: no such checkpoint (found in {folder}: {', '.join(there) or 'none'}); "
            "python pretrain.py makes one"
        )
    try:
        content = torch.load(path, map_location="cpu", pickle_module=_data_only_pickle(), weights_only=False)
    except Exception as error:  # a broken pickle raises whatever its bytes happen to ask for
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{path}: cannot be read as a checkpoint ({os.path.getsize(path)} bytes; {reason}); "
            "it is truncated or of another kind, fetch or make it again"
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
            f"{path}: its experts do not belong together ({' '.join(str(error).split())}); fetch or make it again"
        ) from None
    content.setdefault("item_tokens", None)
    return content


def adopt_settings(config, checkpoint: dict, path: str) -> None:
    """Take the settings that shape the model (`SHAPE`) from a checkpoint.

    Sizes come from its tensors, the others from the settings that it stores. What it does not say stays as configured.

    Args:
        config (Config): changed in place.
        checkpoint: from `read_checkpoint`.
        path: for messages.

    Raises:
        UserError: the user has given one of them another value.
    """
    found = _shape_of(checkpoint)
    adopted = {key: value for key, value in found.items() if config[key] != value}
    for key in adopted.keys() & config.given.keys():
        raise UserError(
            f"{config.given[key]}: found {config[key]!r}, expected {adopted[key]!r}, with which {path} was trained; "
            "leave it out, the checkpoint brings its own"
        )
    for key, value in adopted.items():
        config[key] = value
    if adopted:
        logger.info("settings from %s: %s", path, ", ".join(f"{key} {value}" for key, value in adopted.items()))
    missing = [key for key in SHAPE if key not in found]
    if missing:
        logger.info("%s does not say %s; the settings decide", path, ", ".join(missing))
    check_window(config.given, config)


def _shape_of(checkpoint):
    """The settings of `SHAPE` that a checkpoint tells: dict."""
    stored, state = _stored_settings(checkpoint), checkpoint["state_dict"]
    found = {key: stored[key] for key in SHAPE if isinstance(stored.get(key), int | float | str)}
    layers = {match[1] for match in map(_LAYER.match, state) if match}
    if layers:
        found["n_layers"] = len(layers)
    for key, (name, axis) in _SIZES.items():
        if key in SHAPE and name in state and state[name].dim() > axis:
            found[key] = state[name].shape[axis]
    return found


def _stored_settings(checkpoint):
    """The settings that a checkpoint stores: those of ours, or of RecBole's pickled Config. Returns dict."""
    config = checkpoint.get("config")
    state = getattr(config, "state", None) if isinstance(config, Inert) else {"final_config_dict": config}
    stored = state.get("final_config_dict") if isinstance(state, dict) else None
    return stored if isinstance(stored, dict) else {}


def check_features(checkpoint: dict, features, path: str) -> None:
    """The text features must be of the kind that a checkpoint was trained on: encoder, pooling, width, normalization.

    What either side does not know is not compared. Published checkpoints tell the pooling by their `plm_suffix`.

    Args:
        checkpoint: from `read_checkpoint`.
        features (data.ItemFeatures): the data set's.
        path: for messages.

    Raises:
        UserError: the features are of another kind.
    """
    then, now, file = checkpoint.get("features"), features.description, features.paths[0]
    if not isinstance(then, dict):
        then = {"width": checkpoint["state_dict"].get(_SIZES[_WIDTH][0], torch.empty(0, 0)).shape[-1] or None}
        then |= made_by_suffix(_stored_settings(checkpoint).get("plm_suffix"))
    if "encoder" not in then or "encoder" not in now:
        without = path if "encoder" not in then else file
        logger.info("%s does not say which encoder made its text features; the encoders are not compared", without)
    differ = [key for key in then.keys() & now.keys() if None not in (then[key], now[key]) and then[key] != now[key]]
    if differ:
        raise UserError(
            f"{path}: was trained on text features of {_in_words(then)}; found {_in_words(now)} in {file}; "
            "encode the texts in the same way (dataset/preprocessing/encode_text.py), or name other features "
            "with --plm_suffix"
        )


def _in_words(description):
    told = {key: description.get(key) for key in ("encoder", "pooling", "width", "normalised")}
    return ", ".join(f"{key} {value}" for key, value in told.items() if value is not None)


def changed_settings(checkpoint, config):
    """What a training would do otherwise than the one that saved a checkpoint: dict of key -> (then, now)."""
    then, now = ({**settings, **_NOT_OF_A_RUN} for settings in (checkpoint["config"], config.plain()))
    return {key: (then.get(key), now.get(key)) for key in sorted(then | now) if then.get(key) != now.get(key)}


def latest_of_run(pattern, config, since):
    """The checkpoint that went furthest of a training with these very settings, from which it can go on.

    Args:
        pattern (str): the files, with `{epoch}` in the name.
        config (Config): the training's; how many epochs it is to have may differ.
        since (float): seconds since 1970; older files are of another run.

    Returns:
        str or None
    """
    found = []
    for path in glob.glob(glob.escape(pattern).replace("{epoch}", "*")):
        if os.path.getmtime(path) < since:
            continue
        try:
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except Exception:  # whatever is wrong with it, it is none to go on from
            continue
        if content.get("format") == FORMAT and "optimizer" in content:
            if not changed_settings(content, config) and content["epoch"] < config["epochs"]:
                found.append((content["progress"]["epoch"], content["progress"]["batch"], path))
    return max(found)[-1] if found else None


def _is_named_tensor(item):
    return isinstance(item[0], str) and isinstance(item[1], torch.Tensor)


def from_published_layout(state):
    """Turn a published state dict (one module per expert, features inside) into this project's. Returns a dict.

    A dict that is in this project's layout already comes back as it is; a `module.` prefix, left by
    DistributedDataParallel, goes.
    """
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    of_experts = {name for name in state if name.startswith(f"{_EXPERT}.") and name.split(".")[2].isdecimal()}
    experts = range(1 + max((int(name.split(".")[2]) for name in of_experts), default=-1))
    result = {
        name: tensor for name, tensor in state.items() if name not in of_experts and name != "plm_embedding.weight"
    }  # the features belong to the data, which bring their own
    if experts:
        result[f"{_EXPERT}.bias"] = torch.stack([state[f"{_EXPERT}.{e}.bias"] for e in experts])
        result[f"{_EXPERT}.weight"] = torch.stack([state[f"{_EXPERT}.{e}.lin.weight"] for e in experts])
    return result


def to_published_layout(state):
    """The other way round: one entry per expert. Returns a dict (without `plm_embedding.weight`)."""
    result = {name: tensor for name, tensor in state.items() if not name.startswith(f"{_EXPERT}.")}
    for expert, (bias, weight) in enumerate(zip(state[f"{_EXPERT}.bias"], state[f"{_EXPERT}.weight"], strict=True)):
        result[f"{_EXPERT}.{expert}.bias"], result[f"{_EXPERT}.{expert}.lin.weight"] = bias, weight
    return result


def load_weights(model, checkpoint, path, item_tokens=None):
    """Load a checkpoint's weights into a model; every tensor must be loaded, expected new or expected absent.

    Expected new: the id embedding, when a checkpoint without one goes into the transductive stage.

    Args:
        model (torch.nn.Module): gets the weights.
        checkpoint (dict): from `read_checkpoint`.
        path (str): for messages.
        item_tokens (sequence of str): the data's items in row order, checked against the checkpoint's where it has id
            embeddings.

    Raises:
        UserError: a tensor is missing, left over or of another shape, or the items differ.
    """
    state, own = checkpoint["state_dict"], model.state_dict()
    new = {"item_embedding.weight"} if "item_embedding.weight" not in state else set()
    if "item_embedding.weight" in state and "item_embedding.weight" not in own:
        raise UserError(f"{path}: has id embeddings, which this stage does not; use --train_stage=transductive_ft")
    if "item_embedding.weight" in own and not new:
        _check_items(checkpoint["item_tokens"], item_tokens, path)
    missing = [name for name in own if name not in state and name not in new]
    unexpected = [name for name in state if name not in own]
    reshaped = [name for name in own if name in state and own[name].shape != state[name].shape]
    if missing or unexpected or reshaped:
        raise UserError(f"{path}: is of another architecture: {_difference(state, own, missing, unexpected, reshaped)}")
    result = model.load_state_dict(state, strict=False)
    assert not result.unexpected_keys and set(result.missing_keys) <= new
    logger.info(
        "loaded %s tensors from %s%s", len(state), path, "; new: item_embedding.weight" if new & set(own) else ""
    )


def _difference(state, own, missing, unexpected, reshaped):
    """In words: the settings that differ where the shapes tell, else the first tensors."""
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
        return f"found {'; found '.join(found)}; give the settings it was trained with"
    parts = [
        f"{what} {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"
        for what, names in (("lacks", missing), ("has too much:", unexpected), ("other shapes:", reshaped))
        if names
    ]
    return "; ".join(parts) + "; give the settings it was trained with"


def _check_items(stored, present, path):
    if not isinstance(stored, list):
        raise UserError(
            f"{path}: has id embeddings but does not say of which items (published transductive "
            "checkpoints do not); fine-tune again from the pre-trained checkpoint"
        )
    present = [str(token) for token in present]
    if len(stored) != len(present):
        raise UserError(
            f"{path}: its id embeddings are of {len(stored) - 1} items, the data have {len(present) - 1}; "
            "fine-tune again, or use the data set that it was made with"
        )
    wrong = next((i for i, pair in enumerate(zip(stored, present, strict=True)) if pair[0] != pair[1]), None)
    if wrong is not None:
        raise UserError(
            f"{path}: row {wrong} of its id embeddings is item {stored[wrong]!r}, in the data "
            f"{present[wrong]!r}; fine-tune again, or use the data set that it was made with"
        )


class Inert:
    """What a class named by a checkpoint becomes: an object that remembers its state and runs nothing."""

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


_ALLOWED = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
    ("torch", "Size"): torch.Size,
    ("torch", "device"): torch.device,
    ("numpy", "dtype"): np.dtype,
    ("numpy._core.multiarray", "scalar"): np._core.multiarray.scalar,
    ("numpy.core.multiarray", "scalar"): np._core.multiarray.scalar,
}


def _data_only_pickle():
    """A pickle module whose unpickler makes tensors and plain data, and an `Inert` of everything else."""

    class Unpickler(pickle.Unpickler):
        def find_class(self, module, name):
            if (module, name) in _ALLOWED:
                return _ALLOWED[module, name]
            if module == "torch" and name.endswith("Storage"):
                return getattr(torch, name)
            if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
                return getattr(torch, name)
            return type(name, (Inert,), {"__module__": module})

    module = types.ModuleType("data_only_pickle")
    module.Unpickler, module.UnpicklingError = Unpickler, pickle.UnpicklingError
    module.load = lambda file, **options: Unpickler(file, **options).load()
    return module
