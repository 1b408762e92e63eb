"""Configuration: RecBole's Config with a strict command line, values read as YAML, and nothing changed on import.

Later ones win: RecBole's YAML for the run and the model, props/, the user's --config_files, the command line.
"""

import collections
import glob
import os
import re

import torch
import yaml
from recbole.config import Config as RecBoleConfig
from recbole.utils import get_model

from common.errors import UserError, did_you_mean
from engine.compat import patch_recbole

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PROPS = os.path.join(ROOT, "props")
# keys that RecBole reads but whose defaults stand in none of its YAML files
_RECBOLE_EXTRAS = {"reg_weight", "loss_type", "config_files", "model", "dataset"}


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads 1e-3 as a number."""


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
    """

    def __init__(self, model, dataset, files=(), options=None):
        super().__init__(model=model, dataset=dataset, config_file_list=list(files), config_dict=dict(options or {}))

    def compatibility_settings(self):
        patch_recbole()

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
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file; --config_files takes YAML files, for example props/finetune.yaml"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as mistake:
        raise UserError(f"{path}: is no YAML ({' '.join(str(mistake).split())})") from None
    if not isinstance(content or {}, dict):
        raise UserError(f"{path}: holds {type(content).__name__}, expected `key: value` lines")
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
        if options.get(key, value) != value:
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
    except yaml.YAMLError:
        raise UserError(f"option {name}: {text!r} is no YAML value; put it in quotes") from None


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
    options = dict(options)
    listed = options.pop("config_files", None) or []
    files = listed.replace(",", " ").split() if isinstance(listed, str) else list(listed)
    given = [read_yaml(path) for path in files]
    model = resolve_model(model) if isinstance(model, str) else model
    ours = [os.path.join(PROPS, name) for name in props]
    defaults = _defaults(model, ours)
    known = set(defaults).union(_RECBOLE_EXTRAS, *given)
    for key, value in options.items():
        if key not in known:
            raise UserError(f"unknown option --{key}{did_you_mean('--' + key, ['--' + k for k in known])}")
        _check_kind(key, value, defaults.get(key))
    _default_paths_from_root(options, given, defaults)
    try:
        return Config(model, dataset, ours + files, options)
    except (ValueError, TypeError, KeyError, RuntimeError) as mistake:  # RecBole checks metrics, topk, eval_args
        raise UserError(f"settings of {model.__name__} on {dataset}: {' '.join(str(mistake).split())}") from mistake


def resolve_model(name):
    """The RecBole model class of a name.

    Raises:
        UserError: RecBole has no such model.
    """
    try:
        return get_model(name)
    except (ValueError, AttributeError, ModuleNotFoundError) as mistake:
        known = known_models()
        if isinstance(mistake, ModuleNotFoundError) and name in known:
            raise UserError(f"model {name} needs the package {mistake.name}, which is not installed") from None
        raise UserError(
            f"unknown model {name!r}{did_you_mean(name, known)} (sequential models of RecBole: {', '.join(known)})"
        ) from None


def known_models():
    """Names of RecBole's sequential models, from the YAML files it ships. list of str."""
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


def _check_kind(key, value, default):
    """A value must be of its default's kind; where the default is empty, anything goes."""
    kinds = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "a word",
        list: "a list [a, b]",
        dict: "a mapping {key: value}",
    }
    kind = type(default)
    if default is None or value is None or kind not in kinds:
        return
    fits = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    fits |= kind is float and isinstance(value, int) and not isinstance(value, bool)
    fits |= kind is list and isinstance(value, str | int) or kind is str and isinstance(value, int)
    if not fits:
        raise UserError(f"option --{key}: found {value!r}, expected {kinds[kind]} (its default is {default!r})")


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


def _default_paths_from_root(options, given, defaults):
    """Paths that nobody gave lie beside the code, so that a command works from any folder."""
    for key in ("data_path", "checkpoint_dir"):
        if key not in options and not any(key in settings for settings in given):
            options[key] = os.path.join(ROOT, defaults[key])
