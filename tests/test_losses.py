"""The losses against plain loops in double precision."""

import math

import pytest
import torch
import torch.nn.functional as F

from layers import losses
from layers.losses import catalogue_cross_entropy, draw_others, in_batch_contrastive

T = 0.07


@pytest.fixture(params=[(losses._LOGITS, 64), (20, 1), (1, 1), (20, 64), (1, 64)], autouse=True)
def logits_at_a_time(request, monkeypatch):
    """All at once, a few queries or one at a time, a few candidates or one at a time: it is all one."""
    monkeypatch.setattr(losses, "_LOGITS", request.param[0])
    monkeypatch.setattr(losses, "_FEW_ROWS", request.param[1])


def cosine(a, b):
    return (a @ b) / (a.norm() * b.norm())


def contrastive_by_loop(query, key, targets, users, temperature, weights=None):
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
def test_contrastive_loss_and_gradients_equal_the_loop(seed, weighted, with_users):
    query, key, targets, users = batch(seed=seed)
    weights = torch.randint(1, 4, (len(query),)).float() if weighted else None
    users = users if with_users else None
    results = []
    for function in (in_batch_contrastive, contrastive_by_loop):
        inputs = query.clone().requires_grad_(), key.clone().requires_grad_()
        loss = function(*inputs, targets, users, T, weights)
        loss.backward()
        results.append((loss, inputs[0].grad, inputs[1].grad))
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), plain.double(), rtol=1e-4, atol=1e-5)


def test_who_is_no_negative():
    """Three pairs whose keys all lie on the first query: only real negatives count."""
    query = key = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])

    def loss(targets, users):
        return in_batch_contrastive(query, key, torch.tensor(targets), torch.tensor(users), T).item()

    assert loss([1, 2, 3], [1, 2, 3]) == pytest.approx(math.log(3))
    assert loss([1, 1, 1], [1, 2, 3]) == 0.0, "the same target"
    assert loss([1, 2, 3], [4, 4, 4]) == 0.0, "the same user"
    # queries 0 and 1 share the target, 1 and 2 the user: 0 sees key 2, 1 sees none, 2 sees key 0
    assert loss([1, 1, 3], [1, 2, 2]) == pytest.approx(2 * math.log(2) / 3)


def test_excluded_keys_leave_no_trace():
    """However like a query they are, its gradient is the same."""
    query, key, *_ = batch()
    targets = torch.tensor([1, 1, 1, 1, 1, 1, 1, 2])
    gradients = []
    for others in (key[1:7], query[:1].repeat(6, 1)):
        asked = query.clone().requires_grad_()
        in_batch_contrastive(asked, torch.cat([key[:1], others, key[7:]]), targets, None, T).backward()
        gradients.append(asked.grad[0])
    assert torch.equal(*gradients) and (gradients[0] != 0).any()


@pytest.mark.parametrize("distinct", [True, False])
def test_a_pair_of_weight_two_is_the_pair_twice(distinct):
    query, key, targets, users = batch()
    if distinct:
        targets, users = torch.arange(len(query)) + 1, torch.arange(len(query))
    times = torch.randint(1, 4, (len(query),), generator=torch.Generator().manual_seed(1))
    # the copies of a pair have its target and user, so they are no negatives of each other
    repeated = [tensor.repeat_interleave(times, 0) for tensor in (query, key, targets, users)]
    weighted = in_batch_contrastive(query, key, targets, users, T, times.float())
    assert weighted.item() == pytest.approx(in_batch_contrastive(*repeated, T).item(), rel=1e-5)
    ones = torch.ones(len(query))
    plain = in_batch_contrastive(query, key, targets, users, T)
    assert in_batch_contrastive(query, key, targets, users, T, ones).item() == pytest.approx(plain.item(), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_small_temperature_stays_finite(dtype):
    query, key, targets, users = (t if t.dtype == torch.int64 else t.to(dtype) for t in batch())
    for other in (key, -query, query):
        inputs = query.clone().requires_grad_()
        loss = in_batch_contrastive(inputs, other, targets, users, 0.011)
        loss.backward()
        assert loss.dtype == torch.float32 and torch.isfinite(loss) and torch.isfinite(inputs.grad).all()
    expected = contrastive_by_loop(query, key, targets, users, 0.011)
    loss = in_batch_contrastive(query, key, targets, users, 0.011)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-3)


@pytest.mark.parametrize("weighted", [False, True])
def test_negatives_of_all_processes(weighted):
    """Two processes' losses, averaged, are that of the joined batch, if `gather` joins what they have."""
    query, key, targets, users = batch(size=11)
    weights = torch.randint(1, 4, (11,)).float() if weighted else None
    count = torch.ones(11) if weights is None else weights
    losses, parts = [], [slice(0, 7), slice(7, 11)]
    for part in parts:

        def gather(own_key, own_targets, own_users, own_count, part=part):
            for own, joined in ((own_key, F.normalize(key, dim=-1)), (own_targets, targets), (own_users, users)):
                torch.testing.assert_close(own, joined[part])
            torch.testing.assert_close(own_count, count[part])
            return (F.normalize(key, dim=-1), targets, users, count), part.start, 2

        own_weights = None if weights is None else weights[part]
        losses.append(in_batch_contrastive(query[part], key[part], targets[part], users[part], T, own_weights, gather))
    whole = in_batch_contrastive(query, key, targets, users, T, weights)
    assert sum(losses).item() / 2 == pytest.approx(whole.item(), rel=1e-5)


def test_a_process_without_queries_adds_nothing():
    query, key, targets, users = batch(size=4)

    def gather(*_):
        return (F.normalize(key, dim=-1), targets, users, torch.ones(4)), 4, 2

    none = torch.empty(0, 4, requires_grad=True)
    empty = torch.empty(0, dtype=torch.int64)
    loss = in_batch_contrastive(none, torch.empty(0, 4), empty, empty, T, None, gather)
    loss.backward()
    assert loss.item() == 0.0 and none.grad.shape == (0, 4)


# -- cross entropy over a catalogue -------------------------------------------------------------------------------


def catalogue(size=6, candidates=9, width=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    query, table = (torch.randn(n, width, generator=generator) * 3 for n in (size, candidates))
    return query, table, torch.randint(0, candidates, (size,), generator=generator)


def cross_entropy_by_loop(query, candidates, targets, temperature, weights=None):
    query, candidates = query.double(), candidates.double()
    weights = torch.ones(len(query), dtype=torch.float64) if weights is None else weights.double()
    losses = []
    for state, target in zip(query, targets, strict=True):
        scores = torch.stack([cosine(state, candidate) / temperature for candidate in candidates])
        losses.append(-(scores[target].exp() / scores.exp().sum()).log())
    return (torch.stack(losses) * weights).sum() / weights.sum()


@pytest.mark.parametrize("weights", [None, torch.tensor([1.0, 2, 1, 1, 3, 5])])
def test_cross_entropy_and_gradients_equal_the_formula(weights):
    query, table, targets = catalogue()
    results = []
    for function in (catalogue_cross_entropy, cross_entropy_by_loop):
        inputs = query.clone().requires_grad_(), table.clone().requires_grad_()
        loss = function(*inputs, targets, T, weights)
        loss.backward()
        results.append((loss, inputs[0].grad, inputs[1].grad))
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), plain.double(), rtol=1e-4, atol=1e-5)


def test_a_query_of_weight_two_is_the_query_twice():
    query, table, targets = catalogue()
    times = torch.tensor([1, 2, 1, 1, 3, 5])
    repeated = catalogue_cross_entropy(query.repeat_interleave(times, 0), table, targets.repeat_interleave(times), T)
    assert catalogue_cross_entropy(query, table, targets, T, times.float()).item() == pytest.approx(repeated.item())


def test_the_cross_entropy_of_equal_candidates_is_their_number():
    query, _, targets = catalogue()
    assert catalogue_cross_entropy(query, torch.ones(9, 4), targets, T).item() == pytest.approx(math.log(9))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_scored_in_full(dtype):
    query, table, targets = catalogue()
    loss = catalogue_cross_entropy(query.to(dtype), table.to(dtype), targets, 0.011)
    expected = catalogue_cross_entropy(query.to(dtype).float(), table.to(dtype).float(), targets, 0.011)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected.item(), rel=1e-6)


# -- sampled softmax -------------------------------------------------------------------------------------------------


def test_candidates_that_stand_for_several_are_as_good_as_those():
    """A candidate that stands for three items is that candidate three times."""
    query, table, _ = catalogue()
    targets = torch.tensor([0, 1, 2, 0, 1, 2])
    counts = torch.tensor([1, 1, 1, 3, 2, 1, 4, 1, 2])
    results = []
    for candidates, log_counts in ((table, counts.float().log()), (table.repeat_interleave(counts, 0), None)):
        asked = query.clone().requires_grad_()
        loss = catalogue_cross_entropy(asked, candidates, targets, T, None, log_counts)
        loss.backward()
        results.append((loss, asked.grad))
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


def test_when_all_others_are_drawn_the_loss_is_exact():
    query, table, targets = catalogue()
    named, places = targets.unique(return_inverse=True)
    others, log_share = draw_others(named, len(table), 100)
    assert sorted([*named.tolist(), *others.tolist()]) == list(range(9)) and log_share == 0.0
    sample = table[torch.cat([named, others])]
    sampled = catalogue_cross_entropy(query, sample, places, T, None, torch.zeros(9))
    assert sampled.item() == pytest.approx(catalogue_cross_entropy(query, table, targets, T).item(), rel=1e-5)


def test_others_are_drawn_evenly_and_stand_for_the_rest():
    """Over many draws each other item comes equally often, no named one ever; and the corrected sum over a sample has
    the sum over the catalogue as its mean, which makes the sampled softmax a right one."""
    torch.manual_seed(0)
    named, n_items, count, draws = torch.tensor([0, 3, 4, 9]), 12, 3, 1000
    powers = torch.rand(n_items, dtype=torch.float64).exp()
    times, sums = torch.zeros(n_items), []
    for _ in range(draws):
        others, log_share = draw_others(named, n_items, count)
        assert len(others.unique()) == count
        times[others] += 1
        sums.append(powers[named].sum() + powers[others].sum() * math.exp(log_share))
    assert (times[named] == 0).all()
    rest = [row for row in range(n_items) if row not in named.tolist()]
    share = count / len(rest)
    error = math.sqrt(share * (1 - share) / draws)
    assert (times[rest] / draws - share).abs().max() < 4 * error
    sums = torch.stack(sums)
    assert abs(sums.mean() - powers.sum()) < 4 * sums.std() / math.sqrt(draws) and sums.std() > 0.1


def test_draws_follow_torchs_seed_and_ask_for_no_more_than_there_is():
    named = torch.tensor([1, 2])
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(draw_others(named, 1000, 10)[0])
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    nothing, log_share = draw_others(torch.arange(5), 5, 10)
    assert len(nothing) == 0 and log_share == 0.0
