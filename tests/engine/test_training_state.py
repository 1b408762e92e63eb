"""What continues a training is checked: names, shapes and kinds, before torch or the loop uses them."""

import copy

import pytest
import torch

from common.errors import UserError
from engine.checkpoint import adopt_settings
from engine.training_state import Progress, check_training_state, load_optimizer
from tests.conftest import small_config

OPTIMIZERS = [
    (torch.optim.Adam, {"fused": True}),
    (torch.optim.AdamW, {"fused": True}),
    (torch.optim.SGD, {"fused": True}),
    (torch.optim.Adagrad, {}),
    (torch.optim.RMSprop, {}),
]


def optimizer_of(kind, options, *shapes, steps=0):
    parameters = [torch.nn.Parameter(torch.ones(shape)) for shape in shapes]
    made = kind(parameters, lr=0.1, **options)
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        made.step()
    return made


@pytest.mark.parametrize(("kind", "options"), OPTIMIZERS)
def test_the_state_of_every_optimizer_loads(kind, options):
    stored = optimizer_of(kind, options, (3, 2), (4,), (), steps=2).state_dict()
    target = optimizer_of(kind, options, (3, 2), (4,), ())
    target.param_groups[0]["lr"] = 0.7
    load_optimizer(target, stored, "a.pth")
    assert target.param_groups[0]["lr"] == 0.7, "the learning rate is that of today"
    for number, values in stored["state"].items():
        for name, value in values.items():
            assert torch.equal(target.state_dict()["state"][number][name], value)


def changes():
    """Pairs of a word and a function that damages the state of an Adam of three parameters."""

    def change(*place, value):
        def apply(stored):
            for key in place[:-1]:
                stored = stored[key]
            stored[place[-1]] = value

        return apply

    yield "exp_avg of the optimizer for parameter 0", change("state", 0, "exp_avg", value=torch.zeros(1))
    yield "exp_avg of the optimizer for parameter 0", change("state", 0, "exp_avg", value=torch.zeros(200, 300))
    yield "exp_avg_sq of the optimizer for parameter 1", change("state", 1, "exp_avg_sq", value=torch.zeros(4).double())
    yield "exp_avg_sq of the optimizer for parameter 1", change("state", 1, "exp_avg_sq", value=[1.0] * 4)
    yield "step of the optimizer for parameter 2", change("state", 2, "step", value=torch.zeros(5))
    yield "step of the optimizer for parameter 2", change("state", 2, "step", value=7)
    yield "state of the optimizer", change("state", 2, "more", value=torch.zeros(()))
    yield "state of the optimizer", change("state", 2, value={"step": torch.zeros(())})
    yield "state of the optimizer", change("state", value=[])
    yield "state of the optimizer", change("param_groups", value=None)
    yield "number of a parameter", change("state", 3, value={})
    yield "number of a parameter", change("state", "0", value={})
    yield "list of parameters", change("param_groups", value=[])
    yield "list of parameters", change("param_groups", 0, "params", value=[0, 1])
    yield "list of parameters", change("param_groups", 0, value=[0, 1, 2])


@pytest.mark.parametrize(("what", "change"), changes())
def test_a_state_of_other_parameters_is_refused(what, change):
    """torch's fused Adam reads beyond a state that is smaller than its parameter."""
    kind, options = OPTIMIZERS[0]
    stored = copy.deepcopy(optimizer_of(kind, options, (300, 200), (4,), (), steps=1).state_dict())
    change(stored)
    with pytest.raises(UserError, match=f"^a.pth: cannot be resumed, its {what} does not fit the training .found "):
        load_optimizer(optimizer_of(kind, options, (300, 200), (4,), ()), stored, "a.pth")


def test_the_settings_of_the_stored_optimizer_are_not_used():
    kind, options = OPTIMIZERS[0]
    stored = optimizer_of(kind, options, (2,), steps=1).state_dict()
    stored["param_groups"][0].update(amsgrad=True, betas=("a", None), foreach=True, surplus=1)
    target = optimizer_of(kind, options, (2,))
    before = {**target.param_groups[0], "params": None}
    load_optimizer(target, stored, "a.pth")
    assert {**target.param_groups[0], "params": None} == before


def test_a_state_of_another_optimizer_is_refused():
    stored = optimizer_of(*OPTIMIZERS[0], (2,), steps=1).state_dict()
    with pytest.raises(UserError, match="its state of the optimizer does not fit the training"):
        load_optimizer(optimizer_of(*OPTIMIZERS[3], (2,)), stored, "a.pth")


def whole():
    progress = vars(Progress(epoch=3, batch=1, best_epoch=2, best_score=0.5, best_metrics={"a": 0.5}))
    generators = [{"cpu": torch.get_rng_state()}]
    return {"epoch": 3, "config": {"seed": 1}, "progress": dict(progress), "generators": generators}


@pytest.mark.parametrize("progress", [Progress(), Progress(epoch=3, best_score=-0.5, best_epoch=1, waited=2)])
def test_the_progress_of_a_training_passes(progress):
    assert check_training_state({**whole(), "epoch": progress.epoch, "progress": vars(progress)}, "a.pth") == progress


@pytest.mark.parametrize(
    ("entry", "value", "what"),
    [
        ("progress", None, "progress"),
        ("progress", [], "progress"),
        ("progress", {}, "progress"),
        ("progress", {**whole()["progress"], "more": 1}, "progress"),
        ("progress", {**whole()["progress"], "batch": -1}, "progress of batch"),
        ("progress", {**whole()["progress"], "batch": "1"}, "progress of batch"),
        ("progress", {**whole()["progress"], "batch": True}, "progress of batch"),
        ("progress", {**whole()["progress"], "best_score": float("nan")}, "progress of best_score"),
        ("progress", {**whole()["progress"], "train_seconds": None}, "progress of train_seconds"),
        ("progress", {**whole()["progress"], "best_metrics": 3}, "progress of best_metrics"),
        ("progress", {**whole()["progress"], "epoch": 4}, "number of epochs"),
        ("epoch", None, "number of epochs"),
        ("epoch", "3", "number of epochs"),
        ("config", None, "list of settings"),
        ("config", {1: 2}, "list of settings"),
        ("generators", {}, "state of generators"),
        ("generators", [None], "state of generators"),
        ("generators", [{"cpu": torch.zeros(5, dtype=torch.uint8)}], "state of generators"),
        ("generators", [{"cpu": torch.get_rng_state().float()}], "state of generators"),
        ("generators", [{"cpu": torch.get_rng_state(), "other": torch.zeros(1)}], "state of generators"),
    ],
)
def test_a_damaged_entry_is_named(entry, value, what):
    with pytest.raises(UserError, match=f"^a.pth: cannot be resumed, its {what} does not fit the training .found "):
        check_training_state({**whole(), entry: value}, "a.pth")


@pytest.mark.parametrize(
    ("key", "value"), [("n_heads", 0), ("n_heads", "a"), ("hidden_act", "none"), ("layer_norm_eps", -1.0)]
)
def test_a_stored_setting_that_no_model_has_is_named(tiny, key, value):
    config = small_config("inductive_ft", "Tiny", tiny)
    config.given = {}
    checkpoint = {"config": {key: value, "recipe": ["a"]}, "state_dict": {"a": torch.zeros(1)}}
    with pytest.raises(UserError, match=f"^a.pth: its setting {key}: found {value!r}, expected "):
        adopt_settings(config, checkpoint, "a.pth")
