"""The training loop: early stopping to the letter, the right files saved, a training that goes on bit for bit."""

import glob
import math
import os
import signal

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import pretrain
from common.errors import UserError
from data import UniSRecDataset
from engine.building import build_model, set_seeds
from engine.checkpoint import load_weights, read_checkpoint
from engine.runs import Run
from engine.trainer import Trainer, _mean_loss
from tests.conftest import SMALL, small_config
from unisrec import UniSRec


class Batch:
    """What the loop needs of a batch."""

    def __init__(self, size=4, loss_factor=1.0):
        self.size, self.loss_factor = size, loss_factor

    def __len__(self):
        return self.size

    def to(self, device):
        return self


class Line(torch.nn.Module):
    """A model of one number, whose loss pushes it up by the learning rate each step of SGD."""

    def __init__(self):
        super().__init__()
        self.value = torch.nn.Parameter(torch.zeros(1))

    def calculate_loss(self, batch):
        return -self.value.sum() * batch.loss_factor


class Script:
    """Validation that gives the scores it was told, and notes which weights it was shown."""

    def __init__(self, *scores, metric="ndcg@10"):
        self.scores, self.metric, self.seen = list(scores), metric, []

    def __call__(self, model):
        self.seen.append(round(model.value.item(), 4))
        return {self.metric: self.scores[len(self.seen) - 1]}


def line_trainer(tmp_path, **options):
    """A trainer of a Line, one step an epoch, so that after epoch n its value is n."""
    settings = {"epochs": 20, "stopping_step": 3, "learner": "sgd", "learning_rate": 1.0, **options}
    config = small_config("inductive_ft", "Tiny", "nowhere", checkpoint_dir=str(tmp_path), **settings)
    return Trainer(config, Line(), str(tmp_path / "line.pth"))


# -- early stopping --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scores", "patience", "evaluations", "best"),
    [
        ([0.1, 0.3, 0.2, 0.2, 0.2, 0.9], 3, 5, 2),
        ([0.1, 0.3, 0.3, 0.3, 0.3, 0.9], 3, 5, 2),  # a tie is no gain
        ([0.3, 0.1, 0.1, 0.4, 0.1, 0.1, 0.1, 0.9], 3, 7, 4),  # a gain starts the count anew
        ([0.3, 0.2, 0.9], 1, 2, 1),
        ([0.30001, 0.30002, 0.30001, 0.9], 1, 3, 2),  # unrounded: four digits would call it a tie
        ([0.3, 0.3 + 1e-12, 0.3, 0.9], 1, 3, 2),
        ([0.0, 0.0, 0.0, 0.0, 0.9], 3, 4, 1),  # a score of 0 is the best so far, once
    ],
)
def test_training_stops_after_exactly_so_many_evaluations_without_gain(tmp_path, scores, patience, evaluations, best):
    trainer, script = line_trainer(tmp_path, stopping_step=patience), Script(*scores)
    progress = trainer.fit([Batch()], script)
    assert script.seen == list(range(1, evaluations + 1))
    assert (progress.epoch, progress.best_epoch, progress.best_score) == (evaluations, best, scores[best - 1])
    assert progress.best_metrics == {"ndcg@10": scores[best - 1]}
    assert trainer.model.value.item() == best, "the model ends with the weights of its best epoch"
    assert read_checkpoint(trainer.path)["state_dict"]["value"].item() == best
    assert read_checkpoint(trainer.path)["epoch"] == best


@pytest.mark.parametrize(("start", "best"), [(0.5, 0), (0.3, 0), (0.2, 2)])
def test_the_initial_weights_are_kept_if_no_epoch_is_better(tmp_path, start, best):
    trainer, script = line_trainer(tmp_path, stopping_step=2), Script(0.1, 0.3, 0.3, 0.3)
    progress = trainer.fit([Batch()], script, start={"ndcg@10": start})
    assert (progress.best_epoch, progress.best_score, trainer.model.value.item()) == (best, max(start, 0.3), best)
    content = read_checkpoint(trainer.path)
    assert (content["epoch"], content["state_dict"]["value"].item()) == (best, best)
    assert script.seen == list(range(1, best + 3)), "stops two evaluations after the best one"


def test_best_weights_of_another_run_are_not_tested(tmp_path):
    trainer, other = line_trainer(tmp_path, epochs=2), line_trainer(tmp_path)
    trainer.run, other.run = Run("first"), Run("second")

    def validate(model):
        if trainer.progress.epoch == 2:
            other.save(trainer.path)
        return {"ndcg@10": -trainer.progress.epoch}

    with pytest.raises(UserError, match="line.pth: was replaced by another run; give each run its own --checkpoint_d"):
        trainer.fit([Batch()], validate)


def test_training_ends_with_the_last_epoch(tmp_path):
    trainer, script = line_trainer(tmp_path, epochs=4), Script(0.1, 0.2, 0.3, 0.4)
    assert trainer.fit([Batch()], script).best_epoch == 4
    assert script.seen == [1, 2, 3, 4]


def test_a_metric_that_should_be_small(tmp_path):
    name = "averagepopularity@10"
    trainer = line_trainer(
        tmp_path, metrics=["AveragePopularity"], valid_metric="AveragePopularity@10", stopping_step=2
    )
    progress = trainer.fit([Batch()], Script(5.0, 3.0, 4.0, 3.0, 0.0, metric=name))
    assert (progress.epoch, progress.best_epoch, trainer.model.value.item()) == (4, 2, 2)


@pytest.mark.parametrize(("epochs", "step", "evaluated"), [(5, 2, [2, 4, 5]), (6, 3, [3, 6]), (2, 5, [2])])
def test_every_so_many_epochs_and_the_last_are_evaluated(tmp_path, epochs, step, evaluated):
    """Else a run shorter than eval_step would end with weights that nobody saved."""
    trainer, script = line_trainer(tmp_path, epochs=epochs, eval_step=step), Script(*[0.1 * n for n in range(1, 9)])
    trainer.fit([Batch()], script)
    assert script.seen == evaluated
    assert read_checkpoint(trainer.path)["state_dict"]["value"].item() == evaluated[-1]


# -- an epoch --------------------------------------------------------------------------------------------------------


def test_the_reported_loss_counts_every_prediction_once(tmp_path):
    trainer = line_trainer(tmp_path)
    trainer.model.value.data.fill_(2.0)
    # losses -2 and (after a step up by 1) -3 * 10, of 1 and 3 predictions
    assert trainer.train_epoch([Batch(1), Batch(3, 10.0)], 0) == pytest.approx((1 * -2 + 3 * -30) / 4)
    assert trainer.progress.predictions == 4 and trainer.progress.train_seconds > 0


def test_batches_are_told_the_epoch(tmp_path):
    told = []

    class Batches(list):
        def set_epoch(self, epoch):
            told.append(epoch)

    line_trainer(tmp_path, epochs=3).fit(Batches([Batch()]))
    assert told == [0, 1, 2]


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_a_loss_that_is_no_number_stops_the_run_in_one_line(tmp_path, factor):
    trainer = line_trainer(tmp_path, epochs=3)
    trainer.model.value.data.fill_(1.0)
    expected = (
        "the loss is -?(nan|inf) and the gradient norm is (nan|inf) in epoch 1, batch 2; set a lower --learning_r"
    )
    with pytest.raises(UserError, match=expected) as error:
        trainer.fit([Batch(), Batch(loss_factor=factor)], Script(0.1))
    assert "\n" not in str(error.value)
    assert trainer.model.value.item() == 2.0, "the step that would have spoilt the weights was not made"
    assert not glob.glob(str(tmp_path / "*.pth"))


class Overflow(torch.autograd.Function):
    """A finite loss whose gradient is infinite."""

    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * torch.inf


@pytest.mark.parametrize("clip", [None, {"max_norm": 1.0}])
def test_a_gradient_that_is_not_finite_stops_before_the_step(tmp_path, clip, monkeypatch):
    trainer = line_trainer(tmp_path, epochs=3, clip_grad_norm=clip)
    trainer.train_step(Batch())
    monkeypatch.setattr(trainer.model, "calculate_loss", lambda batch: Overflow.apply(trainer.model.value).sum())
    with pytest.raises(UserError, match="^the gradient norm is inf in epoch 1, batch 1; set a lower --learning_rate"):
        trainer.train_step(Batch())
    assert trainer.model.value.item() == pytest.approx(1.0)


@pytest.mark.parametrize("validate", [True, False])
@pytest.mark.parametrize(("learning_rate", "factor", "value"), [(2.0**99, 1.0, "6.33825.*e.29"), (1e38, 10.0, "inf")])
def test_weights_that_the_last_step_has_spoilt_are_neither_saved_nor_evaluated(
    tmp_path, validate, learning_rate, factor, value
):
    trainer, script = line_trainer(tmp_path, epochs=1, learning_rate=learning_rate), Script(0.1)
    trainer.path = str(tmp_path / ("line.pth" if validate else "line-{epoch}.pth"))
    with pytest.raises(UserError, match=f"^the weights value hold {value} after 1 epochs; nothing is saved of them; "):
        trainer.fit([Batch(loss_factor=factor)], script if validate else None)
    assert not script.seen and not glob.glob(str(tmp_path / "*.pth"))


def test_a_step_that_failed_can_be_repeated(tmp_path):
    """The checkpoint holds the weights and random generators as they were before the step."""

    class Noisy(Line):
        def calculate_loss(self, batch):
            noise.append(torch.rand(1).item())
            return super().calculate_loss(batch)

    noise, path = [], str(tmp_path / "line-{epoch}.pth")
    batches = [Batch(), Batch(), Batch(loss_factor=math.nan)]

    def trainer():
        return Trainer(line_trainer(tmp_path, epochs=3).config, Noisy(), path)

    with pytest.raises(UserError, match=r"batch 3; .*; --resume=\S+/line-0-failed.pth repeats this step"):
        trainer().fit(batches)
    failed = str(tmp_path / "line-0-failed.pth")
    again, checkpoint = trainer(), read_checkpoint(failed)
    load_weights(again.model, checkpoint, failed)
    again.resume(checkpoint, failed)
    assert again.model.value.item() == 2.0 and again.progress.batch == 2
    again.train_step(Batch())
    assert len(noise) == 4 and noise[3] == noise[2] != noise[1]


def test_gradients_are_clipped(tmp_path):
    trainer = line_trainer(tmp_path, clip_grad_norm={"max_norm": 0.25})
    trainer.train_step(Batch(loss_factor=100.0))
    assert trainer.model.value.item() == pytest.approx(0.25, rel=1e-4)
    with pytest.raises(UserError, match="--clip_grad_norm: found .*max_norm: 1.0"):
        line_trainer(tmp_path, clip_grad_norm={"norm": 1.0})
    for value in (math.nan, 0, -1.0, math.inf, "a"):
        with pytest.raises(UserError, match="--clip_grad_norm: found .*, such as {max_norm: 1.0}"):
            line_trainer(tmp_path, clip_grad_norm={"max_norm": value})


def test_tensorboard_holds_loss_and_metrics_when_training_ends(tmp_path):
    line_trainer(tmp_path, epochs=2).fit([Batch()], Script(0.25, 0.5))
    (folder,) = glob.glob(str(tmp_path / "tensorboard" / "line-*"))
    events = EventAccumulator(folder).Reload()
    assert [(event.step, event.value) for event in events.Scalars("valid/ndcg@10")] == [(1, 0.25), (2, 0.5)]
    assert [event.value for event in events.Scalars("train/loss")] == [0.0, -1.0]


def test_a_folder_that_cannot_be_written_to_is_named_before_the_training(tmp_path):
    (tmp_path / "file").touch()
    trainer, script = line_trainer(tmp_path / "file"), Script(0.1)
    with pytest.raises(UserError, match="cannot be written: a file stands where a folder should be"):
        trainer.fit([Batch()], script)
    assert trainer.model.value.item() == 0.0 and script.seen == []


# -- what is saved, and going on from it -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("epochs", "save_step", "saved"),
    [(5, 2, [2, 4, 5]), (4, 2, [2, 4]), (3, 10, [3]), (2, None, [2]), (2, 0, [2]), (2, 1, [1, 2])],
)
def test_multiples_of_save_step_and_the_last_epoch_are_saved(tmp_path, epochs, save_step, saved):
    trainer = line_trainer(tmp_path, epochs=epochs)
    trainer.path = str(tmp_path / "line-{epoch}.pth")
    trainer.fit([Batch()], save_step=save_step)
    names = sorted(os.path.basename(path) for path in glob.glob(str(tmp_path / "*.pth")))
    assert names == [f"line-{epoch}.pth" for epoch in saved]
    for epoch in saved:
        checkpoint = read_checkpoint(str(tmp_path / f"line-{epoch}.pth"))
        assert checkpoint["state_dict"]["value"].item() == checkpoint["epoch"] == epoch
        assert checkpoint["progress"]["epoch"] == epoch


def flatten(value, path=""):
    """All leaves of nested dicts and lists, by their path."""
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {name: leaf for key, inner in items for name, leaf in flatten(inner, f"{path}/{key}").items()}
    return {path: value}


def pretrained(mixture, folder, *options):
    pretrain.main(["-d", "Mix", f"--data_path={mixture}", f"--checkpoint_dir={folder}", *SMALL, *options])


@pytest.mark.slow
def test_a_training_goes_on_bit_for_bit(mixture, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    pretrained(mixture, whole, "--epochs=4", "--train_batch_size=100", "--save_step=2")
    pretrained(mixture, parts, "--epochs=2", "--train_batch_size=100")
    torch.manual_seed(99)  # whatever happened in between
    resume = f"--resume={parts}/UniSRec-Mix-2.pth"
    pretrained(mixture, parts, "--epochs=4", "--train_batch_size=100", resume)
    for epoch in (2, 4):
        one, other = (read_checkpoint(str(folder / f"UniSRec-Mix-{epoch}.pth")) for folder in (whole, parts))
        for part in ("state_dict", "optimizer", "generators"):
            left, right = flatten(one[part]), flatten(other[part])
            assert left.keys() == right.keys() and len(left) > 0
            for name, value in left.items():
                same = torch.equal(value, right[name]) if isinstance(value, torch.Tensor) else value == right[name]
                assert same, (epoch, part, name)
        assert one["progress"]["predictions"] == other["progress"]["predictions"] == epoch * count_rows(mixture)


def count_rows(mixture):
    with open(os.path.join(mixture, "Mix", "Mix.train.inter")) as file:
        return len(file.readlines()) - 1


def test_what_cannot_be_resumed_is_refused(tmp_path):
    def trainer(**options):
        made = line_trainer(tmp_path, **{"epochs": 2, **options})
        made.path = str(tmp_path / "line-{epoch}.pth")
        return made

    trainer().fit([Batch()])
    path = str(tmp_path / "line-2.pth")
    checkpoint = read_checkpoint(path)
    for part in ("optimizer", "generators", "progress"):
        without = {name: value for name, value in checkpoint.items() if name != part}
        with pytest.raises(UserError, match="line-2.pth: cannot be resumed, it holds weights only"):
            trainer(epochs=4).resume(without, path)
    with pytest.raises(UserError, match="line-2.pth: was trained with sgd, not adam; set --learner=sgd"):
        trainer(epochs=4, learner="adam").resume(checkpoint, path)
    with pytest.raises(UserError, match="line-2.pth: has completed 2 epochs, but --epochs is 2; set a larger --epochs"):
        trainer().resume(checkpoint, path)
    resumed = trainer(epochs=4)
    load_weights(resumed.model, checkpoint, path)
    resumed.resume(checkpoint, path)
    assert resumed.fit([Batch()]).epoch == 4 and resumed.model.value.item() == 4


@pytest.mark.slow
@pytest.mark.parametrize("changed", ["a row", "a feature"])
def test_a_training_goes_on_with_changed_data_only_if_the_user_allows_it(mixture, tmp_path, refused, capsys, changed):
    folder = tmp_path / "saved"
    pretrained(mixture, folder, "--epochs=1")
    path = os.path.join(mixture, "Mix", "Mix.train.inter" if changed == "a row" else "B.feat1CLS")
    with open(path, "r+b") as file:
        content = file.read()
        file.seek(0)
        file.write(content + content.splitlines(True)[-1] if changed == "a row" else content[24 * 4 :] + content[:96])
    checkpoint = f"{folder}/UniSRec-Mix-1.pth"
    options = ["-d", "Mix", f"--data_path={mixture}", f"--checkpoint_dir={folder}", *SMALL, "--epochs=2"]
    message = refused(pretrain.main, *options, f"--resume={checkpoint}")
    assert message.startswith(f"{checkpoint}: was trained on other data than those of Mix today")
    assert message.endswith("or go on with --allow_changed_data")
    pretrained(mixture, folder, "--epochs=2", f"--resume={checkpoint}", "--allow_changed_data")
    assert f"warning: the data have changed since {checkpoint} was saved" in capsys.readouterr().err
    assert read_checkpoint(f"{folder}/UniSRec-Mix-2.pth")["run"] != read_checkpoint(checkpoint)["run"]


@pytest.mark.parametrize("folder", ["a{b}c", "{", "}", "{epoch}", "{0}", "[a]*"])
def test_braces_in_a_path_are_plain_characters(tmp_path, folder):
    trainer = line_trainer(tmp_path, epochs=2)
    trainer.path, trainer.run = str(tmp_path / folder / "line-{epoch}.pth"), Run("first")
    trainer.fit([Batch()], save_step=1)
    assert sorted(os.listdir(tmp_path / folder)) == ["line-1.pth", "line-2.pth"]
    other = line_trainer(tmp_path, epochs=2)
    other.path, other.run = trainer.path, Run("second")
    with pytest.raises(UserError, match="line-[12].pth: belongs to another run"):
        other.fit([Batch()], save_step=1)
    tuned = line_trainer(tmp_path, epochs=1)
    tuned.path = str(tmp_path / folder / "tuned.pth")
    tuned.fit([Batch()], Script(0.1))
    tuned.fit([Batch()])
    assert "tuned.pth" in os.listdir(tmp_path / folder)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_what_continues_the_training(tmp_path, caplog, number):
    def batches():
        yield Batch()
        os.kill(os.getpid(), number)
        yield Batch()
        raise AssertionError("goes on after the step")

    class Three:
        __iter__, __len__ = staticmethod(batches), staticmethod(lambda: 3)

    trainer = line_trainer(tmp_path, epochs=2)
    trainer.path = str(tmp_path / "line-{epoch}.pth")
    with caplog.at_level("INFO"), pytest.raises(SystemExit) as end:
        trainer.fit(Three(), save_step=10)
    stopped = read_checkpoint(str(tmp_path / "line-0-stopped.pth"))
    assert end.value.code == 75 and stopped["progress"]["batch"] == 2 and stopped["state_dict"]["value"].item() == 2
    assert f"stopped by {number.name} in epoch 1, batch 2; continue with --resume={tmp_path}" in caplog.text


def one_epoch(tmp_path):
    """The checkpoint of a training of one epoch."""
    first = line_trainer(tmp_path, epochs=1)
    first.path = str(tmp_path / "line-{epoch}.pth")
    first.fit([Batch()])
    return first.path.format(epoch=1)


@pytest.mark.parametrize("taken", ["line-3", "line-4", "line-1-stopped", "line-3-stopped"])
def test_checkpoints_of_another_run_are_not_replaced(tmp_path, taken):
    def trainer(name):
        made = line_trainer(tmp_path, epochs=4)
        made.path, made.run = str(tmp_path / "line-{epoch}.pth"), Run(name)
        made.progress.epoch = 1  # as if resumed
        return made

    path = str(tmp_path / f"{taken}.pth")
    trainer("first").save(path)
    with pytest.raises(
        UserError, match=f"{taken}.pth: belongs to another run .run first: .*; give another --checkpoint_dir"
    ):
        trainer("second").fit([Batch()], save_step=3)
    assert os.listdir(tmp_path) == [f"{taken}.pth"] and read_checkpoint(path)["run"] == "first"
    again = trainer("first")
    assert again.fit([Batch()], save_step=3).epoch == 4 and again.model.value.item() == 3


@pytest.mark.parametrize("name", ["line-1", "line-2", "line-0-stopped", "line-4-stopped", "line-5", "other-3"])
def test_files_that_a_training_does_not_write_are_not_in_its_way(tmp_path, name):
    trainer = line_trainer(tmp_path, epochs=4)
    trainer.path, trainer.run = str(tmp_path / "line-{epoch}.pth"), Run("second", "start")
    trainer.progress.epoch = 1
    (tmp_path / f"{name}.pth").touch()
    trainer.fit([Batch()], save_step=3)
    checkpoint = read_checkpoint(str(tmp_path / "line-4.pth"))
    assert (checkpoint["run"], checkpoint["run_start"], checkpoint["run_data"]) == ("second", "start", None)


def test_a_training_goes_on_with_the_learning_rate_of_today(tmp_path, caplog):
    path = one_epoch(tmp_path)
    again = line_trainer(tmp_path, epochs=2, learning_rate=0.25, weight_decay=0.5)
    with caplog.at_level("INFO"):
        again.resume(read_checkpoint(path), path)
    assert f"settings changed since {path}: learning_rate" in caplog.text and "weight_decay" in caplog.text
    (group,) = again.optimizer.param_groups
    assert (group["lr"], group["weight_decay"]) == (0.25, 0.5)


def test_half_an_epoch_cannot_go_on_in_another_order(tmp_path):
    path = one_epoch(tmp_path)
    checkpoint = read_checkpoint(path)
    line_trainer(tmp_path, epochs=4, train_batch_size=7).resume(checkpoint, path)
    checkpoint["progress"]["batch"] = 3
    line_trainer(tmp_path, epochs=4).resume(checkpoint, path)
    with pytest.raises(UserError, match="stopped within an epoch, with train_batch_size 2048, not 7; set --train_b"):
        line_trainer(tmp_path, epochs=4, train_batch_size=7).resume(checkpoint, path)


def test_the_loss_of_an_epoch_is_that_of_its_predictions():
    """Two processes, two steps; in the second the second process has nothing."""
    mean, seen = _mean_loss([[(2.0, 1), (10.0, 4)], [(4.0, 5), (0.0, 0)]])
    assert (mean, seen) == ((3.0 * 6 + 5.0 * 4) / 10, 10)
    assert _mean_loss([[]]) == (0.0, 0)


# -- models ----------------------------------------------------------------------------------------------------------


def test_the_seed_fixes_the_initial_weights_and_ranks_differ_in_noise(tiny):
    config = small_config("transductive_ft", "Tiny", tiny)
    dataset = UniSRecDataset(config)
    one, other = (build_model(UniSRec, config, dataset).state_dict() for _ in range(2))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    config["seed"] = 1
    different = build_model(UniSRec, config, dataset).state_dict()
    assert not torch.equal(one["item_embedding.weight"], different["item_embedding.weight"])
    noise = []
    for rank in (0, 1, 0):
        set_seeds(2020, rank)
        noise.append(torch.randn(3))
    assert torch.equal(noise[0], noise[2]) and not torch.equal(noise[0], noise[1])


def test_sizes_that_do_not_fit_each_other_are_a_users_mistake(tiny):
    config = small_config("inductive_ft", "Tiny", tiny, n_heads=3)
    with pytest.raises(UserError, match="UniSRec: .*hidden size"):
        build_model(UniSRec, config, UniSRecDataset(config))


def test_a_stopped_training_may_continue_in_its_folder_with_other_settings(tmp_path):
    """It is another run then, which may replace the checkpoint that it continues."""

    def trainer(name, **settings):
        made = line_trainer(tmp_path, epochs=4, **settings)
        made.path, made.run = str(tmp_path / "line-{epoch}.pth"), Run(name)
        return made

    stopped, path = trainer("first"), str(tmp_path / "line-1-stopped.pth")
    stopped.progress.epoch = 1
    stopped.save(path)
    resumed = trainer("second", learning_rate=0.5)
    resumed.resume(read_checkpoint(path), path)
    assert resumed.fit([Batch()], save_step=3).epoch == 4
    assert read_checkpoint(str(tmp_path / "line-4.pth"))["run"] == "second" and os.path.exists(path)
