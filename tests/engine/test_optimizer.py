"""Optimizers by name, and those of embeddings with sparse gradients."""

import copy

import pytest
import torch
from torch import nn

from common.errors import UserError
from engine.optimizer import make_optimizer

SETTINGS = {"learner": "adam", "learning_rate": 0.1, "weight_decay": 0.0, "clip_grad_norm": None}


class Model(nn.Module):
    def __init__(self, sparse=False):
        super().__init__()
        self.ids = nn.Embedding(6, 2, sparse=sparse)
        self.line = nn.Linear(2, 1)

    def forward(self, rows):
        return self.line(self.ids(rows)).sum()


def test_learners():
    for name, kind in (("adam", torch.optim.Adam), ("AdamW", torch.optim.AdamW), ("adagrad", torch.optim.Adagrad)):
        assert isinstance(make_optimizer(SETTINGS | {"learner": name}, Model()), kind)
    with pytest.raises(UserError, match="--learner: found 'adm', expected one of adam, adamw, sgd"):
        make_optimizer(SETTINGS | {"learner": "adm"}, Model())


@pytest.mark.parametrize("name, kind", [("adam", torch.optim.Adam), ("sgd", torch.optim.SGD)])
def test_they_do_what_torchs_do(name, kind):
    """The same steps bit for bit, and each takes the other's state."""
    torch.manual_seed(0)
    model, theirs = Model(), Model()
    theirs.load_state_dict(model.state_dict())
    optimizer = make_optimizer(SETTINGS | {"learner": name, "weight_decay": 0.1}, model)
    reference = kind(theirs.parameters(), lr=0.1, weight_decay=0.1, fused=True)
    for step in range(4):
        for one, way in ((model, optimizer), (theirs, reference)):
            way.zero_grad()
            one(torch.tensor([step, 4])).backward()
            way.step()
        for own, other in zip(model.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(own, other) and own.grad.abs().sum() > 0
        if step == 1:
            states = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(reference.state_dict())
            optimizer.load_state_dict(states[1])
            reference.load_state_dict(states[0])


def test_what_is_frozen_is_not_the_optimizers():
    model = Model()
    model.line.requires_grad_(False)
    groups = make_optimizer(SETTINGS, model).param_groups
    assert [parameter is model.ids.weight for parameter in groups[0]["params"]] == [True]


@pytest.mark.parametrize("learner", ["adam", "sgd", "adagrad"])
def test_sparse_gradients_move_touched_rows_as_dense_ones_do_and_no_others(learner):
    moved = []
    for sparse in (False, True):
        torch.manual_seed(0)
        model = Model(sparse)
        before = model.ids.weight.detach().clone()
        optimizer = make_optimizer(SETTINGS | {"learner": learner}, model)
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.tensor([1, 4])).backward()
            optimizer.step()
        moved.append((model.ids.weight.detach() - before, model.line.weight.detach()))
    torch.testing.assert_close(moved[1], moved[0])
    assert moved[0][0].abs().sum(1).nonzero()[:, 0].tolist() == [1, 4]
    optimizer.zero_grad()
    assert model.ids.weight.grad is None and model.line.weight.grad is None


@pytest.mark.parametrize(
    "key, value, expected",
    [
        ("learner", "adamw", "adam, sgd, adagrad"),
        ("weight_decay", 0.1, "0"),
        ("clip_grad_norm", {"max_norm": 1.0}, "none"),
    ],
)
def test_what_sparse_gradients_cannot_have_is_one_line(key, value, expected):
    make_optimizer(SETTINGS | {key: value}, Model())
    with pytest.raises(UserError, match=f"option --{key}: found .*, expected {expected} with --sampled_negatives"):
        make_optimizer(SETTINGS | {key: value}, Model(sparse=True))
