"""Batches of sequences: every prediction once an epoch, however many share a history, and among how many processes."""

from collections import Counter

import numpy as np
import pytest
import torch

from data import SequenceBatches, Sequences, UniSRecDataset
from data.batches import cut_segments
from data.sequences import DOMAIN_STRIDE
from tests.conftest import small_config
from tests.small_data import write_mixture

AUGMENT = {"item_drop_ratio": 0.2, "item_drop_coefficient": 0.9}


def make_sequences(lengths, skip=0.0, seed=0, repeated=0.0):
    """Sequences of distinct items 1, 2, 3, ..., so that a target names its place; some positions are not scored."""
    random = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    weights = (random.random(offsets[-1]) >= skip).astype(np.uint32)
    weights[random.random(offsets[-1]) < repeated] *= 2
    weights[offsets[:-1]] = 0
    users = np.arange(len(lengths)) + 1000
    return Sequences(offsets, np.arange(1, offsets[-1] + 1, dtype=np.int32), weights, users, cut_length=50)


def random_sequences(count=60, longest=130, **options):
    return make_sequences(np.random.default_rng(1).integers(2, longest + 1, count), **options)


def predictions(batch):
    """What a batch predicts, as (user, context, target, weight), a context being all that the encoder has read."""
    found, place = [], 0
    for items, scored in zip(batch.items, batch.scored, strict=True):
        assert items.dtype == scored.dtype == torch.int64
        for position in scored.tolist():
            row, column = divmod(position, items.size(1))
            context = tuple(items[row, : column + 1].tolist())
            assert 0 not in context
            weight = 1.0 if batch.weights is None else batch.weights[place].item()
            found.append((batch.users[place].item(), context, batch.targets[place].item(), weight))
            place += 1
    assert place == len(batch) == len(batch.targets) == len(batch.users)
    return found


def epoch_of(batches):
    return [prediction for batch in batches for prediction in predictions(batch)]


def expected_predictions(sequences, max_history):
    """The slow reference: each prediction with its newest `max_history` items."""
    found = []
    for user in range(len(sequences)):
        start, end = sequences.offsets[user : user + 2]
        for place in range(start + 1, end):
            if sequences.weights[place]:
                context = tuple(sequences.items[max(start, place - max_history) : place].tolist())
                target, weight = int(sequences.items[place]), float(sequences.weights[place])
                found.append((int(sequences.users[user]), context, target, weight))
    return found


@pytest.mark.parametrize(
    ("max_history", "predictions_per_row"), [(1, 1), (1, 5), (7, 1), (50, 1), (130, 2), (130, 7), (130, 130)]
)
def test_each_prediction_sees_its_newest_items(max_history, predictions_per_row):
    """One prediction per row, or no history longer than `max_history`."""
    sequences = random_sequences(skip=0.2, repeated=0.1)
    batches = SequenceBatches(sequences, 200, max_history, predictions_per_row)
    assert Counter(epoch_of(batches)) == Counter(expected_predictions(sequences, max_history))


@pytest.mark.parametrize(("max_history", "predictions_per_row"), [(50, 2), (50, 25), (50, 50), (12, 5), (12, 20)])
def test_every_prediction_comes_once_and_sees_enough(max_history, predictions_per_row):
    sequences = random_sequences(skip=0.2)
    found = epoch_of(SequenceBatches(sequences, 200, max_history, predictions_per_row))
    full = {target: (user, context) for user, context, target, _ in expected_predictions(sequences, max_history)}
    assert Counter(target for _, _, target, _ in found) == Counter(full.keys())
    for user, context, target, _ in found:
        assert user == full[target][0]
        assert context == full[target][1][-len(context) :], "the items right before the target"
        assert len(context) >= min(len(full[target][1]), max(1, max_history - predictions_per_row + 1))


@pytest.mark.parametrize(
    ("predictions_per_row", "read"), [(1, 8725), (2, 650 + 75 * 50), (25, 25 + 7 * 50), (50, 4 * 50)]
)
def test_predictions_that_share_a_history_cost_less(predictions_per_row, read):
    segments = cut_segments(make_sequences([200] * 5), 50, predictions_per_row)
    lengths = segments.last_targets - segments.starts
    assert (lengths <= 50).all() and (segments.last_targets - segments.first_targets < predictions_per_row).all()
    assert lengths.sum() == 5 * read


def test_segments_without_predictions_are_not_encoded():
    sequences = make_sequences([10, 10, 120])
    sequences.weights[:10] = 0  # the first sequence predicts nothing
    sequences.weights[-50:] = 0  # nor does the end of the last
    segments = cut_segments(sequences, 50, 25)
    assert segments.sequences.tolist() == [1, 2, 2, 2]
    weights = np.cumsum(sequences.weights)
    predictions = weights[segments.last_targets] - weights[segments.first_targets - 1]
    assert predictions.tolist() == segments.predictions.tolist()
    assert segments.predictions.min() > 0


def test_batches_are_near_the_size_asked_for():
    sequences = random_sequences(count=400, longest=60)
    for size in (64, 500, 3000):
        batches = SequenceBatches(sequences, size, 50, 50)
        sizes = [len(batch) for batch in batches]
        assert len(sizes) == len(batches) == round(sequences.n_predictions / size)
        mean = sequences.n_predictions / len(sizes)
        assert abs(mean - size) <= size / (2 * len(sizes)) + 1
        assert all(abs(got - mean) < batches.segments.predictions.max() for got in sizes)


@pytest.mark.parametrize("size", [1, 3, 10, 49])
def test_a_batch_smaller_than_a_sequence_still_holds_one(size):
    batches = SequenceBatches(make_sequences([50, 2, 50, 3, 3, 40, 2]), size, 50, 50)
    sizes = [len(batch) for batch in batches]
    assert len(sizes) == len(batches) and min(sizes) > 0
    assert sum(sizes) == batches.sequences.n_predictions


@pytest.mark.parametrize("predictions_per_row", [1, 50])
def test_one_batch_for_a_data_set_smaller_than_it(predictions_per_row):
    batches = SequenceBatches(make_sequences([3, 4]), 10_000, 50, predictions_per_row)
    assert len(batches) == 1 and [len(batch) for batch in batches] == [5]


def flat(batch):
    """All tensors of a batch."""
    augmented = (batch.augmented_items or []) + (batch.augmented_scored or [])
    return [*batch.items, *batch.scored, *augmented, batch.targets, batch.users]


def equal(left, right):
    left, right = [t for batch in left for t in flat(batch)], [t for batch in right for t in flat(batch)]
    return len(left) == len(right) and all(map(torch.equal, left, right))


def test_seed_and_epoch_fix_the_batches():
    sequences = random_sequences()

    def epoch(number, seed=1):
        batches = SequenceBatches(sequences, 300, 50, 25, seed=seed, augment_ratios=AUGMENT, n_items=10_000)
        batches.set_epoch(number)
        return list(batches)

    assert equal(epoch(0), epoch(0)) and equal(epoch(3), epoch(3))
    for other in (epoch(1), epoch(0, seed=2)):  # in another order, not only augmented anew
        assert not torch.equal(*(torch.cat([batch.targets for batch in batches]) for batches in (epoch(0), other)))
    assert Counter(p for batch in epoch(0) for p in predictions(batch)) == Counter(
        p for batch in epoch(1) for p in predictions(batch)
    )


def test_the_second_view_differs_between_epochs_and_ranks():
    sequences = make_sequences([50] * 40)

    def views(epoch, rank):
        options = dict(augment_ratios=AUGMENT, n_items=10_000, shuffle=False)
        batches = SequenceBatches(sequences, 10_000, 50, 50, rank=rank, world_size=2, **options)
        batches.set_epoch(epoch)
        (batch,) = batches
        return [(view > 0).tolist() for view in batch.augmented_items[0]], batch.items[0]

    (first, items), (again, _), (later, _), (other, other_items) = views(0, 0), views(0, 0), views(1, 0), views(0, 1)
    assert first == again and first != later
    assert first != other and items.shape == other_items.shape, "ranks must not share their draws"


def test_the_second_view_belongs_to_the_first():
    batches = SequenceBatches(random_sequences(), 300, 50, 25, augment_ratios=AUGMENT, n_items=10_000)
    for batch in batches:
        for items, scored, view, places in zip(
            batch.items, batch.scored, batch.augmented_items, batch.augmented_scored, strict=True
        ):
            assert view.shape == items.shape and places.shape == scored.shape
            assert torch.equal(places // view.size(1), scored // items.size(1)), "of the same sequence"
            assert (places <= scored).all() and (view.flatten()[places] > 0).all()
            for row, changed in zip(items.tolist(), view.tolist(), strict=True):
                assert {(item - 1) % 10_000 + 1 for item in changed if item} <= set(row)


@pytest.mark.parametrize("world_size", [2, 3])
def test_all_ranks_together_predict_what_one_process_predicts(world_size):
    sequences = random_sequences(repeated=0.1)
    alone = list(SequenceBatches(sequences, 300, 50, 25))
    ranks = [
        list(SequenceBatches(sequences, 300, 50, 25, rank=rank, world_size=world_size)) for rank in range(world_size)
    ]
    assert all(len(own) == len(alone) for own in ranks), "every process takes every step"
    for number, whole in enumerate(alone):
        parts = [predictions(own[number]) for own in ranks]
        assert Counter(p for part in parts for p in part) == Counter(predictions(whole))


def test_a_rank_that_gets_nothing_encodes_a_sequence_and_scores_nothing():
    sequences = make_sequences([4, 5], repeated=0.5)
    options = dict(augment_ratios=AUGMENT, n_items=100, world_size=3)
    sizes = []
    for rank in range(3):
        (batch,) = SequenceBatches(sequences, 100, 50, 50, rank=rank, **options)
        sizes.append(len(predictions(batch)))
        assert sum(items.size(0) for items in batch.items) == 1 and (batch.items[0] > 0).any()
        assert batch.weights is not None and len(batch.weights) == sizes[-1]
        assert [len(places) for places in batch.augmented_scored] == [len(places) for places in batch.scored]
    assert sizes[2] == 0 and sum(sizes) == 7


@pytest.mark.parametrize("size", [20, 150, 10**6])
def test_batches_of_one_domain(size):
    """Three domains of different size; each batch holds users of one, and they come in random order."""
    sequences = random_sequences()
    sequences.users[10:45] += DOMAIN_STRIDE
    sequences.users[45:] += 2 * DOMAIN_STRIDE
    batches = SequenceBatches(sequences, size, 50, 25, by_domain=True)
    found = list(batches)
    domains = [set((batch.users // DOMAIN_STRIDE).tolist()) for batch in found]
    assert all(len(own) == 1 for own in domains) and len(found) == len(batches) >= 3
    order = [own.pop() for own in domains]
    assert set(order) == {0, 1, 2} and (size > 150 or order != sorted(order))
    everything = SequenceBatches(sequences, size, 50, 25)
    assert Counter(epoch_of(batches)) == Counter(epoch_of(everything))
    assert size > 150 or max(map(len, found)) < size + 50
    again = SequenceBatches(sequences, size, 50, 25, by_domain=True)
    again.skip(2)
    assert equal(list(again), found[2:])
    again.set_epoch(1)
    assert size > 150 or [set((batch.users // DOMAIN_STRIDE).tolist()) for batch in again] != [{one} for one in order]
    ranks = [SequenceBatches(sequences, size, 50, 25, rank=rank, world_size=2, by_domain=True) for rank in (0, 1)]
    for one, other, whole in zip(*ranks, found, strict=True):
        assert Counter(predictions(one) + predictions(other)) == Counter(predictions(whole))


def test_sequences_are_padded_to_the_longest_of_their_bucket_only():
    batches = SequenceBatches(random_sequences(count=300, longest=51), 5000, 50, 50)
    for batch in batches:
        assert len(batch.items) > 3
        for items in batch.items:
            lengths = (items > 0).sum(1)
            assert lengths.max() == items.size(1)
            assert lengths.min() > items.size(1) // 2 - 3
            assert (items[torch.arange(items.size(1)) < lengths[:, None]] > 0).all(), "padded on the right"


def test_weights_are_left_out_where_all_count_once():
    (batch,) = SequenceBatches(make_sequences([5, 6]), 100, 50, 50)
    assert batch.weights is None
    (batch,) = SequenceBatches(make_sequences([5, 6], repeated=1.0), 100, 50, 50)
    assert batch.weights.dtype == torch.float32 and batch.weights.tolist() == [2.0] * 9


def test_a_batch_moves_as_a_whole():
    (batch,) = SequenceBatches(make_sequences([5, 6]), 100, 50, 50, augment_ratios=AUGMENT, n_items=100)
    moved = batch.to("meta")
    assert {tensor.device.type for tensor in flat(moved)} == {"meta"} and moved.weights is None


# -- parts of a batch ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 7, 100, 1000])
@pytest.mark.parametrize("augmented", [False, True])
def test_the_parts_of_a_batch_are_the_batch(count, augmented, tmp_path):
    """In order, each row and each prediction once, with its own view."""
    write_mixture(tmp_path, users=9, cut_length=6, longest=14)
    sequences = UniSRecDataset(small_config("pretrain", "Mix", str(tmp_path))).sequences("train")
    options = {"augment_ratios": {"item_drop_ratio": 0.4, "item_drop_coefficient": 0.5}} if augmented else {}
    (batch,) = SequenceBatches(sequences, 10**6, 6, 2, n_items=29, **options)
    parts = batch.split(count)
    rows = sum(len(items) for items in batch.items)
    assert [sum(map(len, part.items)) for part in parts] == expected_rows(batch, count)
    assert sum(len(part) for part in parts) == len(batch)
    for name in ("targets", "users"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name))
    for items, scored in (("items", "scored"), ("augmented_items", "augmented_scored"))[: 1 + augmented]:
        assert sum(len(bucket) for part in parts for bucket in getattr(part, items)) == rows
        assert torch.equal(seen(parts, items, scored), seen([batch], items, scored))
    positions = [sum(items.numel() for items in part.items) for part in parts]
    assert max(positions) - min(positions) <= 2 * max(items.size(1) for items in batch.items)


def expected_rows(batch, count):
    """The rows of each part: a part ends with the row that reaches the next of `count` equal shares of positions."""
    lengths = [items.size(1) for items in batch.items for _ in items]
    shares = [sum(lengths) * number / count for number in range(1, count + 1)]
    rows, positions, parts = 0, 0, []
    for length in lengths:
        rows, positions = rows + 1, positions + length
        if any(positions - length < share <= positions for share in shares):
            parts.append(rows)
            rows = 0
    return parts


def seen(batches, items, scored):
    """The item at each scored position, and how many stand before it in its row."""
    found = []
    for batch in batches:
        for bucket, places in zip(getattr(batch, items), getattr(batch, scored), strict=True):
            found.append(torch.stack([bucket.flatten()[places], places % bucket.size(1)]))
    return torch.cat(found, dim=1)
