"""The training loop of every command, for one process or several."""

import contextlib
import dataclasses
import inspect
import logging
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_, get_total_norm
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from common.errors import UserError
from common.files import writing
from common.processes import PREEMPTED, Preemption, any_process, broadcast, gather_objects, is_main, rank, world_size
from engine.checkpoint import changed_settings, epoch_files, epoch_path, has_epochs, save_checkpoint
from engine.optimizer import make_optimizer
from engine.runs import Run, check_files
from engine.training_state import Progress, check_training_state, load_optimizer

# The settings that determine the order of the data in an epoch. A training that was stopped within an epoch can only be
# continued in the same order.
_ORDER = {"dataset", "seed", "train_batch_size", "predictions_per_row", "MAX_ITEM_LIST_LENGTH"}
_OF_THE_DATA = {"train_fraction", "holdout_items"}
_ORDER |= _OF_THE_DATA
_FIXED = ("learner", "pretrain_loss")  # no training can be continued with another value
# They replace the epoch in the name of a checkpoint that was saved within the next epoch
_STOPPED, _FAILED = "{epoch}-stopped", "{epoch}-failed"
_LARGEST_WEIGHT = 1e18  # the squares of larger numbers are no float32
logger = logging.getLogger(__name__)


class Trainer:
    """Trains a model, saves checkpoints, and stops early if validation no longer improves.

    Args:
        config: the settings. `epochs`, `learner`, `learning_rate`, `weight_decay`, `clip_grad_norm`, `enable_amp` and
            `accumulate` are read, and for validation `valid_metric`, `eval_step` and `stopping_step`.
        model: a module with RecBole's `calculate_loss(batch)`.
        path: the checkpoint file. If its name contains `{epoch}`, every checkpoint is kept, and a training can be
            continued from each of them.
        item_tokens: the raw id of each row of the id embedding, stored in the checkpoints.
        run: the identity of the run, stored in the checkpoints.

    Raises:
        UserError: a setting does not fit the model or the optimizer.
    """

    def __init__(
        self,
        config,
        model: torch.nn.Module,
        path: str,
        item_tokens: Sequence[str] | None = None,
        run: Run | None = None,
    ):
        self.config, self.path, self.item_tokens, self.run = config, path, item_tokens, run
        self.model: Any = model  # RecBole's methods, and for gradient caching `represent` and `loss`
        self.device = config["device"]
        self.progress = Progress()
        if world_size() > 1:
            _use_dense_gradients(model)
        self.optimizer: Any = make_optimizer(config, model)  # a CombinedOptimizer is never saved
        # with several processes, the wrapped module computes the loss: its backward pass averages the gradients
        self.loss_of = _Loss(model) if world_size() == 1 else _distributed(_Loss(model))
        self.resumed_from: str | None = None  # a checkpoint, which the run may replace
        self.tensorboard = None  # the writer while `fit` runs, in the main process only
        self.preemption = Preemption(_tell_that_it_stops)
        _check_clipping(config["clip_grad_norm"])
        if config["accumulate"] > 1 and not hasattr(model, "represent"):
            raise UserError(f"option --accumulate: {config['model']} cannot compute a batch in parts; expected 1")

    def fit(
        self,
        batches: Any,
        validate: Callable[[torch.nn.Module], dict[str, float]] | None = None,
        save_step: int | None = None,
        start: dict[str, float] | None = None,
    ) -> Progress:
        """Train until the last epoch, or until validation no longer improves.

        Args:
            batches: an iterable over the batches of an epoch. A batch has `to(device)` and a length. If the iterable
                has `set_epoch`, it is called before each epoch.
            validate: a function that computes the metrics on valid. It is called every `eval_step` epochs and after the
                last epoch. The weights of the best epoch are saved, and loaded into the model at the end.
            save_step: without `validate`, a checkpoint is saved every `save_step` epochs and after the last epoch.
            start: the metrics of the initial weights on valid, as epoch 0. If no epoch is better, they are the result.

        Raises:
            UserError: the training would replace a checkpoint of another run, a file cannot be written, or the loss is
                not finite.
            SystemExit: any process received SIGTERM or Ctrl-C. The code is `PREEMPTED`. Without `validate`, a
                checkpoint was saved from which the training can be continued.
        """
        if self.run and validate is None and is_main():
            check_files(self._files_to_replace(save_step), self.run, self.config)
        self.tensorboard = _open_tensorboard(self.config, self.path)
        with self.preemption:
            if start is not None:
                self._record(start)
            self._fit(batches, validate, save_step)
        if self.progress.best_epoch not in (None, self.progress.epoch):
            self._load_best()
        if self.tensorboard:
            self.tensorboard.close()
        return self.progress

    def _fit(self, batches, validate, save_step):
        last = self.config["epochs"]
        for epoch in range(self.progress.epoch, last):
            self.train_epoch(batches, epoch)
            self.progress.epoch, self.progress.batch = epoch + 1, 0
            if validate is None:
                if self._saves_after(epoch + 1, save_step):
                    self.check_weights()
                    self.save(self._epoch_path(epoch + 1))
            elif epoch + 1 == last or (epoch + 1) % self.config["eval_step"] == 0:
                self._validate(validate)
                if self.preemption.requested(self.device):
                    self._save_and_exit()
                if self.progress.waited >= self.config["stopping_step"]:
                    break

    def _validate(self, validate):
        """Evaluate the weights of the last completed epoch on valid."""
        self.check_weights()
        start = time.perf_counter()
        metrics = validate(self.model)
        self.progress.valid_seconds += time.perf_counter() - start
        self._record(metrics)

    def _record(self, metrics):
        """Record the metrics on valid of the last completed epoch. Save the weights if they are the best so far."""
        if self._is_best(metrics):
            self.save(self.path, optimizer=False)

    def _load_best(self):
        """Load the weights of the best epoch. The main process reads the file and sends the weights to the others."""
        if is_main():
            best = torch.load(self.path, map_location="cpu", mmap=True, weights_only=True)
            if self.run and best.get("run") != self.run.id:
                raise UserError(f"{self.path}: was replaced by another run; give each run its own --checkpoint_dir")
            self.model.load_state_dict(best["state_dict"])
        broadcast(self.model.state_dict().values())

    def train_epoch(self, batches: Any, epoch: int) -> float:
        """Train one epoch (`epoch` counts from 0), or the rest of one that was stopped. Returns the mean loss."""
        start = time.perf_counter()
        if hasattr(batches, "set_epoch"):
            batches.set_epoch(epoch)
        if self.progress.batch:
            batches.skip(self.progress.batch)
        self.model.train()
        steps, must_stop = [], False
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
            must_stop = self.preemption.requested(self.device)
            if must_stop:
                break
        loss, seen = _mean_loss(gather_objects(steps))
        seconds = time.perf_counter() - start
        self.progress.predictions += seen
        self.progress.train_seconds += seconds
        if must_stop:
            self._save_and_exit()
        self._report(epoch + 1, {"loss": loss, "predictions per second": seen / seconds})
        return loss

    def _save_and_exit(self):
        """Exit after a signal. A training without validation first saves a checkpoint to continue from."""
        where = f"epoch {self.progress.epoch + 1}, batch {self.progress.batch}"
        by = self.preemption.name or "a signal to another process"
        if not has_epochs(self.path):
            best = f"the best epoch so far is in {self.path}" if self.progress.best_metrics else "nothing is saved yet"
            logger.info("stopped by %s in %s; %s", by, where, best)
            raise SystemExit(PREEMPTED)
        path = self._epoch_path(_STOPPED.format(epoch=self.progress.epoch))
        self.save(path)
        gather_objects(None)  # if one process exits first, the others are killed. Wait until the file is saved
        logger.info("stopped by %s in %s; continue with --resume=%s", by, where, path)
        raise SystemExit(PREEMPTED)

    def train_step(self, batch) -> float:
        """Make one step of the optimizer. Returns the loss.

        Raises:
            UserError: the loss or the norm of the gradients is not finite, in this process or in another.
        """
        before = self._generators()
        self.optimizer.zero_grad(set_to_none=True)
        if self.config["accumulate"] > 1:  # also for one part: all processes must communicate in the same order
            parts = [part.to(self.device) for part in batch.split(self.config["accumulate"])]
            loss = self._backward_in_parts(batch.to(self.device), parts)
        else:
            with self._autocast():
                loss = self.loss_of(batch.to(self.device))
            loss.backward()
        value, norm = torch.stack([loss.detach().float(), self._gradient_norm()]).tolist()
        if any_process(not math.isfinite(value + norm), self.device):
            self._stop_at_step(value, norm, before)
        self.optimizer.step()
        return value

    def _gradient_norm(self):
        """The norm of all gradients before they are clipped, float32 []."""
        if self.config["clip_grad_norm"]:
            return clip_grad_norm_(self.model.parameters(), **self.config["clip_grad_norm"]).float()
        parameters = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        for parameter in parameters:
            if parameter.grad.is_sparse:
                parameter.grad = parameter.grad.coalesce()
        gradients = [parameter.grad for parameter in parameters]
        return get_total_norm([each.values() if each.is_sparse else each for each in gradients]).float()

    def _stop_at_step(self, loss, norm, generators):
        """Stop before a step with NaN or infinite numbers. If the training can be resumed, save what repeats the step.

        Args:
            loss, norm: of this process.
            generators: the states of the random generators before the step.

        Raises:
            UserError: always.
        """
        found = [f"the {what} is {x}" for what, x in (("loss", loss), ("gradient norm", norm)) if not math.isfinite(x)]
        where = f"epoch {self.progress.epoch + 1}, batch {self.progress.batch + 1}"
        again = ""
        if has_epochs(self.path):
            path = self._epoch_path(_FAILED.format(epoch=self.progress.epoch))
            self._set_generators(generators)
            try:
                self.save(path)
                again = f"; --resume={path} repeats this step"
            except UserError as failure:  # a full disk must not hide the reason
                again = f"; what repeats this step could not be saved: {failure}"
            gather_objects(None)  # if one process exits first, the others are killed. Wait until the file is saved
        raise UserError(
            f"{' and '.join(found) or 'the loss or the gradient norm of another process is not finite'} in {where}; "
            "set a lower --learning_rate or --clip_grad_norm='{max_norm: 1.0}'" + again
        )

    def check_weights(self) -> None:
        """Check that no weight is NaN or larger than `_LARGEST_WEIGHT`.

        Raises:
            UserError: a weight is not.
        """
        for name, parameter in self.model.named_parameters():
            extremes = [float(value) for value in torch.aminmax(parameter.detach())] if parameter.numel() else [0.0]
            wrong = [value for value in extremes if not abs(value) < _LARGEST_WEIGHT]
            if wrong:
                raise UserError(
                    f"the weights {name} hold {wrong[0]} after {self.progress.epoch} epochs; nothing is saved of them; "
                    "set a lower --learning_rate or --clip_grad_norm='{max_norm: 1.0}'"
                )

    def _autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=bool(self.config["enable_amp"]))

    def _backward_in_parts(self, batch, parts):
        """Gradient caching (Gao et al., RepL4NLP 2021): only one part of the batch has its activations in memory.

        1. Compute the representations of all parts, without a graph.
        2. Compute the loss of the whole batch, and its gradients with respect to the representations.
        3. Compute the representations of each part again, with the same dropout and noise. Propagate the gradients of
           step 2 through them.

        Returns:
            The loss, float [].
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
        """The states of the random generators that dropout and noise use: dict."""
        states = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self.device)
        return states

    def _set_generators(self, states):
        torch.set_rng_state(states["cpu"])
        if self.device.type == "cuda" and "cuda" in states:
            torch.cuda.set_rng_state(states["cuda"], self.device)

    def _is_best(self, metrics):
        """Record an evaluation. Returns whether its unrounded score is better than all previous scores."""
        epoch = self.progress.epoch
        score = metrics[self.config["valid_metric"].lower()]
        score = score if self.config["valid_metric_bigger"] else -score
        self._report(epoch, metrics, "valid")
        if not score > self.progress.best_score:
            self.progress.waited += 1
            return False
        self.progress.best_score, self.progress.best_epoch, self.progress.waited = score, epoch, 0
        self.progress.best_metrics = metrics
        return True

    def _report(self, epoch, values, what="train"):
        logger.info(
            "epoch %d  %s  %s",
            epoch,
            what,
            "  ".join(f"{k} {v:.4f}" if abs(v) < 100 else f"{k} {v:,.0f}" for k, v in values.items()),
        )
        if self.tensorboard:
            for name, value in values.items():
                self.tensorboard.add_scalar(f"{what}/{name}", value, epoch)

    # -- checkpoints --------------------------------------------------------------------------------------------

    def _epoch_path(self, epoch):
        return epoch_path(self.path, epoch)

    def _saves_after(self, epoch, save_step):
        """Whether a training without validation saves a checkpoint after this epoch."""
        return epoch == self.config["epochs"] or bool(save_step) and epoch % save_step == 0

    def _files_to_replace(self, save_step):
        """The existing checkpoints that the rest of a training without validation may replace. Set of str."""
        done, last = self.progress.epoch, self.config["epochs"]
        names: set[int | str] = {epoch for epoch in range(done + 1, last + 1) if self._saves_after(epoch, save_step)}
        names |= {name.format(epoch=epoch) for epoch in range(done, last) for name in (_STOPPED, _FAILED)}
        found = set(epoch_files(self.path))
        return {self._epoch_path(name) for name in names} & found - {self.resumed_from}

    def save(self, path: str, optimizer: bool = True, epoch: int | None = None) -> None:
        """Write a checkpoint. All processes call this, the main process writes.

        Args:
            path: the file.
            optimizer: also store the optimizer and the random generators, so that the training can be continued.
            epoch: the epoch of the weights. Default: the last one that was completed.
        """
        more: dict[str, Any] = {"progress": dataclasses.asdict(self.progress)}
        if self.run:
            more.update(run=self.run.id, run_start=self.run.start, run_data=self.run.data)
        if optimizer:
            more.update(optimizer=self.optimizer.state_dict(), generators=gather_objects(self._generators()))
        if not is_main():
            return
        save_checkpoint(
            path, self.model, self.config, self.progress.epoch if epoch is None else epoch, self.item_tokens, **more
        )
        logger.info("saved %s", path)

    def resume(self, checkpoint: Mapping, path: str) -> None:
        """Continue the training of a checkpoint. The result is the same, bit for bit, as without interruption.

        Args:
            checkpoint: from `read_checkpoint`. Its weights have already been loaded into the model.
            path: the file of the checkpoint, for messages.

        Raises:
            UserError: the checkpoint has no optimizer state, or that of another optimizer; or the data have changed; or
                it was saved within an epoch, and the order of the data would be another one now; or its training is
                complete.
        """
        if not {"optimizer", "generators", "progress"} <= checkpoint.keys():
            raise UserError(f"{path}: cannot be resumed, it holds weights only; expected one that pretrain.py saved")
        progress = check_training_state(checkpoint, path)
        changed = changed_settings(checkpoint, self.config)
        for key in (key for key in _FIXED if key in changed):
            then, now = changed[key]
            raise UserError(f"{path}: was trained with {then}, not {now}; set --{key}={then}")
        for key in sorted(changed.keys() & _ORDER) if progress.batch else ():
            then, now = changed[key]
            raise UserError(f"{path}: was stopped within an epoch, with {key} {then}, not {now}; set --{key}={then}")
        if progress.epoch >= self.config["epochs"]:
            option = "--pretrain_epochs" if self.config["pretrain_epochs"] else "--epochs"
            raise UserError(
                f"{path}: has completed {progress.epoch} epochs, but {option} is {self.config['epochs']}; "
                f"set a larger {option}"
            )
        self._check_data(checkpoint.get("run_data"), path, changed)
        self.resumed_from = path
        load_optimizer(self.optimizer, checkpoint["optimizer"], path)
        if changed:
            told = ", ".join(f"{key} {then} -> {now}" for key, (then, now) in changed.items())
            logger.info("settings changed since %s: %s", path, told)
        self.progress = progress
        generators = checkpoint["generators"]
        if len(generators) == world_size():
            self._set_generators(generators[rank()])
        else:
            logger.info("saved by %s processes, now %s: dropout and noise differ", len(generators), world_size())
        within = f" and {self.progress.batch} batches" if self.progress.batch else ""
        logger.info("continuing after epoch %d%s", self.progress.epoch, within)

    def _check_data(self, then, path, changed):
        """Check that the data are those of the checkpoint, unless the user allows others.

        Args:
            then: their hash.
            path: the checkpoint, for messages.
            changed: from `changed_settings`.
        """
        if not self.run or self.run.data == then:
            return
        if then is None:
            logger.info("%s does not say which data it was trained on; they are not compared", path)
        elif self.config["allow_changed_data"]:
            logger.warning("warning: the data have changed since %s was saved; going on with those of today", path)
        else:
            for key in sorted(changed.keys() & _OF_THE_DATA):
                told = "was trained with {0}, not {1}; set --{2}={0}, or go on with --allow_changed_data"
                raise UserError(f"{path}: " + told.format(*changed[key], key))
            raise UserError(
                f"{path}: was trained on other data than those of {self.config['dataset']} today (interactions or text "
                "features differ); bring them back, start anew, or go on with --allow_changed_data"
            )


def _tell_that_it_stops():
    if is_main():
        logger.info("stopping after this step; a second signal stops at once")


def _mean_loss(steps):
    """The mean loss over the predictions of an epoch, and their number.

    The loss of a step is the mean of the losses of all processes. It is not weighted by their numbers of predictions.

    Args:
        steps (list of list of (float, int)): for each process, the loss and the number of predictions of each step.
    """
    total, seen = 0.0, 0
    for step in zip(*steps, strict=True):
        losses, counts = zip(*step, strict=True)
        total, seen = total + sum(losses) / len(losses) * sum(counts), seen + sum(counts)
    return total / max(seen, 1), seen


class _Loss(torch.nn.Module):
    """Computes the loss of a model in a forward pass, as DistributedDataParallel requires.

    If `gradients` of the representations of the batch are given, the forward pass returns a number that has these
    gradients. Its backward pass propagates them through the model (see `Trainer._backward_in_parts`).
    """

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch, gradients=None):
        if gradients is not None:
            vectors = self.model.represent(batch)
            passed_on = sum((vector.float() * own).sum() for vector, own in zip(vectors, gradients, strict=True))
            # DistributedDataParallel waits for every parameter, also for those that only the loss uses (history bias)
            used = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
            return passed_on + sum(0.0 * parameter.sum() for parameter in used if not parameter.grad.is_sparse)
        loss = self.model.calculate_loss(batch)
        return sum(loss) if isinstance(loss, tuple) else loss


def _distributed(loss):
    """Wrap the loss so that its backward pass averages the gradients over all processes."""
    # The buffers are the text features, the whitening and the item-to-item weights. They are the same in all processes.
    # DistributedDataParallel would broadcast them, and each process would hold a copy of the memory-mapped features.
    buffers = [name for name, _ in loss.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(loss, buffers)
    return DistributedDataParallel(loss, gradient_as_bucket_view=True)


def _use_dense_gradients(model):
    """Give all embeddings dense gradients, because NCCL cannot reduce sparse ones."""
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            module.sparse = False


def _open_tensorboard(config, path):
    """Open a TensorBoard writer in a folder beside the checkpoint. Returns None in all processes but the main one."""
    if not is_main():
        return None
    name = os.path.splitext(os.path.basename(path))[0].replace("-{epoch}", "")
    folder = os.path.join(config["checkpoint_dir"], "tensorboard", f"{name}-{time.strftime('%m%d-%H%M%S')}")
    with writing(folder):
        return SummaryWriter(folder)


def _check_clipping(arguments):
    """Check that `clip_grad_norm` holds arguments of torch's `clip_grad_norm_`."""
    arguments = arguments or {"max_norm": 1.0}
    try:
        inspect.signature(clip_grad_norm_).bind([], **arguments)
        for key in arguments.keys() & {"max_norm", "norm_type"}:
            if not 0 < arguments[key] or key == "max_norm" and math.isinf(arguments[key]):
                raise TypeError(f"{key} must be a number above 0")
    except TypeError as error:
        raise UserError(
            f"option --clip_grad_norm: found {arguments}, expected arguments of torch's clip_grad_norm_, "
            f"such as {{max_norm: 1.0}} ({error})"
        ) from None
