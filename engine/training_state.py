"""What a checkpoint holds so that its training can be continued, and the checks of it.

Checksums notice a file that was damaged. These checks notice one that was written by other code, or by an attacker:
torch's fused optimizers do not check the shapes of their state, and would read beyond it.
"""

import dataclasses
import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch

from common.errors import UserError


@dataclasses.dataclass
class Progress:
    """The progress of a training. Its checkpoints store it.

    Attributes:
        epoch: number of completed epochs.
        batch: number of completed batches of the next epoch; above 0 if the training was stopped within it.
        best_epoch: the epoch with the best score on valid so far, None before the first evaluation.
        best_score: the score of that epoch, larger is better.
        best_metrics: all metrics of that epoch.
        waited: number of evaluations since the best one.
        predictions: number of training predictions so far, in all processes.
        train_seconds, valid_seconds: time spent so far.
    """

    epoch: int = 0
    batch: int = 0
    best_epoch: int | None = None
    best_score: float = -math.inf
    best_metrics: dict | None = None
    waited: int = 0
    predictions: int = 0
    train_seconds: float = 0.0
    valid_seconds: float = 0.0


def check_training_state(checkpoint: Mapping[str, Any], path: str) -> Progress:
    """Check the entries of a checkpoint that continue a training, apart from the optimizer.

    Args:
        checkpoint: from `engine.checkpoint.read_checkpoint`, with `progress`, `generators`, `config` and `epoch`.
        path: the file, for messages.

    Returns:
        The progress of the training.

    Raises:
        UserError: an entry is not what a training saves.
    """
    stored, known = checkpoint["progress"], Progress()
    names = [field.name for field in dataclasses.fields(Progress)]
    _expect(path, isinstance(stored, dict) and sorted(map(str, stored)) == sorted(names), "progress", stored)
    for key, value in stored.items():
        optional = getattr(known, key) is None
        kind = (dict if key == "best_metrics" else int) if optional else type(getattr(known, key))
        _expect(path, type(value) is kind or optional and value is None, f"progress of {key}", value)
        if kind is not dict and value is not None:
            _expect(path, value >= 0 or key == "best_score" and not math.isnan(value), f"progress of {key}", value)
    epoch, settings, generators = (checkpoint.get(key) for key in ("epoch", "config", "generators"))
    _expect(path, type(epoch) is int and epoch == stored["epoch"], "number of epochs", epoch)
    _expect(
        path, isinstance(settings, dict) and all(type(key) is str for key in settings), "list of settings", settings
    )
    _expect(
        path, isinstance(generators, list) and all(map(_is_generator, generators)), "state of generators", generators
    )
    return Progress(**stored)


def _is_generator(states):
    """Whether `states` holds the states of random generators, as `Trainer.save` stores them."""
    return (
        isinstance(states, dict)
        and "cpu" in states
        and states.keys() <= {"cpu", "cuda"}
        and all(isinstance(state, torch.Tensor) and state.dtype is torch.uint8 for state in states.values())
        and states["cpu"].shape == torch.get_rng_state().shape
    )


def load_optimizer(optimizer: torch.optim.Optimizer, stored: Any, path: str) -> None:
    """Load the state of an optimizer. Its settings, such as the learning rate, stay as they are.

    Args:
        optimizer: over the parameters of the model, in the same order as when it was saved.
        stored: its `state_dict`, from a checkpoint.
        path: the file, for messages.

    Raises:
        UserError: the state belongs to other parameters, or to another optimizer.
    """
    own, shapes = optimizer.state_dict(), _state_of_one(optimizer)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: Any = stored.get("state") if isinstance(stored, dict) else None
    groups: Any = stored.get("param_groups") if isinstance(stored, dict) else None
    _expect(path, isinstance(state, dict) and isinstance(groups, list), "state of the optimizer", stored)
    numbers = [group.get("params") if isinstance(group, dict) else None for group in groups]
    _expect(path, numbers == [group["params"] for group in own["param_groups"]], "list of parameters", numbers)
    for number, values in state.items():
        _expect(path, type(number) is int and 0 <= number < len(parameters), "number of a parameter", number)
        _expect(path, isinstance(values, dict) and values.keys() == shapes.keys(), "state of the optimizer", values)
        for name, value in values.items():
            expected = parameters[number] if shapes[name].dim() else shapes[name]
            fits = isinstance(value, torch.Tensor) and (value.shape, value.dtype) == (expected.shape, expected.dtype)
            _expect(path, fits, f"{name} of the optimizer for parameter {number}", value)
    optimizer.load_state_dict({"state": state, "param_groups": own["param_groups"]})


def _state_of_one(optimizer):
    """The state that an optimizer of this kind has for a parameter of one number: dict of name -> tensor."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    parameter.grad = torch.zeros(1)
    accepted = inspect.signature(type(optimizer)).parameters  # AdamW has a default that it does not accept
    twin = type(optimizer)(
        [parameter], **{key: optimizer.defaults[key] for key in optimizer.defaults.keys() & accepted}
    )
    twin.step()
    return twin.state[parameter]


def _expect(path, holds, what, found):
    if not holds:
        told = (
            f"{tuple(found.shape)} {found.dtype}" if isinstance(found, torch.Tensor) else " ".join(repr(found).split())
        )
        raise UserError(
            f"{path}: cannot be resumed, its {what} does not fit the training (found {told[:80]}); "
            "choose another checkpoint"
        )
