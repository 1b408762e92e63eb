"""Sparse logits and dense logits, compared with a matrix."""

import torch

from layers.logits import DenseLogits, SparseLogits


def example():
    """Entries of a [4, 5] matrix, and this matrix."""
    rows, columns = torch.tensor([0, 0, 2, 3]), torch.tensor([1, 4, 0, 4])
    values = torch.tensor([1.0, 2.0, 3.0, 4.0], requires_grad=True)
    dense = torch.zeros(4, 5)
    dense[rows, columns] = values.detach()
    return SparseLogits(rows, columns, values), dense


def test_they_add_to_dense_logits():
    sparse, dense = example()
    logits = torch.randn(4, 5)
    before = logits.clone()
    total = sparse.add_to(logits)
    torch.testing.assert_close(total, before + dense)
    assert torch.equal(logits, before), "the argument is unchanged"
    (total * torch.arange(20.0).view(4, 5)).sum().backward()
    assert sparse.values.grad.tolist() == [1.0, 4.0, 10.0, 19.0]


def test_one_candidate_per_row():
    sparse, dense = example()
    columns = torch.tensor([4, 0, 0, 3])
    found = sparse.at(columns)
    assert found.tolist() == dense.gather(1, columns[:, None])[:, 0].tolist() == [2.0, 0.0, 3.0, 0.0]
    found.sum().backward()
    assert sparse.values.grad.tolist() == [0.0, 1.0, 1.0, 0.0]


def test_parts_are_those_of_the_dense_matrix():
    sparse, dense = example()
    for start in range(5):
        for stop in range(start, 6):
            rows = sparse.select_rows(start, stop)
            expected = dense[start:stop]
            assert torch.equal(rows.add_to(torch.zeros_like(expected)).detach(), expected)
            columns = sparse.select_columns(start, stop)
            expected = dense[:, start:stop]
            assert torch.equal(columns.add_to(torch.zeros_like(expected)).detach(), expected)


def test_dense_logits_do_the_same():
    sparse, matrix = example()
    dense, logits, columns = DenseLogits(matrix), torch.randn(4, 5), torch.tensor([4, 0, 0, 3])
    torch.testing.assert_close(dense.add_to(logits), sparse.add_to(logits))
    torch.testing.assert_close(dense.at(columns), sparse.at(columns))
    one, other = (added.select_columns(1, 5).add_to(logits[:, 1:]) for added in (dense, sparse))
    torch.testing.assert_close(one, other)
