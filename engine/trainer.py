"""One training loop for every command, for one process or many."""

import contextlib
import dataclasses
import inspect
import logging
import math
import os
import time
from typing import Any, cast

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from common.errors import UserError
from common.files import writing
from common.processes import PREEMPTED, Preemption, any_process, broadcast, gather_objects, is_main, rank, world_size
from engine.checkpoint import changed_settings, save_checkpoint
from engine.optimizer import group_settings, make_optimizer

# what fixes the order of the data, which a training stopped within an epoch has a part of behind it
_ORDER = {"dataset", "seed", "train_batch_size", "predictions_per_row", "MAX_ITEM_LIST_LENGTH"}
logger = logging.getLogger(__name__)


@dataclasses.dataclass
class Progress:
    """How far a training has come; part of its checkpoints.

    Attributes:
        epoch (int): epochs done.
        best_epoch (int or None), best_score (float): the best evaluation on valid so far.
        best_metrics (dict or None): all its metrics.
        waited (int): evaluations since then.
        batch (int): batches done of the epoch after those, where a training was stopped within it.
        predictions (int): learnt from, in all processes.
        train_seconds, valid_seconds (float): spent so far.
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


class Trainer:
    """Trains a model; checkpoints, early stopping.

    Args:
        config (Config): `epochs`, `learner`, `learning_rate`, `weight_decay`, `clip_grad_norm`, `enable_amp`, and for
            validation `valid_metric`, `eval_step`, `stopping_step`.
        model: with RecBole's `calculate_loss(batch)`.
        path (str): the checkpoint file.
        item_tokens (sequence of str or None): stored with models that have id embeddings.
    """

    def __init__(self, config, model, path, item_tokens=None):
        self.config, self.model, self.path, self.item_tokens = config, model, path, item_tokens
        self.device = config["device"]
        self.progress = Progress()
        if world_size() > 1:
            _use_dense_gradients(model)
        self.optimizer = make_optimizer(config, model)
        # over several processes the wrapped module computes the loss, so its backward pass averages the gradients
        self.loss_of = _Loss(model) if world_size() == 1 else _distributed(_Loss(model))
        self.watch = None  # TensorBoard's writer, while training
        self.preemption = Preemption()
        _check_clipping(config["clip_grad_norm"])
        if config["accumulate"] > 1 and not hasattr(model, "represent"):
            raise UserError(f"option --accumulate: {config['model']} computes each batch as a whole; expected 1")

    def fit(self, batches, validate=None, save_step=None):
        """Train until the last epoch, or until validation stops it.

        Args:
            batches: iterable over an epoch's batches, each with `to(device)` and a length; with `set_epoch`, told the
                epoch.
            validate (callable or None): model -> metrics on valid, called each `eval_step` epochs and after the last.
                The best epoch's weights are saved, and are the model's in the end. Without it, each `save_step`
                epochs and the last are saved.
            save_step (int or None).

        Returns:
            Progress

        Raises:
            SystemExit: with code `PREEMPTED`, when a process was told to stop (SIGTERM). Without `validate`, what is
                needed to go on has been saved.
        """
        self.watch = _open_tensorboard(self.config, self.path)
        with self.preemption:
            self._fit(batches, validate, save_step)
        if self.progress.best_epoch not in (None, self.progress.epoch):
            self._load_best()
        if self.watch:
            self.watch.close()
        return self.progress

    def _fit(self, batches, validate, save_step):
        last = self.config["epochs"]
        for epoch in range(self.progress.epoch, last):
            self.train_epoch(batches, epoch)
            self.progress.epoch, self.progress.batch = epoch + 1, 0
            if validate is None:
                if epoch + 1 == last or (save_step and (epoch + 1) % save_step == 0):
                    self.save(self._epoch_path(epoch + 1))
            elif epoch + 1 == last or (epoch + 1) % self.config["eval_step"] == 0:
                start = time.perf_counter()
                metrics = validate(self.model)
                self.progress.valid_seconds += time.perf_counter() - start
                if self._is_best(epoch, metrics):
                    self.save(self.path, optimizer=False)
                elif self.progress.waited >= self.config["stopping_step"]:
                    break

    def _load_best(self):
        """Take the weights of the best epoch from its file, which the main process has written."""
        if is_main():
            best = torch.load(self.path, map_location="cpu", mmap=True, weights_only=True)
            self.model.load_state_dict(best["state_dict"])
        broadcast(self.model.state_dict().values())

    def train_epoch(self, batches, epoch):
        """One pass over the data, or what is left of it. Returns the mean loss."""
        start = time.perf_counter()
        if hasattr(batches, "set_epoch"):
            batches.set_epoch(epoch)
        if self.progress.batch:
            batches.skip(self.progress.batch)
        self.model.train()
        steps, told_to_stop = [], False
        bar = tqdm(
            batches,
            total=len(batches),
            initial=self.progress.batch,
            desc=f"Epoch {epoch + 1}",
            leave=False,
            disable=None if self.config["show_progress"] else True,
        )
        for batch in bar:
            loss = self.train_step(batch)
            steps.append((loss, len(batch)))
            self.progress.batch += 1
            bar.set_postfix(loss=f"{loss:.4f}")
            told_to_stop = self.preemption.requested(self.device)
            if told_to_stop:
                break
        loss, seen = _mean_loss(gather_objects(steps))
        seconds = time.perf_counter() - start
        self.progress.predictions += seen
        self.progress.train_seconds += seconds
        if told_to_stop:
            self._stop()
        self._report(epoch, {"loss": loss, "predictions per second": seen / seconds})
        return loss

    def _stop(self):
        """Leave because a process was told to: save what a pre-training needs to go on."""
        where = f"epoch {self.progress.epoch + 1}, batch {self.progress.batch}"
        if "{epoch}" not in self.path:
            best = f"the best epoch so far is in {self.path}" if self.progress.best_epoch else "nothing is saved yet"
            logger.info("told to stop in %s; %s", where, best)
            raise SystemExit(PREEMPTED)
        path = self._epoch_path(f"{self.progress.epoch}-stopped")
        self.save(path)
        gather_objects(None)  # who ends first has the others ended: wait until the file is there
        logger.info("told to stop in %s; go on with --resume=%s", where, path)
        raise SystemExit(PREEMPTED)

    def train_step(self, batch):
        """One step of the optimiser. Returns the loss, float.

        Raises:
            UserError: the loss is no longer a finite number.
        """
        self.optimizer.zero_grad(set_to_none=True)
        if self.config["accumulate"] > 1:  # also where a process has one part only: all talk in the same order
            parts = [part.to(self.device) for part in batch.split(self.config["accumulate"])]
            loss = self._backward_in_parts(batch.to(self.device), parts)
        else:
            with self._autocast():
                loss = self.loss_of(batch.to(self.device))
            loss.backward()
        if self.config["clip_grad_norm"]:
            clip_grad_norm_(self.model.parameters(), **self.config["clip_grad_norm"])
        value = loss.item()
        if any_process(not math.isfinite(value), self.device):
            found = "no number in another process" if math.isfinite(value) else value
            raise UserError(
                f"the loss is {found} in epoch {self.progress.epoch + 1}; "
                "set a lower --learning_rate or --clip_grad_norm='{max_norm: 1.0}'"
            )
        self.optimizer.step()
        return value

    def _autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=bool(self.config["enable_amp"]))

    def _backward_in_parts(self, batch, parts):
        """The gradients of a batch's loss with the activations of one part at a time (Gao et al., RepL4NLP 2021).

        All parts are represented without a graph; the loss of the whole batch says how each representation should
        change; then part after part is represented again, with the same dropout and noise, and passes that on.
        """
        generators, represented = [], []
        with torch.no_grad(), self._autocast():
            for part in parts:
                generators.append(self._generators())
                represented.append(self.model.represent(part))
        joined = [torch.cat(column).float().requires_grad_() for column in zip(*represented, strict=True)]
        with self._autocast():
            loss = self.model.loss(batch, joined)
        loss.backward()
        after = self._generators()
        lengths = [len(part) for part in parts]
        gradients = zip(*(cast(torch.Tensor, vectors.grad).split(lengths) for vectors in joined), strict=True)
        for part, own, gradient in zip(parts, generators, gradients, strict=True):
            self._set_generators(own)
            distributed = self.loss_of if isinstance(self.loss_of, DistributedDataParallel) else None
            with contextlib.nullcontext() if part is parts[-1] or distributed is None else distributed.no_sync():
                with self._autocast():
                    passed_on = self.loss_of(part, gradient)
                passed_on.backward()
        self._set_generators(after)
        return loss

    def _generators(self):
        """The states of the generators of dropout and noise, dict."""
        states = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self.device)
        return states

    def _set_generators(self, states):
        torch.set_rng_state(states["cpu"])
        if self.device.type == "cuda" and "cuda" in states:
            torch.cuda.set_rng_state(states["cuda"], self.device)

    def _is_best(self, epoch, metrics):
        """Note an evaluation; strictly better, unrounded, or it is not."""
        score = metrics[self.config["valid_metric"].lower()]
        score = score if self.config["valid_metric_bigger"] else -score
        self._report(epoch, metrics, "valid")
        if not score > self.progress.best_score:
            self.progress.waited += 1
            return False
        self.progress.best_score, self.progress.best_epoch, self.progress.waited = score, epoch + 1, 0
        self.progress.best_metrics = metrics
        return True

    def _report(self, epoch, values, what="train"):
        logger.info(
            "epoch %d  %s  %s",
            epoch + 1,
            what,
            "  ".join(f"{k} {v:.4f}" if abs(v) < 100 else f"{k} {v:,.0f}" for k, v in values.items()),
        )
        if self.watch:
            for name, value in values.items():
                self.watch.add_scalar(f"{what}/{name}", value, epoch + 1)

    # -- checkpoints --------------------------------------------------------------------------------------------

    def _epoch_path(self, epoch):
        return self.path.format(epoch=epoch)

    def save(self, path, optimizer=True):
        """Write a checkpoint; with the optimiser and the generators, a training can go on from it."""
        more: dict[str, Any] = {"progress": dataclasses.asdict(self.progress)}
        if optimizer:
            more.update(optimizer=self.optimizer.state_dict(), generators=gather_objects(self._generators()))
        if not is_main():
            return
        save_checkpoint(path, self.model, self.config, self.progress.epoch, self.item_tokens, **more)
        logger.info("saved %s", path)

    def resume(self, checkpoint, path):
        """Go on from a checkpoint of `save`, bit for bit: weights are in the model already.

        Raises:
            UserError: the checkpoint has no optimiser in it, or another; it is of the middle of an epoch in another
                order; or it has all `epochs` behind it.
        """
        if not {"optimizer", "generators", "progress"} <= checkpoint.keys():
            raise UserError(f"{path}: cannot be resumed, it holds weights only; expected one that pretrain.py saved")
        progress, changed = Progress(**checkpoint["progress"]), changed_settings(checkpoint, self.config)
        if "learner" in changed:
            then, now = changed["learner"]
            raise UserError(f"{path}: was trained with {then}, not {now}; give --learner={then}")
        for key in sorted(changed.keys() & _ORDER) if progress.batch else ():
            then, now = changed[key]
            raise UserError(f"{path}: was stopped within an epoch, with {key} {then}, not {now}; give --{key}={then}")
        if checkpoint["epoch"] >= self.config["epochs"]:
            raise UserError(
                f"{path}: has {checkpoint['epoch']} epochs behind it, --epochs is {self.config['epochs']}; give more"
            )
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        for group in self.optimizer.param_groups:
            group.update(group_settings(self.config))
        if changed:
            told = ", ".join(f"{key} {then} -> {now}" for key, (then, now) in changed.items())
            logger.info("settings changed since %s: %s", path, told)
        self.progress = progress
        generators = checkpoint["generators"]
        if len(generators) == world_size():
            self._set_generators(generators[rank()])
        else:
            logger.info("saved by %s processes, now %s: the noise differs", len(generators), world_size())
        within = f" and {self.progress.batch} batches" if self.progress.batch else ""
        logger.info("going on after epoch %d%s", self.progress.epoch, within)


def _mean_loss(steps):
    """The mean loss of an epoch's predictions, and their number.

    Args:
        steps (list of list of (float, int)): of each process, the loss and the predictions of each step. The mean of
            the processes' losses is that of the step's batch, however many predictions each had of it.
    """
    total, seen = 0.0, 0
    for step in zip(*steps, strict=True):
        losses, counts = zip(*step, strict=True)
        total, seen = total + sum(losses) / len(losses) * sum(counts), seen + sum(counts)
    return total / max(seen, 1), seen


class _Loss(torch.nn.Module):
    """A module whose forward pass is the model's loss, or what makes the backward pass continue given gradients."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch, gradients=None):
        if gradients is not None:
            vectors = self.model.represent(batch)
            return sum((vector.float() * own).sum() for vector, own in zip(vectors, gradients, strict=True))
        loss = self.model.calculate_loss(batch)
        return sum(loss) if isinstance(loss, tuple) else loss


def _distributed(loss):
    """The loss, whose backward pass averages the gradients over all processes."""
    # Text features, the only buffers, are the same everywhere and mapped: broadcast, each process would get a copy.
    buffers = [name for name, _ in loss.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(loss, buffers)
    return DistributedDataParallel(loss, gradient_as_bucket_view=True)


def _use_dense_gradients(model):
    """NCCL adds up no sparse ones."""
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            module.sparse = False


def _open_tensorboard(config, path):
    """A writer beside the checkpoints, named like this one; None in the processes that write nothing."""
    if not is_main():
        return None
    from torch.utils.tensorboard import SummaryWriter

    name = os.path.splitext(os.path.basename(path))[0].replace("-{epoch}", "")
    folder = os.path.join(config["checkpoint_dir"], "tensorboard", f"{name}-{time.strftime('%m%d-%H%M%S')}")
    with writing(folder):
        return SummaryWriter(folder)


def _check_clipping(arguments):
    """`clip_grad_norm` holds arguments of torch's clip_grad_norm_."""
    try:
        inspect.signature(clip_grad_norm_).bind([], **(arguments or {"max_norm": 1.0}))
    except TypeError as error:
        raise UserError(
            f"option --clip_grad_norm: found {arguments}, expected arguments of torch's clip_grad_norm_, "
            f"such as {{max_norm: 1.0}} ({error})"
        ) from None
