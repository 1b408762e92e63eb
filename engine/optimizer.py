"""The optimiser that the settings name."""

import inspect

import torch
from torch import nn

from common.errors import UserError

_OPTIMIZERS = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
    "adagrad": torch.optim.Adagrad,
    "rmsprop": torch.optim.RMSprop,
}
_FUSED = {"adam", "adamw", "sgd"}
# for embeddings of which a step touches some rows only; SparseAdam leaves the others and their moments as they are
_SPARSE = {"adam": torch.optim.SparseAdam, "sgd": torch.optim.SGD, "adagrad": torch.optim.Adagrad}


def make_optimizer(config, model):
    """The optimiser that `learner` names, over what is to be trained.

    Raises:
        UserError: an unknown `learner`, or one that cannot learn an embedding with sparse gradients.
    """
    name = str(config["learner"]).lower()
    if name not in _OPTIMIZERS:
        raise UserError(f"option --learner: found {config['learner']!r}, expected one of {', '.join(_OPTIMIZERS)}")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    embeddings = {module.weight for module in model.modules() if isinstance(module, nn.Embedding) and module.sparse}
    sparse = [parameter for parameter in trained if parameter in embeddings]
    dense = [parameter for parameter in trained if parameter not in embeddings]
    fused = {"fused": True} if name in _FUSED else {}
    optimizer = _uncompiled(_OPTIMIZERS[name])(dense, **group_settings(config), **fused)
    if not sparse:
        return optimizer
    for key, found, expected in (
        ("learner", name if name not in _SPARSE else None, ", ".join(_SPARSE)),
        ("weight_decay", config["weight_decay"] or None, "0"),
        ("clip_grad_norm", config["clip_grad_norm"] or None, "none"),
    ):
        if found is not None:
            raise UserError(
                f"option --{key}: found {found!r}, expected {expected} with --sampled_negatives and item ids"
            )
    return Together(optimizer, _uncompiled(_SPARSE[name])(sparse, lr=config["learning_rate"]))


def group_settings(config):
    """What may change when a training goes on, by the optimiser's own names: dict."""
    return {"lr": config["learning_rate"], "weight_decay": config["weight_decay"]}


def _uncompiled(optimizer):
    """A torch optimiser whose methods do not load torch's compiler, which nothing here uses: it takes a second to
    import, and 70 MB of each process."""
    names = ("add_param_group", "load_state_dict", "state_dict", "step", "zero_grad")
    methods = {name: inspect.unwrap(getattr(optimizer, name)) for name in names}
    methods["step"] = torch.no_grad()(methods["step"])
    return type(optimizer.__name__, (optimizer,), methods)


class Together:
    """Several optimisers as one."""

    def __init__(self, *optimizers):
        self.optimizers = optimizers

    def zero_grad(self, set_to_none=True):
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def step(self):
        for optimizer in self.optimizers:
            optimizer.step()
