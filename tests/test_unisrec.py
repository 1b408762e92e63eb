"""The model: its layers against plain loops, and the same numbers however many predictions share a history."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from recbole.data.interaction import Interaction
from torch.utils.checkpoint import checkpoint

import layers.fast.catalogue
import layers.fast.encoder
import layers.ranking
from data import SequenceBatches, UniSRecDataset, batches
from data.sequences import DOMAIN_STRIDE
from engine.trainer import Trainer
from layers.adaptor import MoEAdaptor
from layers.item_to_item import spectral_vectors
from layers.items import distinct_ids
from layers.ranking import expected_ranks
from layers.whitening import Whitening
from tests.conftest import MAX_HISTORY, PUBLISHED, small_config
from tests.small_data import published_rows, write_features, write_splits
from tests.small_models import adaptor, assert_same_gradients, collect_gradients, gradients, one_batch, open_model
from unisrec import UniSRec

# -- adaptor -------------------------------------------------------------------------------------------------------


def test_gates_are_noisy_only_in_training():
    layer = adaptor()
    x = torch.randn(1, 7)
    layer.w_gate.data.zero_()
    still = layer.eval().gates(x.repeat(4000, 1))
    assert torch.equal(still, torch.full((4000, 3), 1 / 3))
    logs = layer.train().gates(x.repeat(4000, 1)).log()
    assert logs.exp().sum(1).allclose(torch.ones(4000))
    # log-gates differ by the noises of two experts: standard deviation softplus(x w) + 0.01 each
    spread = F.softplus(x @ layer.w_noise)[0] + 0.01
    for one, other in ((0, 1), (0, 2), (1, 2)):
        expected = (spread[one] ** 2 + spread[other] ** 2).sqrt().item()
        difference = logs[:, one] - logs[:, other]
        assert difference.std().item() == pytest.approx(expected, rel=0.05)
        assert difference.mean().item() == pytest.approx(0.0, abs=0.1 * expected)
    layer.noise = False
    assert torch.equal(layer.gates(x), layer.eval().gates(x))


# -- predictions that share a history ------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["inductive_ft", "transductive_ft"])
@pytest.mark.parametrize(("where", "predictions_per_row"), [("folder", 1), ("whole", 1), ("whole", 2), ("whole", 50)])
def test_loss_and_gradients_are_those_of_all_rows(stage, where, predictions_per_row, request):
    """Of RecBole's batch of all rows, the repeated ones twice."""
    model, dataset = open_model(stage, request.getfixturevalue(where))
    longest = np.diff(dataset.sequences("train").offsets).max() - 1
    assert dataset.max_history == (MAX_HISTORY if where == "folder" else longest) and longest > MAX_HISTORY
    batch = one_batch(dataset, predictions_per_row)
    assert batch.weights is not None
    loss = model.calculate_loss(batch)
    found = gradients(model, loss)
    train = dataset.build()[0]
    expected = model.calculate_loss(Interaction(train[np.arange(len(train))].interaction))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert_same_gradients(found, gradients(model, expected))


def test_a_shared_history_is_exact_up_to_the_window(folder):
    model, dataset = open_model("inductive_ft", folder)
    states = {}
    for predictions_per_row in (1, 4):
        batch = one_batch(dataset, predictions_per_row)
        with torch.no_grad():
            found = model.encode_scored(model.item_representations(batch.items), batch.scored)
        names = zip(batch.users.tolist(), batch.targets.tolist(), batch_histories(batch), strict=True)
        states[predictions_per_row] = dict(zip(names, found, strict=True))
    short = {name for name in states[1] if len(name[2]) <= MAX_HISTORY - 4}
    assert short and short <= states[4].keys() and states[4].keys() != states[1].keys()
    for name in states[1].keys() & states[4].keys():
        torch.testing.assert_close(states[4][name], states[1][name], rtol=1e-4, atol=1e-5)


def batch_histories(batch):
    """What stands before each prediction of a batch."""
    for items, scored in zip(batch.items, batch.scored, strict=True):
        for position in scored.tolist():
            row, column = divmod(position, items.size(1))
            yield tuple(items[row, : column + 1].tolist())


def test_pretraining_states_and_losses_are_the_same_however_many_share_a_history(whole):
    model, dataset = open_model("pretrain", whole)
    assert dataset.max_history == np.diff(dataset.sequences("train").offsets).max() - 1 > 2
    found = []
    for predictions_per_row in (50, 1):
        batch = one_batch(dataset, predictions_per_row)
        states = model.encode_scored(model.item_representations(batch.items), batch.scored)
        views = model.encode_scored(model.item_representations(batch.augmented_items), batch.augmented_scored)
        torch.testing.assert_close(states, views, rtol=1e-5, atol=1e-6)
        names = zip(batch.users.tolist(), batch.targets.tolist(), batch_histories(batch), strict=True)
        order = [place for _, place in sorted((name, place) for place, name in enumerate(names))]
        loss = model.calculate_loss(batch)
        found.append((states[order].detach(), loss.item(), gradients(model, loss)))
    (states, loss, grads), (row_states, row_loss, row_grads) = found
    torch.testing.assert_close(states, row_states, rtol=1e-4, atol=1e-5)
    assert loss == pytest.approx(row_loss, rel=1e-5)
    assert_same_gradients(grads, row_grads, tolerance=1e-4)


def test_pretraining_reads_features_by_domain_and_view(folder):
    """The loss put together by hand: adaptor over every item's own vector, dense, no deduplication."""
    model, dataset = open_model("pretrain", folder, **PUBLISHED)
    n = dataset.catalogue.n_items
    batch = one_batch(dataset, augment_ratios={"item_drop_ratio": 0.3, "item_drop_coefficient": 0.5})
    assert max(view.max() for view in batch.augmented_items) > n
    with torch.no_grad():
        table = F.pad(model.moe_adaptor(dataset.features.lookup(torch.arange(1, 2 * n + 1))), (0, 0, 1, 0))
        for ids in (batch.items, batch.augmented_items, [batch.targets]):
            for part, vectors in zip(ids, model.item_representations(ids), strict=True):
                torch.testing.assert_close(vectors[part > 0], table[part[part > 0]], rtol=1e-4, atol=1e-5)
        calls = []
        original = model.moe_adaptor.forward
        model.moe_adaptor.forward = lambda x: calls.append(len(x)) or original(x)
        model.calculate_loss(batch)
    everything = torch.cat([part.flatten() for part in [*batch.items, *batch.augmented_items, batch.targets]])
    distinct = everything.clamp(min=1).unique()  # padding stands for some item whose vector nobody looks at
    assert calls == [len(distinct)], "each distinct item of a batch is adapted once"


def domain_batches(dataset, size=10**6):
    """All predictions of each domain, by default in one batch."""
    sequences = dataset.sequences("train")
    batches = SequenceBatches(sequences, size, dataset.max_history, 50, by_domain=True, shuffle=False)
    return list(batches)


def test_pretraining_over_the_catalogue_of_a_domain(folder):
    """Cross entropy over the items of the domain alone, with the history bias, put together by hand."""
    model, dataset = open_model("pretrain", folder, pretrain_loss="catalogue", label_smoothing=0.2)
    counts = dataset.catalogue.counts
    found = domain_batches(dataset)
    assert len(found) == len(counts) > 1
    last = 0
    for batch, count in zip(found, counts, strict=True):
        first, last = last + 1, last + count
        assert all(first <= ids[ids > 0].min() and ids.max() <= last for ids in [*batch.items, batch.targets])
        with torch.no_grad():
            items = F.normalize(model.represent_items(torch.arange(first, last + 1)), dim=-1)
            logits = F.normalize(model.represent(batch)[0], dim=-1) @ items.T / model.temperature
            for row, history in enumerate(batch_histories(batch)):
                newest_first = history[::-1]
                for item in set(history):
                    logits[row, item - first] += model.history_bias.values()[min(newest_first.index(item), 7)]
            losses = F.cross_entropy(logits, batch.targets - first, reduction="none", label_smoothing=0.2)
            weights = torch.ones_like(losses) if batch.weights is None else batch.weights
            expected = (losses * weights).sum() / weights.sum()
        loss = model.calculate_loss(batch)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        loss.backward()
    assert (model.history_bias.weight.grad != 0).any() and (model.moe_adaptor.experts.weight.grad != 0).any()


def test_sampled_negatives_are_of_the_domain(folder):
    exact, dataset = open_model("pretrain", folder, pretrain_loss="catalogue")
    sampled, _ = open_model("pretrain", folder, pretrain_loss="catalogue", sampled_negatives=10**6)
    few, _ = open_model("pretrain", folder, pretrain_loss="catalogue", sampled_negatives=2)
    ends = np.cumsum(dataset.catalogue.counts)
    drawn, domains = 0, set()
    for batch in domain_batches(dataset, 5):
        assert sampled.calculate_loss(batch).item() == pytest.approx(exact.calculate_loss(batch).item(), rel=1e-5)
        domain = int(batch.users[0]) // DOMAIN_STRIDE
        first, last = ends[domain] - dataset.catalogue.counts[domain] + 1, ends[domain]
        with torch.no_grad():
            ids = few._candidates(batch).ids
        assert first <= ids.min() and ids.max() <= last
        own = distinct_ids([*batch.items, batch.targets], int(first))
        assert len(ids) == len(own) + min(2, last - first + 1 - len(own)) and set(own.tolist()) <= set(ids.tolist())
        drawn, domains = drawn + len(ids) - len(own), domains | {domain}
    assert drawn > 5 and len(domains) > 1


@pytest.mark.parametrize("stage", ["pretrain", "transductive_ft"])
def test_bfloat16_gives_nearly_the_same_loss_and_gradients(stage, folder):
    model, dataset = open_model(stage, folder)
    batch = one_batch(dataset)
    plain = model.calculate_loss(batch)
    expected = gradients(model, plain)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.calculate_loss(batch)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(plain.item(), rel=0.02)
    found = gradients(model, loss)
    both = [torch.cat([part[name].flatten() for name in expected]) for part in (found, expected)]
    assert F.cosine_similarity(*both, dim=0) > 0.99


# -- padding -------------------------------------------------------------------------------------------------------


def test_padding_gets_no_gradient(folder, monkeypatch):
    monkeypatch.setattr(batches, "_BUCKET_LENGTHS", (4, 8))
    model, dataset = open_model("inductive_ft", folder)
    batch = one_batch(dataset)
    padded = 0
    for items, scored in zip(batch.items, batch.scored, strict=True):
        vectors = torch.randn(*items.shape, 16, requires_grad=True)
        (model.encode_scored([vectors], [scored]) ** 2).sum().backward()
        assert (vectors.grad[items == 0] == 0).all()
        last = (items > 0).sum(1) - 1
        assert (vectors.grad[torch.arange(len(items)), last] != 0).any(-1).all()
        padded += (items == 0).sum()
    assert padded > 0


@pytest.mark.parametrize("stage", ["pretrain", "transductive_ft"])
def test_more_padding_changes_nothing(stage, folder):
    model, dataset = open_model(stage, folder, MAX_ITEM_LIST_LENGTH=30)
    batch = one_batch(dataset)
    loss = model.calculate_loss(batch)
    before = gradients(model, loss)
    for ids, scored in ((batch.items, batch.scored), (batch.augmented_items, batch.augmented_scored)):
        for bucket, items in enumerate(ids or []):
            width = items.size(1)
            ids[bucket] = F.pad(items, (0, 5))
            scored[bucket] = scored[bucket] // width * (width + 5) + scored[bucket] % width
    again = model.calculate_loss(batch)
    assert again.item() == pytest.approx(loss.item(), rel=1e-6)
    assert_same_gradients(gradients(model, again), before)


# -- predicting ----------------------------------------------------------------------------------------------------


def loader_batches(dataset, size=5):
    test = dataset.build()[2]
    return [test[np.arange(start, min(start + size, len(test)))] for start in range(0, len(test), size)]


@pytest.mark.parametrize("recipe", [{}, PUBLISHED], ids=["default", "published"])
@pytest.mark.parametrize("stage", ["inductive_ft", "transductive_ft"])
def test_scores_are_cosines_and_padding_is_out(stage, recipe, folder):
    """Plus the history bias and the item-to-item logits, in units of the temperature."""
    model, dataset = open_model(stage, folder, **recipe)
    if stage == "transductive_ft" and not recipe:
        model.item_to_item.fit(dataset.sequences("train"))
        model.item_to_item.factor.fill_(7.0)
        model.item_to_item.decay.fill_(0.8)
    (rows,) = loader_batches(dataset, 100)
    with torch.no_grad():
        scores = model.full_sort_predict(rows)
        table = model.moe_adaptor(model.plm_embedding)
        if stage == "transductive_ft":
            table = table + model.item_embedding.weight[1:]
        states = model(rows["item_id_list"], rows["item_length"])
        for row in range(len(rows)):
            expected = F.cosine_similarity(states[row : row + 1], table)
            if not recipe:
                history = rows["item_id_list"][row, : rows["item_length"][row]].flip(0).tolist()
                for item in set(history):
                    bias = model.history_bias.values()[min(history.index(item), 7)]
                    expected[item - 1] += model.temperature * bias
            if model.item_to_item is not None:
                one = rows["item_id_list"][row : row + 1], rows["item_length"][row : row + 1]
                logits = 7.0 * model.item_to_item(*one, 0.8)[0]
                assert logits.abs().max() > 0.1
                expected += model.temperature * logits
            torch.testing.assert_close(scores[row, 1:], expected, rtol=1e-4, atol=1e-5)
        assert torch.isneginf(scores[:, 0]).all() and scores.shape == (14, 41)
        given = scores.gather(1, rows["item_id"][:, None])[:, 0]
        torch.testing.assert_close(model.predict(rows), given, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stage", ["inductive_ft", "transductive_ft"])
def test_the_table_of_items_is_made_once_an_evaluation(stage, folder):
    model, dataset = open_model(stage, folder)
    calls = []
    original = model.item_table
    model.item_table = lambda: calls.append(1) or original()
    batches = loader_batches(dataset)
    assert len(batches) == 3
    with torch.no_grad():
        before = [model.full_sort_predict(batch) for batch in batches]
        model.predict(batches[0])
        assert len(calls) == 1
        model.train()
        model.moe_adaptor.w_gate.data.normal_()
        model.moe_adaptor.experts.weight.data.normal_()
        model.eval()
        after = [model.full_sort_predict(batch) for batch in batches]
        assert len(calls) == 2
    assert all((old != new).any() for old, new in zip(before, after, strict=True))
    fresh, _ = open_model(stage, folder)
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        for batch, scores in zip(batches, after, strict=True):
            assert torch.equal(fresh.full_sort_predict(batch), scores)


@pytest.mark.parametrize("scores_at_once", [1 << 23, 14 * 7, 1])
def test_ranks_in_blocks_are_those_of_all_scores(scores_at_once, folder, monkeypatch):
    model, dataset = open_model("transductive_ft", folder)
    model.item_to_item.fit(dataset.sequences("train"))
    model.item_to_item.factor.fill_(5.0)
    monkeypatch.setattr(layers.ranking, "_SCORES_AT_ONCE", scores_at_once)
    (rows,) = loader_batches(dataset, 100)
    with torch.no_grad():
        scores = model.full_sort_predict(rows)
    expected = 1 + (scores > scores.gather(1, rows["item_id"][:, None])).sum(1).double()
    assert torch.equal(model.ranks(rows), expected) and len(expected.unique()) > 5
    assert torch.equal(expected_ranks(scores, rows["item_id"]), expected)


@pytest.mark.parametrize("scores_at_once", [1 << 23, 14 * 7])
def test_items_with_the_same_text_share_their_ranks(scores_at_once, folder, monkeypatch):
    """Half of the other items with the target's text precede it, on every path."""
    model, dataset = open_model("inductive_ft", folder, **PUBLISHED)
    monkeypatch.setattr(layers.ranking, "_SCORES_AT_ONCE", scores_at_once)
    (rows,) = loader_batches(dataset, 100)
    same = torch.arange(0, 40, 3)  # 14 of the 40 items
    model.plm_embedding = model.plm_embedding.clone()
    model.plm_embedding[same] = model.plm_embedding[0].clone()
    with torch.no_grad():
        scores = model.full_sort_predict(rows)
    ranks = model.ranks(rows)
    torch.testing.assert_close(ranks, expected_ranks(scores, rows["item_id"]))
    tied = torch.isin(rows["item_id"] - 1, same)
    assert tied.any() and not tied.all()
    for rank, row, target in zip(ranks[tied], scores[tied], rows["item_id"][tied], strict=True):
        assert rank == 1 + (row > row[target] + 1e-5).sum() + 13 / 2
    model.plm_embedding[:] = 0.0
    for parameter in model.moe_adaptor.parameters():
        parameter.data.zero_()
    model.train().eval()
    assert (model.ranks(rows) == 1 + 39 / 2).all(), "a constant model ranks every target in the middle"


def test_scores_that_are_nan_have_no_rank(folder):
    model, dataset = open_model("transductive_ft", folder)
    (rows,) = loader_batches(dataset, 100)
    assert not model.ranks(rows).isnan().any()
    target = rows["item_id"][0].item()
    model.train().eval()
    model.item_embedding.weight.data[target] = torch.nan
    assert model.ranks(rows).isnan().all(), "the item is a candidate of every row"


def test_scores_have_gradients_where_they_are_asked_for(folder):
    """Also after an evaluation, whose table has none."""
    model, dataset = open_model("inductive_ft", folder)
    (rows,) = loader_batches(dataset, 100)
    found = []
    for evaluate_first in (False, True):
        model.eval()
        if evaluate_first:
            with torch.no_grad():
                model.full_sort_predict(rows)
        found.append(gradients(model, model.full_sort_predict(rows)[:, 1:].square().sum()))
    assert_same_gradients(found[1], found[0])


# -- large catalogues ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["inductive_ft", "transductive_ft"])
@pytest.mark.parametrize("predictions_per_row", [1, 50])
def test_sampled_softmax_of_the_whole_catalogue_is_the_exact_one(stage, predictions_per_row, folder):
    """Loss and every gradient; those of the id embedding are sparse."""
    results = []
    for count in (0, 1000):
        model, dataset = open_model(stage, folder, sampled_negatives=count)
        loss = model.calculate_loss(one_batch(dataset, predictions_per_row))
        found = gradients(model, loss)
        if stage == "transductive_ft":
            assert found["item_embedding.weight"].is_sparse == bool(count)
            found["item_embedding.weight"] = found["item_embedding.weight"].to_dense()
        results.append((loss.item(), found))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-5)
    assert_same_gradients(results[1][1], results[0][1])


@pytest.mark.parametrize("sampled", [0, 1000])
def test_items_without_interactions_are_in_no_softmax(sampled, folder):
    options = {"holdout_items": 0.3, "sampled_negatives": sampled, "label_smoothing": 0.2, "history_bias": 0}
    model, dataset = open_model("transductive_ft", folder, **options)
    everything, _ = open_model("transductive_ft", folder, unseen_negatives=True, **options)
    sequences, batch = dataset.sequences("train"), one_batch(dataset)
    seen = np.unique(sequences.items)
    assert 5 < len(seen) < model.n_items - 1
    for each in (model, everything):
        each.note_unseen(sequences)
    with torch.no_grad():
        items = F.normalize(model.represent_items(torch.from_numpy(seen)), dim=-1)
        logits = F.normalize(model.represent(batch)[0], dim=-1) @ items.T / model.temperature
        targets = torch.searchsorted(torch.from_numpy(seen), batch.targets)
        losses = F.cross_entropy(logits, targets, reduction="none", label_smoothing=0.2)
        weights = torch.ones_like(losses) if batch.weights is None else batch.weights
    loss = model.calculate_loss(batch)
    assert loss.item() == pytest.approx(((losses * weights).sum() / weights.sum()).item(), rel=1e-5)
    changed = gradients(model, loss)["item_embedding.weight"].to_dense().any(1)
    assert changed.nonzero()[:, 0].tolist() == seen.tolist()
    changed = gradients(everything, everything.calculate_loss(batch))["item_embedding.weight"].to_dense().any(1)
    assert changed.sum() == model.n_items - 1


@pytest.mark.parametrize("stage", ["inductive_ft", "transductive_ft"])
def test_the_bias_of_unseen_items_is_added_to_their_logits(stage, folder):
    plain, dataset = open_model(stage, folder, holdout_items=0.3)
    model, _ = open_model(stage, folder, holdout_items=0.3, unseen_bias=2.0)
    model.load_state_dict(plain.state_dict() | {"unseen_bias": torch.tensor(2.0)})
    unseen = np.setdiff1d(np.arange(1, model.n_items), dataset.sequences("train").items)
    assert len(unseen) > 5
    rows = dataset.build()[2][slice(None)]
    with torch.no_grad():
        expected = plain.full_sort_predict(rows)
        torch.testing.assert_close(model.full_sort_predict(rows), expected)
        for each in (plain, model):
            each.note_unseen(dataset.sequences("train"))
        torch.testing.assert_close(plain.full_sort_predict(rows), expected)
        expected[:, unseen] += 2.0 * model.temperature
        torch.testing.assert_close(model.full_sort_predict(rows), expected)
        torch.testing.assert_close(model.predict(rows), expected.gather(1, rows["item_id"][:, None])[:, 0])
        torch.testing.assert_close(model.ranks(rows), expected_ranks(expected, rows["item_id"]))
        assert not torch.equal(model.ranks(rows), plain.ranks(rows))


def test_in_pretraining_each_domain_leaves_out_its_own_items(folder):
    model, dataset = open_model("pretrain", folder, pretrain_loss="catalogue", holdout_items=0.3)
    model.note_unseen(dataset.sequences("train"))
    ends, seen, found = np.cumsum(dataset.catalogue.counts), np.unique(dataset.sequences("train").items), []
    for batch in domain_batches(dataset):
        domain = int(batch.users[0]) // DOMAIN_STRIDE
        first = ends[domain] - dataset.catalogue.counts[domain] + 1
        expected = seen[(first <= seen) & (seen <= ends[domain])]
        found.append(model._candidates(batch).ids.tolist())
        assert found[-1] == expected.tolist() and len(expected) < dataset.catalogue.counts[domain]
    assert len(found) > 1


@pytest.mark.parametrize("stage", ["inductive_ft", "transductive_ft"])
def test_a_sampled_step_adapts_and_learns_only_what_it_names_and_draws(stage, folder, monkeypatch):
    model, dataset = open_model(stage, folder, sampled_negatives=5)
    one = SequenceBatches(dataset.sequences("train"), 6, dataset.max_history, dataset.max_history, seed=1)
    batch = next(iter(one))
    named = torch.cat([items.flatten() for items in batch.items] + [batch.targets]).clamp(min=1).unique()
    assert len(named) + 5 < 40, "or the test shows nothing"
    adapted = []
    monkeypatch.setattr(MoEAdaptor, "forward", lambda self, x: adapted.append(len(x)) or self.experts(x, self.gates(x)))
    losses = []
    for seed in range(3):
        torch.manual_seed(seed)
        loss = model.calculate_loss(batch)
        losses.append(loss.item())
    assert adapted == [len(named) + 5] * 3 and len(set(losses)) == 3
    loss.backward()
    if stage == "transductive_ft":
        touched = model.item_embedding.weight.grad.coalesce().indices()[0]
        assert len(touched) == len(named) + 5 and set(named.tolist()) <= set(touched.tolist()) and 0 not in touched


@pytest.mark.parametrize("stage", ["inductive_ft", "transductive_ft"])
def test_a_large_catalogue_is_adapted_in_parts(stage, folder, monkeypatch):
    model, dataset = open_model(stage, folder)
    batch, (rows,) = one_batch(dataset), loader_batches(dataset, 100)
    results = []
    for size in (1 << 16, 7):
        monkeypatch.setattr(layers.fast.catalogue, "_ITEMS_AT_ONCE", size)
        monkeypatch.setattr(layers.fast.catalogue, "_ITEMS_KEPT", size)
        with torch.no_grad():
            model.eval()
            scores = model.full_sort_predict(rows)
        loss = model.calculate_loss(batch)
        results.append((scores, loss.item(), gradients(model, loss)))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-5, atol=1e-6)
    assert results[1][1] == pytest.approx(results[0][1], rel=1e-6)
    assert_same_gradients(results[1][2], results[0][2])


def test_what_is_adapted_again_gets_the_same_dropout_and_noise(folder, monkeypatch):
    """In training, the gradients of a catalogue adapted in parts and again are those of parts that were kept."""
    model, _ = open_model("inductive_ft", folder, adaptor_dropout_prob=0.5)
    monkeypatch.setattr(layers.fast.catalogue, "_ITEMS_KEPT", 7)
    model.train()
    results = []
    for again in (True, False):
        monkeypatch.setattr(
            layers.fast.catalogue, "checkpoint", checkpoint if again else lambda f, x, use_reentrant: f(x)
        )
        torch.manual_seed(3)
        table = model.item_table()
        model.zero_grad()
        (table * torch.arange(16.0).sin()).sum().backward()
        results.append((table, [parameter.grad.clone() for parameter in model.moe_adaptor.parameters()]))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(*pair) for pair in zip(results[0][1], results[1][1], strict=True))
    assert all(gradient.abs().max() > 0 for gradient in results[0][1])


# -- batches in parts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["pretrain", "inductive_ft", "transductive_ft"])
def test_a_batch_in_parts_has_the_gradients_of_the_batch(stage, folder, tmp_path):
    """With dropout and noise: of the same draws, all kept in one graph. Without any: of the batch in one."""
    for training in (True, False):
        model, dataset = open_model(stage, folder, learner="sgd", learning_rate=1e-9)
        trainer = Trainer(dataset.config, model, str(tmp_path / "x.pth"))
        batch = one_batch(dataset)
        parts = batch.split(3)
        assert len(parts) == 3
        model.train(training)
        torch.manual_seed(5)
        if training:
            represented = [model.represent(part) for part in parts]
            loss = model.loss(batch, [torch.cat(column) for column in zip(*represented, strict=True)])
        else:
            loss = model.calculate_loss(batch)
        expected = gradients(model, loss)
        after = torch.get_rng_state()
        torch.manual_seed(5)
        dataset.config["accumulate"] = 3
        try:
            assert trainer.train_step(batch) == pytest.approx(loss.item(), rel=1e-5)
        finally:
            dataset.config["accumulate"] = 1
        assert torch.equal(torch.get_rng_state(), after), "the next step draws new numbers"
        assert_same_gradients(collect_gradients(model), expected)


# -- history bias ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("repeats", [False, True])
def test_the_history_bias_learns_whether_people_buy_again(repeats, tmp_path):
    """In a shop where about seven of ten targets are items of the history, and in one where none is."""
    random = np.random.default_rng(0)
    histories = []
    for _ in range(60):
        order = random.permutation(40).tolist()
        history = [order.pop()]
        while len(history) < 9:
            again = repeats and random.random() < 0.7
            history.append(history[-random.integers(1, min(4, len(history) + 1))] if again else order.pop())
        histories.append(history)
    (tmp_path / "Small").mkdir()
    write_splits(str(tmp_path / "Small"), "Small", published_rows(histories, 50))
    write_features(str(tmp_path / "Small" / "Small.feat1CLS"), 40)
    still = {"hidden_dropout_prob": 0.0, "attn_dropout_prob": 0.0}
    dataset = UniSRecDataset(small_config("inductive_ft", "Small", str(tmp_path), **still))
    torch.manual_seed(0)
    model = UniSRec(dataset.config, dataset).train()
    batch, optimizer = one_batch(dataset), torch.optim.Adam(model.parameters(), 1e-3)
    shares = []  # of the probability that the model gives to the items of the history
    (rows,) = loader_batches(dataset, 100)
    for step in range(41):
        if step in (0, 40):
            with torch.no_grad():
                probabilities = (model.eval().full_sort_predict(rows) / model.temperature).softmax(1)
            in_history = F.one_hot(rows["item_id_list"], 41).amax(1)
            in_history[:, 0] = 0
            shares.append((probabilities * in_history).sum(1).mean().item())
            model.train()
        optimizer.zero_grad()
        model.calculate_loss(batch).backward()
        optimizer.step()
    assert shares[0] > 0.9, "at first the model recommends what it has seen"
    assert shares[1] == pytest.approx(0.7 if repeats else 0.0, abs=0.1)


# -- what is trained -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["inductive_ft", "transductive_ft"])
def test_a_fixed_encoder_is_positions_and_transformer_and_nothing_else(stage, folder):
    model, dataset = open_model(stage, folder)
    assert all(parameter.requires_grad for parameter in model.parameters())
    model.freeze_encoder()
    free = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    expected = {"LayerNorm.weight", "LayerNorm.bias", "moe_adaptor.w_gate", "moe_adaptor.w_noise"}
    expected |= {"moe_adaptor.experts.weight", "moe_adaptor.experts.bias"}
    expected |= {"history_mean.recency", "history_mean.weight", "history_bias.weight"}
    assert free == expected | ({"item_embedding.weight"} if stage == "transductive_ft" else set())
    frozen = {name.split(".")[0] for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {"position_embedding", "trm_encoder"}
    model.calculate_loss(one_batch(dataset)).backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert without == {name for name, p in model.named_parameters() if not p.requires_grad} | {"moe_adaptor.w_noise"}


def test_each_stage_has_the_parameters_of_the_published_model(folder):
    shared = None
    for stage in ("pretrain", "inductive_ft", "transductive_ft"):
        model, dataset = open_model(stage, folder, **PUBLISHED)
        state = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        ids = state.pop("item_embedding.weight", None)
        assert ids == ((41, 16) if stage == "transductive_ft" else None)
        shared = shared or state
        assert state == shared, "features are no part of a checkpoint"
    assert state["moe_adaptor.experts.weight"] == (3, 16, 24) and state["position_embedding.weight"] == (50, 16)


def test_the_parts_that_are_not_in_the_paper_add_these_tensors(folder):
    published, _ = open_model("transductive_ft", folder, **PUBLISHED)
    model, _ = open_model("transductive_ft", folder)
    added = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in published.state_dict():
        del added[name]
    whitening = {"whitening.0.mean": (24,), "whitening.0.matrix": (24, 24)}
    history = {"history_mean.recency": (50,), "history_mean.weight": (), "history_bias.weight": (8,)}
    weights = {"columns": (40, 40), "values": (40, 40), "factor": (), "decay": ()}  # of 40 items, all are kept
    history["unseen_bias"] = ()
    assert added == whitening | history | {f"item_to_item.{name}": shape for name, shape in weights.items()}


def test_texts_are_whitened_by_domain(folder):
    model, dataset = open_model("pretrain", folder)
    counts, n = dataset.catalogue.counts, dataset.catalogue.n_items
    ids = torch.arange(1, 2 * n + 1)
    texts = dataset.features.lookup(ids)
    whitened = model.whitening(texts, ids)
    start = 0
    for table in texts[:n].split(counts):
        layer = Whitening(24).fit(table)
        for view in (0, n):
            rows = slice(view + start, view + start + len(table))
            torch.testing.assert_close(whitened[rows], layer(texts[rows]))
        start += len(table)
    torch.testing.assert_close(model.represent_items(ids), model.moe_adaptor(whitened))


def test_ids_start_from_the_training_sequences(folder):
    model, dataset = open_model("transductive_ft", folder)
    padding = model.item_embedding.weight[0].clone()
    model.start_ids(dataset.sequences("train"))
    expected = 0.3 * spectral_vectors(dataset.sequences("train"), 40, 16)
    assert torch.equal(model.item_embedding.weight[1:], expected)
    assert torch.equal(model.item_embedding.weight[0], padding)
    published, _ = open_model("transductive_ft", folder, **PUBLISHED)
    before = published.item_embedding.weight.clone()
    published.start_ids(dataset.sequences("train"))
    assert torch.equal(published.item_embedding.weight, before)


def test_in_training_an_item_may_lose_its_whole_id_embedding(folder):
    model, _ = open_model("transductive_ft", folder, id_dropout_prob=0.4, adaptor_dropout_prob=0.0)
    model.moe_adaptor.noise = False
    ids = torch.arange(1, 41)
    texts = model.moe_adaptor(model.plm_embedding)
    whole = texts + model.item_embedding(ids)
    assert torch.equal(model.represent_items(ids), whole)
    model.train()
    torch.manual_seed(0)
    lost = torch.cat([(model.represent_items(ids) == texts).all(1) for _ in range(50)])
    assert lost.float().mean().item() == pytest.approx(0.4, abs=0.05)
    kept = ~lost[-40:]
    torch.manual_seed(0)
    for _ in range(50):
        vectors = model.represent_items(ids)
    torch.testing.assert_close(vectors[kept], whole[kept])


def test_a_cosine_start_keeps_the_cosines_of_the_texts():
    torch.manual_seed(0)
    texts = torch.randn(50, 24)
    cosines = F.normalize(texts, dim=-1) @ F.normalize(texts, dim=-1).T
    kept = []
    for start in ("cosine", "normal"):
        vectors = F.normalize(MoEAdaptor(2, 24, 32, 0.2, start=start).eval()(texts), dim=-1)
        kept.append((vectors @ vectors.T - cosines).abs().max().item())
    assert kept[0] < 0.05 < 0.3 < kept[1]


def test_features_are_part_of_no_checkpoint(folder):
    model, dataset = open_model("inductive_ft", folder, **PUBLISHED)
    assert torch.equal(model.plm_embedding, dataset.features.table()) and "plm_embedding" not in model.state_dict()
    assert not any(parameter is model.plm_embedding for parameter in model.parameters())
