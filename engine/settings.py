"""Settings: reads and checks the files in props/ and the command line. Imports no torch, so --help and errors are fast.

A setting is declared by one line of a YAML file in props/:

    key: default  # (kind, unit; range) meaning [source]

The kind is bool, int, float, str, list of int, list of str or dict. The range of a number is `1 or more`, `above 0`,
`from 0 to 1` or `from 0 to below 1`. The range of a str lists the allowed words. A file that is read later may give the
key another default. If its line has a comment without a kind, the comment replaces the meaning only. The YAML files of
RecBole and of models of one's own are read in the same way.
"""

import dataclasses
import math
import os
import re
import textwrap
from collections.abc import Callable
from typing import Any

import yaml

from baselines import recbole_file
from common.errors import UserError, did_you_mean

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
COMMAND_PROPS = {  # the files of props/ that each command reads. A later file overrides an earlier one
    "pretrain": ("overall.yaml", "UniSRec.yaml", "pretrain.yaml"),
    "finetune": ("overall.yaml", "UniSRec.yaml", "finetune.yaml"),
    "baseline": ("overall.yaml",),
}
STAGE_PROPS = {"inductive_ft": "inductive_ft.yaml"}  # further defaults of a stage of fine-tuning
RECIPES = {"published": "published.yaml"}  # files of settings for --config_files, and for checkpoints of that recipe
SHORT = {"-d": "dataset", "-m": "model", "-p": "pretrained", "-f": "fix_enc"}  # the same in every command
# Settings that do not change the result of a run, and paths. What a path leads to is part of a run by its content
NO_EFFECT = {"checkpoint_dir", "data_path", "pre_model_path", "pretrained", "ranks_file", "result_file", "resume"}
NO_EFFECT |= {"allow_changed_data", "bundle", "device", "gpu_id", "groups", "local_rank", "show_progress", "use_gpu"}
# keys that RecBole reads, but that have no default in its YAML files
_RECBOLE_EXTRAS = {"reg_weight", "loss_type"}
_RECBOLE_FILES = ("overall.yaml", "dataset/sample.yaml", "quick_start_config/sequential.yaml")

_KINDS = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "str": "a string",
    "list": "a list [a, b]",
    "list of int": "a list [a, b]",
    "list of str": "a list [a, b]",
    "dict": "a mapping {key: value}",
}
_TYPES = {"bool": bool, "int": int, "float": float, "str": str, "list": list, "dict": dict}
_RANGES: dict[str, Callable[..., bool]] = {  # of numbers, with their tests
    r"(\S+) or more": lambda value, low: low <= value < math.inf,
    r"above (\S+)": lambda value, low: low < value < math.inf,
    r"(?:from )?(\S+) to (\S+)": lambda value, low, high: low <= value <= high,
    r"(?:from )?(\S+) to below (\S+)": lambda value, low, high: low <= value < high,
}
_LINE = re.compile(r"(?P<key>\w+):[ ]*(?P<default>.*?)\s+#[ ]*(?P<comment>.*)")
_DECLARATION = re.compile(r"\((?P<kind>[a-z ]+)(?:, (?P<unit>[^;)]*))?(?:; (?P<range>[^)]*))?\)\s*(?P<meaning>.*)")


class Loader(yaml.SafeLoader):
    """A safe YAML loader that reads 1e-3 as a number, and 2024-01-01 as a string, because dates occur in paths."""


Loader.yaml_implicit_resolvers = {
    first: [resolver for resolver in resolvers if resolver[0] != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d[\d_]*(?:\.[\d_]*)?|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def read_yaml(path: str) -> dict:
    """Read a YAML file of settings.

    Raises:
        UserError: the file is missing or is not a YAML mapping.
    """
    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.load(file, Loader=Loader)
    except OSError as failure:
        what = "no such file" if isinstance(failure, FileNotFoundError) else f"cannot be read ({failure.strerror})"
        raise UserError(f"{path}: {what}; --config_files takes YAML files, for example props/finetune.yaml") from None
    except (yaml.YAMLError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: is not valid YAML ({reason}); expected `key: value` lines") from None
    if not isinstance(content or {}, dict):
        raise UserError(f"{path}: holds {type(content).__name__}, expected `key: value` lines")
    for key in content or {}:
        if not isinstance(key, str):
            raise UserError(f"{path}: key {key!r} is not a string, expected `key: value` lines")
    return content or {}


# -- declarations ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Setting:
    """A setting as its line in a YAML file declares it.

    Attributes:
        kind: a key of `_KINDS`. If it is empty, the kind is unknown and any value is allowed.
        text: the default as it is written in the file.
        declared: whether the comment has the form `(kind, unit; range) meaning`.
    """

    key: str
    default: Any
    kind: str = ""
    unit: str = ""
    range: str = ""
    meaning: str = ""
    text: str = ""
    declared: bool = False

    def check(self, value: Any, where: str) -> Any:
        """Check the kind and the range of a value.

        Args:
            value: the value.
            where: the option, or the file and the key, for the message.

        Returns:
            The value. For the kind str, a number becomes a str, and a word gets the upper and lower case of the range.

        Raises:
            UserError: the value is of another kind, or outside the range.
        """
        if not self.kind or value is None and (self.default is None or self.kind in ("list", "dict")):
            return value
        if not _is_of_kind(value, self.kind):
            note = "" if self.default is None else f" (its default is {self.default!r})"
            raise UserError(f"{where}: found {value!r}, expected {_KINDS[self.kind]}{note}")
        value = str(value) if self.kind == "str" else value
        if self.kind == "str" and self.range:
            found = [word for word in self.choices() if word.lower() == value.lower()]
            if found:
                return found[0]
        elif self._is_within_range(value):
            return value
        hint = did_you_mean(value, self.choices()) if self.kind == "str" else ""
        raise UserError(f"{where}: found {value!r}, expected {self.expected()}{hint}")

    def choices(self) -> list[str]:
        """The allowed words of a str. Empty if any str is allowed."""
        words = self.range.removeprefix("one of ")
        return re.split(", | or ", words) if self.kind == "str" and words else []

    def expected(self) -> str:
        """The allowed values in words."""
        if self.kind == "list of int":
            return f"whole numbers, each {self.range}, such as {self.text}"
        if self.kind == "list of str":
            return f"names, such as {self.text}"
        return self.range if self.kind in ("int", "str") or self.range[:1].isdigit() else f"a number {self.range}"

    def _is_within_range(self, value):
        if self.kind in ("list of int", "list of str"):
            kind = int if self.kind == "list of int" else str
            values = as_list(value)
            return bool(values) and all(type(one) is kind and (not self.range or self._holds(one)) for one in values)
        return not self.range or self._holds(value)

    def _holds(self, number):
        for pattern, test in _RANGES.items():
            match = re.fullmatch(pattern, self.range)
            if match:
                return test(number, *map(float, match.groups()))
        raise UserError(
            f"setting {self.key}: its range {self.range!r} is unknown; expected `1 or more` or `from 0 to 1`"
        )


def _is_of_kind(value, kind):
    """Whether a value has a kind. A whole number is also a float and a str, and a single value is also a list."""
    if kind.startswith("list"):
        return type(value) in (list, str, int)
    if isinstance(value, bool):
        return kind == "bool"
    return isinstance(value, _TYPES[kind]) or kind in ("float", "str") and type(value) is int


def as_list(value: object) -> list:
    """A list as it is, anything else as a list of one."""
    return value if isinstance(value, list) else [value]


def read_settings(path: str) -> dict[str, Setting]:
    """The settings of a YAML file: their defaults, and what their comments declare."""
    defaults = read_yaml(path)
    with open(path, encoding="utf-8") as file:
        lines = {match["key"]: match for match in map(_LINE.match, file) if match}
    return {key: _declared(key, default, lines.get(key)) for key, default in defaults.items()}


def _declared(key, default, line):
    kinds = [kind for kind, of_type in _TYPES.items() if type(default) is of_type]
    setting = Setting(key, default, kinds[0] if kinds else "")
    if not line:
        return setting
    setting = dataclasses.replace(setting, text=line["default"], meaning=line["comment"].strip())
    match = _DECLARATION.fullmatch(line["comment"].strip())
    if not match:
        return setting
    kind = match["kind"] if match["kind"] in _KINDS else ""
    if kind and (default is None or _is_of_kind(default, kind)):
        setting = dataclasses.replace(setting, kind=kind)  # else the kind of the default counts
    return dataclasses.replace(
        setting, unit=match["unit"] or "", range=match["range"] or "", meaning=match["meaning"], declared=True
    )


def read_chain(files: list[str]) -> list[tuple[str, dict[str, Setting]]]:
    """Read YAML files one after another: (path, its settings). Missing declarations are taken from earlier files."""
    chain: list[tuple[str, dict[str, Setting]]] = []
    known: dict[str, Setting] = {}
    for path in files:
        settings = {}
        for key, setting in read_settings(path).items():
            home = known.get(key)
            if home and not setting.declared:
                home.check(setting.default, f"{path}: {key}")
                text, meaning = setting.text, setting.meaning or home.meaning
                setting = dataclasses.replace(home, default=setting.default, text=text, meaning=meaning)
            settings[key] = setting
        known.update(settings)
        chain.append((path, settings))
    return chain


def props_file(name: str) -> str:
    """The path of a file of props/."""
    return os.path.join(ROOT, "props", name)


def command_files(command: str, stage: str | None = None, recbole=(), own=()) -> list[str]:
    """The YAML files with the defaults of a run, without those that RecBole reads for every model.

    A later file overrides an earlier one.

    Args:
        command: a key of `COMMAND_PROPS`.
        stage: the stage of fine-tuning, which may have its own file.
        recbole: RecBole's YAML files of the model.
        own: the YAML files of a model of one's own.
    """
    props = [*map(props_file, COMMAND_PROPS[command])]
    if command == "finetune":
        stage = str(stage or read_yaml(props_file("finetune.yaml"))["train_stage"]).lower()
        props += [props_file(STAGE_PROPS[stage])] if stage in STAGE_PROPS else []
    return [*recbole, *props, *own]


# -- a run's settings -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Settled:
    """The settings of a run, checked.

    Attributes:
        files: the YAML files with the defaults. A later file overrides an earlier one.
        settings: every known key.
        given: key -> value that the user set, by an option or in a YAML file.
        where: key -> the option or file that set it, for messages.
    """

    files: list[str]
    settings: dict[str, Setting]
    given: dict[str, Any]
    where: dict[str, str]

    def values(self) -> dict[str, Any]:
        """The value of every key."""
        return {key: setting.default for key, setting in self.settings.items()} | self.given


def settle(command: str, options: dict, recbole=(), own=()) -> Settled:
    """Collect and check the settings of a run.

    Args:
        command, recbole, own: see `command_files`.
        options: from `parse_command_line`, without `model` and `dataset`; `config_files` may name more YAML files.

    Raises:
        UserError: an unknown key, or a value of another kind or outside its range.
    """
    user_files = _user_files(options)
    options = {key: value for key, value in options.items() if key != "config_files"}
    sources = [*((f"{path}: ", content) for path, content in user_files), ("option --", options)]
    files = command_files(command, _last(sources, "train_stage"), recbole, own)
    chain = read_chain([*map(recbole_file, _RECBOLE_FILES), *files])
    settings = {key: setting for _, part in chain for key, setting in part.items()}
    known = {*settings, *_RECBOLE_EXTRAS}.union(*(content for _, content in user_files))
    for key in options:
        if key not in known:
            near = did_you_mean(f"--{key}", [f"--{name}" for name in (*known, "help")])
            raise UserError(f"unknown option --{key}{near}")
    ranges = _ranges_of_props()
    given, where = {}, {}
    for prefix, content in sources:
        for key, value in content.items():
            setting = _with_range(settings.get(key) or Setting(key, None), ranges)
            given[key], where[key] = setting.check(value, prefix + key), prefix + key
    settled = Settled(files, settings, given, where)
    check_predictions_per_row(given, settled.values())
    return settled


def _last(sources, key):
    """The value of a key in the last source that has it, else None."""
    return next((content[key] for _, content in reversed(sources) if key in content), None)


def _with_range(setting, ranges):
    """Add a range to a setting of RecBole: that of the same key in props/. The range of a size is `1 or more`."""
    namesake = ranges.get(setting.key)
    if setting.range or not setting.kind:
        return setting
    if namesake and namesake.kind == setting.kind:
        return dataclasses.replace(setting, range=namesake.range)
    is_size = setting.kind == "int" and setting.key.endswith("_size")
    return dataclasses.replace(setting, range="1 or more") if is_size else setting


def _ranges_of_props():
    """The settings in props/ that have a range, by key. A range of one word is left out: it is for UniSRec only."""
    found = _settings_of_props()
    return {setting.key: setting for setting in found if setting.range and len(setting.choices()) != 1}


def _settings_of_props():
    """The settings of all files of props/ that any command reads, as each file declares them."""
    names = dict.fromkeys(sum(COMMAND_PROPS.values(), ()))
    return [setting for name in names for setting in read_settings(props_file(name)).values()]


def check_stored(key: str, value: Any, where: str) -> None:
    """Check a setting of props/ that a file other than YAML stores.

    Raises:
        UserError: the value is of another kind, or outside the range.
    """
    for setting in _settings_of_props():
        if setting.key == key and setting.declared:
            setting.check(value, where)
            return


def check_predictions_per_row(given, settings):
    """Check that `predictions_per_row`, if the user set it, is at most MAX_ITEM_LIST_LENGTH.

    Raises:
        UserError: it is larger.
    """
    longest = settings["MAX_ITEM_LIST_LENGTH"]
    if "predictions_per_row" in given and settings["predictions_per_row"] > longest:
        raise UserError(
            f"option --predictions_per_row: found {settings['predictions_per_row']}, "
            f"expected 1 to MAX_ITEM_LIST_LENGTH, {longest}"
        )


# -- the command line -----------------------------------------------------------------------------------------------


def parse_command_line(argv: list[str], help_for: Callable[[list[str]], str]) -> dict:
    """Split a command line into keys and values.

    `--key=value` and `--key value` both work, and so do the short names of `SHORT`. Values are read as YAML. `--key`
    without a value sets a bool of props/ to true.

    Args:
        argv: the arguments, without the name of the program.
        help_for: a function of `argv` that returns the text for -h and --help.

    Raises:
        UserError: a word is not an option, an option has no value, or an option has two different values.
    """
    if "-h" in argv or "--help" in argv:
        print(help_for(argv))
        raise SystemExit(0)
    options: dict[str, Any] = {}
    words = list(argv)
    while words:
        word = words.pop(0)
        name, equals, text = word.partition("=")
        if name in SHORT:
            key = SHORT[name]
        elif name.startswith("--") and len(name) > 2:
            key = name[2:]
        else:
            raise UserError(
                f"unexpected word {word!r}; options are written --key=value or --key value (--help lists them)"
            )
        if equals:
            value = _yaml_value(name, text)
        elif words and (not words[0].startswith("-") or _is_number(words[0])):
            value = _yaml_value(name, words.pop(0))
        elif any(setting.kind == "bool" and name == f"--{setting.key}" for setting in _settings_of_props()):
            value = True
        else:
            raise UserError(f"option {name} has no value; write {name} VALUE")
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
        return yaml.load(text, Loader=Loader)
    except (yaml.YAMLError, ValueError):
        raise UserError(f"option {name}: {text!r} is not a YAML value; put it in quotes") from None


def take_option(options: dict, key: str, default: str) -> str:
    """Take the value of a key that a command needs first: from the options, the user's YAML files, or `default`.

    Args:
        options: from `parse_command_line`. The key is removed.
        key: `dataset` or `model`.
        default: the value if the key is in neither.

    Raises:
        UserError: the value is not a name.
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


# -- help -----------------------------------------------------------------------------------------------------------


def help_text(usage: str, command: str, recbole=(), own=()) -> str:
    """The help of a command: its usage, and each setting with its default and meaning, grouped by file.

    Args:
        command, recbole, own: see `command_files`.
    """
    base = [*map(recbole_file, _RECBOLE_FILES)]
    files = command_files(command, recbole=recbole, own=own)
    files += [props_file(name) for name in STAGE_PROPS.values() if command == "finetune"]
    chain = read_chain([*base, *files])
    parts = [usage.strip()]
    for path, settings in chain[len(base) :]:
        title = (
            f"RecBole's {os.path.basename(path)}"
            if path in recbole
            else f"{os.path.relpath(path, ROOT)}: {_title(path)}"
        )
        parts.append(_section(title, settings))
    ours = {key for _, settings in chain[len(base) :] for key in settings}
    further = sorted({key for _, settings in chain[: len(base)] for key in settings} - ours)
    parts.append(textwrap.fill(f"Further keys of RecBole: {', '.join(further)}", 110, subsequent_indent="  "))
    return "\n\n".join(parts)


def _title(path):
    with open(path, encoding="utf-8") as file:
        return file.readline().strip("# \n")


def _section(title, settings):
    lines = [title]
    for setting in settings.values():
        about = "; ".join(filter(None, [", ".join(filter(None, [setting.kind, setting.unit])), setting.range]))
        left = f"  --{setting.key} {setting.text}"
        text = f"{setting.meaning} ({about})"
        gap = " " * 36
        start = f"{left:36}" if len(left) < 35 else f"{left}\n{gap}"
        lines.append(start + textwrap.fill(text, 112, initial_indent=gap, subsequent_indent=gap).strip())
    return "\n".join(lines)
