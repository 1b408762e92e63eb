"""The models that we compare with: one registry says what each of them needs. Importing it imports no model."""

import dataclasses
import importlib
import importlib.util
import inspect
import os
import sys

from common.errors import UserError, did_you_mean

TEXT, ATTRIBUTES, GRAPH = "text features", "item attributes", "a knowledge graph"
_OFFERED = {TEXT}  # what our data sets have beside the interactions
_SUGGESTION = "such as SASRec, GRU4Rec, BERT4Rec"


@dataclasses.dataclass(frozen=True)
class Baseline:
    """What is known of a model without importing it.

    Attributes:
        path: `module:Class`.
        needs: what the model reads beside the interactions: `TEXT`, `ATTRIBUTES`, `GRAPH`.
        ignores_padding: the scores do not depend on the padding behind a history, so rows may be padded to the longest
            of their batch only. tests/test_recbole_contract.py proves it for each. Of the other models some crash on
            rows shorter than MAX_ITEM_LIST_LENGTH, and some score such rows differently.
        trains: False for a model that is evaluated as it is.
        implemented: False for a model that is planned.
    """

    path: str
    needs: tuple[str, ...] = ()
    ignores_padding: bool = False
    trains: bool = True
    implemented: bool = True

    @property
    def runs(self) -> bool:
        """Whether the model runs on our data sets."""
        return self.implemented and set(self.needs) <= _OFFERED

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
    **_recbole("FDSA S3Rec", needs=(TEXT,), implemented=False),
    "SASRec": Baseline("baselines.sasrec:SASRec", ignores_padding=True),
    "Popularity": Baseline("baselines.untrained:Popularity", ignores_padding=True, trains=False),
    "LastText": Baseline("baselines.untrained:LastText", needs=(TEXT,), ignores_padding=True, trains=False),
    "MeanText": Baseline("baselines.untrained:MeanText", needs=(TEXT,), ignores_padding=True, trains=False),
}


def entry(model: type) -> Baseline:
    """The registry's entry of a class. A class that is not registered says the same by attributes of its own.

    `uses_item_text = True` asks for text features, `ignores_padding = True` for rows padded to the longest of their
    batch, `trains = False` for an evaluation without training. A class that derives from a registered one needs what
    that one needs. The attributes of a registered class are not read: its entry must say the same.
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
        UserError: no such model, or one that does not run on our data sets; the message says why.
    """
    known = MODELS.get(name)
    if known and known.runs:
        return
    if known and not known.implemented:
        raise UserError(
            f"model {name}: reads {' and '.join(known.needs)} and comes later; choose one that runs now, {_SUGGESTION}"
        )
    if known:
        raise UserError(
            f"model {name}: needs {' and '.join(known.needs)}, which these data sets do not have; "
            f"choose one that reads interactions only, {_SUGGESTION}"
        )
    if os.path.isfile(recbole_file(f"model/{name}.yaml")):
        raise UserError(f"model {name}: is no sequential model; choose one that is, {_SUGGESTION}")
    run = sorted(name for name, model in MODELS.items() if model.runs)
    raise UserError(
        f"unknown model {name!r}{did_you_mean(name, run)} (models that run: {', '.join(run)}; "
        "FILE.py:CLASS or package.module:CLASS runs one of your own)"
    )


def find_model(name: str) -> type:
    """The class of a model: a name of the registry, `FILE.py:CLASS` or `package.module:CLASS`.

    Raises:
        UserError: no such model, or one that does not run on our data sets.
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
    folder, stem = os.path.dirname(os.path.abspath(path)), os.path.splitext(os.path.basename(path))[0]
    if folder not in sys.path:
        sys.path.append(folder)  # last, so that modules beside the file are found and none of ours is replaced
    name = f"model_file_{stem}"
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
            raise  # a package that the module itself imports
        raise UserError(
            f"{name}: no such module; -m takes a model's name, FILE.py:CLASS or package.module:CLASS"
        ) from None


def _class_of(module, name, place):
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
    """The path of a YAML file of RecBole's, relative to its folder `properties`; RecBole is not imported."""
    spec = importlib.util.find_spec("recbole")
    assert spec and spec.submodule_search_locations
    return os.path.join(spec.submodule_search_locations[0], "properties", name)


def yaml_files_of_name(name: str) -> tuple[list[str], list[str]]:
    """`yaml_files` of a model of the registry, without importing it. Classes that it derives from are not searched."""
    own = []
    if name in MODELS and MODELS[name].path.startswith(f"{__name__}."):
        module = MODELS[name].path.split(":")[0].rpartition(".")[2]
        own = [os.path.join(os.path.dirname(__file__), f"{stem}.yaml") for stem in (name, module)]
    return [*filter(os.path.isfile, [recbole_file(f"model/{name}.yaml")])], [*filter(os.path.isfile, own)]


def yaml_files(model: type) -> tuple[list[str], list[str]]:
    """The YAML files with the defaults of a model and of the classes that it derives from, later ones win.

    Returns:
        those of RecBole, and those beside the files of other classes, `CLASS.yaml` or as the file is called.
    """
    recbole, own = [], []
    for base in reversed(model.__mro__):
        if base.__module__.startswith("recbole."):
            recbole.append(recbole_file(f"model/{base.__name__}.yaml"))
        elif hasattr(sys.modules.get(base.__module__), "__file__"):
            file = inspect.getfile(base)
            own += [os.path.join(os.path.dirname(file), f"{base.__name__}.yaml"), f"{os.path.splitext(file)[0]}.yaml"]
    return [*filter(os.path.isfile, recbole)], [*dict.fromkeys(filter(os.path.isfile, own))]
