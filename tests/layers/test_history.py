"""The parts that read the history directly, compared with loops over predictions."""

import math

import pytest
import torch
import torch.nn.functional as F

from data.batches import SequenceBatch
from layers.history import BIAS_STEP, DECAYS, MEAN_STEP, HistoryBias, HistoryMean, history_entries

# histories [7], [7 8 7], [8 8], [5 6]; the first bucket has two sequences with three scored positions
ITEMS = [torch.tensor([[7, 8, 7], [8, 8, 0]]), torch.tensor([[5, 6]])]
SCORED = [torch.tensor([0, 2, 4]), torch.tensor([1])]
HISTORIES = [[7], [7, 8, 7], [8, 8], [5, 6]]


def entries_by_loop(histories):
    """(prediction, item, recency of its newest occurrence), sorted."""
    found = []
    for row, history in enumerate(histories):
        for item in set(history):
            found.append((row, item, history[::-1].index(item)))
    return sorted(found)


def random_buckets(seed=0):
    generator = torch.Generator().manual_seed(seed)
    items, scored, histories = [], [], []
    for count, length in ((4, 3), (3, 9)):
        bucket = torch.randint(1, 6, (count, length), generator=generator)
        lengths = torch.randint(1, length + 1, (count,), generator=generator)
        bucket[torch.arange(length) >= lengths[:, None]] = 0
        positions = (bucket > 0).flatten().nonzero()[:, 0]
        positions = positions[torch.rand(len(positions), generator=generator) < 0.7]
        items.append(bucket)
        scored.append(positions)
        histories += [bucket[place // length, : place % length + 1].tolist() for place in positions.tolist()]
    return items, scored, histories


def test_entries_of_a_small_batch():
    rows, ids, recencies = history_entries(ITEMS, SCORED)
    assert rows.tolist() == sorted(rows.tolist())
    found = sorted(zip(rows.tolist(), ids.tolist(), recencies.tolist(), strict=True))
    assert found == [(0, 7, 0), (1, 7, 0), (1, 8, 1), (2, 8, 0), (3, 5, 1), (3, 6, 0)]


@pytest.mark.parametrize("seed", range(4))
def test_entries_are_those_of_a_loop(seed):
    items, scored, histories = random_buckets(seed)
    rows, ids, recencies = history_entries(items, scored)
    assert rows.tolist() == sorted(rows.tolist())
    assert sorted(zip(rows.tolist(), ids.tolist(), recencies.tolist(), strict=True)) == entries_by_loop(histories)


def test_a_batch_without_scored_positions_has_no_entries():
    found = history_entries(ITEMS, [positions[:0] for positions in SCORED])
    assert [part.tolist() for part in found] == [[], [], []]


def test_the_bias_of_old_items_is_shared():
    bias = HistoryBias(3)
    bias.weight.data = torch.tensor([-3.0, -2.0, -1.0]) / BIAS_STEP
    torch.testing.assert_close(bias(torch.tensor([0, 1, 2, 3, 40])), torch.tensor([-3.0, -2.0, -1.0, -1.0, -1.0]))


def mean_by_loop(layer, vectors):
    """The formula of `HistoryMean` for one history, vectors float [n, H], oldest first."""
    total = 0.0
    for recency, vector in enumerate(vectors.flip(0)):
        total = total + torch.exp(layer.recency[recency] * MEAN_STEP) * F.normalize(vector, dim=0)
    return layer.weight * MEAN_STEP * math.sqrt(vectors.size(1)) * F.normalize(total, dim=0)


def test_means_are_those_of_a_loop():
    torch.manual_seed(0)
    layer = HistoryMean(9)
    layer.recency.data += torch.randn(9) / MEAN_STEP
    layer.weight.data.fill_(0.7 / MEAN_STEP)
    items, scored, _ = random_buckets()
    vectors = [torch.randn(*bucket.shape, 6) for bucket in items]
    expected = [
        mean_by_loop(layer, bucket[place // bucket.size(1), : place % bucket.size(1) + 1])
        for bucket, positions in zip(vectors, scored, strict=True)
        for place in positions.tolist()
    ]
    torch.testing.assert_close(layer.scored(vectors, scored), torch.stack(expected))


def test_the_last_mean_is_the_scored_one_at_the_last_position():
    torch.manual_seed(0)
    layer, vectors, lengths = HistoryMean(8), torch.randn(4, 8, 6), torch.tensor([1, 8, 5, 3])
    scored = layer.scored([vectors], [torch.arange(4) * 8 + lengths - 1])
    torch.testing.assert_close(layer.last(vectors, lengths), scored)
    vectors[torch.arange(8) >= lengths[:, None]] = 1e6  # padding
    torch.testing.assert_close(layer.last(vectors, lengths), scored)


def test_at_first_the_mean_decays_and_has_the_length_of_a_state():
    layer = HistoryMean(50, decay=0.5)
    ratio = (layer.recency[1] * MEAN_STEP).exp() / (layer.recency[0] * MEAN_STEP).exp()
    assert ratio.item() == pytest.approx(0.5)
    vectors = torch.randn(1, 50, 300)
    assert layer.last(vectors, torch.tensor([50])).norm().item() == pytest.approx(math.sqrt(300), rel=1e-4)
    layer.switch_off()
    assert (layer.last(vectors, torch.tensor([50])) == 0).all()
    layer.last(vectors, torch.tensor([50])).sum().backward()
    assert layer.weight.grad != 0, "it can still be learned"


# -- first values from data -------------------------------------------------------------------------------------------


def batch_with_repeats(shares, weights=False, users=400, length=6):
    """Sequences of distinct items. After the last one, the item of recency k follows with the probability shares[k]."""
    generator = torch.Generator().manual_seed(3)
    items = torch.stack([torch.randperm(20, generator=generator)[:length] + 1 for _ in range(users)])
    scored = torch.arange(users) * length + length - 1
    chosen = torch.multinomial(torch.tensor([*shares, 1 - sum(shares)]), users, True, generator=generator)
    repeated = items.flip(1).gather(1, chosen.clamp(max=length - 1)[:, None])[:, 0]
    targets = torch.where(chosen < len(shares), repeated, 21)  # item 21 is in no history
    counts = 1.0 + torch.arange(users) % 3 if weights else None
    return SequenceBatch([items], [scored], targets, counts, torch.arange(users))


def loss_with(bias, scale=2.0):
    """A model that prefers newer items of the history: its logits are -scale times the recency, and 0 elsewhere."""

    def logits(batch):
        rows, ids, recencies = history_entries(batch.items, batch.scored)
        plain = torch.zeros(len(batch), 22).index_put((rows, ids), 3 - scale * recencies)
        return bias.logits(batch).add_to(plain)

    def loss(batch):
        losses = F.cross_entropy(logits(batch), batch.targets, reduction="none")
        return losses.mean() if batch.weights is None else (losses * batch.weights).sum() / batch.weights.sum()

    return loss, logits


def repeats_by_recency(batch, probabilities):
    """The sum of the probabilities of the items of the history, by recency."""
    rows, ids, recencies = history_entries(batch.items, batch.scored)
    weights = torch.ones(len(batch)) if batch.weights is None else batch.weights / batch.weights.mean()
    return torch.zeros(6).index_add(0, recencies, weights[rows] * probabilities[rows, ids])


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("shares", [[0.3, 0.2, 0.1, 0.05, 0.05, 0.05], [0.2] * 4])
def test_the_bias_starts_with_the_repeats_of_the_data(shares, weights):
    batch, bias = batch_with_repeats(shares, weights), HistoryBias(6)
    loss, logits = loss_with(bias)
    common = {}
    for value in range(-6, 7):
        bias.weight.data.fill_(value / BIAS_STEP)
        common[value] = loss(batch).item()
    bias.switch_off()
    bias.start(batch, loss)
    expected = repeats_by_recency(batch, logits(batch).softmax(1)).sum().item()
    assert expected == pytest.approx(
        repeats_by_recency(batch, F.one_hot(batch.targets, 22).float()).sum().item(), rel=0.2
    )
    assert loss(batch).item() < min(common.values()) - 0.05, "better than the best value for all recencies"


def test_the_bias_of_data_without_repeats_is_low_at_all_recencies():
    batch, bias = batch_with_repeats([0.0] * 6), HistoryBias(8)
    loss, _ = loss_with(bias)
    bias.start(batch, loss)
    assert bias.values().max() < -4 and bias.values().min() > -20
    lucky = SequenceBatch(batch.items, batch.scored, batch.targets.clone(), None, batch.users)
    lucky.targets[0] = lucky.items[0][0, 2]  # one repeat, of recency 3, which the model hardly expects
    other = HistoryBias(8)
    other.start(lucky, loss_with(other)[0])
    assert other.values()[3] < -3, "one repeat does not outweigh 400 predictions"
    assert other.values()[6:].tolist() == pytest.approx([other.values()[6].item()] * 2), "no history is so long"


def test_the_mean_starts_with_the_decay_that_fits_best():
    mean = HistoryMean(5)
    for wanted in DECAYS:
        decay = torch.tensor(wanted).log()
        mean.start(None, lambda _, decay=decay: (mean.recency[1] * MEAN_STEP - decay).abs())
        torch.testing.assert_close(mean.recency * MEAN_STEP, decay * torch.arange(5.0))
    mean.start(None, lambda _: torch.tensor(1.0))
    torch.testing.assert_close(mean.recency, HistoryMean(5).recency), "the default, if all are equal"
