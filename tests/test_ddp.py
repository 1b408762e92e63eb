"""Several processes compute what one computes on the joined batch, and the command that starts them.

The processes talk over gloo on the CPU.
"""

import contextlib
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist

import data.batches
import ddp_pretrain
import pretrain
import unisrec
from common.errors import UserError
from common.processes import gather, gather_objects, is_main, rank, start_process_group, world_size
from data import SequenceBatches, UniSRecDataset
from data.augment import augment
from engine.checkpoint import read_checkpoint
from engine.config import ROOT
from engine.setup import build_model, set_seeds
from engine.trainer import Trainer
from tests.conftest import SMALL, small_config, write_mix

STILL = {"hidden_dropout_prob": 0.0, "attn_dropout_prob": 0.0, "adaptor_dropout_prob": 0.0}
AUGMENT = {"item_drop_ratio": 0.3, "item_drop_coefficient": 0.5}
# how a global batch of 11 sequences is shared out: evenly, unevenly, all but one, and nothing for one process
SHARES = {"even": (6, 5), "uneven": (3, 8), "one": (1, 10), "nothing": (0, 11)}


# -- losses and gradients --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def no_chance():
    """No noise in the gate (its parameters stay part of the computation), and the augmented views of `own_views`."""
    before = torch.randn_like, data.batches.augment
    torch.randn_like, data.batches.augment = torch.zeros_like, own_views
    try:
        yield
    finally:
        torch.randn_like, data.batches.augment = before


def open_mix(data_path, folder):
    """A model without dropout, in training, and the windows and augmented views of its data."""
    config = small_config("pretrain", "Mix", data_path, checkpoint_dir=folder, **STILL)
    config["lambda"] = 0.5  # the second loss should count
    dataset = UniSRecDataset(config)
    batches = SequenceBatches(
        dataset.sequences("train"), 100, dataset.window, augment_ratios=AUGMENT, n_items=dataset.catalogue.n_items
    )
    model = build_model(unisrec.UniSRec, config, dataset)
    with torch.no_grad():
        for parameter in model.moe_adaptor.parameters():
            parameter.normal_(0, 0.2)
    return model.train(), config, batches


def own_views(items, scored, n_items, generator, **ratios):
    """`data.augment.augment`, drawn for each sequence from its content: the same view in whatever batch it comes."""
    views, kept, width = [], [], items.shape[1]
    for row, sequence in enumerate(items):
        places = scored[scored // width == row] - row * width
        generator = np.random.default_rng([int(item) for item in sequence if item])
        view, place = augment(sequence[None], places, n_items, generator, **ratios)
        views.append(view)
        kept.append(place + row * width)
    return np.concatenate(views), np.concatenate(kept)


def loss_and_gradients(trainer, batch):
    trainer.optimizer.zero_grad()
    loss = trainer.loss_of(batch)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    return loss.item(), gradients


def worker(number, data_path, folder, port):
    """One of two processes: the helpers of common.processes, its share of each global batch, a checkpoint."""
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="2", RANK=str(number))
    assert (rank(), world_size(), is_main(), gather_objects("alone")) == (0, 1, True, ["alone"])
    start_process_group()
    assert (rank(), world_size(), is_main()) == (number, 2, number == 0)
    assert gather_objects({"rank": number}) == [{"rank": 0}, {"rank": 1}]

    part = torch.full((2 - number, 3), float(number), requires_grad=True)
    (joined, places), start, processes = gather(part, torch.arange(2 - number))
    assert joined.tolist() == [[0.0] * 3, [0.0] * 3, [1.0] * 3] and places.tolist() == [0, 1, 0]
    assert (start, processes) == ((0, 2) if number == 0 else (2, 2))
    (joined * torch.tensor([[1.0], [2.0], [3.0]]) * (number + 1)).sum().backward()
    # each row's factor, from both processes: 1 * row + 2 * row
    assert part.grad.tolist() == ([[3.0] * 3, [6.0] * 3] if number == 0 else [[9.0] * 3])

    model, config, batches = open_mix(data_path, folder)
    model.gather = gather
    config["epochs"] = 1
    trainer = Trainer(config, model, os.path.join(folder, "ddp-{epoch}.pth"))
    assert isinstance(trainer.loss_of, torch.nn.parallel.DistributedDataParallel)
    results = {}
    with no_chance():
        for name, (first, _) in SHARES.items():
            mine = np.arange(first) if number == 0 else np.arange(first, 11)
            batch = batches.make(mine) if len(mine) else batches.make(np.arange(1), mute=True)
            results[name] = loss_and_gradients(trainer, batch)
    torch.save(results, os.path.join(folder, f"results-{number}.pt"))

    set_seeds(config["seed"], rank())
    trainer.progress.epoch = 1
    trainer.save(os.path.join(folder, "saved.pth"))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def computed(tmp_path_factory):
    """What two processes computed, what one computes, and the folder."""
    folder = str(tmp_path_factory.mktemp("ddp"))
    data_path = write_mix(os.path.join(folder, "data"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(worker, (data_path, folder, port), nprocs=2)
    model, config, batches = open_mix(data_path, folder)
    with no_chance():
        alone = loss_and_gradients(Trainer(config, model, "nowhere"), batches.make(np.arange(11)))
    return [torch.load(os.path.join(folder, f"results-{number}.pt")) for number in (0, 1)], alone, folder


@pytest.mark.parametrize("share", SHARES)
def test_two_processes_compute_what_one_does(computed, share):
    results, (loss, gradients), _ = computed
    losses = [result[share][0] for result in results]
    assert sum(losses) / 2 == pytest.approx(loss, rel=1e-5)
    assert loss > 1 and (share != "nothing" or losses[0] == 0.0)
    largest = max(gradient.abs().max() for gradient in gradients.values())
    assert len(gradients) == 39 and largest > 1e-3
    for result in results:
        found = result[share][1]
        assert found.keys() == gradients.keys()
        for name, gradient in gradients.items():
            assert (found[name] - gradient).abs().max() <= 1e-5 * largest, (share, name)


def test_the_comparison_would_notice(computed):
    """Different parts of the model matter, and the two processes' own shares differ from the whole."""
    results, (loss, gradients), _ = computed
    assert abs(results[0]["uneven"][0] - results[1]["uneven"][0]) > 1e-3
    largest = max(gradient.abs().max() for gradient in gradients.values())
    meaningful = [name for name, gradient in gradients.items() if gradient.abs().max() > 1e-4 * largest]
    assert len(meaningful) > 30


def test_a_checkpoint_of_several_processes_holds_the_noise_of_each(computed):
    checkpoint = read_checkpoint(os.path.join(computed[2], "saved.pth"))
    one, other = (generators["cpu"] for generators in checkpoint["generators"])
    assert not torch.equal(one, other)
    assert not [name for name in checkpoint["state_dict"] if name.startswith("module.")]


def test_going_on_with_another_number_of_processes(mixture, tmp_path):
    """The noise then differs, the weights, the optimiser and the order of the data do not."""
    common = ["-d", "Mix", f"--data_path={mixture}", f"--checkpoint_dir={tmp_path}", *SMALL]
    pretrain.main([*common, "--epochs=1"])
    content = torch.load(tmp_path / "UniSRec-Mix-1.pth", weights_only=True)
    content["generators"] = content["generators"] * 2
    torch.save(content, tmp_path / "of-two.pth")
    pretrain.main([*common, "--epochs=2", f"--resume={tmp_path}/of-two.pth"])
    assert read_checkpoint(str(tmp_path / "UniSRec-Mix-2.pth"))["epoch"] == 2


# -- the command -----------------------------------------------------------------------------------------------------


def test_the_command_trains_with_two_processes(tmp_path):
    data_path = write_mix(tmp_path / "data")
    command = [sys.executable, "-W", "ignore", os.path.join(ROOT, "ddp_pretrain.py"), "-d", "Mix", "--nproc", "2"]
    command += [f"--data_path={data_path}", f"--checkpoint_dir={tmp_path}/saved", "--epochs=1", *SMALL]
    environment = {name: value for name, value in os.environ.items() if name not in ("LOCAL_RANK", "RANK")}
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path, env=environment)
    assert run.returncode == 0, run.stderr
    assert "no GPU: 2 processes on the CPU" in run.stdout or torch.cuda.is_available()
    assert run.stderr.count("saved ") == 1, "one process writes"
    assert sorted(os.listdir(tmp_path / "saved")) == ["UniSRec-Mix-1.pth", "tensorboard"]
    checkpoint = read_checkpoint(str(tmp_path / "saved" / "UniSRec-Mix-1.pth"))
    assert checkpoint["epoch"] == 1 and len(checkpoint["generators"]) == 2
    assert all(torch.isfinite(tensor).all() for tensor in checkpoint["state_dict"].values())


@pytest.fixture
def ddp(mixture, tmp_path, refused, monkeypatch):
    """Run ddp_pretrain.py where it must fail, in this process; returns the message."""
    for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # what the command sets goes after the test
        monkeypatch.delenv(name)
    common = ["-d", "Mix", f"--data_path={mixture}", f"--checkpoint_dir={tmp_path}/saved", *SMALL]
    yield lambda *options: refused(ddp_pretrain.main, *common, *options)
    assert not os.path.exists(tmp_path / "saved")


def test_a_taken_port_is_named(ddp):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert (
            ddp("-p", port, "--nproc=2") == f"option --port: {port} is taken or no port; leave it out to get a free one"
        )
    assert ddp("--port=99999").startswith("option --port: 99999 is taken or no port")


@pytest.mark.parametrize("option", ["--nproc=0", "--nproc=-1", "--nproc=two", "--nproc=true", "--port=0", "--port=x"])
def test_wrong_numbers_are_refused(ddp, option):
    name, value = option.split("=")
    assert ddp(option).startswith(f"option {name}: found ") and ddp(option).endswith(
        "expected a whole number from 1 on"
    )


def test_mistakes_show_before_any_process_starts(ddp, mixture, monkeypatch):
    monkeypatch.setattr(torch.multiprocessing, "spawn", lambda *arguments, **options: pytest.fail("started"))
    assert ddp("--nproc=2", "--lambada=1") == "unknown option --lambada; did you mean --lambda?"
    os.unlink(os.path.join(mixture, "Mix", "Mix.train.inter"))
    assert "Mix.train.inter: no such file" in ddp("--nproc=2")


def test_a_mistake_that_all_processes_make_is_told_once(ddp, monkeypatch):
    """Each process notes it and ends with code 2; the command tells it."""

    def spawn(function, arguments, nprocs):
        for number in range(nprocs):
            with pytest.raises(SystemExit) as end:
                function(number, *arguments)
            assert end.value.code == 2
        raise torch.multiprocessing.ProcessExitedException("process 0 terminated", 0, 1, 2)

    def work(number, config):
        raise UserError(f"mistake of {config['dataset']}")

    monkeypatch.setattr(torch.multiprocessing, "spawn", spawn)
    monkeypatch.setattr(ddp_pretrain, "work", work)
    assert ddp("--nproc=2") == "mistake of Mix"


def test_a_bug_in_a_process_keeps_its_traceback(mixture, tmp_path, monkeypatch):
    def spawn(function, arguments, nprocs):
        raise torch.multiprocessing.ProcessRaisedException("ZeroDivisionError in line 3", 0, 1)

    for name in ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE"):
        monkeypatch.setenv(name, "")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(torch.multiprocessing, "spawn", spawn)
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match="ZeroDivisionError in line 3"):
        ddp_pretrain.main(["-d", "Mix", f"--data_path={mixture}", f"--checkpoint_dir={tmp_path}", *SMALL])
