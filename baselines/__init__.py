"""The registry of baselines: what each model needs. Importing this package imports no model."""

import dataclasses
import importlib
import importlib.util
import inspect
import os
import sys

from common.errors import UserError, did_you_mean

TEXT, ATTRIBUTES, GRAPH = "text features", "item attributes", "a knowledge graph"
_OFFERED = {TEXT}  # what the data sets have in addition to the interactions
_SUGGESTION = "such as SASRec, GRU4Rec, BERT4Rec"


@dataclasses.dataclass(frozen=True)
class Baseline:
    """An entry of the registry, which can be read without importing the model.

    Attributes:
        path: `module:Class`.
        needs: what the model reads in addition to the interactions: `TEXT`, `ATTRIBUTES`, `GRAPH`.
        ignores_padding: the scores do not depend on the padding behind a history. So histories may be padded to the
            longest of their batch, instead of MAX_ITEM_LIST_LENGTH. tests/test_recbole_contract.py checks this for each
            such model. Of the other models, some crash on shorter rows, and some give other scores.
        trains: False for a model without training.
        derived_from: the RecBole model whose settings a model of this project also has. Empty: none.
        command: whose settings it has: `baseline`, or `finetune` for a model derived from UniSRec.
    """

    path: str
    needs: tuple[str, ...] = ()
    ignores_padding: bool = False
    trains: bool = True
    derived_from: str = ""
    command: str = "baseline"

    @property
    def runs(self) -> bool:
        """Whether the model runs on the data sets of this project."""
        return set(self.needs) <= _OFFERED

    def load(self) -> type:
        """Import the class.

        Raises:
            UserError: a package that the model needs is not installed.
        """
        module, name = self.path.split(":")
        try:
            return getattr(importlib.import_module(module), name)
        except ModuleNotFoundError as error:
            raise UserError(f"model {name}: needs the package {error.name}, which is not installed") from None


def _recbole(names, **says):
    return {name: Baseline(f"recbole.model.sequential_recommender:{name}", **says) for name in names.split()}


MODELS = {
    **_recbole("BERT4Rec CORE FPMC GCSAN GRU4Rec NARM SRGNN TransRec", ignores_padding=True),
    **_recbole("Caser FEARec FOSSIL GRU4RecCPR HGN HRM LightSANs NPE NextItNet RepeatNet SASRecCPR SHAN SINE STAMP"),
    **_recbole("DIEN DIN GRU4RecF SASRecF", needs=(ATTRIBUTES,)),
    **_recbole("GRU4RecKG KSR", needs=(GRAPH,)),
    "SASRec": Baseline("baselines.sasrec:SASRec", ignores_padding=True, derived_from="SASRec"),
    "SASRecHistory": Baseline("baselines.sasrec:SASRecHistory", ignores_padding=True, derived_from="SASRec"),
    "FDSA": Baseline("baselines.fdsa:FDSA", needs=(TEXT,), ignores_padding=True, derived_from="SASRec"),
    "S3Rec": Baseline("baselines.s3rec:S3Rec", needs=(TEXT,), ignores_padding=True, derived_from="SASRec"),
    "ZESRec": Baseline(
        "baselines.zesrec:ZESRec", needs=(TEXT,), ignores_padding=True, derived_from="SASRec", command="finetune"
    ),
    "Popularity": Baseline("baselines.untrained:Popularity", ignores_padding=True, trains=False),
    "LastText": Baseline("baselines.untrained:LastText", needs=(TEXT,), ignores_padding=True, trains=False),
    "MeanText": Baseline("baselines.untrained:MeanText", needs=(TEXT,), ignores_padding=True, trains=False),
    "WhitenedText": Baseline("baselines.untrained:WhitenedText", needs=(TEXT,), ignores_padding=True, trains=False),
    "ItemTransitions": Baseline("baselines.item_to_item:ItemTransitions", ignores_padding=True, trains=False),
    "ItemKNN": Baseline("baselines.item_to_item:ItemKNN", ignores_padding=True, trains=False),
    "VSKNN": Baseline("baselines.session_knn:VSKNN", ignores_padding=True, trains=False),
    "EASE": Baseline("baselines.item_to_item:EASE", ignores_padding=True, trains=False),
    "TextAndTransitions": Baseline(
        "baselines.item_to_item:TextAndTransitions", needs=(TEXT,), ignores_padding=True, trains=False
    ),
}


def entry(model: type) -> Baseline:
    """The entry of a class in the registry. For a class that is not registered, an entry from the class attributes.

    `uses_item_text = True` means that the class needs text features, `ignores_padding = True` that histories may be
    padded to the longest of their batch, `trains = False` that it is evaluated without training. A class that derives
    from a registered class also needs what that class needs. The attributes of a registered class are not read: its
    entry must say the same.
    """
    registered = _registered(model)
    if registered:
        return registered
    needs = {need for base in model.__mro__ if _registered(base) for need in _registered(base).needs}
    needs |= {TEXT} if getattr(model, "uses_item_text", False) else set()
    path = f"{model.__module__}:{model.__name__}"
    ignores_padding, trains = getattr(model, "ignores_padding", False), getattr(model, "trains", True)
    return Baseline(path, tuple(sorted(needs)), bool(ignores_padding), bool(trains))


def _registered(model):
    found = MODELS.get(model.__name__)
    return found if found and model.__module__.startswith(found.path.split(":")[0]) else None


def check_name(name: str) -> None:
    """Check that a model of this name runs, without importing it.

    Raises:
        UserError: the model does not exist, or does not run on the data sets of this project. The message says why.
    """
    known = MODELS.get(name)
    if known and known.runs:
        return
    if known:
        raise UserError(
            f"model {name}: needs {' and '.join(known.needs)}, which these data sets do not have; "
            f"choose one that reads interactions only, {_SUGGESTION}"
        )
    if os.path.isfile(recbole_file(f"model/{name}.yaml")):
        raise UserError(f"model {name}: is not a sequential model; choose one that is, {_SUGGESTION}")
    run = sorted(name for name, model in MODELS.items() if model.runs)
    raise UserError(
        f"unknown model {name!r}{did_you_mean(name, run)} (models that run: {', '.join(run)}; "
        "FILE.py:CLASS or package.module:CLASS runs one of your own)"
    )


def find_model(name: str) -> type:
    """The class of a model: a name of the registry, `FILE.py:CLASS` or `package.module:CLASS`.

    Raises:
        UserError: the model does not exist, or does not run on the data sets of this project.
    """
    place, colon, class_name = name.rpartition(":")
    if not colon:
        if name.endswith(".py"):
            raise UserError(f"option --model: found {name}, expected the class as well: {name}:CLASS")
        check_name(name)
        return MODELS[name].load()
    module = _load_file(place) if place.endswith(".py") else _load_module(place)
    return _class_of(module, class_name, place)


def _load_file(path):
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file; -m takes a model's name, FILE.py:CLASS or package.module:CLASS")
    path = os.path.abspath(path)
    folder = os.path.dirname(path)
    if folder not in sys.path:
        sys.path.append(folder)  # last: modules beside the file are found, but replace no module of the project
    name = f"model_file_{path.replace('.', '_')}"  # two files of one name are two modules
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _load_module(name):
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if not error.name or not f"{name}.".startswith(f"{error.name}."):
            raise  # the module exists, but it imports a missing package
        raise UserError(
            f"{name}: no such module; -m takes a model's name, FILE.py:CLASS or package.module:CLASS"
        ) from None


def _class_of(module, name, place):
    # imported here: it takes two seconds, and `--help` reads the registry
    from recbole.model.abstract_recommender import SequentialRecommender

    classes = {
        key: value
        for key, value in vars(module).items()
        if inspect.isclass(value) and issubclass(value, SequentialRecommender) and value is not SequentialRecommender
    }
    if name not in classes:
        derived = "" if not hasattr(module, name) else ", which must derive from RecBole's SequentialRecommender"
        raise UserError(f"{place}: has no model {name}{derived} (models there: {', '.join(classes) or 'none'})")
    return classes[name]


# -- the YAML files of models ---------------------------------------------------------------------------------------


def recbole_file(name: str) -> str:
    """The path of a YAML file in RecBole's folder `properties`. RecBole is not imported."""
    spec = importlib.util.find_spec("recbole")
    assert spec and spec.submodule_search_locations
    return os.path.join(spec.submodule_search_locations[0], "properties", name)


def _props_file(name):
    return os.path.join(os.path.dirname(os.path.dirname(__file__)), "props", f"{name}.yaml")


def yaml_files_of_name(name: str) -> tuple[list[str], list[str]]:
    """`yaml_files` of a model of the registry, without importing it. Of the classes that it derives from, only the one
    that `derived_from` names is searched."""
    own, recboles = [], name
    if name in MODELS and MODELS[name].path.startswith(f"{__name__}."):
        recboles = MODELS[name].derived_from
        own = [_props_file(name)]
    return [*filter(os.path.isfile, [recbole_file(f"model/{recboles}.yaml")])], [*filter(os.path.isfile, own)]


def yaml_files(model: type) -> tuple[list[str], list[str]]:
    """The YAML files with the defaults of a model and of the classes that it derives from.

    Returns:
        The files of RecBole, and those of other classes: `props/CLASS.yaml` for a class of this package, else the files
        beside its Python file that are called `CLASS.yaml` or like the Python file. A later file overrides an earlier
        one.
    """
    recbole, own = [], []
    for base in reversed(model.__mro__):
        if base.__module__.startswith("recbole."):
            recbole.append(recbole_file(f"model/{base.__name__}.yaml"))
        elif base.__module__.startswith(f"{__name__}."):
            own.append(_props_file(base.__name__))
        elif hasattr(sys.modules.get(base.__module__), "__file__"):
            file = inspect.getfile(base)
            own += [os.path.join(os.path.dirname(file), f"{base.__name__}.yaml"), f"{os.path.splitext(file)[0]}.yaml"]
    return [*filter(os.path.isfile, recbole)], [*dict.fromkeys(filter(os.path.isfile, own))]
