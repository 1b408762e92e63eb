"""Configuration: RecBole's Config with a strict command line, values read as YAML, and nothing changed on import.

Later ones win: RecBole's YAML for the run and the model, props/, the user's --config_files, the command line.
"""

import collections
import glob
import math
import os
import re
import types

import torch
import yaml

from common.errors import UserError, did_you_mean
from engine.compat import patch_recbole
from engine.startup import sklearn_on_demand

with sklearn_on_demand():
    from recbole.config import Config as RecBoleConfig
    from recbole.evaluator import metric_types
    from recbole.utils import EvaluatorType, InputType, get_model

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PROPS = os.path.join(ROOT, "props")
# keys that RecBole reads but whose defaults stand in none of its YAML files
_RECBOLE_EXTRAS = {"reg_weight", "loss_type", "config_files"}
# the kinds of values that stand for nothing (~) by default
_KINDS = {"pretrained": str, "resume": str, "result_file": str, "clip_grad_norm": dict}

_ACTIVATIONS = ["gelu", "relu", "swish", "tanh", "sigmoid"]
_TESTS = {  # what a value must be, in words and as a test
    "1 or more": lambda value: value >= 1,
    "0 or more": lambda value: 0 <= value < math.inf,
    f"0 to {2**32 - 1}": lambda value: 0 <= value < 2**32,
    "a number above 0": lambda value: 0 < value < math.inf,
    "a number from 0 to 1": lambda value: 0 <= value <= 1,
    "a number from 0 to below 1": lambda value: 0 <= value < 1,
    f"one of {', '.join(_ACTIVATIONS)}": lambda value: value in _ACTIVATIONS,
    "whole numbers from 1 on, such as [10, 50]": lambda value: (
        value and all(type(k) is int and k >= 1 for k in _as_list(value))
    ),
    "names, such as [Recall, NDCG]": lambda value: value and all(type(name) is str for name in _as_list(value)),
}
_EXPECTED = {  # key: what its value must be; one that is missing here may be anything of its kind
    **dict.fromkeys(("train_batch_size", "eval_batch_size", "eval_step", "stopping_step", "accumulate"), "1 or more"),
    **dict.fromkeys(("MAX_ITEM_LIST_LENGTH", "predictions_per_row", "plm_size"), "1 or more"),
    **dict.fromkeys(("n_layers", "n_heads", "hidden_size", "inner_size", "n_exps", "embedding_size"), "1 or more"),
    **dict.fromkeys(("epochs", "save_step", "weight_decay", "lambda", "initializer_range"), "0 or more"),
    **dict.fromkeys(("learning_rate", "temperature", "layer_norm_eps"), "a number above 0"),
    **dict.fromkeys(("item_drop_ratio", "item_drop_coefficient"), "a number from 0 to 1"),
    **dict.fromkeys(("hidden_dropout_prob", "attn_dropout_prob", "adaptor_dropout_prob"), "a number from 0 to below 1"),
    "sampled_negatives": "0 or more",
    "seed": f"0 to {2**32 - 1}",
    "hidden_act": f"one of {', '.join(_ACTIVATIONS)}",
    "topk": "whole numbers from 1 on, such as [10, 50]",
    "metrics": "names, such as [Recall, NDCG]",
}


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads 1e-3 as a number, and 2024-01-01 as the word it is in a path."""


_Loader.yaml_implicit_resolvers = {
    first: [resolver for resolver in resolvers if resolver[0] != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d[\d_]*(?:\.[\d_]*)?|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


class Config(RecBoleConfig):
    """RecBole's Config from explicit arguments alone.

    RecBole's own reads sys.argv by itself, evaluates strings as Python, adds names to numpy and to yaml's loader, and
    overwrites CUDA_VISIBLE_DEVICES; those steps are replaced here.

    Args:
        model (str or class): the model.
        dataset (str): the data set.
        files (list of str): YAML files, later ones win.
        options (dict): the command line's keys and values.

    Attributes:
        changed (dict): what the user has set otherwise than the command's defaults; filled by `build_config`.
    """

    changed = types.MappingProxyType({})

    def __init__(self, model, dataset, files=(), options=None):
        super().__init__(model=model, dataset=dataset, config_file_list=list(files), config_dict=dict(options or {}))

    def compatibility_settings(self):
        patch_recbole()

    def _load_config_files(self, file_list):
        return {key: value for path in file_list or () for key, value in read_yaml(path).items()}

    def _build_yaml_loader(self):
        return _Loader

    def _convert_config_dict(self, config_dict):
        return config_dict

    def _load_cmd_line(self):
        return {}

    def _init_device(self):
        settings = self.final_config_dict
        wants_gpu = settings["use_gpu"] and torch.cuda.is_available()
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        settings["device"] = (
            torch.device("cuda", local_rank % max(torch.cuda.device_count(), 1)) if wants_gpu else torch.device("cpu")
        )
        settings["single_spec"], settings["local_rank"] = True, 0  # RecBole's own trainers run alone

    def plain(self):
        """The settings as plain data, for checkpoints and result files. dict."""
        return {key: _plain(value) for key, value in sorted(self.final_config_dict.items())}

    def __reduce__(self):
        # RecBole's trainers pickle the whole Config; as plain data torch reads it back without running anything
        return collections.OrderedDict, (), None, None, iter(self.plain().items())


def _plain(value):
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(inner) for inner in value]
    return str(value)


def read_yaml(path):
    """Read a YAML file of settings.

    Raises:
        UserError: it is missing, or is no YAML mapping.
    """
    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.load(file, Loader=_Loader)
    except OSError as failure:
        what = "no such file" if isinstance(failure, FileNotFoundError) else f"cannot be read ({failure.strerror})"
        raise UserError(f"{path}: {what}; --config_files takes YAML files, for example props/finetune.yaml") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path}: is no YAML ({' '.join(str(error).split())}); expected `key: value` lines") from None
    if not isinstance(content or {}, dict):
        raise UserError(f"{path}: holds {type(content).__name__}, expected `key: value` lines")
    for key in content or {}:
        if not isinstance(key, str):
            raise UserError(f"{path}: key {key!r} is no word, expected `key: value` lines")
    return content or {}


def parse_command_line(argv, short, usage):
    """Split a command line into keys and values.

    `--key=value` and `--key value` both work, and so do the short names; values are read as YAML.

    Args:
        argv (list of str): without the program's name.
        short (dict): short names, for example {"-d": "dataset"}.
        usage (str): printed for -h and --help.

    Returns:
        dict of key -> value

    Raises:
        UserError: a word that is no option, an option without value or given twice with different values.
    """
    if "-h" in argv or "--help" in argv:
        print(usage.strip())
        raise SystemExit(0)
    options, words = {}, list(argv)
    while words:
        word = words.pop(0)
        name, equals, text = word.partition("=")
        if name in short:
            key = short[name]
        elif name.startswith("--") and len(name) > 2:
            key = name[2:]
        else:
            raise UserError(
                f"unexpected word {word!r}; options are written --key=value or --key value (--help lists them)"
            )
        if not equals:
            if not words or (words[0].startswith("-") and not _is_number(words[0])):
                raise UserError(f"option {name} has no value; write {name} VALUE")
            text = words.pop(0)
        value = _yaml_value(name, text)
        if key in options and options[key] != value:
            raise UserError(f"option --{key} is given twice, as {options[key]!r} and {value!r}; keep one")
        options[key] = value
    return options


def _is_number(word):
    try:
        float(word)
    except ValueError:
        return False
    return True


def _yaml_value(name, text):
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError):
        raise UserError(f"option {name}: {text!r} is no YAML value; put it in quotes") from None


def take_option(options, key, default):
    """Take a key that a command needs before the rest: from the options, else the user's YAML files, else `default`.

    Args:
        options (dict): from `parse_command_line`; loses the key.

    Raises:
        UserError: the value is no word.
    """
    in_files = {name: value for _, settings in _user_files(options) for name, value in settings.items()}
    value = options.pop(key, in_files.get(key, default))
    if not isinstance(value, str | int) or isinstance(value, bool):
        raise UserError(f"option --{key}: found {value!r}, expected a name, such as {default}")
    return str(value)


def _user_files(options):
    """The YAML files that `config_files` names: list of (path, settings)."""
    listed = options.get("config_files") or []
    paths = listed.replace(",", " ").split() if isinstance(listed, str) else listed
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise UserError(f"option --config_files: found {listed!r}, expected YAML files, comma separated")
    return [(path, read_yaml(path)) for path in paths]


def build_config(model, dataset, props, options):
    """Put a command's configuration together and check every key.

    Args:
        model (str or class): a model's name in RecBole, or the class.
        dataset (str): the data set.
        props (list of str): files of props/ that the command uses, without path.
        options (dict): from `parse_command_line`; `config_files` may name more YAML files.

    Returns:
        Config

    Raises:
        UserError: an unknown model or key, a value of the wrong kind.
    """
    options, given = dict(options), _user_files(options)
    options.pop("config_files", None)
    model = resolve_model(model) if isinstance(model, str) else model
    ours = [os.path.join(PROPS, name) for name in props]
    defaults = _defaults(model, ours)
    known = {*defaults, *_RECBOLE_EXTRAS}.union(*(settings for _, settings in given))
    for key in options:
        if key not in known:
            raise UserError(f"unknown option --{key}{did_you_mean('--' + key, ['--' + k for k in known])}")
    settings = _checked([*((f"{path}: ", content) for path, content in given), ("option --", options)], defaults)
    changed = {key: value for key, value in settings.items() if value != defaults.get(key)}
    for key in ("data_path", "checkpoint_dir"):
        # where nobody gave a path, it lies beside the code, so that a command works from any folder
        settings.setdefault(key, os.path.join(ROOT, defaults[key]))
    if {**defaults, **settings}.get("train_stage") == "inductive_ft":
        # on text alone the model learns a little better from batches of more users; with ids it makes no difference
        settings.setdefault("predictions_per_row", 2)
    if _compares_pairs(model, {**defaults, **settings}):
        settings.setdefault("train_neg_sample_args", {"distribution": "uniform", "sample_num": 1})  # RecBole's default
    try:
        config = Config(model, dataset, ours, settings)
    except (ValueError, TypeError, KeyError, RuntimeError) as error:  # RecBole checks eval_args and more
        raise UserError(f"settings of {model.__name__} on {dataset}: {' '.join(str(error).split())}") from error
    config.changed = changed
    return config


def _compares_pairs(model, settings):
    """Whether a model learns from pairs of a target and a sampled item."""
    kind = getattr(model, "input_type", None)
    return settings.get("loss_type", "BPR" if kind == InputType.PAIRWISE else None) == "BPR"


def _checked(sources, defaults):
    """What the user set, later ones winning, with kinds and ranges checked. Returns dict.

    Args:
        sources (list of (str, dict)): settings, and where they stand, for messages.
        defaults (dict): of every key.
    """
    result = {}
    for where, settings in sources:
        for key, value in settings.items():
            default = defaults.get(key)
            kind = _KINDS.get(key, type(default))
            _check_kind(where + key, value, default, kind)
            expected = _EXPECTED.get(key) if key in defaults else None
            if expected and not _TESTS[expected](value):
                raise UserError(f"{where}{key}: found {value!r}, expected {expected}")
            result[key] = str(value) if kind is str and type(value) is int else value
    longest = result.get("MAX_ITEM_LIST_LENGTH", defaults["MAX_ITEM_LIST_LENGTH"])
    shared = result.get("predictions_per_row", 1)
    if shared > longest:
        raise UserError(f"option --predictions_per_row: found {shared}, expected 1 to MAX_ITEM_LIST_LENGTH, {longest}")
    _check_metrics({**defaults, **result})
    return result


def _check_metrics(settings):
    """Metrics must be RecBole's ranking metrics, `valid_metric` one of those that are measured."""
    known = sorted(name for name, kind in metric_types.items() if kind == EvaluatorType.RANKING)
    names = [name.lower() for name in _as_list(settings["metrics"])]
    for name in names:
        if name not in known:
            raise UserError(
                f"option --metrics: found {name!r}, expected ranking metrics ({', '.join(known)})"
                + did_you_mean(name, known)
            )
    measured = [f"{name}@{k}" for name in names if name != "gauc" for k in _as_list(settings["topk"])]
    measured += ["gauc"] if "gauc" in names else []
    if settings["valid_metric"].lower() not in measured:
        raise UserError(
            f"option --valid_metric: found {settings['valid_metric']!r}, expected what --metrics and --topk measure: "
            + ", ".join(measured)
        )


def _as_list(value):
    return value if isinstance(value, list) else [value]


def resolve_model(name):
    """The RecBole model class of a name.

    Raises:
        UserError: RecBole has no such model.
    """
    try:
        return get_model(name)
    except (ValueError, AttributeError, ModuleNotFoundError) as error:
        known = known_models()
        if isinstance(error, ModuleNotFoundError) and name in known:
            raise UserError(f"model {name} needs the package {error.name}, which is not installed") from None
        raise UserError(
            f"unknown model {name!r}{did_you_mean(name, known)} (sequential models of RecBole: {', '.join(known)})"
        ) from None


def known_models():
    """Names of RecBole's sequential models. list of str."""
    import recbole.model.sequential_recommender as models

    return sorted(name for name in vars(models) if name[:1].isupper())


def _defaults(model, files):
    """Every key that a run of this model knows, with its default."""
    properties = os.path.join(os.path.dirname(os.path.abspath(__import__("recbole").__file__)), "properties")
    paths = [
        os.path.join(properties, "overall.yaml"),
        os.path.join(properties, "dataset", "sample.yaml"),
        os.path.join(properties, "quick_start_config", "sequential.yaml"),
        *glob.glob(os.path.join(properties, "model", f"{model.__name__}.yaml")),
        *files,
    ]
    merged = {}
    for path in paths:
        merged.update(read_yaml(path))
    return merged


def _check_kind(where, value, default, kind):
    """A value must be of its default's kind; where nothing is known of the key, anything goes."""
    kinds = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "a word",
        list: "a list [a, b]",
        dict: "a mapping {key: value}",
    }
    if kind not in kinds or value is None and (default is None or kind in (list, dict)):
        return
    fits = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    fits |= kind is float and type(value) is int
    fits |= kind is list and type(value) in (str, int) or kind is str and type(value) is int
    if not fits:
        note = "" if default is None else f" (its default is {default!r})"
        raise UserError(f"{where}: found {value!r}, expected {kinds[kind]}{note}")


def check_choice(config, key, choices):
    """A setting must be one of some words.

    Raises:
        UserError: it is another.
    """
    if config[key] not in choices:
        raise UserError(
            f"option --{key}: found {config[key]!r}, expected {' or '.join(choices)}"
            + did_you_mean(config[key], choices)
        )
