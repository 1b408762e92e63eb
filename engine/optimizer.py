"""The optimizer that the setting `learner` names."""

import torch
from torch import nn

from common.errors import UserError
from engine.startup import without_compiler

_OPTIMIZERS = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
    "adagrad": torch.optim.Adagrad,
    "rmsprop": torch.optim.RMSprop,
}
_FUSED = {"adam", "adamw", "sgd"}
# For embeddings with sparse gradients. SparseAdam changes only the rows that are in the gradient, and their moments.
_SPARSE = {"adam": torch.optim.SparseAdam, "sgd": torch.optim.SGD, "adagrad": torch.optim.Adagrad}


class CombinedOptimizer:
    """Several optimizers, each with its own parameters, that are used as one.

    Args:
        optimizers: for example one for dense and one for sparse gradients.
    """

    def __init__(self, *optimizers: torch.optim.Optimizer):
        self.optimizers = optimizers

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()


def make_optimizer(config, model: nn.Module) -> torch.optim.Optimizer | CombinedOptimizer:
    """Make the optimizer that `learner` names, for the parameters that require gradients.

    Embeddings with sparse gradients get their own optimizer.

    Raises:
        UserError: `learner` is unknown, or a setting does not work with sparse gradients.
    """
    name = str(config["learner"]).lower()
    if name not in _OPTIMIZERS:
        raise UserError(f"option --learner: found {config['learner']!r}, expected one of {', '.join(_OPTIMIZERS)}")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    embeddings = {module.weight for module in model.modules() if isinstance(module, nn.Embedding) and module.sparse}
    sparse = [parameter for parameter in trained if parameter in embeddings]
    dense = [parameter for parameter in trained if parameter not in embeddings]
    fused = {"fused": True} if name in _FUSED else {}
    optimizer = without_compiler(_OPTIMIZERS[name])(dense, **group_settings(config), **fused)
    if not sparse:
        return optimizer
    _check_sparse(config, name)
    return CombinedOptimizer(optimizer, without_compiler(_SPARSE[name])(sparse, lr=config["learning_rate"]))


def group_settings(config) -> dict[str, float]:
    """The optimizer settings that may change when a training is resumed, by torch's names."""
    return {"lr": config["learning_rate"], "weight_decay": config["weight_decay"]}


def _check_sparse(config, name):
    for key, found, expected in (
        ("learner", name if name not in _SPARSE else None, ", ".join(_SPARSE)),
        ("weight_decay", config["weight_decay"] or None, "0"),
        ("clip_grad_norm", config["clip_grad_norm"] or None, "none"),
    ):
        if found is not None:
            raise UserError(
                f"option --{key}: found {found!r}, expected {expected} with --sampled_negatives and item ids"
            )
