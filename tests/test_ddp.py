"""Several processes compute what one computes on the joined batch, and the command that starts them.

The processes talk over gloo on the CPU.
"""

import concurrent.futures
import contextlib
import datetime
import glob
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import data.batches
import ddp_pretrain
import finetune
import pretrain
import unisrec
from baselines.untrained import LastText
from common.errors import UserError
from common.files import read_json
from common.processes import (
    Preemption,
    _agree_on_start,
    any_process,
    broadcast,
    from_main,
    gather,
    gather_objects,
    is_main,
    process_group,
    rank,
    world_size,
)
from data import SequenceBatches, UniSRecDataset
from data.augment import augment
from ddp_pretrain import free_port
from engine.building import build_model, set_seeds
from engine.checkpoint import read_checkpoint
from engine.evaluate import Evaluation
from engine.item_to_item import add_item_to_item
from engine.settings import ROOT
from engine.trainer import Trainer
from tests.conftest import SMALL, small_config, write_mix, write_tiny
from tests.small_data import write_downstream
from tests.small_models import collect_gradients

pytestmark = pytest.mark.slow

STILL = {
    "hidden_dropout_prob": 0.0,
    "attn_dropout_prob": 0.0,
    "adaptor_dropout_prob": 0.0,
    "id_dropout_prob": 0.0,
}
AUGMENT = {"item_drop_ratio": 0.3, "item_drop_coefficient": 0.5}  # views that drop items and such that drop words
SEGMENTS = 11
# how a global batch of 11 sequences is shared out: evenly, unevenly, all but one or two, and nothing for a process
SHARES = {
    2: {"even": (6, 5), "uneven": (3, 8), "one": (1, 10), "nothing": (0, 11)},
    3: {"even": (4, 4, 3), "uneven": (1, 8, 2), "nothing": (3, 0, 8), "nothing twice": (0, 11, 0)},
}
CATALOGUE = "pretrain over a catalogue"
STAGES = ("pretrain", CATALOGUE, "inductive_ft", "transductive_ft")
# options to try with uneven shares, and how far from one process they may be; all other items drawn are the exact loss
VARIANTS = {"bf16": ({"enable_amp": True}, 2e-2), "sampled": ({"sampled_negatives": 1000}, 1e-5)}


# -- losses, gradients, metrics --------------------------------------------------------------------------------------


@contextlib.contextmanager
def no_chance():
    """No noise in the gate (its parameters stay part of the computation), and the augmented views of `own_views`."""
    before = torch.randn_like, data.batches.augment
    torch.randn_like, data.batches.augment = torch.zeros_like, own_views
    try:
        yield
    finally:
        torch.randn_like, data.batches.augment = before


def open_stage(stage, folder, **options):
    """A model without dropout, in training, and the segments of its data, with augmented views in contrastive
    pre-training. The first segments of the mixture are of one domain."""
    contrastive = stage == "pretrain"
    if stage == CATALOGUE:
        stage, options = "pretrain", {"pretrain_loss": "catalogue", "sampled_negatives": 0, **options}
    name, data_path = ("Mix", "pretrain") if stage == "pretrain" else ("Tiny", "downstream")
    options = {"checkpoint_dir": folder, "learner": "sgd", "learning_rate": 1e-14, **STILL, **options}
    config = small_config(stage, name, os.path.join(folder, data_path), **options)
    config["lambda"] = 0.5  # the second loss should count
    dataset = UniSRecDataset(config)
    augment_ratios = AUGMENT if contrastive else None
    batches = SequenceBatches(
        dataset.sequences("train"),
        100,
        dataset.max_history,
        2,
        augment_ratios=augment_ratios,
        n_items=dataset.catalogue.n_items,
    )
    model = build_model(unisrec.UniSRec, config, dataset)
    with torch.no_grad():
        for parameter in model.moe_adaptor.parameters():
            parameter.normal_(0, 0.2)
    return model.train(), config, batches, dataset


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
    """Of one step with a learning rate of nearly nothing."""
    loss = trainer.train_step(batch)
    return loss, collect_gradients(trainer.model)


def metrics_of(folder):
    """Of an untrained model, on parts that the processes share evenly, unevenly and with nothing for some."""
    found = {}
    for name, metrics in (
        ("shared", ["Recall", "NDCG", "ItemCoverage"]),
        ("by ranks", ["Recall", "MRR"]),
        ("alone", ["GAUC"]),
    ):
        options = {"metrics": metrics, "topk": [1, 5], "valid_metric": f"{metrics[0]}@5" if name != "alone" else "GAUC"}
        model, config, _, dataset = open_stage("inductive_ft", folder, **options)
        evaluation = Evaluation(config, dataset)
        assert evaluation.shared == (world_size() > 1 and name != "alone")
        found[name] = [evaluation(model, phase) for phase in ("valid", "test")]
    return found


def tables_of(folder):
    """Of untrained models: tables of ranks of 40 users and of two, of whom a third process gets none."""
    found = {}
    for name, path, options in (
        ("shared", "Tiny", {"metrics": ["NDCG", "ItemCoverage"]}),
        ("alone", "Tiny", {"metrics": ["NDCG", "GAUC"]}),
        ("two users", "Small", {"metrics": ["NDCG", "ItemCoverage"]}),
    ):
        config = small_config("inductive_ft", path, os.path.join(folder, "downstream"), **options, topk=[5, 10])
        dataset = UniSRecDataset(config)
        model, evaluation = build_model(LastText, config, dataset), Evaluation(config, dataset)
        assert evaluation.shared == (world_size() > 1 and name != "alone")
        table, metrics = evaluation.evaluate(model, "test")
        found[name] = {key: column.tolist() for key, column in vars(table).items()}, metrics
    return found


def choice_of(folder):
    """The factor and decay of the item-to-item logits of an untrained model, and its metrics on valid with them."""
    found = []
    data_path = os.path.join(folder, "downstream")
    for name, metrics in (("Tiny", ["NDCG"]), ("Tiny", ["NDCG", "GAUC"]), ("Small", ["NDCG"])):
        config = small_config("transductive_ft", name, data_path, metrics=metrics, topk=[5], valid_metric="NDCG@5")
        dataset = UniSRecDataset(config)
        model = build_model(unisrec.UniSRec, config, dataset)
        found.append(add_item_to_item(model, Evaluation(config, dataset)))
        found.append({name: float(getattr(model.item_to_item, name)) for name in ("factor", "decay")})
    return found


def helpers_of_processes(number, count):
    """What `common.processes` gives, checked where it is used."""
    assert (rank(), world_size(), is_main()) == (number, count, number == 0)
    assert gather_objects({"rank": number}) == [{"rank": other} for other in range(count)]
    assert from_main(f"of {number}") == "of 0"
    tensor = torch.full((2,), float(number))
    broadcast([tensor])
    assert tensor.tolist() == [0.0, 0.0]
    rows = count - number
    part = torch.full((rows, 3), float(number), requires_grad=True)
    (joined_part, places), start, processes = gather(part, torch.arange(rows))
    expected = [float(other) for other in range(count) for _ in range(count - other)]
    assert joined_part[:, 0].tolist() == expected and processes == count
    assert start == expected.index(number) and places[start : start + rows].tolist() == list(range(rows))
    factors = torch.arange(1.0, len(expected) + 1)[:, None]
    (joined_part * factors * (number + 1)).sum().backward()
    # each row's factor, from all processes: (1 + 2 + ...) * row
    assert torch.equal(part.grad, (factors[start : start + rows] * count * (count + 1) / 2).expand(-1, 3))
    preemption = Preemption()
    assert preemption.requested(torch.device("cpu")) is False
    if number == count - 1:
        preemption._receive(signal.SIGTERM, None)
    assert preemption.requested(torch.device("cpu")) is True
    assert any_process(number == 1, torch.device("cpu")) is True and any_process(False, torch.device("cpu")) is False


def worker(number, count, folder, port):
    """One of several processes: helpers, its share of each global batch in each stage, evaluation, a checkpoint."""
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(count))
    assert (rank(), world_size(), is_main(), gather_objects("alone")) == (0, 1, True, ["alone"])
    os.environ.update(RANK=str(number), LOCAL_RANK=str(number))
    with process_group():
        helpers_of_processes(number, count)
        results = {"metrics": metrics_of(folder), "tables": tables_of(folder), "choice": choice_of(folder)}
        for stage in STAGES:
            model, config, batches, _ = open_stage(stage, folder)
            trainer = Trainer(config, model, os.path.join(folder, "ddp-{epoch}.pth"))
            assert isinstance(trainer.loss_of, torch.nn.parallel.DistributedDataParallel)
            with no_chance():
                for share, sizes in SHARES[count].items():
                    mine = np.arange(sum(sizes[:number]), sum(sizes[: number + 1]))
                    batch = batches.make_batch(mine) if len(mine) else batches.make_batch(np.arange(1), scored=False)
                    for accumulate in (1, 3):
                        config["accumulate"] = accumulate
                        results[stage, share, accumulate] = loss_and_gradients(trainer, batch)
            for variant, (options, _) in VARIANTS.items():
                model, config, batches, _ = open_stage(stage, folder, **options)
                trainer, split = Trainer(config, model, "nowhere"), SHARES[count]["uneven"]
                with no_chance():
                    batch = batches.make_batch(np.arange(sum(split[:number]), sum(split[: number + 1])))
                    for accumulate in (1, 3):
                        config["accumulate"] = accumulate
                        results[stage, variant, accumulate] = loss_and_gradients(trainer, batch)
        torch.save(results, os.path.join(folder, f"results-{count}-{number}.pt"))
        set_seeds(config["seed"], rank())
        trainer.progress.epoch = 1
        trainer.save(os.path.join(folder, f"saved-{count}.pth"))


@pytest.fixture(scope="module")
def computed(tmp_path_factory):
    """What two and three processes computed, what one computes, and the folder."""
    folder = str(tmp_path_factory.mktemp("ddp"))
    write_mix(os.path.join(folder, "pretrain"))
    write_tiny(os.path.join(folder, "downstream"))
    write_downstream(os.path.join(folder, "downstream"), users=2, items=30, cut_length=12, longest=14)
    results = {}
    for count in SHARES:
        torch.multiprocessing.spawn(worker, (count, folder, free_port()), nprocs=count)
        results[count] = [torch.load(os.path.join(folder, f"results-{count}-{number}.pt")) for number in range(count)]
    alone = {"metrics": metrics_of(folder), "tables": tables_of(folder), "choice": choice_of(folder)}
    with no_chance():
        for stage in STAGES:
            model, config, batches, _ = open_stage(stage, folder)
            trainer = Trainer(config, model, "nowhere")
            alone[stage] = loss_and_gradients(trainer, batches.make_batch(np.arange(SEGMENTS)))
            model, config, *_ = open_stage(stage, folder, enable_amp=True)
            trainer = Trainer(config, model, "nowhere")
            alone[stage, "bf16"] = loss_and_gradients(trainer, batches.make_batch(np.arange(SEGMENTS)))
    return results, alone, folder


def starts(store, *numbers, count=3, timeout=10.0):
    """What processes with these numbers agree on, as threads."""
    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        waiting = datetime.timedelta(seconds=timeout)
        return list(pool.map(lambda number: _agree_on_start(store, number, count, waiting), numbers))


def test_processes_agree_on_their_start_whatever_earlier_ones_left():
    store = torch.distributed.HashStore()
    assert starts(store, 0, 1, 2) == [1, 1, 1]
    first = store.get("first start")
    store.set("question 1", "asked by one that was killed")
    assert starts(store, 2, 1, 0) == [2, 2, 2] and store.get("first start") == first
    with pytest.raises(TimeoutError, match="processes 1, 2 of 3 did not start in time"):
        starts(store, 0, timeout=0.1)


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with (
        pytest.raises(UserError, match="process 4 of this machine finds 2 GPUs"),
        process_group(torch.device("cuda", 1)),
    ):
        pass


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("count, share", [(count, share) for count in SHARES for share in SHARES[count]])
@pytest.mark.parametrize("stage", STAGES)
def test_several_processes_compute_what_one_does(computed, stage, count, share, accumulate):
    """The mean loss, and every gradient on every process; so too with a batch's parts one after another."""
    results, alone, _ = computed
    loss, gradients = alone[stage]
    found = [result[stage, share, accumulate] for result in results[count]]
    assert sum(own for own, _ in found) / count == pytest.approx(loss, rel=1e-5) and loss > 1
    for number, size in enumerate(SHARES[count][share]):
        assert size or found[number][0] == 0.0
    largest = max(gradient.abs().max() for gradient in gradients.values())
    assert len(gradients) >= 39 and largest > 1e-3
    for _, own in found:
        assert own.keys() == gradients.keys()
        for name, gradient in gradients.items():
            assert (own[name] - gradient).abs().max() <= 1e-5 * largest, name


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("count", SHARES)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("stage", STAGES)
def test_so_they_do_in_bf16_and_with_sampled_negatives(computed, stage, variant, count, accumulate):
    results, alone, _ = computed
    tolerance = VARIANTS[variant][1]
    loss, gradients = alone.get((stage, variant), alone[stage])
    found = [result[stage, variant, accumulate] for result in results[count]]
    assert sum(own for own, _ in found) / count == pytest.approx(loss, rel=tolerance)
    largest = max(gradient.abs().max() for gradient in gradients.values())
    for _, own in found:
        assert own.keys() == gradients.keys()
        for name, gradient in gradients.items():
            assert (own[name] - gradient).abs().max() <= tolerance * largest, name
    if variant == "bf16":
        rounded = max((gradient - alone[stage][1][name]).abs().max() for name, gradient in gradients.items())
        assert rounded > 1e-4 * largest


@pytest.mark.parametrize("count", SHARES)
def test_several_processes_find_the_metrics_of_one(computed, count):
    results, alone, _ = computed
    assert alone["metrics"]["shared"][1]["recall@5"] > 0 and alone["metrics"]["alone"][1]["gauc"] > 0
    for result in results[count]:
        for name, phases in alone["metrics"].items():
            for own, other in zip(result["metrics"][name], phases, strict=True):
                assert own == pytest.approx(other, abs=1e-6), name


@pytest.mark.parametrize("count", SHARES)
def test_several_processes_find_the_table_of_one(computed, count):
    results, alone, _ = computed
    assert [len(table["rank"]) for table, _ in alone["tables"].values()] == [40, 40, 2]
    assert len(set(alone["tables"]["shared"][0]["rank"])) > 5
    for result in results[count]:
        assert result["tables"] == alone["tables"]


@pytest.mark.parametrize("count", SHARES)
def test_several_processes_choose_the_factor_of_one(computed, count):
    results, alone, _ = computed
    assert alone["choice"][1]["factor"] > 0
    for result in results[count]:
        for own, other in zip(result["choice"], alone["choice"], strict=True):
            assert own == pytest.approx(other, abs=1e-6)


def test_the_comparison_would_notice(computed):
    """Different parts of the model matter, and the processes' own shares differ from the whole."""
    results, alone, _ = computed
    for stage in STAGES:
        own = [result[stage, "uneven", 1][0] for result in results[2]]
        assert abs(own[0] - own[1]) > 1e-3
        gradients = alone[stage][1].values()
        largest = max(gradient.abs().max() for gradient in gradients)
        assert sum(bool(gradient.abs().max() > 1e-4 * largest) for gradient in gradients) > 30


def test_a_checkpoint_of_several_processes_holds_the_noise_of_each(computed):
    checkpoint = read_checkpoint(os.path.join(computed[2], "saved-3.pth"))
    states = [generators["cpu"] for generators in checkpoint["generators"]]
    assert len(states) == 3 and not torch.equal(states[0], states[1]) and not torch.equal(states[1], states[2])
    assert not [name for name in checkpoint["state_dict"] if name.startswith("module.")]


def test_going_on_with_another_number_of_processes(mixture, tmp_path):
    """The noise then differs, the weights, the optimizer and the order of the data do not."""
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


linux = pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="finds the processes in /proc")


class Running:
    """A command of this project in a process of its own, whose log is read line by line."""

    def __init__(self, *command):
        drop = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        environment = {name: value for name, value in os.environ.items() if name not in drop}
        environment["OMP_NUM_THREADS"] = "1"  # sums are rounded alike
        command = [sys.executable, "-W", "ignore", *map(str, command)]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        self.log = []

    def wait_for(self, text):
        for line in self.process.stderr:
            self.log.append(line)
            if text in line:
                return
        raise AssertionError("".join(self.log))

    def workers(self):
        """The processes that do the work, ascending: list of pids."""
        found, pids = [], [self.process.pid]
        while pids:
            pid = pids.pop()
            for children in glob.glob(f"/proc/{pid}/task/*/children"):
                with open(children) as file:
                    pids += map(int, file.read().split())
            with open(f"/proc/{pid}/cmdline") as command, open(f"/proc/{pid}/environ") as environment:
                started_by_torchrun = "\0RANK=" in environment.read()
                if started_by_torchrun or "spawn_main" in command.read():
                    found.append(pid)
        return sorted(found)

    def writes(self):
        """Whether the process that writes is among its own."""
        while not (workers := self.workers()):
            time.sleep(0.1)
        return b"\0RANK=0\0" in pathlib.Path(f"/proc/{workers[0]}/environ").read_bytes()

    def end(self, seconds):
        """Wait for its end; returns (exit code, log)."""
        with contextlib.suppress(ValueError):
            self.log += self.process.communicate(timeout=seconds)[1].splitlines(True)
        return self.process.wait(), "".join(self.log)


def ddp_command(data_path, folder, *options):
    common = ["-d", "Mix", f"--data_path={data_path}", f"--checkpoint_dir={folder}", "--train_batch_size=40", *SMALL]
    return [os.path.join(ROOT, "ddp_pretrain.py"), *common, *options]


def assert_same_end(one, other):
    """Two checkpoints hold the same weights, moments and noise, bit for bit."""
    one, other = read_checkpoint(str(one)), read_checkpoint(str(other))
    assert one["progress"]["predictions"] == other["progress"]["predictions"]
    for name, tensor in one["state_dict"].items():
        assert torch.equal(tensor, other["state_dict"][name]), name
    for mine, others in zip(one["generators"], other["generators"], strict=True):
        assert torch.equal(mine["cpu"], others["cpu"])


def train_undisturbed(folder, epochs):
    """Train with two processes and save a checkpoint after each epoch. Returns the folder of the checkpoints."""
    options = "--nproc=2", f"--epochs={epochs}", "--save_step=1"
    code, log = Running(*ddp_command(write_mix(folder / "data"), folder / "saved", *options)).end(180)
    assert code == 0, log
    return folder / "saved"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The checkpoints after each of nine epochs of a run that nothing disturbs."""
    return train_undisturbed(tmp_path_factory.mktemp("undisturbed"), 9)


@linux
def test_a_killed_process_takes_the_run_down_within_seconds_and_is_named(mixture, tmp_path):
    run = Running(*ddp_command(mixture, tmp_path, "--nproc=2", "--epochs=100000", "--save_step=100000"))
    run.wait_for("epoch 2  train")
    victim = run.workers()[-1]
    os.kill(victim, signal.SIGKILL)
    code, log = run.end(30)
    assert code == 1 and "of 2 was killed (SIGKILL), the others were stopped; continue from the last" in log
    assert re.search(r"error: process [01] of 2", log) and "Traceback" not in log


def test_a_run_told_to_stop_saves_and_goes_on_as_if_undisturbed(mixture, undisturbed, tmp_path):
    """SIGTERM in the middle of an epoch; exit code 75. Two processes, and the same two later."""
    run = Running(*ddp_command(mixture, tmp_path, "--nproc=2", "--epochs=100000", "--save_step=100000"))
    run.wait_for("epoch 2  train")
    run.process.terminate()
    code, log = run.end(30)
    assert code == 75, log
    (stopped,) = glob.glob(str(tmp_path / "*-stopped.pth"))
    assert f"continue with --resume={stopped}" in log
    epochs = read_checkpoint(stopped)["progress"]["epoch"] + 1
    run = Running(*ddp_command(mixture, tmp_path, "--nproc=2", f"--epochs={epochs}", f"--resume={stopped}"))
    assert run.end(180)[0] == 0
    whole = undisturbed if epochs <= 9 else train_undisturbed(tmp_path / "whole", epochs)
    assert_same_end(tmp_path / f"UniSRec-Mix-{epochs}.pth", whole / f"UniSRec-Mix-{epochs}.pth")


@linux
@pytest.mark.parametrize("nodes", [1, 2])
def test_torchrun_restarts_from_the_last_checkpoint_and_ends_the_same(mixture, undisturbed, tmp_path, nodes):
    """A process is killed; torchrun, on one node or two, starts all again."""
    port = free_port()
    meeting = ["--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}"] if nodes == 2 else [f"--master_port={port}"]
    torchrun = ["-m", "torch.distributed.run", f"--nnodes={nodes}", f"--nproc_per_node={2 // nodes}", *meeting]
    command = [*torchrun, "--max_restarts=2", *ddp_command(mixture, tmp_path, "--epochs=9", "--save_step=1")]
    *followers, writer = sorted((Running(*command) for _ in range(nodes)), key=Running.writes)
    writer.wait_for("epoch 3  train")
    os.kill((followers or [writer])[0].workers()[-1], signal.SIGKILL)
    writer.wait_for("continuing after epoch")
    for run in (writer, *followers):
        code, log = run.end(180)
        assert code == 0, log
    assert_same_end(tmp_path / "UniSRec-Mix-9.pth", undisturbed / "UniSRec-Mix-9.pth")


def test_torchrun_fine_tunes_and_one_process_writes(tiny, tmp_path):
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    command = [
        os.path.join(ROOT, "finetune.py"),
        "-d",
        "Tiny",
        f"--data_path={tiny}",
        f"--checkpoint_dir={tmp_path}/saved",
    ]
    run = Running(*torchrun, *command, "--epochs=6", *SMALL)
    code, log = run.end(180)
    assert code == 0, log
    assert log.count("epoch 6  valid") == log.count("result: ") == 1
    names = sorted(os.listdir(tmp_path / "saved"))
    result = read_json(str(tmp_path / "saved" / names[1]))
    name = f"UniSRec-Tiny-transductive_ft-2020-{result['run']}"
    assert names == [name, f"{name}.json", f"{name}.pth", "tensorboard"] and log.count("bundle: ") == 1
    again = tmp_path / "again.json"
    checkpoint = f"{tmp_path}/saved/{name}.pth"
    finetune.main([*command[1:], "-p", checkpoint, "--epochs=0", f"--result_file={again}", *SMALL])
    assert read_json(str(again))["metrics"]["test"] == pytest.approx(result["metrics"]["test"], abs=1e-6)


@pytest.fixture
def ddp(mixture, tmp_path, refused, monkeypatch):
    """Run ddp_pretrain.py where it must fail, in this process; returns the message."""
    for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS"):
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
            ddp("--port", port, "--nproc=2")
            == f"option --port: {port} is in use or not a port; leave the option out to get a free port"
        )
    assert ddp("-p", port).startswith("unknown option --pretrained (-p): ")
    assert ddp("--port=99999").startswith("option --port: 99999 is in use or not a port")


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


class Ended:
    """Stands in for the processes of a run that has failed."""

    processes = ()

    def __init__(self, failure):
        self.failure = failure

    def join(self, grace_period):
        raise self.failure


def test_a_mistake_that_all_processes_make_is_told_once(ddp, monkeypatch):
    """Each process notes it and ends with code 2; the command tells it."""

    def spawn(function, arguments, nprocs, join):
        for number in range(nprocs):
            with pytest.raises(SystemExit) as end:
                function(number, *arguments)
            assert end.value.code == 2
        return Ended(torch.multiprocessing.ProcessExitedException("process 0 terminated", 0, 1, 2))

    def mistaken(config):
        raise UserError(f"error of {config['dataset']}")

    monkeypatch.setattr(torch.multiprocessing, "spawn", spawn)
    monkeypatch.setattr(ddp_pretrain, "pretrain", mistaken)
    assert ddp("--nproc=2") == "error of Mix"


def test_a_bug_in_a_process_keeps_its_traceback(mixture, tmp_path, monkeypatch):
    def spawn(function, arguments, nprocs, join):
        return Ended(torch.multiprocessing.ProcessRaisedException("ZeroDivisionError in line 3", 0, 1))

    for name in ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(torch.multiprocessing, "spawn", spawn)
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match="ZeroDivisionError in line 3"):
        ddp_pretrain.main(["-d", "Mix", f"--data_path={mixture}", f"--checkpoint_dir={tmp_path}", *SMALL])
