"""Replace the plain parts of a model by the fast versions of `layers/fast/`."""

import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from recbole.model.layers import FeedForward
from torch import Tensor, nn

import layers.fast.catalogue
import layers.fast.cross_entropy
import layers.fast.dropout
import layers.fast.encoder
import layers.fast.experts
import layers.losses
from common.errors import UserError
from layers.encoder import AllPositions
from unisrec import PWLayer, UniSRec


def use_fast_parts(model: nn.Module) -> None:
    """Replace the plain methods of a model, and of the modules in it, by their fast versions.

    A method that a derived class overrides stays as it is. A fast version with example inputs in `_METHODS` is compared
    with the plain method on these inputs, so that a change to the plain method cannot go unnoticed.

    Raises:
        UserError: a fast version and the plain method give different results.
    """
    for module in model.modules():
        for kind, name, fast, example in _METHODS:
            plain = getattr(kind, name)
            if isinstance(module, kind) and getattr(type(module), name) is plain:
                if example is not None:
                    _check_equal(module, plain, fast, example)
                setattr(module, name, types.MethodType(fast, module))
        if isinstance(module, FeedForward) and module.intermediate_act_fn == module.gelu:
            module.intermediate_act_fn = F.gelu  # one operation instead of RecBole's four
    if isinstance(model, UniSRec) and model.cross_entropy is layers.losses.cross_entropy:
        model.cross_entropy = layers.fast.cross_entropy.cross_entropy


def _expert_inputs(module: PWLayer, draw: Callable[..., Tensor]) -> tuple[Any, ...]:
    experts, width = module.bias.shape
    return draw(3, width), draw(3, experts).softmax(-1)


def _bucket_inputs(module: Any, draw: Callable[..., Tensor]) -> tuple[Any, ...]:
    device, length = module.position_embedding.weight.device, min(3, module.max_seq_length)
    scored = torch.arange(length, device=device)
    return [draw(2, length, module.hidden_size), draw(1, 1, module.hidden_size)], [scored, scored[:1]]


def _history_inputs(module: Any, draw: Callable[..., Tensor]) -> tuple[Any, ...]:
    length = min(3, module.max_seq_length)
    lengths = torch.tensor([1, length], device=module.position_embedding.weight.device)
    return draw(2, length, module.hidden_size), lengths


# (class, plain method, fast version, function that makes example inputs). None: the fast version is not compared.
_METHODS: tuple[tuple[type, str, Callable[..., Tensor], Callable[..., tuple[Any, ...]] | None], ...] = (
    (nn.Dropout, "forward", layers.fast.dropout.forward, None),
    (PWLayer, "forward", layers.fast.experts.forward, _expert_inputs),
    (AllPositions, "encode_scored", layers.fast.encoder.encode_scored, _bucket_inputs),
    (AllPositions, "encode_last", layers.fast.encoder.encode_last, _history_inputs),
    (UniSRec, "item_table", layers.fast.catalogue.item_table, None),
)


def _check_equal(module, plain, fast, example):
    weight = next(module.parameters())
    generator = torch.Generator().manual_seed(0)  # leaves torch's global generator unchanged

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(weight.device, weight.dtype)

    was_training = module.training
    module.eval()
    with torch.no_grad():
        inputs = example(module, draw)
        expected, found = plain(module, *inputs), fast(module, *inputs)
    module.train(was_training)
    if not torch.allclose(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())):
        raise UserError(
            f"{plain.__qualname__} and its fast version {fast.__module__}.{fast.__name__} give different results; "
            "run with --fast=false, or change both"
        )
