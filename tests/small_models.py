"""Small models for the tests, on the small data sets of the fixtures `folder` and `whole`."""

import functools

import torch
import torch.nn.functional as F

from data import SequenceBatches, UniSRecDataset
from engine.fast_parts import use_fast_parts
from layers.adaptor import MoEAdaptor
from layers.history import BIAS_STEP, MEAN_STEP
from tests.conftest import small_config
from unisrec import UniSRec

UNCHANGED = {"item_drop_ratio": 0.0, "item_drop_coefficient": 0.5}  # a second view that equals the first


@functools.cache
def config_of(stage, folder, **options):
    """Reading the YAML files takes longer than the data sets."""
    return small_config(stage, "Mix" if stage == "pretrain" else "Small", folder, **options)


def open_model(stage, folder, fast=True, **options):
    dataset = UniSRecDataset(config_of(stage, folder, **options))
    torch.manual_seed(1)
    model = UniSRec(dataset.config, dataset).eval()
    if fast:
        use_fast_parts(model)
    for name, parameter in model.named_parameters():  # large enough that every part matters
        parameter.data.normal_(0.0, 0.2 / BIAS_STEP if name.startswith("history_") else 0.2)
    return model, dataset


def one_batch(dataset, predictions_per_row=50, **options):
    """All predictions of the training file in one batch."""
    augment = UNCHANGED if dataset.config["train_stage"] == "pretrain" else None
    options = {"augment_ratios": augment, "n_items": dataset.catalogue.n_items, **options}
    (batch,) = SequenceBatches(dataset.sequences("train"), 10**6, dataset.max_history, predictions_per_row, **options)
    return batch


def collect_gradients(model):
    """The gradients of all parameters. Those of the history parts are with respect to what these parts compute with,
    so that their scale is that of the others."""
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    steps = {"history_bias.weight": BIAS_STEP, "history_mean.weight": MEAN_STEP, "history_mean.recency": MEAN_STEP}
    return {name: gradient / steps.get(name, 1.0) for name, gradient in found.items()}


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return collect_gradients(model)


def assert_same_gradients(ours, others, tolerance=1e-5):
    assert ours.keys() == others.keys() and len(ours) > 30
    largest = max(gradient.abs().max() for gradient in others.values())
    for name in ours:
        assert (ours[name] - others[name]).abs().max() <= tolerance * largest, name


def adaptor(experts=3, width=7, hidden=5, dropout=0.2, noise=True):
    torch.manual_seed(0)
    layer = MoEAdaptor(experts, width, hidden, dropout, noise)
    for parameter in layer.parameters():
        parameter.data.normal_()
    return layer


def adaptor_by_loop(layer, x):
    """Paper, section 2.1, expert by expert: sum_e g_e W_e (x - b_e)."""
    gates = torch.softmax(x @ layer.w_gate, dim=-1)
    total = 0.0
    for expert, (weight, bias) in enumerate(zip(layer.experts.weight, layer.experts.bias, strict=True)):
        total = total + gates[:, expert : expert + 1] * F.linear(x - bias, weight)
    return total
