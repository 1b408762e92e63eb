"""Each fast part has the values and gradients of its plain one, and takes its place only where that is so."""

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from recbole.model.layers import FeedForward, MultiHeadAttention
from torch import nn

import layers.fast.cross_entropy
import layers.fast.dropout
import layers.fast.encoder
import layers.fast.experts
import layers.losses
from baselines.sasrec import SASRec
from common.errors import UserError
from data import UniSRecDataset
from engine.building import build_model
from engine.config import build_config
from engine.fast_parts import use_fast_parts
from layers.adaptor import PWLayer
from layers.encoder import AllPositions
from tests.small_models import (
    adaptor,
    adaptor_by_loop,
    assert_same_gradients,
    config_of,
    gradients,
    one_batch,
    open_model,
)
from unisrec import UniSRec


def is_fast(module, name):
    return getattr(type(module), name).__module__.startswith("layers.fast.")


# -- the whole model ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("predictions_per_row", [1, 2, 50])
@pytest.mark.parametrize("stage", ["pretrain", "inductive_ft", "transductive_ft"])
def test_the_fast_model_has_the_loss_and_gradients_of_the_plain_one(stage, predictions_per_row, folder):
    results = []
    for fast in (False, True):
        model, dataset = open_model(stage, folder, fast)
        loss = model.calculate_loss(one_batch(dataset, predictions_per_row))
        results.append((loss.item(), gradients(model, loss)))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-6)
    assert_same_gradients(results[1][1], results[0][1])


@pytest.mark.parametrize("stage", ["inductive_ft", "transductive_ft"])
def test_the_fast_model_scores_and_ranks_as_the_plain_one(stage, folder):
    results = []
    for fast in (False, True):
        model, dataset = open_model(stage, folder, fast)
        rows = dataset.build()[2][list(range(14))]
        with torch.no_grad():
            results.append((model.full_sort_predict(rows)[:, 1:], model.predict(rows), model.ranks(rows)))
    for plain, fast in zip(*results, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-5)
    assert len(results[0][2].unique()) > 5


def test_models_are_built_with_the_fast_parts_unless_told_otherwise(folder):
    for fast in (True, False):
        dataset = UniSRecDataset(config_of("inductive_ft", folder, fast=fast))
        model = build_model(UniSRec, dataset.config, dataset)
        assert is_fast(model, "encode_scored") is is_fast(model.moe_adaptor.experts, "forward") is fast
        assert (model.cross_entropy is layers.fast.cross_entropy.cross_entropy) is fast
        gelus = [module.intermediate_act_fn for module in model.modules() if isinstance(module, FeedForward)]
        assert len(gelus) == 2 and all((function is F.gelu) is fast for function in gelus)


def test_the_baseline_gets_the_fast_encoder_too(folder):
    config = build_config(SASRec, "Small", "baseline", {"data_path": folder, "hidden_size": 16})
    dataset = UniSRecDataset(config)
    torch.manual_seed(0)
    plain = SASRec(config, dataset).eval()
    fast = copy.deepcopy(plain)
    use_fast_parts(fast)
    assert is_fast(fast, "encode_scored") and not is_fast(plain, "encode_scored")
    batch = one_batch(dataset, 2, augment_ratios=None)
    losses = [model.calculate_loss(batch) for model in (plain, fast)]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)
    assert_same_gradients(*(gradients(model, loss) for model, loss in zip((plain, fast), losses, strict=True)))


def test_a_fast_model_is_freed_with_its_last_reference(folder):
    model, _ = open_model("inductive_ft", folder)
    assert type(model).__name__ == "UniSRec" and isinstance(model, UniSRec)
    alive = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert alive() is None
    finally:
        gc.enable()


def test_the_check_leaves_the_random_numbers_and_the_mode_alone(folder):
    model, _ = open_model("inductive_ft", folder, fast=False)
    model.train()
    state = torch.get_rng_state()
    use_fast_parts(model)
    assert torch.equal(torch.get_rng_state(), state) and all(module.training for module in model.modules())


# -- what was changed is not replaced ----------------------------------------------------------------------------------


class Residual(PWLayer):
    def forward(self, x, gates):
        return super().forward(x, gates) + x[:, : self.weight.size(1)]


class Backwards(UniSRec):
    def encode_last(self, item_vectors, lengths):
        return -super().encode_last(item_vectors, lengths)


def test_a_method_that_a_derived_class_overrides_stays(folder):
    plain, dataset = open_model("inductive_ft", folder, fast=False)
    changed = copy.deepcopy(plain)
    changed.__class__ = Backwards
    changed.moe_adaptor.experts.__class__ = Residual
    expected = copy.deepcopy(changed)
    use_fast_parts(changed)
    assert not is_fast(changed.moe_adaptor.experts, "forward") and not is_fast(changed, "encode_last")
    assert is_fast(changed, "encode_scored")
    rows = dataset.build()[2][list(range(14))]
    with torch.no_grad():
        scores = [model.full_sort_predict(rows)[:, 1:] for model in (plain, expected, changed)]
    torch.testing.assert_close(scores[2], scores[1], rtol=1e-4, atol=1e-5)
    assert (scores[2] - scores[0]).abs().max() > 0.1


class NoisyStates(UniSRec):
    """Differs from UniSRec in training only, and on long histories only, so that a check on a few numbers passes."""

    def encode(self, item_vectors):
        states = super().encode(item_vectors)
        return states + torch.randn_like(states) if self.training else torch.cat([states[:, :3], -states[:, 3:]], 1)


class ScaledAttention(MultiHeadAttention):
    def forward(self, input_tensor, attention_mask):
        return super().forward(input_tensor, attention_mask) * (1.0 + self.training)


class AddedLinear(nn.Linear):
    added = 0.0

    def forward(self, x):
        return super().forward(x) + self.added


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model, "__class__", NoisyStates),
        lambda model: setattr(model.trm_encoder.layer[1].multi_head_attention, "__class__", ScaledAttention),
        lambda model: setattr(model.trm_encoder.layer[0].multi_head_attention.query, "__class__", AddedLinear),
        lambda model: setattr(model, "trm_encoder", nn.Identity()),
    ],
)
def test_no_fast_encoder_goes_round_what_was_overridden(change, folder):
    model, _ = open_model("inductive_ft", folder, fast=False)
    change(model)
    use_fast_parts(model)
    assert not is_fast(model, "encode_scored") and not is_fast(model, "encode_last")
    assert is_fast(model.moe_adaptor.experts, "forward") and is_fast(model, "item_table")


class ZeroAtFirst(PWLayer):
    """A new parameter that starts at zero changes nothing before the first step."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.residual = nn.Parameter(torch.zeros(self.weight.shape[1:]))


CHANGES = {
    "experts": (PWLayer, "forward", lambda self, x, gates, plain=PWLayer.forward: plain(self, x, gates) + x[:, :16]),
    "a residual path that starts at zero": (
        PWLayer,
        "forward",
        lambda self, x, gates, plain=PWLayer.forward: plain(self, x, gates) + x @ self.residual.T,
    ),
    "encoder": (AllPositions, "encode", lambda self, vectors, plain=AllPositions.encode: plain(self, vectors).tanh()),
    "catalogue": (UniSRec, "item_table", lambda self, plain=UniSRec.item_table: plain(self) * 2),
    "cross entropy": (
        layers.losses,
        "cross_entropy",
        lambda *args, plain=layers.losses.cross_entropy, **options: plain(*args, **options) + 0.1,
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_plain_part_that_was_changed_in_its_place_is_noticed(change, folder, monkeypatch):
    """Someone edits the plain model and forgets the fast version: no training with what is no longer meant."""
    model, _ = open_model("transductive_ft", folder, fast=False)
    if "residual" in change:
        sizes = 3, 24, 16, 0.2
        model.moe_adaptor.experts = ZeroAtFirst(*sizes).eval()
    place, name, changed = CHANGES[change]
    changed.__qualname__ = name
    monkeypatch.setattr(place, name, changed)
    if change == "cross entropy":
        monkeypatch.setattr(UniSRec, name, staticmethod(changed))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(UserError, match=r"and its fast version .* give different results; run with --fast=false"):
        use_fast_parts(model)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert model.n_items == 41


# -- experts -----------------------------------------------------------------------------------------------------------


def fast_adaptor(**options):
    layer = adaptor(**options)
    layer.experts.forward = layers.fast.experts.forward.__get__(layer.experts)
    return layer


def output_and_gradients(layer, function, x):
    """What a way to compute the adaptor gives for x [11, 7], and the gradients of everything."""
    layer.zero_grad()
    asked = x.clone().requires_grad_()
    output = function(asked)
    (output * torch.arange(55.0).view(11, 5).sin()).sum().backward()
    parts = [layer.w_gate.grad, layer.experts.weight.grad, layer.experts.bias.grad, asked.grad]
    return [output, *(part.clone() for part in parts)]


def test_fast_experts_have_the_values_and_gradients_of_the_plain_ones_and_of_a_loop():
    plain = adaptor().eval()
    fast = fast_adaptor().eval()
    x = torch.randn(11, 7)
    expected = output_and_gradients(plain, lambda x: adaptor_by_loop(plain, x), x)
    for layer in (plain, fast):
        for ours, by_loop in zip(output_and_gradients(layer, layer, x), expected, strict=True):
            assert ours.abs().max() > 0.1
            torch.testing.assert_close(ours, by_loop, rtol=1e-4, atol=1e-4)


def test_the_gradients_of_experts_with_dropout_equal_autograds(monkeypatch):
    """The hand-written backward pass, with the same draw of dropout, against the formula left to autograd."""
    layer = fast_adaptor(noise=False).train()
    kept = torch.rand(3, 11, 7) > 0.2
    monkeypatch.setattr(layers.fast.experts, "keep_mask", lambda shape, probability, device: kept.view(shape))
    x = torch.randn(11, 7)

    def plain(asked):
        gates = torch.softmax(asked @ layer.w_gate, dim=-1)
        seen = asked * kept / 0.8 - layer.experts.bias[:, None]  # [E, U, D]
        return torch.einsum("ue,ehd,eud->uh", gates, layer.experts.weight, seen)

    results = [output_and_gradients(layer, function, x) for function in (layer, plain)]
    for ours, others in zip(*results, strict=True):
        assert others.abs().max() > 0.1
        torch.testing.assert_close(ours, others, rtol=1e-4, atol=1e-4)


def seen_by_experts(layer, x, gates):
    """What each expert gets to see, [U, E, D]: its weights copy dimension d to output e * D + d, biases are 0."""
    experts, width = layer.bias.shape
    layer.weight.data.zero_()
    for expert in range(experts):
        for column in range(width):
            layer.weight.data[expert, expert * width + column, column] = 1.0
    layer.bias.data.zero_()
    return layer(x, gates).detach().view(len(x), experts, width)


@pytest.mark.parametrize("fast", [False, True])
def test_dropout_is_drawn_for_each_expert_and_unbiased(fast):
    torch.manual_seed(0)
    layer, x, gates = PWLayer(4, 16, 64, 0.2).train(), torch.ones(5000, 16), torch.ones(5000, 4)
    if fast:
        layer.forward = layers.fast.experts.forward.__get__(layer)
    seen = seen_by_experts(layer, x, gates)
    dropped = seen == 0
    assert seen.unique().tolist() == pytest.approx([0.0, 1 / 0.8])
    assert dropped.float().mean((0, 2)).tolist() == pytest.approx([0.2] * 4, abs=0.01)
    assert dropped.float().mean((0, 1)).tolist() == pytest.approx([0.2] * 16, abs=0.02)
    assert seen.mean().item() == pytest.approx(1.0, abs=0.01)
    for expert in range(1, 4):  # independent: both drop a number once in 25 times
        both = (dropped[:, 0] & dropped[:, expert]).float().mean().item()
        assert both == pytest.approx(0.04, abs=0.005)
    assert (seen_by_experts(layer, x, gates) != seen).any(), "drawn anew each time"
    torch.manual_seed(9)
    first = seen_by_experts(layer, x, gates)
    torch.manual_seed(9)
    assert torch.equal(seen_by_experts(layer, x, gates), first), "torch's seed fixes it"
    assert torch.equal(seen_by_experts(layer.eval(), x, gates), torch.ones(5000, 4, 16))


@pytest.mark.parametrize("make", [adaptor, fast_adaptor])
def test_the_output_in_training_is_right_on_average(make):
    layer = make(noise=False)
    x = torch.randn(3, 7)
    expected = layer.eval()(x)
    layer.train()
    mean = layer(x.repeat(20_000, 1)).view(20_000, 3, 5).mean(0)
    torch.testing.assert_close(mean, expected, rtol=0.05, atol=0.1)


# -- dropout and attention -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("probability", [0.1, 0.5])
def test_dropout_keeps_the_share_and_the_mean(probability):
    torch.manual_seed(3)
    layer, x = nn.Dropout(probability), torch.full((300, 700), 2.0, requires_grad=True)
    use_fast_parts(layer)
    dropped = layer(x)
    assert dropped.unique().tolist() == pytest.approx([0.0, 2 / (1 - probability)])
    assert (dropped == 0).float().mean().item() == pytest.approx(probability, abs=0.005)
    dropped.sum().backward()
    torch.testing.assert_close(x.grad * 2, dropped.detach())
    assert (layer(x) != dropped).any(), "drawn anew each time"
    torch.manual_seed(3)
    assert torch.equal(layer(x), dropped), "torch's seed fixes it"
    assert layer.eval()(x) is x


def test_every_dropout_of_the_model_is_the_fast_one(folder):
    model, _ = open_model("transductive_ft", folder)
    found = [module for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    assert len(found) == 1 + 2 * 3
    assert all(module.forward.__func__ is layers.fast.dropout.forward and module.p == 0.2 for module in found)


def test_attention_with_dropout_is_the_one_without_where_nothing_is_dropped(folder):
    model, dataset = open_model("inductive_ft", folder)
    batch = one_batch(dataset)
    vectors = [table.detach() for table in model.item_representations(batch.items)]
    expected = model.encode_scored(vectors, batch.scored)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 1e-9  # above 0, so that attention goes the way of training
    torch.testing.assert_close(model.encode_scored(vectors, batch.scored), expected, rtol=1e-4, atol=1e-5)


def test_the_last_state_alone_is_the_last_of_all_states(folder):
    model, _ = open_model("inductive_ft", folder)
    lengths = torch.tensor([1, 8, 5, 3])
    vectors = torch.randn(4, 8, model.hidden_size)
    results = []
    for states in (
        lambda x: model.encode_last(x, lengths),
        lambda x: model.encode_scored([x], [torch.arange(4) * 8 + lengths - 1]),
    ):
        x = vectors.clone().requires_grad_()
        output = states(x)
        own = gradients(model, (output * torch.arange(float(output.numel())).view_as(output).cos()).sum())
        results.append((output, x.grad, own))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-3, atol=1e-4)
    keys = [name for name in results[1][2] if not name.endswith("key.bias")]  # the keys' biases change nothing
    assert_same_gradients(*({key: part[2][key] for key in keys} for part in results), tolerance=1e-4)


def test_scores_do_not_depend_on_how_many_histories_are_scored_together(folder, monkeypatch):
    model, dataset = open_model("inductive_ft", folder)
    rows = dataset.build()[2][list(range(14))]
    assert len(rows["item_length"].unique()) > 3
    found = []
    for together in (256, 5, 1):
        monkeypatch.setattr(layers.fast.encoder, "_ROWS_AT_ONCE", together)
        with torch.no_grad():
            found.append(model.full_sort_predict(rows))
    for scores in found[1:]:
        torch.testing.assert_close(scores, found[0], rtol=1e-4, atol=1e-5)
