"""Puts the fast versions of `layers/fast/` in the place of the plain parts of a model."""

import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from recbole.model.layers import FeedForward, MultiHeadAttention, TransformerEncoder, TransformerLayer
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

    A method that a derived class overrides stays as it is, and so does one that calls an overridden method. Each fast
    version is compared with its plain one on a few random numbers, so that a change to the plain one cannot go
    unnoticed.

    Raises:
        UserError: a fast version computes something else than the plain one.
    """
    for module in model.modules():
        for kind, name, fast, example, fits in _METHODS:
            plain = getattr(kind, name)
            if isinstance(module, kind) and getattr(type(module), name) is plain and fits(module):
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


def _fits_any(module: Any) -> bool:
    return True


def _fits_encoder(module: Any) -> bool:
    """Whether all methods that the fast encoder does without are the plain ones: `encode` and those of RecBole's."""
    encoder_layers = getattr(module.trm_encoder, "layer", ())
    attentions = [getattr(layer, "multi_head_attention", None) for layer in encoder_layers]
    linear = [getattr(attention, name, None) for attention in attentions for name in ("query", "key", "value")]
    return (
        type(module).encode is AllPositions.encode
        and type(module.trm_encoder) is TransformerEncoder
        and all(type(layer) is TransformerLayer for layer in encoder_layers)
        and all(type(attention) is MultiHeadAttention for attention in attentions)
        and all(type(part) is nn.Linear for part in linear)
    )


# (class, plain method, fast version, inputs to compare them on, what a module must fulfil). Without inputs: the fast
# version calls plain methods.
_METHODS: tuple[
    tuple[type, str, Callable[..., Tensor], Callable[..., tuple[Any, ...]] | None, Callable[[Any], bool]], ...
] = (
    (nn.Dropout, "forward", layers.fast.dropout.forward, None, _fits_any),
    (PWLayer, "forward", layers.fast.experts.forward, _expert_inputs, _fits_any),
    (AllPositions, "encode_scored", layers.fast.encoder.encode_scored, _bucket_inputs, _fits_encoder),
    (AllPositions, "encode_last", layers.fast.encoder.encode_last, _history_inputs, _fits_encoder),
    (UniSRec, "item_table", layers.fast.catalogue.item_table, None, _fits_any),
)


def _check_equal(module, plain, fast, example):
    weight = next(module.parameters())
    generator = torch.Generator().manual_seed(0)  # the model's own random numbers stay as they are

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
