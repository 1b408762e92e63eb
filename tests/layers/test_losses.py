"""The losses against plain loops in double precision."""

import math

import pytest
import torch
import torch.nn.functional as F

import layers.fast.cross_entropy
from layers.logits import SparseLogits
from layers.losses import catalogue_cross_entropy, cross_entropy, draw_negatives, in_batch_contrastive

T = 0.07
WAYS = {  # (logits held at a time, queries below which keys are taken in blocks) of the fast cross entropy
    "plain": None,
    "all at once": (1 << 22, 64),
    "a few queries": (20, 1),
    "one query": (1, 1),
    "a few keys": (20, 64),
    "one key": (1, 64),
}


@pytest.fixture(params=WAYS)
def entropy(request, monkeypatch):
    """The plain cross entropy and the fast one with blocks of any size: all compute the same."""
    if WAYS[request.param] is None:
        return cross_entropy
    for name, value in zip(("_LOGITS", "_FEW_ROWS"), WAYS[request.param], strict=True):
        monkeypatch.setattr(layers.fast.cross_entropy, name, value)
    return layers.fast.cross_entropy.cross_entropy


@pytest.fixture
def contrastive(entropy):
    """in_batch_contrastive(query, key, targets, users, ...) at the temperature T."""

    def loss(query, key, targets, users, temperature=T, **options):
        options |= {"targets": targets, "users": users, "temperature": temperature, "cross_entropy": entropy}
        return in_batch_contrastive(query, key, **options)

    return loss


@pytest.fixture
def over_catalogue(entropy):
    """catalogue_cross_entropy(query, candidates, targets, ...) at the temperature T."""

    def loss(query, candidates, targets, temperature=T, **options):
        options |= {"targets": targets, "temperature": temperature, "cross_entropy": entropy}
        return catalogue_cross_entropy(query, candidates, **options)

    return loss


def cosine(a, b):
    return (a @ b) / (a.norm() * b.norm())


def contrastive_by_loop(query, key, targets, users, temperature=T, weights=None):
    """S(a, b), spelt out: a mean over queries, each with the keys that are neither of its target nor of its user."""
    weights = torch.ones(len(query), dtype=torch.float64) if weights is None else weights.double()
    query, key = query.double(), key.double()
    total = 0.0
    for i in range(len(query)):
        terms = [cosine(query[i], key[i]) / temperature]
        for j in range(len(key)):
            same_user = users is not None and users[i] == users[j]
            if j != i and targets[i] != targets[j] and not same_user:
                terms.append(cosine(query[i], key[j]) / temperature + weights[j].log())
        total = total + weights[i] * (torch.stack(terms).logsumexp(0) - terms[0])
    return total / weights.sum()


def batch(size=8, width=4, items=5, users=4, seed=0):
    """Vectors of any length, with targets and users that occur several times."""
    generator = torch.Generator().manual_seed(seed)
    query, key = (torch.randn(size, width, generator=generator) * 3 for _ in range(2))
    targets = torch.randint(1, items + 1, (size,), generator=generator)
    users = torch.randint(0, users, (size,), generator=generator)
    assert len(targets.unique()) < size and len(users.unique()) < size
    return query, key, targets, users


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("with_users", [False, True])
def test_contrastive_loss_and_gradients_equal_the_loop(seed, weighted, with_users, contrastive):
    query, key, targets, users = batch(seed=seed)
    weights = torch.randint(1, 4, (len(query),)).float() if weighted else None
    users = users if with_users else None
    results = []
    for function in (contrastive, contrastive_by_loop):
        inputs = query.clone().requires_grad_(), key.clone().requires_grad_()
        loss = function(*inputs, targets, users, weights=weights)
        loss.backward()
        results.append((loss, inputs[0].grad, inputs[1].grad))
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), plain.double(), rtol=1e-4, atol=1e-5)


def test_who_is_no_negative(contrastive):
    """Three pairs whose keys all lie on the first query: only real negatives count."""
    query = key = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])

    def loss(targets, users):
        return contrastive(query, key, torch.tensor(targets), torch.tensor(users)).item()

    assert loss([1, 2, 3], [1, 2, 3]) == pytest.approx(math.log(3))
    assert loss([1, 1, 1], [1, 2, 3]) == 0.0, "the same target"
    assert loss([1, 2, 3], [4, 4, 4]) == 0.0, "the same user"
    # queries 0 and 1 share the target, 1 and 2 the user: 0 sees key 2, 1 sees none, 2 sees key 0
    assert loss([1, 1, 3], [1, 2, 2]) == pytest.approx(2 * math.log(2) / 3)


def test_excluded_keys_leave_no_trace(contrastive):
    """However like a query they are, its gradient is the same."""
    query, key, *_ = batch()
    targets = torch.tensor([1, 1, 1, 1, 1, 1, 1, 2])
    gradients = []
    for others in (key[1:7], query[:1].repeat(6, 1)):
        asked = query.clone().requires_grad_()
        contrastive(asked, torch.cat([key[:1], others, key[7:]]), targets, None).backward()
        gradients.append(asked.grad[0])
    assert torch.equal(*gradients) and (gradients[0] != 0).any()


@pytest.mark.parametrize("distinct", [True, False])
def test_a_pair_of_weight_two_is_the_pair_twice(distinct, contrastive):
    query, key, targets, users = batch()
    if distinct:
        targets, users = torch.arange(len(query)) + 1, torch.arange(len(query))
    times = torch.randint(1, 4, (len(query),), generator=torch.Generator().manual_seed(1))
    # the copies of a pair have its target and user, so they are no negatives of each other
    repeated = [tensor.repeat_interleave(times, 0) for tensor in (query, key, targets, users)]
    weighted = contrastive(query, key, targets, users, weights=times.float())
    assert weighted.item() == pytest.approx(contrastive(*repeated).item(), rel=1e-5)
    ones = torch.ones(len(query))
    plain = contrastive(query, key, targets, users)
    assert contrastive(query, key, targets, users, weights=ones).item() == pytest.approx(plain.item(), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_small_temperature_stays_finite(dtype, contrastive):
    query, key, targets, users = (t if t.dtype == torch.int64 else t.to(dtype) for t in batch())
    for other in (key, -query, query):
        inputs = query.clone().requires_grad_()
        loss = contrastive(inputs, other, targets, users, 0.011)
        loss.backward()
        assert loss.dtype == torch.float32 and torch.isfinite(loss) and torch.isfinite(inputs.grad).all()
    expected = contrastive_by_loop(query, key, targets, users, 0.011)
    loss = contrastive(query, key, targets, users, 0.011)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-3)


@pytest.mark.parametrize("weighted", [False, True])
def test_negatives_of_all_processes(weighted, contrastive):
    """Two processes' losses, averaged, are that of the joined batch, if `gather` joins what they have."""
    query, key, targets, users = batch(size=11)
    weights = torch.randint(1, 4, (11,)).float() if weighted else None
    count = torch.ones(11) if weights is None else weights
    losses, parts = [], [slice(0, 7), slice(7, 11)]
    for part in parts:

        def gather(own_key, own_targets, own_users, own_count, part=part):
            for part_of_ours, joined in (
                (own_key, F.normalize(key, dim=-1)),
                (own_targets, targets),
                (own_users, users),
            ):
                torch.testing.assert_close(part_of_ours, joined[part])
            torch.testing.assert_close(own_count, count[part])
            return (F.normalize(key, dim=-1), targets, users, count), part.start, 2

        own_weights = None if weights is None else weights[part]
        own = query[part], key[part], targets[part], users[part]
        losses.append(contrastive(*own, weights=own_weights, gather=gather))
    whole = contrastive(query, key, targets, users, weights=weights)
    assert sum(losses).item() / 2 == pytest.approx(whole.item(), rel=1e-5)


def test_a_process_without_queries_adds_nothing(contrastive):
    query, key, targets, users = batch(size=4)

    def gather(*_):
        return (F.normalize(key, dim=-1), targets, users, torch.ones(4)), 4, 2

    none = torch.empty(0, 4, requires_grad=True)
    empty = torch.empty(0, dtype=torch.int64)
    loss = contrastive(none, torch.empty(0, 4), empty, empty, gather=gather)
    loss.backward()
    assert loss.item() == 0.0 and none.grad.shape == (0, 4)


# -- cross entropy over a catalogue -------------------------------------------------------------------------------


def catalogue(size=6, candidates=9, width=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    query, table = (torch.randn(n, width, generator=generator) * 3 for n in (size, candidates))
    return query, table, torch.randint(0, candidates, (size,), generator=generator)


def cross_entropy_by_loop(
    query, candidates, targets, temperature, weights=None, added=None, label_smoothing=0.0, log_counts=None
):
    """The formula, prediction by prediction: `added` is float [B, N], `log_counts` float [N]."""
    query, candidates = query.double(), candidates.double()
    weights = torch.ones(len(query), dtype=torch.float64) if weights is None else weights.double()
    counts = torch.ones(len(candidates), dtype=torch.float64) if log_counts is None else log_counts.double().exp()
    losses = []
    for row, (state, target) in enumerate(zip(query, targets, strict=True)):
        scores = torch.stack([cosine(state, candidate) / temperature for candidate in candidates])
        scores = scores if added is None else scores + added[row]
        log_probabilities = scores - (counts * scores.exp()).sum().log()
        labels = label_smoothing * counts / counts.sum()
        labels[target] += 1 - label_smoothing
        losses.append(-(labels * log_probabilities).sum())
    return (torch.stack(losses) * weights).sum() / weights.sum()


@pytest.mark.parametrize("weights", [None, torch.tensor([1.0, 2, 1, 1, 3, 5])])
def test_cross_entropy_and_gradients_equal_the_formula(weights, over_catalogue):
    query, table, targets = catalogue()
    results = []
    for function in (over_catalogue, cross_entropy_by_loop):
        inputs = query.clone().requires_grad_(), table.clone().requires_grad_()
        loss = function(*inputs, targets, T, weights=weights)
        loss.backward()
        results.append((loss, inputs[0].grad, inputs[1].grad))
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), plain.double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("sampled", [False, True])
def test_added_logits_and_smoothed_labels_are_those_of_the_formula(label_smoothing, sampled, over_catalogue):
    query, table, targets = catalogue()
    rows = torch.tensor([0, 0, 1, 3, 5])
    columns = torch.tensor([int(targets[0]), (int(targets[0]) + 1) % 9, 8, 0, int(targets[5])])
    log_counts = None
    if sampled:
        log_counts = torch.full((9,), 0.7).index_fill(0, targets, 0.0)
    options = {"weights": torch.tensor([1.0, 2, 1, 1, 3, 5]), "label_smoothing": label_smoothing}
    options["log_counts"] = log_counts
    results = []
    for function in (over_catalogue, cross_entropy_by_loop):
        inputs = query.clone().requires_grad_(), table.clone().requires_grad_()
        values = torch.tensor([-5.0, 3.0, -1.0, 0.5, 2.0], requires_grad=True)
        added = SparseLogits(rows, columns, values)
        dense = added.add_to(torch.zeros(6, 9))
        loss = function(*inputs, targets, T, added=added if function is over_catalogue else dense, **options)
        loss.backward()
        results.append((loss, inputs[0].grad, inputs[1].grad, values.grad))
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), plain.double(), rtol=1e-4, atol=1e-5)
    assert results[0][3].abs().min() > 0


def test_a_query_of_weight_two_is_the_query_twice(over_catalogue):
    query, table, targets = catalogue()
    times = torch.tensor([1, 2, 1, 1, 3, 5])
    repeated = over_catalogue(query.repeat_interleave(times, 0), table, targets.repeat_interleave(times))
    assert over_catalogue(query, table, targets, weights=times.float()).item() == pytest.approx(repeated.item())


def test_the_cross_entropy_of_equal_candidates_is_their_number(over_catalogue):
    query, _, targets = catalogue()
    assert over_catalogue(query, torch.ones(9, 4), targets).item() == pytest.approx(math.log(9))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_scored_in_full(dtype, over_catalogue):
    query, table, targets = catalogue()
    loss = over_catalogue(query.to(dtype), table.to(dtype), targets, 0.011)
    expected = over_catalogue(query.to(dtype).float(), table.to(dtype).float(), targets, 0.011)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected.item(), rel=1e-6)


# -- sampled softmax -------------------------------------------------------------------------------------------------


def test_candidates_that_stand_for_several_are_as_good_as_those(over_catalogue):
    """A candidate that stands for three items is that candidate three times."""
    query, table, _ = catalogue()
    targets = torch.tensor([0, 1, 2, 0, 1, 2])
    counts = torch.tensor([1, 1, 1, 3, 2, 1, 4, 1, 2])
    results = []
    for candidates, log_counts in ((table, counts.float().log()), (table.repeat_interleave(counts, 0), None)):
        asked = query.clone().requires_grad_()
        loss = over_catalogue(asked, candidates, targets, log_counts=log_counts)
        loss.backward()
        results.append((loss, asked.grad))
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


def test_when_all_others_are_drawn_the_loss_is_exact(over_catalogue):
    query, table, targets = catalogue()
    batch_items, places = (targets + 1).unique(return_inverse=True)
    negatives, log_count = draw_negatives(batch_items, len(table), 100)
    assert sorted([*batch_items.tolist(), *negatives.tolist()]) == list(range(1, 10)) and log_count == 0.0
    sample = table[torch.cat([batch_items, negatives]) - 1]
    sampled = over_catalogue(query, sample, places, log_counts=torch.zeros(9))
    assert sampled.item() == pytest.approx(over_catalogue(query, table, targets).item(), rel=1e-5)


def test_negatives_are_drawn_evenly_and_stand_for_the_rest():
    """Over many draws every item outside the batch comes equally often, and no batch item ever. The corrected sum over
    a sample has the sum over the catalogue as its mean, so the sampled softmax is unbiased in its denominator."""
    torch.manual_seed(0)
    batch_items, n_items, count, draws = torch.tensor([1, 4, 5, 10]), 12, 3, 1000
    powers = torch.rand(n_items + 1, dtype=torch.float64).exp()
    powers[0] = 0.0  # padding
    times, sums = torch.zeros(n_items + 1), []
    for _ in range(draws):
        negatives, log_count = draw_negatives(batch_items, n_items, count)
        assert len(negatives.unique()) == count
        times[negatives] += 1
        sums.append(powers[batch_items].sum() + powers[negatives].sum() * math.exp(log_count))
    assert (times[batch_items] == 0).all() and times[0] == 0
    rest = [item for item in range(1, n_items + 1) if item not in batch_items.tolist()]
    share = count / len(rest)
    error = math.sqrt(share * (1 - share) / draws)
    assert (times[rest] / draws - share).abs().max() < 4 * error
    sums = torch.stack(sums)
    assert abs(sums.mean() - powers.sum()) < 4 * sums.std() / math.sqrt(draws) and sums.std() > 0.1


def test_draws_follow_torchs_seed_and_ask_for_no_more_than_there_is():
    batch_items = torch.tensor([1, 2])
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(draw_negatives(batch_items, 1000, 10)[0])
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    nothing, log_count = draw_negatives(torch.arange(1, 6), 5, 10)
    assert len(nothing) == 0 and log_count == 0.0
