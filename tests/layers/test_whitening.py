"""Whitening against scikit-learn's Ledoit-Wolf covariance, and catalogues that are too small or too uniform."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.covariance import ledoit_wolf

import layers.whitening
from layers.whitening import DomainWhitening, Whitening


def correlated(items, width, seed=0):
    """Text vectors with a common direction and correlated dimensions, of any length: float32 [items, width]."""
    generator = np.random.default_rng(seed)
    vectors = generator.normal(size=(items, width)) @ generator.normal(size=(width, width)) + 3
    return torch.from_numpy(vectors.astype(np.float32))


def centred(features):
    """The unit vectors without their mean, float64 [N, D]."""
    unit = F.normalize(features.double(), dim=-1)
    return unit - unit.mean(0)


def whitened_covariance(whitening, features):
    """The covariance of the output before it is cut to unit length, float64 [D, D]."""
    output = centred(features) @ whitening.matrix.double()
    return output.T @ output / len(features)


@pytest.mark.parametrize(("items", "width"), [(200, 12), (13, 12), (8, 12)])
def test_the_covariance_becomes_the_identity_up_to_the_shrinkage(items, width):
    """(1 - s) C + s m I is the inverse of the squared matrix, with the shrinkage s and the mean variance m."""
    features = correlated(items, width)
    whitening = Whitening(width).fit(features)
    x = centred(features).numpy()
    shrunk, shrinkage = ledoit_wolf(x, assume_centered=True)
    matrix = whitening.matrix.double().numpy()
    np.testing.assert_allclose(matrix @ shrunk @ matrix, np.eye(width), atol=1e-4)
    assert 0 <= shrinkage < 1 and np.allclose(matrix, matrix.T, rtol=1e-5)
    covariance = whitened_covariance(whitening, features).numpy()
    rest = shrinkage * (x**2).mean() * np.linalg.inv(shrunk)
    np.testing.assert_allclose((1 - shrinkage) * covariance + rest, np.eye(width), atol=1e-4)


def test_with_many_items_the_covariance_is_the_identity():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(20_000, 5, generator=generator) * torch.tensor([1.0, 2, 3, 2, 1])
    features[:, 4] += 0.5 * features[:, 1]
    assert not np.allclose(np.corrcoef(centred(features).T), np.eye(5), atol=0.1)
    covariance = whitened_covariance(Whitening(5).fit(features), features)
    np.testing.assert_allclose(covariance, np.eye(5), atol=0.01)


def test_two_dimensions_worked_out_by_hand():
    """Unit vectors at the angles 0, 90, 180 and 270 degrees, those on the x axis twice: variances 2/3 and 1/3.

    The mean of |x|^4 is 1, and that of C^2 is 5/9, so the error is (1 - 5/9) / 6 = 2/27. The distance to I/2 is 1/18,
    which is less. So the shrinkage is 1.
    """
    features = torch.tensor([[2.0, 0], [1, 0], [0, 5], [-3, 0], [-1, 0], [0, -1]])
    whitening = Whitening(2).fit(features)
    torch.testing.assert_close(whitening.matrix, torch.eye(2) * 2**0.5)
    torch.testing.assert_close(whitening.mean, torch.zeros(2))
    wider = Whitening(2).fit(features.repeat(100, 1))  # error 2/2700, shrinkage 2/150: variances nearer to 2/3 and 1/3
    expected = torch.tensor([2 / 3 - 1 / 6 * 2 / 150, 1 / 3 + 1 / 6 * 2 / 150]).rsqrt().diag()
    torch.testing.assert_close(wider.matrix, expected)


def test_the_output_has_unit_length_and_does_not_depend_on_that_of_the_input():
    features = correlated(50, 6)
    whitening = Whitening(6)
    torch.testing.assert_close(whitening(features), F.normalize(features, dim=-1), msg="before fit: the unit vectors")
    output = whitening.fit(features)(features)
    torch.testing.assert_close(output.norm(dim=-1), torch.ones(50))
    torch.testing.assert_close(whitening(features * 7), output, rtol=0, atol=1e-5)
    expected = F.normalize(centred(features) @ whitening.matrix.double(), dim=-1).float()
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rows_at_once", [1, 7, 50])
def test_blocks_and_float16_change_nothing(monkeypatch, rows_at_once):
    features = correlated(50, 6).half()
    expected = Whitening(6).fit(features.float())
    monkeypatch.setattr(layers.whitening, "_ROWS_AT_ONCE", rows_at_once)
    found = Whitening(6).fit(features)
    torch.testing.assert_close(found.matrix, expected.matrix)
    torch.testing.assert_close(found.mean, expected.mean)
    assert found(features).dtype == torch.float32
    torch.testing.assert_close(found(features), expected(features.float()), rtol=0, atol=1e-5)


def test_equal_texts_become_zero_and_two_texts_opposite():
    whitening = Whitening(4).fit(torch.tensor([[0.3, 1.0, 0.1, 2.0]]).repeat(9, 1))
    assert not whitening.matrix.any()
    assert not Whitening(4).fit(torch.ones(1, 4)).matrix.any(), "one item"
    assert not Whitening(4).fit(torch.zeros(3, 4)).matrix.any(), "no texts"
    first, second = Whitening(4).fit(torch.eye(4)[:2])(torch.eye(4)[:2])
    torch.testing.assert_close(first, torch.tensor([0.5**0.5, -(0.5**0.5), 0, 0]))
    torch.testing.assert_close(second, -first)


def test_dimensions_that_never_vary_do_not_dominate():
    features = correlated(300, 6)
    features[:, 4] = 0
    output = Whitening(6).fit(features)(features)
    assert output.isfinite().all() and output[:, 4].abs().max() < 1e-5


def test_the_statistics_are_saved_and_nothing_is_trained():
    features = correlated(30, 5)
    whitening = Whitening(5).fit(features)
    assert not list(whitening.parameters()) and whitening.state_dict().keys() == {"mean", "matrix"}
    loaded = Whitening(5)
    loaded.load_state_dict(whitening.state_dict())
    assert torch.equal(loaded(features), whitening(features))


def test_each_domain_has_its_own_whitening(monkeypatch):
    tables = [correlated(40, 5, seed=1), correlated(7, 5, seed=2).half(), correlated(30, 5, seed=3)]
    whitening = DomainWhitening(tables)
    ids = torch.tensor([77, 1, 40, 41, 47, 48, 77 + 41, 77 + 77])  # above 77: shortened texts, in the same order
    domains = [2, 0, 0, 1, 1, 2, 1, 2]
    vectors = correlated(len(ids), 5, seed=4)
    found = whitening(vectors, ids)
    for vector, domain, own in zip(vectors, domains, found, strict=True):
        torch.testing.assert_close(own, Whitening(5).fit(tables[domain])(vector))
    monkeypatch.setattr(layers.whitening, "_ROWS_AT_ONCE", 3)
    table = DomainWhitening(tables[1:2]).whiten_table(tables[1])
    assert table.dtype == torch.float16, "a table needs no more memory than before"
    torch.testing.assert_close(table.float(), Whitening(5).fit(tables[1])(tables[1]), rtol=0, atol=1e-3)
