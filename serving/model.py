"""The model of a bundle, built without the files of a data set."""

import types
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from engine.checkpoint import load_weights
from engine.settings import settle
from unisrec import UniSRec

# RecBole's names of the columns of a batch; nothing reads such a batch here
_COLUMNS = {"USER_ID_FIELD": "user_id", "ITEM_ID_FIELD": "item_id", "LIST_SUFFIX": "_list", "NEG_PREFIX": "neg_"}


class _Features:
    """What UniSRec reads of the text features of a data set.

    Args:
        table: float32 [N, D]. Without rows if the representations of the items are known.
    """

    def __init__(self, table: Tensor):
        self.width = table.size(1)
        self._table = table

    def table(self) -> Tensor:
        return self._table

    def domain_tables(self) -> list[Tensor]:
        return [self._table]


def shop_of(n_items: int, width: int, features: Tensor | None = None) -> Any:
    """What UniSRec reads of a data set.

    Args:
        n_items: N.
        width: D.
        features: text vectors, float32 [N, D]. None if the representations of the items are known.
    """
    return types.SimpleNamespace(
        num=lambda field: n_items + 1,
        catalogue=types.SimpleNamespace(counts=[n_items]),
        features=_Features(torch.zeros(0, width) if features is None else features),
    )


def build_model(content: dict[str, Any], shop: Any) -> UniSRec:
    """Build the model of a bundle for a shop, in evaluation mode.

    A model that was only pre-trained is used as an inductive one.

    Args:
        content: from `engine.bundle.read_bundle`.
        shop: from `shop_of`. Without text vectors, the whitening is that of the bundle.
    """
    stage = "inductive_ft" if content["train_stage"] == "pretrain" else content["train_stage"]
    model = untrained_model(shop, {**content["config"], "train_stage": stage})
    load_weights(model, content, "the bundle", content["item_tokens"])
    whitening = {name: tensor for name, tensor in content["state_dict"].items() if name.startswith("whitening.")}
    if whitening:
        model.load_state_dict(whitening, strict=False)
    return model.eval()


def untrained_model(shop: Any, settings: Mapping[str, Any] | None = None) -> UniSRec:
    """A model with new weights.

    Args:
        shop: from `shop_of`.
        settings: the defaults of fine-tuning for those that are missing. `train_stage` is `inductive_ft` by default.
    """
    given = {"train_stage": "inductive_ft", **(settings or {})}
    defaults = settle("finetune", {"train_stage": given["train_stage"]}).values()
    values: dict[str, Any] = defaultdict(lambda: None, defaults | _COLUMNS | given)
    values["device"] = torch.device("cpu")
    return UniSRec(values, shop).eval()
