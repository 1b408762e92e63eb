"""RecBole's Config from checked settings. Nothing is read from sys.argv, evaluated, or changed on import.

The sources of the settings, where a later source overrides an earlier one: RecBole's YAML files, props/, the YAML file
beside a model of one's own, the user's --config_files, the command line.
"""

import collections
import os

import torch

from baselines import TEXT, entry, find_model, yaml_files
from common.errors import UserError, did_you_mean
from engine.compat import patch_recbole
from engine.metrics import METRICS
from engine.settings import ROOT, Loader, as_list, read_yaml, settle
from engine.startup import sklearn_on_demand

with sklearn_on_demand():
    from recbole.config import Config as RecBoleConfig
    from recbole.evaluator import metric_types
    from recbole.utils import EvaluatorType, InputType


class Config(RecBoleConfig):
    """RecBole's Config from explicit arguments only.

    RecBole's Config reads sys.argv, evaluates strings as Python, adds names to numpy and to yaml's loader, and
    overwrites CUDA_VISIBLE_DEVICES. This class replaces these steps.

    Args:
        model (str or class): the model.
        dataset (str): the data set.
        files (list of str): YAML files. A later file overrides an earlier one.
        options (dict): the keys and values of the command line.

    Attributes:
        given (dict of str -> str): the keys that the user set -> the option or file that set them.
        uses_item_text, ignores_padding (bool): as the registry or the model's class declares them.
        changed (dict): the settings that the user set to another value than the default of the command.
    """

    def __init__(self, model, dataset, files=(), options=None):
        super().__init__(model=model, dataset=dataset, config_file_list=list(files), config_dict=dict(options or {}))
        about = entry(self.model_class)
        self.uses_item_text, self.ignores_padding = TEXT in about.needs, about.ignores_padding
        self.given, self.changed = {}, {}

    def compatibility_settings(self):
        patch_recbole()

    def _load_config_files(self, file_list):
        return {key: value for path in file_list or () for key, value in read_yaml(path).items()}

    def _build_yaml_loader(self):
        return Loader

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
        """The settings as a dict of plain data, for checkpoints and result files."""
        return {key: _plain(value) for key, value in sorted(self.final_config_dict.items())}

    def __reduce__(self):
        # RecBole's trainers pickle the whole Config. It becomes plain data, which torch reads without running any code
        return collections.OrderedDict, (), None, None, iter(self.plain().items())


def _plain(value):
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(inner) for inner in value]
    return str(value)


def build_config(model: str | type, dataset: str, command: str, options: dict | None = None) -> Config:
    """Build the Config of a run and check every key.

    Args:
        model: the class, or a name that `baselines.find_model` knows.
        dataset: the data set.
        command: `pretrain`, `finetune` or `baseline`. `engine.settings.COMMAND_PROPS` lists the files that it reads.
        options: from `engine.settings.parse_command_line`; `config_files` may name more YAML files.

    Raises:
        UserError: an unknown model or key, or a value of the wrong kind.
    """
    model = find_model(model) if isinstance(model, str) else model
    recbole, own = yaml_files(model)
    settled = settle(command, options or {}, recbole, own)
    values, settings = settled.values(), dict(settled.given)
    _check_metrics(values)
    for key in ("data_path", "checkpoint_dir"):
        # a default path is relative to the project, so that a command works from any folder
        settings.setdefault(key, os.path.join(ROOT, values[key]))
    if _compares_pairs(model, values):
        settings.setdefault("train_neg_sample_args", {"distribution": "uniform", "sample_num": 1})  # RecBole's default
    try:
        config = Config(model, dataset, settled.files, settings)
    except (ValueError, TypeError, KeyError, RuntimeError) as error:  # RecBole checks eval_args and more
        raise UserError(f"settings of {model.__name__} on {dataset}: {' '.join(str(error).split())}") from error
    config.given = settled.where
    defaults = {key: setting.default for key, setting in settled.settings.items()}
    config.changed = {key: value for key, value in settled.given.items() if value != defaults.get(key)}
    return config


def _compares_pairs(model, settings):
    """Whether a model learns from pairs of a target and a sampled negative."""
    kind = getattr(model, "input_type", None)
    return settings.get("loss_type", "BPR" if kind == InputType.PAIRWISE else None) == "BPR"


def _check_metrics(settings):
    """Check that all metrics are ranking metrics of RecBole or of `METRICS`, and that `valid_metric` is one of them."""
    recboles = {name for name, kind in metric_types.items() if kind == EvaluatorType.RANKING}
    known = sorted(recboles.union(METRICS))
    names = [name.lower() for name in as_list(settings["metrics"])]
    for name in names:
        if name not in known:
            raise UserError(
                f"option --metrics: found {name!r}, expected ranking metrics ({', '.join(known)})"
                + did_you_mean(name, known)
            )
    measured = [f"{name}@{k}" for name in names if name != "gauc" for k in as_list(settings["topk"])]
    measured += ["gauc"] if "gauc" in names else []
    if settings["valid_metric"].lower() not in measured:
        raise UserError(
            f"option --valid_metric: found {settings['valid_metric']!r}, expected what --metrics and --topk measure: "
            + ", ".join(measured)
        )
