"""Replace the plain parts of a model by the fast versions of `layers/fast/`."""

import contextlib
from collections.abc import Callable, Iterator
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
from layers.adaptor import PWLayer
from layers.encoder import AllPositions
from unisrec import UniSRec

_FEW_ITEMS = 5  # of the catalogue, to compare on
_LARGE = 1 << 22  # numbers; a larger parameter, an id embedding, keeps its values for the comparison


def use_fast_parts(model: nn.Module) -> None:
    """Replace plain parts of a model by their fast versions: the methods of `_methods`, RecBole's GELU, and the cross
    entropy of UniSRec. Everything else runs as written.

    A method that a derived class overrides stays as it is, and so does a method that calls it. Each fast version is
    compared with its plain one, in evaluation mode, on random inputs and parameters, so that a change to the plain one
    is noticed.

    Raises:
        UserError: a fast version and the plain method give different results.
    """
    for module in model.modules():
        methods = {}
        for kind, name, fast, make_inputs in _methods():
            plain = getattr(kind, name)
            if isinstance(module, kind) and getattr(type(module), name) is plain:
                if kind is AllPositions and not _has_plain_encoder(module):
                    continue
                if make_inputs is not None:
                    with _for_comparison(module):
                        inputs = make_inputs(module)
                        _check_equal(plain, fast, module, *inputs)
                methods[name] = fast
        if methods:
            module.__class__ = _derived(type(module), methods)
        if isinstance(module, FeedForward) and module.intermediate_act_fn == module.gelu:
            module.intermediate_act_fn = F.gelu  # one operation instead of RecBole's four
    if isinstance(model, UniSRec) and model.cross_entropy is layers.losses.cross_entropy:
        _check_cross_entropy(layers.losses.cross_entropy, layers.fast.cross_entropy.cross_entropy)
        model.cross_entropy = layers.fast.cross_entropy.cross_entropy


def _derived(kind: type, methods: dict[str, Any]) -> type:
    """A class of the same name with some methods replaced. Methods stored in the instance would make a reference cycle,
    which keeps a model in memory after its last use."""
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    return type(kind.__name__, (kind,), names | methods)


def _methods() -> list[tuple[type, str, Callable[..., Tensor], Callable[[Any], tuple] | None]]:
    """(class, plain method, fast version, inputs to compare them on). Without inputs nothing is compared."""
    return [
        (nn.Dropout, "forward", layers.fast.dropout.forward, None),  # other random numbers
        (PWLayer, "forward", layers.fast.experts.forward, _expert_inputs),
        (AllPositions, "encode_scored", layers.fast.encoder.encode_scored, _bucket_inputs),
        (AllPositions, "encode_last", layers.fast.encoder.encode_last, _history_inputs),
        (UniSRec, "item_table", layers.fast.catalogue.item_table, _catalogue_inputs),
    ]


def _has_plain_encoder(module):
    """Whether a model overrides nothing that the fast encoder does without: `encode` and RecBole's transformer.

    The comparison would not notice what an override does in training only, or in longer histories than it compares.
    """
    encoder = getattr(module, "trm_encoder", None)
    blocks = getattr(encoder, "layer", ())
    attentions = [getattr(block, "multi_head_attention", None) for block in blocks]
    projections = [getattr(attention, name, None) for attention in attentions for name in ("query", "key", "value")]
    return (
        type(module).encode is AllPositions.encode
        and type(encoder) is TransformerEncoder
        and all(type(block) is TransformerLayer for block in blocks)
        and all(type(attention) is MultiHeadAttention for attention in attentions)
        and all(type(projection) is nn.Linear for projection in projections)
    )


def _expert_inputs(module):
    experts, width = module.bias.shape
    return torch.randn(3, width), torch.randn(3, experts).softmax(-1)


def _bucket_inputs(module):
    """Two buckets, [2, 3] and [1, 1] positions."""
    length = min(3, module.max_seq_length)
    vectors = [torch.randn(2, length, module.hidden_size), torch.randn(1, 1, module.hidden_size)]
    return vectors, [torch.arange(length), torch.zeros(1, dtype=torch.int64)]


def _history_inputs(module):
    length = min(3, module.max_seq_length)
    return torch.randn(2, length, module.hidden_size), torch.tensor([1, length])


def _catalogue_inputs(module):
    module.n_items = min(module.n_items, 1 + _FEW_ITEMS)  # `_for_comparison` restores it
    return ()


@contextlib.contextmanager
def _for_comparison(module: nn.Module) -> Iterator[None]:
    """Within the block: no gradients, evaluation mode, random parameters (they may be zero at the start of a training),
    and random numbers that leave the generator of the training as it was."""
    parameters = {parameter: parameter.data for parameter in module.parameters() if parameter.numel() <= _LARGE}
    attributes, modes = vars(module).copy(), {part: part.training for part in module.modules()}
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for parameter in parameters:
                parameter.data = torch.randn_like(parameter) * 0.3
            for part in modes:
                part.training = False
            yield
    finally:
        for parameter, data in parameters.items():
            parameter.data = data
        for part, training in modes.items():
            part.training = training
        vars(module).update(attributes)


def _check_equal(plain, fast, *inputs, **options):
    expected, found = plain(*inputs, **options), fast(*inputs, **options)
    if not torch.allclose(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())):
        raise UserError(
            f"{plain.__qualname__} and its fast version {fast.__module__}.{fast.__name__} give different results; "
            "run with --fast=false, or change both"
        )


def _check_cross_entropy(plain, fast):
    """Compare the values, with counts and keys that are left out."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        query, keys, weights, counts = torch.randn(4, 8), torch.randn(6, 8), torch.rand(4), torch.rand(6)
        labels = torch.tensor([0, 1, 2, 0]), torch.tensor([0, 1, 2, 0, 3, 3])
        options = {"weights": weights, "log_counts": counts, "left_out": [labels]}
        _check_equal(plain, fast, query, keys, torch.arange(4), **options)
